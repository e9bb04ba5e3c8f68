//! What requests of every dialect have in common: limits, sampling, stops, template variables (here), tools (`tools.rs`),
//! conversations (`turns.rs`). JSON in, protocol messages out; no I/O.

pub(crate) mod tools;
pub(crate) mod turns;

use std::collections::HashMap;

use flash_proto::v1;
use serde_json::{Map, Value};

use crate::{
    error::{Code, Failure},
    json::{Node, Object},
};

pub(crate) const MESSAGES_MAX: usize = 4096;
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const BIASES_MAX: usize = 1024;
const I64_MIN: f64 = i64::MIN as f64;
const SCHEMA_BYTES_MAX: usize = 256 << 10;

/// Larger than the engine can count is as good as the most it can count.
pub(crate) fn clamped(value: i64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// At least one token; absent means what fits, and so does -1, as LM Studio's clients say it.
pub(crate) fn tokens(node: Node<'_>) -> Result<u32, Failure> {
    if node.value.as_i64() == Some(-1) { Ok(u32::MAX) } else { node.int(1..=i64::MAX).map(clamped) }
}

/// The sampling fields that all but Ollama spell alike.
pub(crate) fn sampling(top: &mut Object<'_>) -> Result<v1::Sampling, Failure> {
    let penalty = |node: Node<'_>| node.float("must be between -2 and 2", |x| (-2.0..=2.0).contains(&x));
    let window = |node: Node<'_>| node.int(0..=u32::MAX.into()).map(clamped);
    let repetition_window = match top.read("repetition_context_size", window)? {
        None => top.read("repeat_last_n", window)?,
        found => found,
    };
    Ok(v1::Sampling {
        temperature: top.read("temperature", temperature)?,
        top_k: top.read("top_k", top_k)?,
        top_p: top.read("top_p", top_p)?,
        min_p: top.read("min_p", min_p)?,
        repetition_penalty: top.read("repetition_penalty", repetition)?,
        repetition_window,
        frequency_penalty: top.read("frequency_penalty", penalty)?,
        presence_penalty: top.read("presence_penalty", penalty)?,
        logit_bias: top.read("logit_bias", logit_bias)?.unwrap_or_default(),
        seed: top.read("seed", seed)?,
    })
}

pub(crate) fn temperature(node: Node<'_>) -> Result<f32, Failure> {
    node.float("must be between 0 and 2", |x| (0.0..=2.0).contains(&x))
}

/// -1 is how vLLM says off.
pub(crate) fn top_k(node: Node<'_>) -> Result<u32, Failure> {
    node.int(-1..=i64::MAX).map(|k| clamped(k.max(0)))
}

pub(crate) fn top_p(node: Node<'_>) -> Result<f32, Failure> {
    node.float("must be above 0 and at most 1", |x| x > 0.0 && x <= 1.0)
}

pub(crate) fn min_p(node: Node<'_>) -> Result<f32, Failure> {
    node.float("must be at least 0 and below 1", |x| (0.0..1.0).contains(&x))
}

pub(crate) fn repetition(node: Node<'_>) -> Result<f32, Failure> {
    node.float("must be above 0 and at most 2", |x| x > 0.0 && x <= 2.0)
}

pub(crate) fn seed(node: Node<'_>) -> Result<u64, Failure> {
    if let Some(seed) = node.value.as_i64() {
        return Ok(seed.cast_unsigned());
    }
    match node.value.as_f64() {
        // Else different ones would become one.
        Some(seed) if !(I64_MIN..-I64_MIN).contains(&seed) => Err(node.refuse(Code::InvalidValue, "must be an integer of 64 bits")),
        _ => node.int(i64::MIN..=i64::MAX).map(i64::cast_unsigned),
    }
}

fn logit_bias(node: Node<'_>) -> Result<HashMap<u32, f32>, Failure> {
    let map = node.value.as_object().ok_or_else(|| node.refuse(Code::InvalidValue, "expected an object"))?;
    if map.len() > BIASES_MAX {
        return Err(node.refuse(Code::InvalidValue, format_args!("must have at most {BIASES_MAX} entries")));
    }
    let entry = |(key, value): (&String, _)| {
        let id = key.parse().map_err(|_| node.refuse(Code::InvalidValue, "keys must be token ids"))?;
        let bias = Node { value, path: format!("{}.{id}", node.path) };
        Ok((id, bias.float("must be between -100 and 100", |x| (-100.0..=100.0).contains(&x))?))
    };
    map.iter().map(entry).collect()
}

/// One string or several.
pub(crate) fn stops(node: Node<'_>) -> Result<Vec<String>, Failure> {
    let nodes = if node.value.is_string() { vec![node] } else { node.array(STOPS_MAX)?.collect() };
    let mut stops = Vec::new();
    for node in nodes {
        let text = node.text()?;
        if text.len() > STOP_BYTES_MAX {
            return Err(node.refuse(Code::InvalidValue, format_args!("must have at most {STOP_BYTES_MAX} bytes")));
        }
        // An empty one would stop everything at once; clients send it to mean none.
        if !text.is_empty() {
            stops.push(text.to_owned());
        }
    }
    Ok(stops)
}

/// Seconds or text in ollama's syntax; the daemon knows the syntax.
pub(crate) fn keep_alive(top: &mut Object<'_>) -> Result<Option<String>, Failure> {
    let text = |node: Node<'_>| match node.value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(seconds) if seconds.is_f64() => {
            node.float("must be a number of seconds", f64::is_finite).map(|seconds| format!("{seconds}s"))
        }
        _ => node.int(i64::MIN..=i64::MAX).map(|seconds| if seconds > 0 { format!("{seconds}s") } else { seconds.to_string() }),
    };
    let keep_alive = top.read("keep_alive", text)?;
    let ttl = top.read("ttl", text)?;
    Ok(keep_alive.or(ttl))
}

