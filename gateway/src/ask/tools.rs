//! Tools as the dialects offer them → [`v1::Tool`], which of them may be called, and back from the daemon's one name per
//! tool to the client's: with its namespace, or as a tool that takes text instead of JSON.

use std::collections::HashMap;

use flash_proto::v1::{self, format::Kind, tool_choice::Mode};
use serde_json::Value;

use super::schema;
use crate::{
    error::{Code, Failure},
    json::{Node, Object},
};

pub(crate) const TOOLS_MAX: usize = 512;

pub(crate) fn name<'a>(node: &Node<'a>) -> Result<&'a str, Failure> {
    let name = node.text()?;
    let sane = (1..=128).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.:/-".contains(&byte));
    if sane { Ok(name) } else { Err(node.refuse(Code::InvalidValue, "must be 1 to 128 letters, digits or _ . : / -")) }
}

/// What the client calls a tool.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Name {
    pub(crate) namespace: Option<String>,
    pub(crate) name: String,
    /// Takes text; on the wire its arguments are `{"input": text}`.
    pub(crate) custom: bool,
}

/// The tools of a request.
#[derive(Debug, Default)]
pub(crate) struct Tools {
    pub(crate) list: Vec<v1::Tool>,
    pub(crate) names: Names,
}

/// Names that differ from the daemon's, and tools that take text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names(HashMap<String, Name>);

impl Names {
    pub(crate) fn of(&self, wire: &str) -> Name {
        self.0.get(wire).cloned().unwrap_or_else(|| Name { namespace: None, name: wire.to_owned(), custom: false })
    }
}

/// The daemon's name of a tool in a namespace.
pub(crate) fn wire_name(namespace: Option<&str>, name: &str) -> String {
    namespace.filter(|namespace| !namespace.is_empty()).map_or_else(|| name.to_owned(), |namespace| format!("{namespace}__{name}"))
}

impl Tools {
    /// `{name, description, parameters, strict}`; `schema_key` is where the dialect keeps the schema.
    pub(crate) fn function(&mut self, mut object: Object<'_>, schema_key: &'static str, unknown: &mut Vec<String>) -> Result<(), Failure> {
        let tool = v1::Tool {
            name: name(&object.require("name")?)?.to_owned(),
            description: object.read("description", |node| node.text())?.unwrap_or_default().to_owned(),
            parameters_json: object.read(schema_key, schema)?.unwrap_or_default(),
            strict: object.read("strict", |node| node.flag())?.unwrap_or(false),
            ..Default::default()
        };
        object.ignore(&["type", "cache_control", "defer_loading", "eager_input_streaming", "input_examples", "allowed_callers"]);
        object.finish(unknown);
        self.list.push(tool);
        Ok(())
    }

    /// `{name, description, format}`.
    pub(crate) fn custom(&mut self, mut object: Object<'_>, unknown: &mut Vec<String>) -> Result<(), Failure> {
        let name = name(&object.require("name")?)?.to_owned();
        let tool = v1::Tool {
            name: name.clone(),
            description: object.read("description", |node| node.text())?.unwrap_or_default().to_owned(),
            input: Some(object.read("format", |node| text_format(&node, unknown))?.unwrap_or_default()),
            ..Default::default()
        };
        object.ignore(&["type", "defer_loading"]);
        object.finish(unknown);
        self.names.0.insert(name.clone(), Name { namespace: None, name, custom: true });
        self.list.push(tool);
        Ok(())
    }

    /// Puts the tools from `start` on into a namespace.
    pub(crate) fn enclose(&mut self, start: usize, namespace: &str) {
        let (before, tools) = self.list.split_at_mut(start);
        for tool in tools {
            let wire = wire_name(Some(namespace), &tool.name);
            let name = std::mem::replace(&mut tool.name, wire.clone());
            // One outside of it that takes text may have the same name.
            if before.iter().all(|tool| tool.name != name || tool.input.is_none()) {
                self.names.0.remove(&name);
            }
            self.names.0.insert(wire, Name { namespace: Some(namespace.to_owned()), name, custom: tool.input.is_some() });
        }
    }

    /// What may be called. `node` is where the client says so, to refuse it there.
    pub(crate) fn choice(&self, wanted: Wanted, single: bool, node: Option<&Node<'_>>) -> Result<Option<v1::ToolChoice>, Failure> {
        let refuse = |what: String| match node {
            Some(node) => node.refuse(Code::InvalidValue, what),
            None => Failure::new(Code::InvalidValue, what),
        };
        if let Some(unknown) = wanted.names.iter().find(|name| self.list.iter().all(|tool| tool.name != **name)) {
            return Err(refuse(format!("names the tool '{unknown}', which is not among the request's tools")));
        }
        if self.list.is_empty() {
            return match wanted.mode {
                Mode::Required => Err(refuse("a tool must be called, and the request has none".into())),
                Mode::Auto | Mode::None => Ok(None),
            };
        }
        Ok(Some(v1::ToolChoice { mode: wanted.mode.into(), names: wanted.names, single }))
    }
}

