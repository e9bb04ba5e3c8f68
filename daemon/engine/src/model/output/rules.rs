//! Tools and formats as rules of a Lark grammar, in the way a model writes them. Texts only: `grammar.rs` compiles them.

use serde_json::{Map, Value, json};

use super::{
    calls::is_string,
    formats::{Calls, Style},
};
use crate::{Error, Format, Parameters, Tool, model::chat::ToolChoice};

/// Calls of one reply, where nothing else may follow.
const CALLS_MAX: usize = 16;

/// In Harmony thinking is a message like any other.
pub(super) const THOUGHT: &str =
    "thought: \"<|channel|>analysis<|message|>\" musing \"<|start|>assistant\"\nmusing[suffix=\"<|end|>\"]: /(.|\\n)*/\n";
/// A parameter's text and what ends it.
const XML_TEXT: &str = "text[suffix=\"\\n</parameter>\\n\"]: /(.|\\n)*/\n";
/// What ends a parameter, as a pattern.
const XML_END: &str = "<\\/parameter>";
/// Longer texts are not counted: a count costs a state for each character.
const XML_LENGTH_MAX: u64 = 2048;

/// What a tool is called with, or a part of it.
#[derive(Clone, Copy)]
pub(super) enum Part<'a> {
    Json(&'a Value),
    /// Rules for `text`, which is not within quotes.
    Text(&'a str),
}

/// A part as a rule's body, or its rules as they are; `None`: any text has to do.
pub(super) type Form<'a> = &'a dyn Fn(&Tool, Part) -> Result<Option<String>, Error>;

fn json_form(form: Form, tool: &Tool, schema: &Value) -> Result<String, Error> {
    Ok(form(tool, Part::Json(schema))?.expect("JSON has a form"))
}

/// The schema of a tool's arguments, which are an object whatever it says: what it says beside that may not be enforceable then.
fn arguments(tool: &Tool) -> Value {
    let mut schema = tool.schema();
    if let Some(schema) = schema.as_object_mut() {
        schema.insert("type".into(), "object".into());
    }
    schema
}

/// Rules for `calls`: one or more of the tools' calls.
pub(super) fn calls(calls: &Calls, tools: &[&Tool], choice: &ToolChoice, form: Form) -> Result<String, Error> {
    let rules = bodies(calls, tools, form)?;
    let (open, more) = (quoted(calls.open), CALLS_MAX - 1);
    Ok(match calls.style {
        Style::Harmony => format!("calls: body\n{rules}"),
        _ if choice.single => format!("calls: {open} body\n{rules}"),
        _ => format!("calls: call (\"\\n\" call){{0,{more}}}\ncall: {open} body\n{rules}"),
    })
}

/// Rules for `body`: what stands between a call's mark and the end of its own mark.
pub(super) fn bodies(calls: &Calls, tools: &[&Tool], form: Form) -> Result<String, Error> {
    let bodies = (0..tools.len()).map(|index| format!("t{index}")).collect::<Vec<_>>().join(" | ");
    let mut rules = format!("body: {bodies}\n");
    for (index, tool) in tools.iter().enumerate() {
        let name = &tool.name;
        let (before, after) = match calls.style {
            Style::Xml => {
                rules += &xml(index, tool, form)?;
                continue;
            }
            Style::Harmony => (format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"), String::new()),
            Style::Json => (format!("\n{{\"name\": \"{name}\", \"arguments\": "), quoted(&format!("}}\n{}", calls.close))),
        };
        rules += &format!("t{index}: {} a{index} {after}\na{index}: {}\n", quoted(&before), json_form(form, tool, &arguments(tool))?);
    }
    if calls.style == Style::Xml {
        rules += XML_TEXT;
    }
    Ok(rules)
}

/// Parameters in the schema's order, those that are not required may be left out; without properties any may come.
fn xml(index: usize, tool: &Tool, form: Form) -> Result<String, Error> {
    let (whole, none) = (tool.schema(), Map::new());
    let properties = whole.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let required = |key: &str| whole.get("required").and_then(Value::as_array).is_some_and(|keys| keys.iter().any(|known| known == key));
    let (mut parts, mut rules) = (String::new(), String::new());
    // A key that XML cannot hold is left out.
    for (number, (key, schema)) in properties.iter().filter(|(key, _)| !key.contains(['>', '<', '\n'])).enumerate() {
        let value = if is_string(Some(schema)) {
            let (value, terminal) = xml_text(&format!("x{index}_{number}"), schema, (tool, form))?;
            rules += &terminal;
            value
        } else {
            let mut schema = schema.clone();
            for definitions in ["$defs", "definitions"] {
                if let (Some(schema), Some(found)) = (schema.as_object_mut(), whole.get(definitions)) {
                    schema.insert(definitions.into(), found.clone());
                }
            }
            format!("{} {}", json_form(form, tool, &schema)?, quoted("\n</parameter>\n"))
        };
        parts += &format!(" p{index}_{number}{}", if required(key) { "" } else { "?" });
        rules += &format!("p{index}_{number}: {} {value}\n", quoted(&format!("<parameter={key}>\n")));
    }
    if properties.is_empty() && whole.get("properties").is_none() && whole.get("additionalProperties") != Some(&Value::Bool(false)) {
        parts = format!(" q{index}*");
        rules = format!("q{index}: \"<parameter=\" /[^<>\\n]+/ \">\\n\" text\n");
    }
    let (head, tail) = (quoted(&format!("\n<function={}>\n", tool.name)), quoted("</function>\n</tool_call>"));
    Ok(format!("t{index}: {head}{parts} {tail}\n{rules}"))
}

/// A parameter that is text: one of a few, or what a grammar, a pattern or a length says, or any; with rules of its own, by that name.
fn xml_text(name: &str, schema: &Value, (tool, form): (&Tool, Form)) -> Result<(String, String), Error> {
    let end = "\n</parameter>\n";
    let choices = schema.get("const").map(std::slice::from_ref).or_else(|| schema.get("enum")?.as_array().map(Vec::as_slice));
    let choices: Option<Vec<_>> = choices.filter(|choices| !choices.is_empty()).and_then(|all| all.iter().map(Value::as_str).collect());
    if let Some(choices) = choices {
        let choices: Vec<_> = choices.into_iter().map(|choice| quoted(&format!("{choice}{end}"))).collect();
        return Ok((format!("({})", choices.join(" | ")), String::new()));
    }
    if let Parameters::Text(Some(Format::Lark(grammar))) = &tool.parameters {
        let rules = form(tool, Part::Text(&format!("text: %lark {{\n{grammar}\n}}\n")))?;
        return Ok(match rules {
            Some(rules) => (format!("{name} {}", quoted(end)), rules.replacen("text", name, 1)),
            None => ("text".into(), String::new()),
        });
    }
    let length = |key: &str| schema.get(key).and_then(Value::as_u64).filter(|length| *length <= XML_LENGTH_MAX);
    let (least, most) = (length("minLength").unwrap_or(0), length("maxLength"));
    let mut parts = Vec::new();
    if (least > 0 || most.is_some()) && most.is_none_or(|most| most >= least) {
        let most = most.map_or(String::new(), |most| most.to_string());
        parts.push(format!("/(.|\\n){{{least},{most}}}/"));
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str) {
        let pattern = format!("/{}/", llguidance::regex_to_lark(&anywhere(pattern), ""));
        parts.extend(form(tool, Part::Text(&format!("text: T\nT: {pattern}\n")))?.map(|_| pattern));
    }
    if parts.is_empty() {
        return Ok(("text".into(), String::new()));
    }
    // Without the mark inside, the first mark is the end.
    let text = format!("{} & ~/(.|\\n)*{XML_END}(.|\\n)*/", parts.join(" & "));
    let terminal = name.to_uppercase();
    Ok((name.into(), format!("{terminal}: {text}\n{name}[suffix={}]: {terminal}\n", quoted(end))))
}

/// A pattern as JSON Schema has it, each of whose choices may stand anywhere in a text unless it is anchored, as one of the whole text.
fn anywhere(pattern: &str) -> String {
    let (mut depth, mut escaped, mut class) = (0, false, false);
    let choices = pattern.split(|c| {
        let ends = c == '|' && depth == 0 && !class && !escaped;
        match c {
            _ if escaped => {}
            '[' => class = true,
            ']' => class = false,
            '(' if !class => depth += 1,
            ')' if !class => depth -= 1,
            _ => {}
        }
        escaped = c == '\\' && !escaped;
        ends
    });
    let any = "(.|\\n)*";
    let whole = choices.map(|choice| {
        let (first, inner) = choice.strip_prefix('^').map_or((any, choice), |inner| ("", inner));
        let escapes = |before: &&str| before.chars().rev().take_while(|c| *c == '\\').count() % 2 == 1;
        let (inner, last) = inner.strip_suffix('$').filter(|before| !escapes(before)).map_or((inner, any), |before| (before, ""));
        format!("{first}(?:{inner}){last}")
    });
    whole.collect::<Vec<_>>().join("|")
}

/// Rules for a tool's name on a line of its own and its arguments: what a Harmony parser makes of a message's head.
pub(super) fn named(tools: &[&Tool], form: Form) -> Result<String, Error> {
    let mut rules = format!("start: {}\n", (0..tools.len()).map(|index| format!("t{index}")).collect::<Vec<_>>().join(" | "));
    for (index, tool) in tools.iter().enumerate() {
        rules += &format!(
            "t{index}: {} a{index}\na{index}: {}\n",
            quoted(&format!("{}\n", tool.name)),
            json_form(form, tool, &arguments(tool))?
        );
    }
    Ok(rules)
}

/// A literal.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// A JSON schema. At most one space or line break between two tokens: else a model may write them without end.
pub(super) fn inline(schema: &Value, lenient: bool) -> String {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        schema => without(schema, &says_nothing),
    };
    if let Some(schema) = schema.as_object_mut() {
        schema.insert("x-guidance".into(), json!({"whitespace_pattern": "[ \\n]", "lenient": lenient}));
    }
    format!("%json {schema}")
}

/// States that the `multipleOf`s of all schemas in a grammar take at least: one for every remainder of each number, and where schemas are
/// combined perhaps of what is a multiple of all of them.
pub(super) fn remainders(lark: &str) -> u128 {
    fn walk(value: &Value, numbers: &mut Vec<Decimal>, combined: &mut bool) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    match (key.as_str(), value) {
                        ("multipleOf", Value::Number(number)) => numbers.push(Decimal::of(&number.to_string())),
                        ("allOf" | "$ref", _) => *combined = true,
                        _ => {}
                    }
                    walk(value, numbers, combined);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, numbers, combined)),
            _ => {}
        }
    }
    // Each up to its own end, whatever its texts say.
    let after = lark.match_indices("%json").map(|(at, mark)| &lark[at + mark.len()..]);
    let schemas = after.filter_map(|rest| serde_json::Deserializer::from_str(rest).into_iter().next()?.ok());
    let states = schemas.map(|schema: Value| {
        let (mut numbers, mut combined) = (Vec::new(), false);
        walk(&schema, &mut numbers, &mut combined);
        let each = numbers.iter().fold(0, |sum: u128, number| sum.saturating_add(number.digits));
        let all = numbers.into_iter().reduce(Decimal::common_multiple).map_or(0, |number| number.digits);
        if combined { all.max(each) } else { each }
    });
    states.fold(0, u128::saturating_add)
}

