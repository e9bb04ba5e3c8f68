//! Reading a client's JSON leniently and precisely: wrong types are refused with the path of the field, `null` counts as
//! absent, unknown fields are collected, not refused. Knows no dialect; the request readers of each API call it.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::{Code, Failure};

pub(crate) const DEPTH_MAX: usize = 128;

/// One JSON document of at most [`DEPTH_MAX`] levels and nothing after it.
pub(crate) fn parse(bytes: &[u8]) -> Result<Value, Failure> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let invalid = |why: String| Failure::new(Code::InvalidJson, format!("The request body is not valid JSON: {why}."));
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(Failure::new(Code::InvalidJson, "The request body is empty; send a JSON object."));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| invalid(format!("byte {} is not UTF-8", error.valid_up_to())))?;
    if depth(bytes) > DEPTH_MAX {
        return Err(invalid(format!("it is nested more than {DEPTH_MAX} levels deep")));
    }
    let read = |text: &str| {
        let mut reader = serde_json::Deserializer::from_str(text);
        // serde_json's own limit would refuse the 128th level; the depth is known to be bounded here.
        reader.disable_recursion_limit();
        serde::Deserialize::deserialize(&mut reader).and_then(|value| reader.end().map(|()| value))
    };
    let value = read(text).or_else(|error| mended(text).map_or(Err(error), |mended| read(&mended)));
    value.map_err(|error| invalid(error.to_string()))
}

/// With U+FFFD for each half of a UTF-16 pair that is alone, if there are any: clients in JavaScript cut texts between the two, and
/// what they have cut once they send with every turn.
fn mended(text: &str) -> Option<String> {
    let unit = |at: usize| text.get(at..at + 6)?.strip_prefix("\\u").and_then(|hex| u16::from_str_radix(hex, 16).ok());
    let (mut mended, mut rest, mut at) = (String::new(), 0, 0);
    while let Some(next) = text[at..].find('\\') {
        at += next;
        at += match (unit(at), unit(at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
            (Some(0xd800..=0xdfff), _) => {
                mended.extend([&text[rest..at], "\\ufffd"]);
                rest = at + 6;
                6
            }
            // The backslash and what it escapes, which may be several bytes in what is no JSON.
            _ => 1 + text[at + 1..].chars().next().map_or(0, char::len_utf8),
        };
    }
    (rest > 0).then(|| mended + &text[rest..])
}

/// Deepest nesting of brackets outside strings.
fn depth(bytes: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for &byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Node<'a> {
    pub(crate) value: &'a Value,
    pub(crate) path: String,
}

impl<'a> Node<'a> {
    pub(crate) fn root(value: &'a Value) -> Self {
        Self { value, path: String::new() }
    }

    /// A refusal of this field: `what` says what it must be.
    pub(crate) fn refuse(&self, code: Code, what: impl std::fmt::Display) -> Failure {
        if self.path.is_empty() {
            return Failure::new(code, format!("Invalid request body: {what}."));
        }
        Failure::at(code, &*self.path, format!("Invalid value for '{}': {what}.", self.path))
    }

    fn expected(&self, what: &str) -> Failure {
        let found = match self.value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        self.refuse(Code::InvalidValue, format_args!("expected {what}, got {found}"))
    }

    pub(crate) fn text(&self) -> Result<&'a str, Failure> {
        self.value.as_str().ok_or_else(|| self.expected("a string"))
    }

    pub(crate) fn flag(&self) -> Result<bool, Failure> {
        self.value.as_bool().ok_or_else(|| self.expected("a boolean"))
    }

    /// Whole numbers written as `10.0` are whole.
    pub(crate) fn int(&self, range: RangeInclusive<i64>) -> Result<i64, Failure> {
        let number = self.value.as_number().ok_or_else(|| self.expected("an integer"))?;
        #[allow(clippy::cast_possible_truncation, reason = "the cast saturates, and the range is checked next")]
        let whole = |float: f64| (float.fract() == 0.0).then_some(float as i64);
        let found = number.as_i64().or_else(|| number.as_f64().and_then(whole)).ok_or_else(|| self.expected("an integer"))?;
        if range.contains(&found) {
            return Ok(found);
        }
        let what = match (*range.start(), *range.end()) {
            (start, i64::MAX) => format!("must be at least {start}"),
            (start, end) => format!("must be between {start} and {end}"),
        };
        Err(self.refuse(Code::InvalidValue, what))
    }

    /// `wanted` is the sentence that tells what `accept` accepts.
    pub(crate) fn float(&self, wanted: &str, accept: impl Fn(f64) -> bool) -> Result<f32, Failure> {
        let found = self.value.as_f64().ok_or_else(|| self.expected("a number"))?;
        #[allow(clippy::cast_possible_truncation, reason = "samplers work in f32")]
        if accept(found) { Ok(found as f32) } else { Err(self.refuse(Code::InvalidValue, wanted)) }
    }

    pub(crate) fn array(&self, longest: usize) -> Result<impl Iterator<Item = Node<'a>> + use<'a>, Failure> {
        let items = self.value.as_array().ok_or_else(|| self.expected("an array"))?;
        if items.len() > longest {
            return Err(self.refuse(Code::InvalidValue, format_args!("must have at most {longest} elements")));
        }
        let path = self.path.clone();
        Ok(items.iter().enumerate().map(move |(index, value)| Node { value, path: format!("{path}[{index}]") }))
    }

    pub(crate) fn object(&self) -> Result<Object<'a>, Failure> {
        let map = self.value.as_object().ok_or_else(|| self.expected("an object"))?;
        Ok(Object { map, path: self.path.clone(), known: Vec::new() })
    }
}