/// Which tools the client wants called.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) mode: Mode,
    /// The daemon's names; none: any.
    pub(crate) names: Vec<String>,
}

impl Wanted {
    pub(crate) fn mode(mode: Mode) -> Self {
        Self { mode, names: Vec::new() }
    }

    pub(crate) fn one(name: impl Into<String>) -> Self {
        Self { mode: Mode::Required, names: vec![name.into()] }
    }

    /// OpenAI's forms in both of its APIs: a word, `{type, name}`, `{type: allowed_tools, mode, tools}`, their fields in the
    /// object itself or in one that is named as the type.
    pub(crate) fn openai(node: &Node<'_>) -> Result<Self, Failure> {
        if let Some(word) = node.value.as_str() {
            return match word {
                "none" => Ok(Self::mode(Mode::None)),
                "auto" => Ok(Self::mode(Mode::Auto)),
                "required" => Ok(Self::mode(Mode::Required)),
                _ => Err(node.refuse(Code::InvalidValue, "must be 'none', 'auto', 'required' or an object")),
            };
        }
        if !node.value.is_object() {
            return Err(node.refuse(Code::InvalidValue, "must be 'none', 'auto', 'required' or an object"));
        }
        let mut object = node.object()?;
        let kind = object.require("type")?;
        match kind.text()? {
            "function" | "custom" => Ok(Self::one(named(node)?)),
            "allowed_tools" => {
                let mut inner = match object.get("allowed_tools") {
                    Some(inner) => inner.object()?,
                    None => object,
                };
                let mode = match inner.get("mode") {
                    None => Mode::Auto,
                    Some(mode) => match mode.text()? {
                        "auto" => Mode::Auto,
                        "required" => Mode::Required,
                        _ => return Err(mode.refuse(Code::InvalidValue, "must be 'auto' or 'required'")),
                    },
                };
                let mut names = Vec::new();
                for tool in inner.require("tools")?.array(TOOLS_MAX)? {
                    let kind = tool.value.get("type").and_then(Value::as_str).unwrap_or("function");
                    // Hosted tools are not offered, so that they are allowed changes nothing.
                    if matches!(kind, "function" | "custom") {
                        names.push(named(&tool)?);
                    }
                }
                // None of those that are allowed exists here.
                match mode {
                    Mode::Required if names.is_empty() => {
                        Err(kind
                            .refuse(Code::UnsupportedValue, "a tool must be called, and none of those that are allowed is offered here"))
                    }
                    _ if names.is_empty() => Ok(Self::mode(Mode::None)),
                    mode => Ok(Self { mode, names }),
                }
            }
            "auto" => Ok(Self::mode(Mode::Auto)),
            "none" => Ok(Self::mode(Mode::None)),
            "required" => Ok(Self::mode(Mode::Required)),
            _ => Err(kind.refuse(Code::UnsupportedValue, "tools of this type are not offered here; force a function or a custom tool")),
        }
    }
}

/// The daemon's name of the tool that `{type, name}` or `{type, <type>: {name}}` means.
fn named(node: &Node<'_>) -> Result<String, Failure> {
    let mut object = node.object()?;
    let mut inner = match (object.get("function"), object.get("custom")) {
        (Some(inner), _) | (None, Some(inner)) => inner.object()?,
        (None, None) => object,
    };
    let name = inner.require("name")?;
    let namespace = inner.read("namespace", |node| node.text())?;
    Ok(wire_name(namespace, name.text()?))
}

