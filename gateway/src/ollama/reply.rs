//! `/api/chat` and `/api/generate`, the replies: events → lines of JSON, or what was collected → one object. Pure but for
//! the time that every line carries.

use flash_proto::v1::{self, done::Finish, generate_event::Event, text::Channel};
use serde_json::{Value, json};

use crate::{
    ask::tools::arguments,
    call::now,
    openai::models::rfc3339,
    reply::{Collected, Piece, Seams},
    router::unique_id,
    sse::{self, Item},
};

/// What the request says about its reply.
#[derive(Debug)]
pub(crate) struct Style {
    pub(crate) model: String,
    /// A message, not just a text.
    pub(crate) chat: bool,
}

impl Style {
    fn line(&self, content: &str, thinking: &str, calls: &[Value], done: bool) -> Value {
        let mut line = json!({"model": self.model, "created_at": rfc3339(now())});
        let mut said = json!({"role": "assistant", "content": content});
        if !thinking.is_empty() {
            said["thinking"] = thinking.into();
        }
        if !calls.is_empty() {
            said["tool_calls"] = calls.into();
        }
        if self.chat {
            line["message"] = said;
        } else {
            line["response"] = content.into();
            if !thinking.is_empty() {
                line["thinking"] = thinking.into();
            }
        }
        line["done"] = done.into();
        line
    }

    /// The answer where nothing was generated.
    pub(crate) fn idle(&self, reason: &str) -> Value {
        let mut line = self.line("", "", &[], true);
        line["done_reason"] = reason.into();
        line
    }

    pub(crate) fn whole(&self, reply: &Collected) -> Value {
        let calls: Vec<_> = (0..).zip(reply.calls()).map(|(index, (name, arguments))| call(index, name, arguments)).collect();
        let line = self.line(&reply.content(), &reply.reasoning(), &calls, true);
        ended(line, reply.done.as_ref().unwrap_or(&v1::Done::default()))
    }
}

fn call(index: u32, name: &str, text: &str) -> Value {
    let arguments: Value = serde_json::from_str(&arguments(text)).unwrap_or_else(|_| json!({}));
    json!({"id": format!("call_{}", unique_id()), "function": {"index": index, "name": name, "arguments": arguments}})
}

/// Adds why it ended and how long it took, in nanoseconds.
fn ended(mut line: Value, done: &v1::Done) -> Value {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "durations are positive, and the cast saturates")]
    let ns = |ms: f64| (ms * 1e6) as u64;
    let (usage, timing) = (done.usage.unwrap_or_default(), done.timing.unwrap_or_default());
    let reason = if done.finish() == Finish::Length { "length" } else { "stop" };
    let fields = json!({
        "done_reason": reason, "total_duration": ns(timing.ttft_ms + timing.decode_ms), "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens, "prompt_eval_duration": ns(timing.prefill_ms),
        "eval_count": usage.completion_tokens, "eval_duration": ns(timing.decode_ms),
    });
    if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
        line.extend(fields);
    }
    line
}

/// Events → the text of a stream. A call is told when it is whole.
#[derive(Debug)]
pub(crate) struct Lines {
    style: Style,
    collected: Collected,
    seams: Seams,
    /// Calls told.
    told: u32,
}

impl Lines {
    pub(crate) fn new(style: Style) -> Self {
        Self { style, collected: Collected::default(), seams: Seams::default(), told: 0 }
    }

    pub(crate) fn write(&mut self, item: Item<'_>, out: &mut String) {
        let event = match item {
            Item::Event(_, event) => event,
            // A line without text is one that clients read over.
            Item::Heartbeat => return sse::line(&self.style.line("", "", &[], false), out),
            Item::Failed(failure) => return sse::line(&failure.ollama(), out),
        };
        let before = self.collected.pieces.len();
        if self.collected.add(event) {
            self.tell_call(before, out);
        }
        let seam = self.seams.before(event);
        match event {
            Event::Text(text) if !text.text.is_empty() => {
                let line = match text.channel() {
                    Channel::Content => self.style.line(&format!("{seam}{}", text.text), "", &[], false),
                    Channel::Reasoning => self.style.line("", &text.text, &[], false),
                };
                sse::line(&line, out);
            }
            Event::Done(done) => {
                self.tell_call(self.collected.pieces.len(), out);
                sse::line(&ended(self.style.line("", "", &[], true), done), out);
            }
            _ => {}
        }
    }

    /// Tells the last of the first `count` pieces, if it is a call.
    fn tell_call(&mut self, count: usize, out: &mut String) {
        if let Some(Piece::Call { name, arguments }) = count.checked_sub(1).map(|at| &self.collected.pieces[at]) {
            sse::line(&self.style.line("", "", &[call(self.told, name, arguments)], false), out);
            self.told += 1;
        }
    }
}

#[cfg(test)]
#[path = "reply_tests.rs"]
mod tests;