/// Variables of a chat template that come with the request itself.
const OURS: [&str; 4] = ["messages", "tools", "bos_token", "eos_token"];

/// Variables for the chat template.
#[derive(Debug, Default)]
pub(crate) struct Variables(Map<String, Value>);

impl Variables {
    pub(crate) fn thinking(&mut self, on: bool) {
        self.0.insert("enable_thinking".into(), on.into());
    }

    /// How hard to think; `none` is not at all.
    pub(crate) fn effort(&mut self, node: &Node<'_>) -> Result<(), Failure> {
        let effort = match node.text()? {
            // The template knows its own.
            "default" => return Ok(()),
            // Anthropic's word for the most.
            "max" => "xhigh",
            known @ ("none" | "minimal" | "low" | "medium" | "high" | "xhigh") => known,
            _ => return Err(node.refuse(Code::InvalidValue, "must be 'none', 'minimal', 'low', 'medium', 'high' or 'xhigh'")),
        };
        self.thinking(effort != "none");
        self.0.insert("reasoning_effort".into(), effort.into());
        Ok(())
    }

    /// Tokens of thinking at most: the daemon keeps to it, and templates may show it.
    pub(crate) fn budget(&mut self, node: &Node<'_>) -> Result<(), Failure> {
        self.0.insert("thinking_budget".into(), clamped(node.int(0..=i64::MAX)?).into());
        Ok(())
    }

    /// Those that the client names itself, which win over what it implies.
    pub(crate) fn given(&mut self, top: &mut Object<'_>) -> Result<(), Failure> {
        if let Some(node) = top.get("chat_template_kwargs") {
            let given = node.value.as_object().ok_or_else(|| node.refuse(Code::InvalidValue, "expected an object"))?;
            if let Some(ours) = OURS.into_iter().find(|name| given.contains_key(*name)) {
                return Err(node.refuse(Code::InvalidValue, format_args!("'{ours}' is not for it to set")));
            }
            self.0.extend(given.clone());
        }
        Ok(())
    }

    pub(crate) fn json(self) -> String {
        if self.0.is_empty() { String::new() } else { Value::Object(self.0).to_string() }
    }
}

/// A schema as text, its keys in the client's order.
pub(crate) fn schema(node: Node<'_>) -> Result<String, Failure> {
    if !node.value.is_object() {
        return Err(node.refuse(Code::InvalidValue, "expected a JSON schema, which is an object"));
    }
    let text = node.value.to_string();
    if text.len() > SCHEMA_BYTES_MAX {
        return Err(node.refuse(Code::InvalidValue, format_args!("must have at most {} KiB", SCHEMA_BYTES_MAX >> 10)));
    }
    Ok(text)
}

pub(crate) fn json_object() -> v1::Format {
    v1::Format { kind: Some(v1::format::Kind::JsonObject(true)), strict: false }
}

pub(crate) fn json_schema(schema: String, strict: bool) -> v1::Format {
    v1::Format { kind: Some(v1::format::Kind::JsonSchema(schema)), strict }
}

/// `text`, `json_object` or `json_schema`, whose fields stand in the object itself (Responses) or in one of its name.
pub(crate) fn format(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<Option<v1::Format>, Failure> {
    let mut object = node.object()?;
    let kind = object.require("type")?;
    let format = match kind.text()? {
        "text" => None,
        // A schema beside it is how llama.cpp and others have it.
        "json_object" => Some(object.read("schema", schema)?.map_or_else(json_object, |text| json_schema(text, false))),
        "json_schema" => {
            let flat = ["name", "schema"].iter().any(|key| node.value.get(key).is_some());
            let mut inner = if flat { node.object()? } else { object.require("json_schema")?.object()? };
            let text = schema(inner.require("schema")?)?;
            let strict = inner.read("strict", |node| node.flag())?.unwrap_or(false);
            inner.ignore(&["name", "description", "type", "json_schema"]);
            inner.finish(unknown);
            Some(json_schema(text, strict))
        }
        _ => return Err(kind.refuse(Code::InvalidValue, "must be 'text', 'json_object' or 'json_schema'")),
    };
    object.ignore(&["name", "description", "schema", "strict", "json_schema"]);
    object.finish(unknown);
    Ok(format)
}

pub(crate) fn text_only(node: &Node<'_>) -> Failure {
    node.refuse(Code::UnsupportedModality, "the model reads text only")
}

/// One request for each of `n` choices; with a seed, each has its own.
pub(crate) fn choices(request: v1::GenerateRequest, n: u32) -> Vec<v1::GenerateRequest> {
    let mut requests = vec![request; n as usize];
    for (index, request) in (0..).zip(&mut requests) {
        if let Some(seed) = request.sampling.as_mut().and_then(|sampling| sampling.seed.as_mut()) {
            *seed = seed.wrapping_add(index);
        }
    }
    requests
}
