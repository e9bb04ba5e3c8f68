//! `/v1/chat/completions`, both directions and pure: JSON → [`v1::GenerateRequest`], events → chunks or one completion.
//! No I/O here; `openai/mod.rs` drives it.

use serde_json::Value;

use super::types::{
    Choice, Chunk, Completion, CompletionDetails, Delta, DeltaMessage, Head, Logprob, Logprobs, Measured, Message, PromptDetails, Token,
    Usage,
};
use crate::{
    error::{Code, Failure},
    json::{Node, Object},
};
use flash_proto::v1::{self, generate_event::Event, generate_request::Prompt};

const MESSAGES_MAX: usize = 4096;
const TOOLS_MAX: usize = 512;
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const BIASES_MAX: usize = 1024;

/// One request, read and checked; `generate.model` is still what the client wrote.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) generate: v1::GenerateRequest,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Fields that were ignored because nobody knows them.
    pub(crate) unknown: Vec<String>,
}

pub(crate) fn read(body: &Value) -> Result<Request, Failure> {
    let mut unknown = Vec::new();
    let mut top = Node::root(body).object()?;
    let model = top.read("model", |node| node.text())?.unwrap_or_default().to_owned();
    refuse_unbuilt(&mut top)?;
    let chat = conversation(&mut top, &mut unknown)?;
    let stream = top.read("stream", |node| node.flag())?.unwrap_or(false);
    let include_usage = top.read("stream_options", |node| stream_options(&node, &mut unknown))?.unwrap_or(false);
    let generate = v1::GenerateRequest {
        model,
        prompt: Some(Prompt::Chat(chat)),
        sampling: Some(sampling(&mut top)?),
        stop: top.read("stop", |node| stops(&node))?.unwrap_or_default(),
        max_tokens: max_tokens(&mut top)?,
        top_logprobs: top_logprobs(&mut top)?,
        keep_alive: keep_alive(&mut top)?,
        ..Default::default()
    };
    top.read("parallel_tool_calls", |node| node.flag())?;
    top.ignore(&["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"]);
    top.ignore(&["prediction", "verbosity", "web_search_options"]);
    top.finish(&mut unknown);
    Ok(Request { generate, stream, include_usage, unknown })
}

/// What this build cannot do is refused: an answer that pretends otherwise would be worse.
fn refuse_unbuilt(top: &mut Object<'_>) -> Result<(), Failure> {
    let unsupported = |node: &Node<'_>, what: &str| Err(node.refuse(Code::UnsupportedValue, what));
    if let Some(node) = top.get("n")
        && node.int(1..=4)? > 1
    {
        return unsupported(&node, "this build gives one choice per request");
    }
    for key in ["tools", "functions"] {
        if let Some(node) = top.get(key)
            && node.array(TOOLS_MAX)?.next().is_some()
        {
            return unsupported(&node, "this build does not support tools");
        }
    }
    for key in ["tool_choice", "function_call"] {
        let Some(node) = top.get(key) else { continue };
        match node.value.as_str() {
            Some("none" | "auto") => {}
            Some("required") => return unsupported(&node, "this build does not support tools"),
            None if node.value.is_object() => return unsupported(&node, "this build does not support tools"),
            _ => return Err(node.refuse(Code::InvalidValue, "must be 'none', 'auto', 'required' or an object")),
        }
    }
    if let Some(node) = top.get("response_format") {
        let kind = node.object()?.require("type")?;
        match kind.text()? {
            "text" => {}
            "json_object" | "json_schema" => return unsupported(&kind, "this build answers in plain text only"),
            _ => return Err(kind.refuse(Code::InvalidValue, "must be 'text', 'json_object' or 'json_schema'")),
        }
    }
    let audio = |node: &Node<'_>| Err(node.refuse(Code::UnsupportedModality, "the model answers in text only"));
    if let Some(node) = top.get("modalities") {
        for kind in node.array(8)? {
            if kind.text()? != "text" {
                return audio(&kind);
            }
        }
    }
    top.get("audio").map_or(Ok(()), |node| audio(&node))
}

