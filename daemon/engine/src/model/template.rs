//! Chat templates, rendered byte for byte as transformers does with jinja2. They are programs from a download, so each run
//! is bounded: instructions, processor time, the size of every variable and of the output. Knows nothing of tokens;
//! `text.rs` calls it.

use std::{
    cell::Cell,
    fmt,
    io::{self, Write},
    time::Duration,
};

use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    value::{Kwargs, Rest, ValueKind, from_args},
};
use serde_json::{Map, Value as Json};

use super::{
    chat::{self, Chat, Message, Tool},
    limits::{Deadline, on_deep_stack},
    python, rewrite,
};

/// A thousand messages need some 100,000.
const FUEL: u64 = 5_000_000;
const TIME: Duration = Duration::from_millis(500);
/// Of the rendered text and of each variable; far above any context.
const BYTES_MAX: usize = 32 << 20;
/// Values inside one variable.
const NODES_MAX: usize = 1 << 18;
const DEPTH_MAX: usize = 100;
/// Marks the end of the message to be continued; the trailing space tells whether the template strips.
const CONTINUE: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

pub(super) struct Template {
    environment: Environment<'static>,
    /// bos_token, eos_token and so on.
    special: Map<String, Json>,
    shows_tools: bool,
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template").field("special", &self.special).finish_non_exhaustive()
    }
}

impl Template {
    pub(super) fn new(source: &str, special: Map<String, Json>) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(|out, _, value| {
            let text = python::str(value);
            spend(text.len())?;
            out.write_str(&text).map_err(|_| too_large())
        });
        environment.set_unknown_method_callback(method);
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("string", |value: &Value| python::str(value));
        environment.add_filter("join", join);
        environment.add_filter("replace", |text: &str, from: &str, to: &str| replace(text, from, to, None));
        environment.add_filter("indent", indent);
        environment.add_function("raise_exception", |message: &Value| {
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, python::str(message)))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_function(rewrite::TICK, tick);
        environment.add_function(rewrite::BOUND, bound);
        let source = rewrite::guarded(source)?;
        on_deep_stack("template", move || match environment.add_template_owned("chat", source) {
            Ok(()) => {
                let variables = environment.get_template("chat").map(|template| template.undeclared_variables(false));
                let shows_tools = variables.is_ok_and(|names| names.contains("tools"));
                Ok(Self { environment, special, shows_tools })
            }
            Err(error) => Err(reason(&error)),
        })
    }

    /// `kwargs` win over special tokens, as in transformers. Messages that the template raises at are shown to it once more as
    /// [`chat::relaxed`] makes them.
    pub(super) fn render(&self, chat: &Chat) -> Result<String, String> {
        let as_it_is = self.render_messages(chat, chat.messages.clone());
        as_it_is.or_else(|error| {
            let mut tried = chat.messages.clone();
            for messages in chat::relaxed(&chat.messages) {
                if messages != tried
                    && let Ok(text) = self.render_messages(chat, messages.clone())
                {
                    return Ok(text);
                }
                tried = messages;
            }
            Err(error)
        })
    }

    fn render_messages(&self, chat: &Chat, mut messages: Vec<Message>) -> Result<String, String> {
        let last = match messages.last_mut().filter(|_| chat.continue_final) {
            Some(last) => {
                let content = last.content.clone();
                last.content.push_str(CONTINUE);
                Some(content)
            }
            None if chat.continue_final => return Err("there is no message to continue".into()),
            None => None,
        };
        let mut variables = self.special.clone();
        variables.insert("messages".into(), messages.iter().map(Message::to_json).collect());
        let tools = chat.tools.iter().filter(|tool| !tool.hidden).map(Tool::to_json).collect::<Vec<_>>();
        variables.insert("tools".into(), if tools.is_empty() { Json::Null } else { Json::Array(tools) });
        variables.insert("documents".into(), Json::Null);
        variables.insert("add_generation_prompt".into(), Json::Bool(!chat.continue_final));
        variables.extend(chat.kwargs.clone());
        let text = self.run(&variables)?;
        match last {
            Some(content) => cut(&text, &content),
            None => Ok(text),
        }
    }

    /// Whether it shows tools at all.
    pub(super) fn shows_tools(&self) -> bool {
        self.shows_tools
    }

    fn run(&self, variables: &Map<String, Json>) -> Result<String, String> {
        // Whose thread-local limits start afresh.
        on_deep_stack("template", || {
            LIMITS.set(Limits { until: Deadline::after(TIME), bytes: 0 });
            let mut out = Bounded(Vec::new());
            let template = self.environment.get_template("chat").map_err(|error| reason(&error))?;
            template.render_captured_to(variables, &mut out).map_err(|error| reason(&error))?;
            String::from_utf8(out.0).map_err(|error| error.to_string())
        })
    }
}

