//! A call's text: name and arguments out of JSON, XML or a Harmony header. Pure functions over whole texts, and [`Scan`] for the end of
//! a JSON object that comes in pieces. `parse.rs` calls them.

use serde_json::{Deserializer, Map, Value};

use super::parse::Schemas;

/// What was read; `None` if it goes on, `Err` if it is something else.
pub(super) type Read<T> = Result<Option<T>, ()>;
/// Name and arguments.
pub(super) type Call = (String, Map<String, Value>);

/// Finds the end of a JSON object in text that is known to be JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scan {
    /// Bytes of `text` up to the object's end, if it is there.
    pub(super) fn end(&mut self, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' | b'[' if !self.in_string => self.depth += 1,
                b'}' | b']' if !self.in_string => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// The name in the head of a call that keeps to our grammar, and what follows the head.
pub(super) fn head(text: &str) -> Option<(&str, &str)> {
    let (head, rest) = text.split_once("\", \"arguments\": ")?;
    Some((head.split_once("\"name\": \"")?.1, rest))
}

/// The first JSON value of a text, whatever stands behind it; `None` if the text ends within it.
fn value(text: &str) -> Read<Value> {
    match Deserializer::from_str(text).into_iter().next() {
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(error)) if error.is_eof() => Ok(None),
        None => Ok(None),
        Some(Err(_)) => Err(()),
    }
}

pub(super) fn object(text: &str) -> Read<Map<String, Value>> {
    match value(text)? {
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(_) => Err(()),
        None => Ok(None),
    }
}

/// `{"name": …, "arguments": {…}}`; arguments may be missing, be called parameters, or be written as a string.
pub(super) fn json(text: &str) -> Read<Call> {
    let Some(mut call) = object(text)? else { return Ok(None) };
    let Some(Value::String(name)) = call.remove("name") else { return Err(()) };
    let arguments = match call.remove("arguments").or_else(|| call.remove("parameters")) {
        Some(Value::Object(map)) => map,
        Some(Value::String(text)) => object(&text)?.ok_or(())?,
        None | Some(Value::Null) => Map::new(),
        Some(_) => return Err(()),
    };
    Ok(Some((name, arguments)))
}

/// `<function=NAME>`, parameters, `</function>`; values are typed as the tool's schema says.
pub(super) fn xml(text: &str, schemas: &Schemas) -> Read<Call> {
    let Some(rest) = text.trim_start().strip_prefix("<function=") else { return Err(()) };
    let Some((name, mut rest)) = rest.split_once('>') else { return Ok(None) };
    let properties = schemas.get(name).and_then(|schema| schema.get("properties"));
    let mut arguments = Map::new();
    loop {
        rest = rest.trim_start();
        if rest.starts_with("</function>") {
            return Ok(Some((name.into(), arguments)));
        }
        if rest.is_empty() {
            return Ok(None);
        }
        let Some(parameter) = rest.strip_prefix("<parameter=") else { return Err(()) };
        let Some((key, value)) = parameter.split_once('>') else { return Ok(None) };
        let Some((value, behind)) = value.split_once("</parameter>") else { return Ok(None) };
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let schema = properties.and_then(|properties| properties.get(key));
        arguments.insert(key.into(), typed(value, schema));
        rest = behind;
    }
}

/// A value that XML gives as text: a string where the schema says so or knows nothing better, else what it means as JSON.
fn typed(text: &str, schema: Option<&Value>) -> Value {
    if is_string(schema) {
        return text.into();
    }
    serde_json::from_str(text.trim()).unwrap_or_else(|_| match text.trim() {
        "True" => Value::Bool(true),
        "False" => Value::Bool(false),
        "None" => Value::Null,
        _ => text.into(),
    })
}

/// Whether a schema's values are written without quotes in XML.
pub(super) fn is_string(schema: Option<&Value>) -> bool {
    let Some(schema) = schema else { return false };
    match schema.get("type") {
        Some(Value::String(kind)) => kind == "string",
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "string"),
        _ => match schema.get("enum") {
            Some(Value::Array(values)) => !values.is_empty() && values.iter().all(Value::is_string),
            _ => ["anyOf", "oneOf"].iter().any(|key| match schema.get(*key) {
                Some(Value::Array(options)) => options.iter().any(|option| is_string(Some(option))),
                _ => false,
            }),
        },
    }
}