fn conversation(top: &mut Object<'_>, unknown: &mut Vec<String>) -> Result<v1::Chat, Failure> {
    let list = top.require("messages")?;
    let mut messages = Vec::new();
    let mut prefix = false;
    for node in list.array(MESSAGES_MAX)? {
        let (message, is_prefix) = message(&node, unknown)?;
        messages.push(message);
        prefix = is_prefix;
    }
    let Some(last) = messages.last() else {
        return Err(list.refuse(Code::InvalidValue, "must have at least one element"));
    };
    let of_assistant = last.role == "assistant";
    let continue_final_message = match top.get("continue_final_message") {
        Some(node) if node.flag()? && !of_assistant => {
            return Err(node.refuse(Code::InvalidValue, "the last message is not the assistant's"));
        }
        Some(node) => node.flag()?,
        None => prefix && of_assistant,
    };
    Ok(v1::Chat { messages, template_kwargs_json: template_kwargs(top)?, continue_final_message, ..v1::Chat::default() })
}

/// A message and whether it asks to be continued.
fn message(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<(v1::Message, bool), Failure> {
    let mut object = node.object()?;
    let role = object.require("role")?;
    let role = match role.text()? {
        "developer" => "system",
        "function" => "tool",
        known @ ("system" | "user" | "assistant" | "tool") => known,
        _ => return Err(role.refuse(Code::InvalidValue, "must be 'system', 'developer', 'user', 'assistant' or 'tool'")),
    };
    for key in ["tool_calls", "function_call"] {
        if let Some(calls) = object.get(key)
            && calls.value.as_array().is_none_or(|calls| !calls.is_empty())
        {
            return Err(calls.refuse(Code::UnsupportedValue, "this build does not support tools"));
        }
    }
    let refusal = object.read("refusal", |node| node.text())?;
    let content = match role {
        "assistant" => object.read("content", |node| content(&node, unknown))?.unwrap_or_else(|| refusal.unwrap_or_default().to_owned()),
        "tool" => object.read("content", |node| content(&node, unknown))?.unwrap_or_default(),
        _ => content(&object.require("content")?, unknown)?,
    };
    let name = object.read("name", |node| node.text())?.map(str::to_owned);
    let prefix = object.read("prefix", |node| node.flag())?.unwrap_or(false);
    // Earlier reasoning is not shown to the model again; ids of calls mean nothing to a template without tools.
    object.ignore(&["tool_call_id", "reasoning_content", "reasoning", "annotations", "audio"]);
    object.finish(unknown);
    Ok((v1::Message { role: role.to_owned(), content, name, ..v1::Message::default() }, prefix))
}

/// Text, or parts whose texts follow each other.
fn content(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<String, Failure> {
    if let Some(text) = node.value.as_str() {
        return Ok(text.to_owned());
    }
    if !node.value.is_array() {
        return Err(node.refuse(Code::InvalidValue, "must be a string or an array of parts"));
    }
    let mut joined = String::new();
    for part in node.array(usize::MAX)? {
        let mut object = part.object()?;
        let kind = object.require("type")?;
        let text = match kind.text()? {
            "text" | "input_text" | "output_text" => object.require("text")?.text()?,
            "refusal" => object.require("refusal")?.text()?,
            "image_url" | "input_image" | "image" | "input_audio" | "audio" | "video_url" | "file" | "input_file" | "document" => {
                return Err(part.refuse(Code::UnsupportedModality, "the model reads text only"));
            }
            _ => return Err(kind.refuse(Code::InvalidValue, "must be 'text', 'input_text' or 'refusal'")),
        };
        object.ignore(&["cache_control", "annotations"]);
        object.finish(unknown);
        joined.push_str(text);
    }
    Ok(joined)
}

/// Variables for the chat template; the explicit ones win over what `reasoning_effort` implies.
fn template_kwargs(top: &mut Object<'_>) -> Result<String, Failure> {
    let mut kwargs = serde_json::Map::new();
    if let Some(node) = top.get("reasoning_effort") {
        let effort = node.text()?;
        if !["none", "minimal", "low", "medium", "high", "xhigh"].contains(&effort) {
            return Err(node.refuse(Code::InvalidValue, "must be 'none', 'minimal', 'low', 'medium', 'high' or 'xhigh'"));
        }
        kwargs.insert("enable_thinking".into(), (effort != "none").into());
        kwargs.insert("reasoning_effort".into(), effort.into());
    }
    if let Some(node) = top.get("chat_template_kwargs") {
        let given = node.value.as_object().ok_or_else(|| node.refuse(Code::InvalidValue, "expected an object"))?;
        kwargs.extend(given.clone());
    }
    Ok(if kwargs.is_empty() { String::new() } else { Value::Object(kwargs).to_string() })
}

fn stream_options(node: &Node<'_>, unknown: &mut Vec<String>) -> Result<bool, Failure> {
    let mut options = node.object()?;
    let include_usage = options.read("include_usage", |node| node.flag())?.unwrap_or(false);
    options.ignore(&["include_obfuscation"]);
    options.finish(unknown);
    Ok(include_usage)
}

fn sampling(top: &mut Object<'_>) -> Result<v1::Sampling, Failure> {
    let penalty = |node: Node<'_>| node.float("must be between -2 and 2", |x| (-2.0..=2.0).contains(&x));
    let window = |node: Node<'_>| node.int(0..=u32::MAX.into()).map(clamped);
    let repetition_window = match top.read("repetition_context_size", window)? {
        None => top.read("repeat_last_n", window)?,
        found => found,
    };
    Ok(v1::Sampling {
        temperature: top.read("temperature", |node| node.float("must be between 0 and 2", |x| (0.0..=2.0).contains(&x)))?,
        // -1 is how vLLM says off.
        top_k: top.read("top_k", |node| node.int(-1..=i64::MAX))?.map(|k| clamped(k.max(0))),
        top_p: top.read("top_p", |node| node.float("must be above 0 and at most 1", |x| x > 0.0 && x <= 1.0))?,
        min_p: top.read("min_p", |node| node.float("must be at least 0 and below 1", |x| (0.0..1.0).contains(&x)))?,
        repetition_penalty: top.read("repetition_penalty", |node| node.float("must be above 0 and at most 2", |x| x > 0.0 && x <= 2.0))?,
        repetition_window,
        frequency_penalty: top.read("frequency_penalty", penalty)?,
        presence_penalty: top.read("presence_penalty", penalty)?,
        logit_bias: top.read("logit_bias", logit_bias)?.unwrap_or_default(),
        seed: top.read("seed", |node| node.int(i64::MIN..=i64::MAX))?.map(i64::cast_unsigned),
    })
}

/// Larger than the engine can count is as good as the most it can count.
fn clamped(value: i64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn logit_bias(node: Node<'_>) -> Result<std::collections::HashMap<u32, f32>, Failure> {
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

fn stops(node: &Node<'_>) -> Result<Vec<String>, Failure> {
    let nodes = if node.value.is_string() { vec![node.clone()] } else { node.array(STOPS_MAX)?.collect() };
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

fn max_tokens(top: &mut Object<'_>) -> Result<Option<u32>, Failure> {
    let new = top.read("max_completion_tokens", |node| node.int(1..=i64::MAX))?;
    let old = top.read("max_tokens", |node| node.int(1..=i64::MAX))?;
    Ok(new.or(old).map(clamped))
}

fn top_logprobs(top: &mut Object<'_>) -> Result<Option<u32>, Failure> {
    let wanted = top.read("logprobs", |node| node.flag())?.unwrap_or(false);
    match top.get("top_logprobs") {
        Some(node) => {
            let count = node.int(0..=20)?;
            if !wanted && count > 0 {
                return Err(node.refuse(Code::InvalidValue, "needs 'logprobs' to be true"));
            }
            Ok(wanted.then(|| clamped(count)))
        }
        None => Ok(wanted.then_some(0)),
    }
}

/// Seconds or text in ollama's syntax; the daemon knows the syntax.
fn keep_alive(top: &mut Object<'_>) -> Result<Option<String>, Failure> {
    let text = |node: Node<'_>| match node.value {
        Value::String(text) => Ok(text.clone()),
        _ => node.int(i64::MIN..=i64::MAX).map(|seconds| if seconds > 0 { format!("{seconds}s") } else { seconds.to_string() }),
    };
    let keep_alive = top.read("keep_alive", text)?;
    let ttl = top.read("ttl", text)?;
    Ok(keep_alive.or(ttl))
}

/// Events → the text of a stream.
#[derive(Debug)]
pub(crate) struct Chunks {
    pub(crate) head: Head,
    pub(crate) include_usage: bool,
    /// Whether log-probabilities were asked for: then even text-less tokens are told.
    pub(crate) logprobs: bool,
}

impl Chunks {
    /// Appends what `event` says; the caller has merged and counted already.
    pub(crate) fn write(&mut self, event: &Event, out: &mut String) {
        match event {
            Event::Accepted(accepted) => {
                self.head.system_fingerprint.clone_from(&accepted.fingerprint);
                self.choice(DeltaMessage { role: Some("assistant"), content: Some("") }, None, None, out);
            }
            Event::Text(text) if !text.text.is_empty() || !text.logprobs.is_empty() => {
                let logprobs = self.logprobs.then(|| logprobs(&text.logprobs));
                self.choice(DeltaMessage { role: None, content: Some(&text.text) }, logprobs, None, out);
            }
            Event::Done(done) => {
                self.choice(DeltaMessage::default(), None, Some(finish_reason(done)), out);
                if self.include_usage {
                    self.chunk(Vec::new(), Some(Some(usage(done))), Some(measured(done)), out);
                }
                out.push_str("data: [DONE]\n\n");
            }
            Event::Text(_) | Event::Progress(_) | Event::Failed(_) | Event::Routing(_) | Event::ToolCall(_) => {}
        }
    }

    fn choice(&self, delta: DeltaMessage<'_>, logprobs: Option<Logprobs>, finish_reason: Option<&'static str>, out: &mut String) {
        let usage = self.include_usage.then_some(None);
        self.chunk(vec![Delta { index: 0, delta, logprobs, finish_reason }], usage, None, out);
    }

    fn chunk(&self, choices: Vec<Delta<'_>>, usage: Option<Option<Usage>>, x_flash: Option<Measured>, out: &mut String) {
        let chunk = Chunk { head: &self.head, object: "chat.completion.chunk", choices, usage, x_flash };
        crate::sse::data(&chunk, out);
    }
}

/// Events → one completion.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    text: v1::Text,
    fingerprint: String,
}

impl Collected {
    /// The body, once `event` was the last one.
    pub(crate) fn add(&mut self, event: Event, head: &mut Head, with_logprobs: bool) -> Option<String> {
        match event {
            Event::Accepted(accepted) => self.fingerprint = accepted.fingerprint,
            Event::Text(text) => {
                self.text.text.push_str(&text.text);
                self.text.logprobs.extend(text.logprobs);
            }
            Event::Done(done) => {
                head.system_fingerprint = std::mem::take(&mut self.fingerprint);
                return Some(self.completion(&done, head, with_logprobs));
            }
            Event::Progress(_) | Event::Failed(_) | Event::Routing(_) | Event::ToolCall(_) => {}
        }
        None
    }

    fn completion(&self, done: &v1::Done, head: &Head, with_logprobs: bool) -> String {
        let message = Message { role: "assistant", content: &self.text.text, refusal: None };
        let logprobs = with_logprobs.then(|| logprobs(&self.text.logprobs));
        let choices = [Choice { index: 0, message, logprobs, finish_reason: finish_reason(done) }];
        let body = Completion { head, object: "chat.completion", choices, usage: usage(done), x_flash: measured(done) };
        serde_json::to_string(&body).expect("plain data is always JSON")
    }
}

fn finish_reason(done: &v1::Done) -> &'static str {
    match done.finish() {
        v1::done::Finish::Stop => "stop",
        v1::done::Finish::Length => "length",
        v1::done::Finish::ToolCalls => "tool_calls",
    }
}

fn usage(done: &v1::Done) -> Usage {
    let usage = done.usage.unwrap_or_default();
    Usage {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens },
        completion_tokens_details: CompletionDetails { reasoning_tokens: 0 },
    }
}

fn measured(done: &v1::Done) -> Measured {
    let (usage, timing) = (done.usage.unwrap_or_default(), done.timing.unwrap_or_default());
    let per_second = |tokens: u32, ms: f64| (tokens > 0 && ms > 0.0).then(|| f64::from(tokens) * 1e3 / ms);
    let lookups = timing.expert_hits + timing.expert_misses;
    #[allow(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
    let hit_rate = (lookups > 0).then(|| timing.expert_hits as f64 / lookups as f64);
    Measured {
        ttft_ms: timing.ttft_ms,
        prefill_tok_s: per_second(usage.prompt_tokens.saturating_sub(usage.cached_tokens), timing.prefill_ms),
        // The first token belongs to the prefill.
        decode_tok_s: per_second(usage.completion_tokens.saturating_sub(1), timing.decode_ms),
        queue_ms: timing.queue_ms,
        expert_cache_hit_rate: hit_rate,
        bytes_from_ssd: timing.ssd_bytes,
    }
}

fn logprobs(tokens: &[v1::TokenLogprob]) -> Logprobs {
    // JSON has no infinity; OpenAI writes this for what was masked.
    let token = |bytes: &[u8], logprob: f32| Token {
        token: String::from_utf8_lossy(bytes).into_owned(),
        logprob: if logprob.is_finite() { logprob.max(-9999.0) } else { -9999.0 },
        bytes: bytes.to_vec(),
    };
    let entry = |found: &v1::TokenLogprob| Logprob {
        token: token(&found.token, found.logprob),
        top_logprobs: found.top.iter().map(|other| token(&other.token, other.logprob)).collect(),
    };
    Logprobs { content: tokens.iter().map(entry).collect(), refusal: None }
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