/// Everything up to the end of the final message's content, whose own trailing space counts only if the template keeps it.
fn cut(text: &str, content: &str) -> Result<String, String> {
    let found = text.rfind(CONTINUE.trim_end()).filter(|_| text.contains(content.trim()));
    let end = found.ok_or("the final message cannot be continued: the template does not show it")?;
    match text[end..].starts_with(CONTINUE) {
        true => Ok(text[..end].into()),
        false => Ok(text[..end].trim_end().into()),
    }
}

/// The error with the line and its causes, without minijinja's dump of variables.
fn reason(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[derive(Clone, Copy)]
struct Limits {
    until: Deadline,
    /// Printed so far, into the output or into a captured block.
    bytes: usize,
}

thread_local! {
    static LIMITS: Cell<Limits> = Cell::new(Limits { until: Deadline::after(TIME), bytes: 0 });
}

fn too_large() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("the template makes more than {BYTES_MAX} bytes"))
}

fn spend(bytes: usize) -> Result<(), Error> {
    let mut limits = LIMITS.get();
    limits.bytes = limits.bytes.saturating_add(bytes);
    LIMITS.set(limits);
    if limits.bytes > BYTES_MAX { Err(too_large()) } else { tick().map(drop) }
}

/// Called at the head of every loop and macro body.
fn tick() -> Result<Value, Error> {
    match LIMITS.get().until.passed() {
        true => Err(Error::new(ErrorKind::InvalidOperation, format!("the template ran for longer than {} ms", TIME.as_millis()))),
        false => Ok(Value::UNDEFINED),
    }
}

/// Called on every value that is about to get a name; only by names can a template grow a value without bound.
fn bound(value: Value) -> Result<Value, Error> {
    tick()?;
    let (mut bytes, mut nodes) = (BYTES_MAX, NODES_MAX);
    measure(&value, 0, &mut bytes, &mut nodes)?;
    Ok(value)
}

fn measure(value: &Value, depth: usize, bytes: &mut usize, nodes: &mut usize) -> Result<(), Error> {
    let fits = |left: &mut usize, taken: usize| left.checked_sub(taken).map(|rest| *left = rest).is_some();
    let len = value.as_str().map_or(0, str::len);
    if depth > DEPTH_MAX || !fits(nodes, 1) || !fits(bytes, len) {
        return Err(Error::new(ErrorKind::InvalidOperation, "the template makes a value that is too large or too deep"));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.try_for_each(|item| measure(&item, depth + 1, bytes, nodes)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            measure(&key, depth + 1, bytes, nodes)?;
            measure(&value.get_item(&key)?, depth + 1, bytes, nodes)
        }),
        _ => Ok(()),
    }
}

/// The output, which refuses to grow past [`BYTES_MAX`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > BYTES_MAX {
            return Err(io::Error::other(format!("the template makes more than {BYTES_MAX} bytes")));
        }
        self.0.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Methods of Python's str and dict. Those that can blow a value up, or that the library answers otherwise than Python, are