/// digits / 10^places, in lowest terms of ten.
struct Decimal {
    digits: u128,
    places: u32,
}

impl Decimal {
    fn of(number: &str) -> Self {
        let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
        let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits = format!("{}{part}", whole.trim_start_matches('-')).parse().unwrap_or(u128::MAX);
        let places = part.len() as i64 - exponent.parse::<i64>().unwrap_or(0);
        Self { digits: times_ten(digits, (-places).clamp(0, 99) as u32), places: places.clamp(0, 999) as u32 }.lowest()
    }

    fn lowest(mut self) -> Self {
        while self.places > 0 && self.digits.is_multiple_of(10) {
            (self.digits, self.places) = (self.digits / 10, self.places - 1);
        }
        self
    }

    fn common_multiple(self, other: Self) -> Self {
        let places = self.places.max(other.places);
        let [a, b] = [self, other].map(|number| times_ten(number.digits, places - number.places));
        let (mut divisor, mut rest) = (a, b);
        while rest > 0 {
            (divisor, rest) = (rest, divisor % rest);
        }
        Self { digits: (a / divisor.max(1)).saturating_mul(b), places }.lowest()
    }
}

fn times_ten(digits: u128, times: u32) -> u128 {
    10u128.checked_pow(times).map_or(u128::MAX, |by| digits.saturating_mul(by))
}

