//! Python's `str()`, `repr()` and `json.dumps()` of template values, byte for byte: what jinja2 prints where minijinja would
//! print Rust's idea of the same value. `template.rs` plugs these in; nothing else here is Python.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind, from_args},
};

/// What `{{ value }}` prints.
pub(super) fn str(value: &Value) -> String {
    let mut out = String::new();
    match value.as_str() {
        Some(text) => out.push_str(text),
        None => repr(value, &mut out),
    }
    out
}

fn repr(value: &Value, out: &mut String) {
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => bracketed(value, out, '[', ']', repr),
        ValueKind::Map => bracketed(value, out, '{', '}', |key, out| {
            repr(key, out);
            out.push_str(": ");
            repr(&value.get_item(key).unwrap_or_default(), out);
        }),
        _ => out.push_str(&value.to_string()),
    }
}

fn bracketed(value: &Value, out: &mut String, open: char, close: char, mut item: impl FnMut(&Value, &mut String)) {
    out.push(open);
    for (index, element) in value.try_iter().into_iter().flatten().enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        item(&element, out);
    }
    out.push(close);
}

fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || ('\x7f'..='\u{a0}').contains(&c) || c == '\u{ad}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
}

fn number(value: &Value, out: &mut String) {
    if value.is_integer() {
        out.push_str(&value.to_string());
    } else {
        out.push_str(&float(f64::try_from(value.clone()).unwrap_or(f64::NAN)));
    }
}

/// The shortest digits that read back the same, in exponent form from 1e16 and below 1e-4.
fn float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "nan".into()
        } else if value > 0.0 {
            "inf".into()
        } else {
            "-inf".into()
        };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("LowerExp writes an e");
    match exponent.parse::<i32>().expect("LowerExp writes a number behind the e") {
        exponent if (-4..16).contains(&exponent) => format!("{value:?}"),
        exponent => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

/// How `tojson` was asked to write.
struct Json {
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
    ascii: bool,
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)` of transformers.
pub(super) fn tojson(value: &Value, args: Rest<Value>) -> Result<String, Error> {
    let (args, kwargs): (&[Value], Kwargs) = from_args(&args)?;
    let bad = |what: &str| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    let arg = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let named = kwargs.get::<Option<Value>>(name)?;
        Ok(args.get(index).cloned().or(named).filter(|value| !value.is_none()))
    };
    let ascii = arg(0, "ensure_ascii")?.is_some_and(|ascii| ascii.is_true());
    let indent = match arg(1, "indent")? {
        Some(indent) => Some(indent.as_usize().filter(|indent| *indent <= 64).ok_or_else(|| bad("indent is not a number from 0 to 64"))?),
        None => None,
    };
    let [item, key] = match arg(2, "separators")? {
        Some(pair) => [str(&pair.get_item_by_index(0)?), str(&pair.get_item_by_index(1)?)],
        None => [if indent.is_some() { "," } else { ", " }.into(), ": ".into()],
    };
    let sort_keys = arg(3, "sort_keys")?.is_some_and(|sort| sort.is_true());
    kwargs.assert_all_used()?;
    let mut out = String::new();
    Json { indent, item, key, sort_keys, ascii }.write(value, 0, &mut out)?;
    Ok(out)
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let unfit = |what: &str| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what} is not JSON serializable"));
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => number_json(value, out),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<_> = value.try_iter()?.collect();
                self.bracket('[', ']', &items, depth, out, |item, out| self.write(item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<_> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.bracket('{', '}', &keys, depth, out, |key, out| {
                    self.string(&key_json(key), out);
                    out.push_str(&self.key);
                    self.write(&value.get_item(key)?, depth + 1, out)
                })?;
            }
            kind => return Err(unfit(&kind.to_string())),
        }
        Ok(())
    }

    fn bracket(
        &self,
        open: char,
        close: char,
        items: &[Value],
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent.filter(|_| !items.is_empty()) {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.item);
            }
            line(depth + 1, out);
            write(item, out)?;
        }
        line(depth, out);
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\x08' => out.push_str("\\b"),
                '\x0c' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")))
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn number_json(value: &Value, out: &mut String) {
    let mut text = String::new();
    number(value, &mut text);
    out.push_str(match text.as_str() {
        "nan" => "NaN",
        "inf" => "Infinity",
        "-inf" => "-Infinity",
        text => text,
    });
}

/// Keys that are no strings become some as JSON writes them.
fn key_json(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
        _ => str(key),
    }
}