/// ours.
fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name) {
        (Some(text), "replace") => {
            let (from, to, count): (&str, &str, Option<usize>) = from_args(args)?;
            replace(text, from, to, count).map(Value::from)
        }
        (Some(text), "join") => {
            let (values,): (&Value,) = from_args(args)?;
            join(values, Some(text), None).map(Value::from)
        }
        (Some(text), "count") => {
            let (what,): (&str,) = from_args(args)?;
            Ok(Value::from(if what.is_empty() { text.chars().count() + 1 } else { text.matches(what).count() }))
        }
        (Some(text), "find" | "rfind") => {
            let (what,): (&str,) = from_args(args)?;
            let found = if name == "find" { text.find(what) } else { text.rfind(what) };
            Ok(Value::from(found.map_or(-1, |at| text[..at].chars().count() as i64)))
        }
        (Some(text), "removeprefix") => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        (Some(text), "removesuffix") => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        (Some(text), "rsplit") => {
            let (separator, max): (&str, Option<usize>) = from_args(args)?;
            let mut parts: Vec<_> = match max {
                Some(max) => text.rsplitn(max.saturating_add(1), separator).collect(),
                None => text.rsplit(separator).collect(),
            };
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn replace(text: &str, from: &str, to: &str, count: Option<usize>) -> Result<String, Error> {
    let found = text.matches(from).count().min(count.unwrap_or(usize::MAX));
    match found.checked_mul(to.len()).is_some_and(|added| added <= BYTES_MAX) {
        true => Ok(text.replacen(from, to, found)),
        false => Err(too_large()),
    }
}

fn join(values: &Value, separator: Option<&str>, attribute: Option<Kwargs>) -> Result<String, Error> {
    let attribute = attribute.map(|kwargs| kwargs.get::<String>("attribute")).transpose()?;
    let mut out = String::new();
    for (index, value) in values.try_iter()?.enumerate() {
        if index > 0 {
            out.push_str(separator.unwrap_or_default());
        }
        out.push_str(&python::str(&match &attribute {
            Some(name) => value.get_attr(name)?,
            None => value,
        }));
        if out.len() > BYTES_MAX {
            return Err(too_large());
        }
    }
    Ok(out)
}

/// jinja2's `indent(width=4, first=False, blank=False)`.
fn indent(text: &str, args: Rest<Value>) -> Result<String, Error> {
    let (args, kwargs): (&[Value], Kwargs) = from_args(&args)?;
    let arg =
        |index: usize, name: &str| -> Result<Option<Value>, Error> { Ok(args.get(index).cloned().or(kwargs.get::<Option<Value>>(name)?)) };
    let width = arg(0, "width")?;
    let pad = match width.as_ref().and_then(Value::as_str) {
        Some(pad) => pad.to_owned(),
        None => " ".repeat(width.and_then(|width| width.as_usize()).unwrap_or(4).min(1 << 10)),
    };
    let (first, blank) = (arg(1, "first")?.is_some_and(|first| first.is_true()), arg(2, "blank")?.is_some_and(|blank| blank.is_true()));
    kwargs.assert_all_used()?;
    if text.matches('\n').count().saturating_mul(pad.len()) > BYTES_MAX {
        return Err(too_large());
    }
    let mut out = String::new();
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let wanted = if index == 0 { first } else { blank || !line.is_empty() };
        out.push_str(if wanted { &pad } else { "" });
        out.push_str(line);
    }
    Ok(out)
}

/// The local time, as Python's strftime writes it.
fn strftime_now(format: &str) -> Result<String, Error> {
    let text = jiff::fmt::strtime::format(format, &jiff::Zoned::now());
    text.map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn special() -> Map<String, Json> {
        Map::from_iter(
            [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")].map(|(name, token)| (name.into(), token.into())),
        )
    }

    /// Expected texts and errors are those of transformers 5.23 with jinja2 3.1.6.
    #[test]
    fn templates_render_as_in_transformers() {
        let cases: Vec<Json> = serde_json::from_str(include_str!("../../tests/data/templates.json")).unwrap();
        let mut wrong = Vec::new();
        for case in &cases {
            let messages: Vec<Message> = case["messages"].as_array().unwrap().iter().map(message).collect();
            let kwargs = case["kwargs"].as_object().unwrap().clone();
            let template = Template::new(case["template"].as_str().unwrap(), special());
            // As it is: what is relaxed is ours, not transformers'.
            let chat = Chat { kwargs, continue_final: case["continue_final"] == true, ..Chat::default() };
            let result = template.and_then(|template| template.render_messages(&chat, messages));
            let good = match (&result, case["expected"].as_str()) {
                (Ok(text), Some(expected)) => text == expected,
                (Err(_), None) => true,
                _ => false,
            };
            if !good {
                wrong.push(format!(
                    "{}\n  got      {result:?}\n  expected {}",
                    case["name"],
                    case.get("expected").unwrap_or(&case["error"])
                ));
            }
        }
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    }

    fn message(value: &Json) -> Message {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        Message { role: text("role").unwrap(), content: text("content").unwrap(), name: text("name"), ..Message::default() }
    }

    #[test]
    fn hostile_templates_fail() {
        let check = |source: &str| {
            let chat = Chat::of(vec![message(&json!({"role": "user", "content": "hello"}))]);
            let result = Template::new(source, special()).and_then(|template| template.render(&chat));
            assert!(result.is_err(), "{:.80} made {} bytes", source, result.unwrap().len());
        };
        check("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}");
        check("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}");
        check("{% for i in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}");
        check("{% for i in range(99999) %}{{ range(99999)|list|length }}{% endfor %}");
        check("{{ 'a' * 1000000000 }}");
        check("{% for i in range(1000) %}{{ 'x' * 1000000 }}{% endfor %}");
        check(&format!("{{% for i in range(10000) %}}{}{{% endfor %}}", "x".repeat(1 << 17)));
        check("{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}");
        check("{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}");
        check("{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}");
        check("{% set ns = namespace(s=[1]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}");
        check("{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}");
        check("{% macro m(s) %}{{ m(s) }}{% endmacro %}{{ m('a') }}");
        check("{% macro m(s) %}{{ m(s ~ s) }}{% endmacro %}{{ m('a') }}");
        check(
            "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}{% set x = 'a' * 99999 %}{% for i in range(99) %}{% set y = m(m(m(m(m(m(x)))))) %}{% endfor %}",
        );
        check("{% set x %}{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}");
        check("{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}");
        check("{% set x = 'a' * 99999 %}{{ x|replace('a', x) }}");
        check("{% set x = 'a' * 99999 %}{{ x.join(range(99999)) }}");
        check("{% set x = 'a' * 99999 %}{{ range(99999)|join(x) }}");
        check("{% set x = '\n' * 9999999 %}{{ x|indent(1000) }}");
        check(&"{% if true %}".repeat(10_000));
        check(&format!("{{{{ {}1{} }}}}", "(".repeat(10_000), ")".repeat(10_000)));
        check(&format!("{{{{ {}1{} }}}}", "[".repeat(10_000), "]".repeat(10_000)));
        check(&format!("{{{{ {}1 }}}}", "not ".repeat(10_000) + "x.y.z"));
        check(&format!("{{{{ {} }}}}", "-".repeat(10_000) + "x.y.z"));
        check(&format!("{{{{ {}1{} }}}}", "{'a':".repeat(10_000), "}".repeat(10_000)));
        check(&format!("{{{{ {} }}}}", "x if x else ".repeat(5_000) + "x.y.z"));
        check(&format!("{{{{ {} }}}}", "x == ".repeat(10_000) + "x.y.z"));
        check(&format!("{{{{ {} }}}}", "x or ".repeat(10_000) + "x.y.z"));
        check(&format!("{{{{ {} }}}}", "2 ** ".repeat(10_000) + "x.y.z"));
        check(&format!("{{{{ x{}.y.z }}}}", "[1:]".repeat(10_000)));
        check(&format!("{{% set x %}}{{% for i in range(99999) %}}{}{{% endfor %}}{{% endset %}}", "x".repeat(1 << 17)));
        check(&format!("{{{{ {}.x.y }}}}", "1+".repeat(20_000) + "x"));
        check(&format!("{{{{ x{}.y }}}}", ".x".repeat(20_000)));
        check(&format!("{{{{ x{} }}}}", "|nope".repeat(10_000)));
        check(&format!("{{% if x %}}{}{{% endif %}}{{{{ x.y }}}}", "{% elif x %}".repeat(20_000)));
        check("{% include 'x' %}");
        check("{% for");
        check("{{ 'a");
        check("{# a");
        check("{% set %}");
        check("{%%}");
        check("{%-%}");
        check("{{ strftime_now('%Q%!') }}");
        check("{{ 'a'|tojson(indent=100000000) }}");
    }

    #[test]
    fn the_clock_is_read() {
        let template = Template::new("{{ strftime_now('%d %b %Y %H:%M:%S %-d %A') }}", special()).unwrap();
        let text = template.render(&Chat::default()).unwrap();
        assert_eq!(text.split(' ').count(), 6, "{text}");
    }

    #[test]
    fn errors_say_what_the_template_said() {
        let template = Template::new("{% if messages %}{{ raise_exception('no ' ~ messages[0].role) }}{% endif %}", special()).unwrap();
        let message = message(&json!({ "role": "system", "content": "" }));
        let error = template.render(&Chat::of(vec![message])).unwrap_err();
        assert!(error.contains("no system"), "{error}");
        assert!(template.render(&Chat { continue_final: true, ..Chat::default() }).unwrap_err().contains("no message to continue"));
    }
}