/// Whether all types that it names are JSON's: what has others is no schema, however little is insisted on.
pub(super) fn typed(schema: &Value) -> bool {
    const TYPES: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];
    let known = |name: &Value| name.as_str().is_some_and(|name| TYPES.contains(&name));
    match schema {
        Value::Object(map) => map.iter().all(|(key, value)| match (key.as_str(), value) {
            ("type", Value::String(_)) => known(value),
            ("type", Value::Array(names)) => names.iter().all(known),
            ("enum" | "const" | "default" | "examples", _) => true,
            (_, value) => typed(value),
        }),
        Value::Array(items) => items.iter().all(typed),
        _ => true,
    }
}

/// A schema without what most often is beyond us, for callers who do not insist.
pub(super) fn plainer(schema: &Value) -> Value {
    const BEYOND: [&str; 8] =
        ["pattern", "format", "patternProperties", "minProperties", "maxProperties", "multipleOf", "propertyNames", "not"];
    /// Integers up to here are what they are in every reader of JSON.
    const BOUND_MAX: f64 = 9_007_199_254_740_991.0;
    without(schema, &|key, value| {
        let bound = key.ends_with("inimum") || key.ends_with("aximum");
        let far = key == "$ref" && value.as_str().is_some_and(|at| !at.starts_with('#'));
        BEYOND.contains(&key) || far || bound && value.as_f64().is_some_and(|bound| bound.abs() > BOUND_MAX)
    })
}

