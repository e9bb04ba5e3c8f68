//! `/v1/messages`, the reply: events → named server-sent events, or what was collected → one message. Pure.

use flash_proto::v1::{self, done::Finish, generate_event::Event, text::Channel};
use serde_json::{Value, json};

use crate::{
    ask::tools::arguments,
    reply::{Collected, Piece},
    sse::{self, Item},
};

/// Clients send it back and nobody checks it; it must be base64.
const SIGNATURE: &str = "Zmxhc2g=";

/// What the request says about its reply.
#[derive(Debug)]
pub(crate) struct Style {
    /// Without a prefix; calls derive theirs from it.
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) request_id: String,
    /// Whether thinking is shown.
    pub(crate) thinking: bool,
    /// Nothing was asked for but to read the prompt.
    pub(crate) prompt_only: bool,
}

impl Style {
    fn head(&self, content: Vec<Value>, done: Option<&v1::Done>, usage: &Value) -> Value {
        let (reason, stop) = done.map_or((Value::Null, Value::Null), stopped);
        json!({
            "id": format!("msg_{}", self.id), "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": reason, "stop_sequence": stop, "usage": usage,
        })
    }

    fn call_id(&self, index: u32) -> String {
        format!("toolu_{}_{index}", self.id)
    }

    pub(crate) fn message(&self, reply: &Collected) -> Value {
        let mut calls = 0;
        let block = |piece: &Piece| match piece {
            Piece::Reasoning(_) if !self.thinking => None,
            Piece::Reasoning(text) => Some(json!({"type": "thinking", "thinking": text, "signature": SIGNATURE})),
            Piece::Content { text, .. } => (!text.is_empty()).then(|| json!({"type": "text", "text": text})),
            Piece::Call { name, arguments: text } => {
                let input: Value = serde_json::from_str(&arguments(text)).unwrap_or_else(|_| json!({}));
                calls += 1;
                Some(json!({"type": "tool_use", "id": self.call_id(calls - 1), "name": name, "input": input}))
            }
        };
        let content = reply.pieces.iter().filter(|_| !self.prompt_only).filter_map(block).collect();
        let done = reply.done.as_ref().map(|done| self.told(done));
        self.head(content, done.as_ref(), &usage(&done.as_ref().and_then(|done| done.usage).unwrap_or_default()))
    }

    /// The end, as if nothing had been generated if nothing was to be.
    fn told(&self, done: &v1::Done) -> v1::Done {
        let mut done = done.clone();
        if self.prompt_only {
            done.set_finish(Finish::Length);
            done.usage.iter_mut().for_each(|usage| usage.completion_tokens = 0);
        }
        done
    }
}

/// Input is what had to be read; what was in the cache is counted beside it.
fn usage(usage: &v1::Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens), "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens,
    })
}

fn stopped(done: &v1::Done) -> (Value, Value) {
    match (done.finish(), &done.stop) {
        (Finish::Stop, Some(stop)) => (json!("stop_sequence"), json!(stop)),
        (Finish::Stop, None) => (json!("end_turn"), Value::Null),
        (Finish::Length, _) => (json!("max_tokens"), Value::Null),
        (Finish::ToolCalls, _) => (json!("tool_use"), Value::Null),
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Block {
    Thinking,
    Text,
    Tool,
}

/// Events → the text of a stream.
#[derive(Debug)]
pub(crate) struct Events {
    style: Style,
    started: bool,
    open: Option<Block>,
    /// Of the open block, or of the next one.
    index: u32,
    calls: u32,
}

impl Events {
    pub(crate) fn new(style: Style) -> Self {
        Self { style, started: false, open: None, index: 0, calls: 0 }
    }

    pub(crate) fn write(&mut self, item: Item<'_>, out: &mut String) {
        match item {
            Item::Event(_, event) => self.event(event, out),
            Item::Heartbeat if self.started => event("ping", json!({}), out),
            // Nothing but a comment may come before the start, which tells how long the prompt is.
            Item::Heartbeat => sse::comment(out),
            Item::Failed(failure) => sse::named("error", &failure.anthropic(&self.style.request_id), out),
        }
    }

    fn event(&mut self, said: &Event, out: &mut String) {
        match said {
            Event::Accepted(accepted) => {
                let first = v1::Usage { prompt_tokens: accepted.prompt_tokens, completion_tokens: 1, ..Default::default() };
                event("message_start", json!({"message": self.style.head(Vec::new(), None, &usage(&first))}), out);
                event("ping", json!({}), out);
                self.started = true;
            }
            Event::Text(_) | Event::ToolCall(_) if self.style.prompt_only => {}
            Event::Text(text) if text.text.is_empty() => {}
            Event::Text(text) if text.channel() == Channel::Reasoning => {
                if self.style.thinking {
                    self.enter(Block::Thinking, || json!({"type": "thinking", "thinking": "", "signature": ""}), out);
                    self.delta(&json!({"type": "thinking_delta", "thinking": text.text}), out);
                }
            }
            Event::Text(text) => {
                self.enter(Block::Text, || json!({"type": "text", "text": ""}), out);
                self.delta(&json!({"type": "text_delta", "text": text.text}), out);
            }
            Event::ToolCall(part) => {
                if part.index >= self.calls {
                    self.close(out);
                    self.calls = part.index + 1;
                    let block = json!({"type": "tool_use", "id": self.style.call_id(part.index), "name": part.name, "input": {}});
                    self.enter(Block::Tool, || block, out);
                }
                if !part.arguments.is_empty() {
                    self.delta(&json!({"type": "input_json_delta", "partial_json": part.arguments}), out);
                }
            }
            Event::Done(done) => {
                self.close(out);
                let done = self.style.told(done);
                let (reason, stop) = stopped(&done);
                let delta = json!({"stop_reason": reason, "stop_sequence": stop});
                event("message_delta", json!({"delta": delta, "usage": usage(&done.usage.unwrap_or_default())}), out);
                event("message_stop", json!({}), out);
            }
            Event::Progress(_) | Event::Prompt(_) | Event::Failed(_) | Event::Routing(_) => {}
        }
    }

    /// Goes on with the open block if it is of this kind, else begins one.
    fn enter(&mut self, kind: Block, block: impl FnOnce() -> Value, out: &mut String) {
        if self.open != Some(kind) {
            self.close(out);
            event("content_block_start", json!({"index": self.index, "content_block": block()}), out);
            self.open = Some(kind);
        }
    }

    fn delta(&self, delta: &Value, out: &mut String) {
        event("content_block_delta", json!({"index": self.index, "delta": delta}), out);
    }

    fn close(&mut self, out: &mut String) {
        let Some(kind) = self.open.take() else { return };
        if kind == Block::Thinking {
            self.delta(&json!({"type": "signature_delta", "signature": SIGNATURE}), out);
        }
        event("content_block_stop", json!({"index": self.index}), out);
        self.index += 1;
    }
}

/// Appends `{"type": kind, …fields}` under its name.
fn event(kind: &str, fields: Value, out: &mut String) {
    let mut body = json!({"type": kind});
    if let (Value::Object(body), Value::Object(fields)) = (&mut body, fields) {
        body.extend(fields);
    }
    sse::named(kind, &body, out);
}

#[cfg(test)]
#[path = "reply_tests.rs"]
mod tests;