/// An object being read; remembers which fields it was asked for.
#[derive(Debug)]
pub(crate) struct Object<'a> {
    map: &'a Map<String, Value>,
    path: String,
    known: Vec<&'static str>,
}

impl<'a> Object<'a> {
    pub(crate) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The field, unless it is absent or null.
    pub(crate) fn get(&mut self, key: &'static str) -> Option<Node<'a>> {
        self.known.push(key);
        let value = self.map.get(key).filter(|value| !value.is_null())?;
        Some(Node { value, path: self.path_of(key) })
    }

    pub(crate) fn read<T>(&mut self, key: &'static str, read: impl FnOnce(Node<'a>) -> Result<T, Failure>) -> Result<Option<T>, Failure> {
        self.get(key).map(read).transpose()
    }

    pub(crate) fn require(&mut self, key: &'static str) -> Result<Node<'a>, Failure> {
        let path = self.path_of(key);
        self.get(key).ok_or_else(|| Failure::at(Code::MissingParameter, &*path, format!("Missing required parameter: '{path}'.")))
    }

    /// Fields that mean something to others and nothing here.
    pub(crate) fn ignore(&mut self, keys: &[&'static str]) {
        self.known.extend(keys);
    }

    /// Adds the fields nobody asked for, without array indices: `messages[].foo`.
    pub(crate) fn finish(self, unknown: &mut Vec<String>) {
        for key in self.map.keys().filter(|key| !self.known.contains(&key.as_str())) {
            let path = self.path_of(key);
            let mut name = String::with_capacity(path.len());
            for part in path.split_inclusive(['[', ']']) {
                let index = part.strip_suffix(']').is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
                name.push_str(if index { "]" } else { part });
            }
            unknown.push(name);
        }
    }
}

/// Calls `read` with `body` once for everything in it, that put into something else: none of them may panic.
#[cfg(test)]
pub(crate) fn mutate(body: &Value, read: impl Fn(&Value)) {
    fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(index, item)| pointers(item, &format!("{at}/{index}"), found));
            }
            Value::Object(fields) => {
                fields.iter().for_each(|(key, field)| pointers(field, &format!("{at}/{}", key.replace('/', "~1")), found));
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    pointers(body, "", &mut found);
    for pointer in found {
        for other in ["null", "true", "-1", "1e300", "\"\"", "\"x\"", "[]", "[null]", "[[1]]", "{}", "{\"type\": \"x\"}"] {
            let mut body = body.clone();
            *body.pointer_mut(&pointer).expect("found above") = serde_json::from_str(other).expect("JSON");
            read(&body);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bodies_are_json_or_refused() {
        let nested = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
        let check = |bytes: &[u8], wanted: Result<Value, &str>| match (parse(bytes), wanted) {
            (Ok(found), Ok(wanted)) => assert_eq!(found, wanted),
            (Err(failure), Err(part)) => assert!(failure.message.contains(part), "{}", failure.message),
            (found, wanted) => panic!("{found:?} instead of {wanted:?}"),
        };
        check(b"\xef\xbb\xbf {\"a\": 1} ", Ok(json!({"a": 1})));
        check(b"{\"a\": 1, \"a\": 2}", Ok(json!({"a": 2})));
        check(br#"{"brackets": "[[[\"[["}"#, Ok(json!({"brackets": "[[[\"[["})));
        check(b"", Err("empty"));
        check(b" \n", Err("empty"));
        check(b"{} x", Err("trailing characters"));
        check(b"{\"a\": \"\xff\"}", Err("byte 7 is not UTF-8"));
        check(b"{\"a\": 1e999}", Err("number out of range"));
        check(
            br#"{"a": "\ud83d\ude00 \ud800 \udc00\ud800\ud83d\ude00\\ud800"}"#,
            Ok(json!({"a": "😀 \u{fffd} \u{fffd}\u{fffd}😀\\ud800"})),
        );
        check(br#"{"a": "\ud800"#, Err("EOF"));
        check("{\"a\": \"\\é\\ud800\"}".as_bytes(), Err("escape"));
        assert!(parse(&nested(128)).is_ok());
        check(&nested(129), Err("128 levels"));
        check(&nested(10_000), Err("128 levels"));
        check(&vec![b'['; 1_000_000], Err("128 levels"));
    }

    #[test]
    fn numbers_keep_to_their_ranges() {
        let check = |value: Value, wanted: Option<i64>| assert_eq!(Node::root(&value).int(1..=10).ok(), wanted, "{value}");
        check(json!(1), Some(1));
        check(json!(10.0), Some(10));
        check(json!(0), None);
        check(json!(1.5), None);
        check(json!(1e300), None);
        check(json!(u64::MAX), None);
        check(json!("1"), None);
        check(json!(true), None);
    }
}