/// Whether this may be the head of a Harmony message, whose mark has not come yet.
pub(super) fn is_header(text: &str) -> bool {
    let text = text.trim_start();
    ["<|start|>", "<|channel|>", " to=", "to=functions."].iter().any(|mark| text.starts_with(mark) || mark.starts_with(text))
}

/// The function that a Harmony message is for.
pub(super) fn recipient(header: &str) -> Option<&str> {
    let (_, name) = header.split_once("to=functions.")?;
    let end = name.find(|c: char| c.is_whitespace() || c == '<').unwrap_or(name.len());
    Some(&name[..end])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    #[test]
    fn json_calls_are_read_and_mended() {
        let check = |text: &str, expected: Read<(&str, Value)>| {
            let read = json(text).map(|read| read.map(|(name, arguments)| (name, Value::Object(arguments))));
            assert_eq!(read, expected.map(|call| call.map(|(name, arguments)| (name.into(), arguments))), "{text}");
        };
        check(r#" {"name": "f", "arguments": {"a": 1}} "#, Ok(Some(("f", json!({"a": 1})))));
        check(r#"{"name": "f", "arguments": {"a": 1}}}"#, Ok(Some(("f", json!({"a": 1})))));
        check(r#"{"arguments": "{\"a\": 1}", "name": "f"}"#, Ok(Some(("f", json!({"a": 1})))));
        check(r#"{"name": "f"}"#, Ok(Some(("f", json!({})))));
        check(r#"{"name": "f", "parameters": {}} trailing"#, Ok(Some(("f", json!({})))));
        check(r#"{"name": "f", "arguments": {"a": "</tool_call>"#, Ok(None));
        check(r#"{"name": 5}"#, Err(()));
        check(r#"{"name": "f", "arguments": [1]}"#, Err(()));
        check(r#"{"name": "f", "arguments": "x"}"#, Err(()));
        check("f(1)", Err(()));
    }

    #[test]
    fn xml_values_are_typed_by_the_schema() {
        let schema = json!({"properties": {"n": {"type": "integer"}, "s": {"type": "string"}, "e": {"enum": ["1", "2"]}, "l": {"type": "array"}, "o": {"anyOf": [{"type": "string"}, {"type": "null"}]}}});
        let schemas: Schemas = Arc::new(Map::from_iter([("f".to_owned(), schema)]));
        let text = "\n<function=f>\n<parameter=n>\n5\n</parameter>\n<parameter=s>\n5\n\n</parameter><parameter=e>1</parameter>\n<parameter=l>\n[1, \"a\"]\n</parameter>\n<parameter=o>\n7\n</parameter>\n<parameter=x>\nTrue\n</parameter>\n</function>\n";
        let (name, arguments) = xml(text, &schemas).unwrap().unwrap();
        assert_eq!(
            (name.as_str(), Value::Object(arguments)),
            ("f", json!({"n": 5, "s": "5\n", "e": "1", "l": [1, "a"], "o": "7", "x": true}))
        );
        assert_eq!(xml("<function=f>\n<parameter=s>\n</tool_call>", &schemas), Ok(None));
        assert_eq!(xml("<function=f>\nsay", &schemas), Err(()));
        assert_eq!(xml("{\"name\"", &schemas), Err(()));
    }

    #[test]
    fn objects_end_where_their_brace_does() {
        let check = |pieces: &[&str], expected: Option<usize>| {
            let mut scan = Scan::default();
            let (last, first) = pieces.split_last().unwrap();
            assert!(first.iter().all(|piece| scan.end(piece).is_none()));
            assert_eq!(scan.end(last), expected, "{pieces:?}");
        };
        check(&[r#"{"a": "}\"}", "b": [{}]} x"#], Some(24));
        check(&[r#"{"a": "\"#, r#""}"#, r#""}}"#], Some(2));
        check(&["{", "{", "}"], None);
    }
}