/// The form of a custom tool's text; free text is a format without a kind.
fn text_format(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<v1::Format, Failure> {
    let mut object = node.object()?;
    let kind = object.require("type")?;
    let format = match kind.text()? {
        "text" => v1::Format::default(),
        "grammar" => {
            let mut grammar = match object.get("grammar") {
                Some(inner) => inner.object()?,
                None => node.object()?,
            };
            let syntax = grammar.require("syntax")?;
            let definition = grammar.require("definition")?.text()?.to_owned();
            let kind = match syntax.text()? {
                "lark" => Kind::Lark(definition),
                "regex" => Kind::Regex(definition),
                _ => return Err(syntax.refuse(Code::InvalidValue, "must be 'lark' or 'regex'")),
            };
            v1::Format { kind: Some(kind), strict: false }
        }
        _ => return Err(kind.refuse(Code::InvalidValue, "must be 'text' or 'grammar'")),
    };
    object.ignore(&["syntax", "definition", "grammar"]);
    object.finish(unknown);
    Ok(format)
}

/// Arguments as a client keeps them → a JSON object as text. What is none, because a reply ended within it or its tool takes
/// text, is shown as the input of a tool that takes text.
pub(crate) fn arguments(text: &str) -> String {
    let trimmed = text.trim();
    match serde_json::from_str::<Value>(trimmed) {
        Ok(Value::Object(_)) => trimmed.to_owned(),
        _ if trimmed.is_empty() => "{}".to_owned(),
        _ => input(text),
    }
}

pub(crate) fn input(text: &str) -> String {
    serde_json::json!({"input": text}).to_string()
}

/// The text within `{"input": text}`, from the pieces that come of it.
#[derive(Debug, Default)]
pub(crate) struct Unquoted {
    /// Quotes seen: the third begins the text, the next one that is not escaped ends it.
    quotes: u8,
    /// What came of an escape sequence, without the backslash.
    escape: Option<String>,
    /// The first half of a character that takes two escapes.
    high: Option<u16>,
}

impl Unquoted {
    pub(crate) fn push(&mut self, json: &str) -> String {
        let mut text = String::new();
        for c in json.chars() {
            match (&mut self.escape, self.quotes, c) {
                (Some(escape), ..) => {
                    escape.push(c);
                    if !escape.starts_with('u') || escape.len() == 5 {
                        let escape = self.escape.take().expect("just seen");
                        self.unescape(&escape, &mut text);
                    }
                }
                (None, 0..3, '"') => self.quotes += 1,
                (None, 3, '"') => {
                    self.lone(&mut text);
                    self.quotes += 1;
                }
                (None, 3, '\\') => self.escape = Some(String::new()),
                (None, 3, c) => {
                    self.lone(&mut text);
                    text.push(c);
                }
                _ => {}
            }
        }
        text
    }

    fn lone(&mut self, text: &mut String) {
        if self.high.take().is_some() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }

    fn unescape(&mut self, escape: &str, text: &mut String) {
        let unit = escape.strip_prefix('u').map(|digits| u16::from_str_radix(digits, 16).unwrap_or(0xfffd));
        let Some(unit) = unit else {
            self.lone(text);
            return text.push_str(match escape {
                "n" => "\n",
                "t" => "\t",
                "r" => "\r",
                "b" => "\u{8}",
                "f" => "\u{c}",
                other => other,
            });
        };
        let units = [self.high.take(), Some(unit)];
        match char::decode_utf16(units.iter().flatten().copied()).collect::<Result<String, _>>() {
            Ok(decoded) => text.push_str(&decoded),
            Err(_) if (0xd800..0xdc00).contains(&unit) => {
                text.extend(units[0].map(|_| char::REPLACEMENT_CHARACTER));
                self.high = Some(unit);
            }
            Err(_) => text.extend(char::decode_utf16(units.into_iter().flatten()).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))),
        }
    }
}

/// The text of a custom tool's call.
pub(crate) fn unquoted(arguments: &str) -> String {
    Unquoted::default().push(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_out_of_its_json_in_any_pieces() {
        for text in ["", "plain", "a \"quoted\" \\ line\n\ttab \u{8}\u{c}\r/", "Zoë 😀 \u{1}\u{7f}", "{\"input\": \"x\"}"] {
            let escaped: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            for json in [input(text), format!("{{ \"input\" :\n \"{escaped}\" }}")] {
                assert_eq!(unquoted(&json), text);
                let mut pieces = Unquoted::default();
                assert_eq!(json.chars().map(|c| pieces.push(&c.to_string())).collect::<String>(), text, "{json}");
            }
        }
        assert_eq!(unquoted(r#"{"input":"a\ud83d"}"#), "a\u{fffd}");
        assert_eq!(unquoted(r#"{"input":"a\ud83dx\ude00\u00zz"}"#), "a\u{fffd}x\u{fffd}\u{fffd}");
        assert_eq!(unquoted(r#"{"input":"cut sho"#), "cut sho");
        assert_eq!(unquoted("{}"), "");
    }

    #[test]
    fn arguments_are_always_an_object() {
        for (text, wanted) in [
            (r#" {"b": 1, "a": 2}"#, r#"{"b": 1, "a": 2}"#),
            ("", "{}"),
            (r#"{"a": tru"#, r#"{"input":"{\"a\": tru"}"#),
            ("[1]", r#"{"input":"[1]"}"#),
        ] {
            assert_eq!(arguments(text), wanted);
        }
    }
}