/// Keywords that llguidance does not know, where they allow everything: so do those that zod writes of every record.
fn says_nothing(key: &str, value: &Value) -> bool {
    match key {
        "propertyNames" => [json!(true), json!({}), json!({"type": "string"})].contains(value),
        "dependentRequired" | "dependentSchemas" => *value == json!({}),
        "uniqueItems" => *value == json!(false),
        _ => false,
    }
}

/// A schema without some of its keywords.
fn without(schema: &Value, left_out: &dyn Fn(&str, &Value) -> bool) -> Value {
    match schema {
        Value::Object(map) => {
            // Names of properties are no keywords.
            let inner = |(key, value): (&String, &Value)| {
                let value = match (key.as_str(), value) {
                    ("properties" | "$defs" | "definitions", Value::Object(named)) => {
                        named.iter().map(|(name, value)| (name.clone(), without(value, left_out))).collect::<Map<_, _>>().into()
                    }
                    ("enum" | "const" | "default" | "examples", value) => value.clone(),
                    (_, value) => without(value, left_out),
                };
                (key.clone(), value)
            };
            map.iter().filter(|(key, value)| !left_out(key, value)).map(inner).collect::<Map<_, _>>().into()
        }
        Value::Array(items) => items.iter().map(|item| without(item, left_out)).collect(),
        other => other.clone(),
    }
}
