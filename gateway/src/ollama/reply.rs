//! `/api/chat` and `/api/generate`, the replies: events → lines of JSON, or what was collected → one object. Pure but for
//! the time that every line carries.

use flash_proto::v1::{self, done::Finish, generate_event::Event, text::Channel};
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use crate::{
    ask::tools::arguments,
    call::now,
    openai::models::rfc3339,
    reply::{Collected, Piece, Seams, behind},
    router::unique_id,
    sse::{self, Item},
};

/// What the request says about its reply.
#[derive(Debug)]
pub(crate) struct Style {
    pub(crate) model: String,
    /// A message, not just a text.
    pub(crate) chat: bool,
    /// When the request came.
    pub(crate) arrived: Instant,
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
        ended(line, reply.done.as_ref().unwrap_or(&v1::Done::default()), self.arrived.elapsed())
    }
}

fn call(index: u32, name: &str, text: &str) -> Value {
    let arguments: Value = serde_json::from_str(&arguments(text)).unwrap_or_else(|_| json!({}));
    json!({"id": format!("call_{}", unique_id()), "function": {"index": index, "name": name, "arguments": arguments}})
}

/// Adds why it ended and how long it took, in nanoseconds; what came before the prompt is read is the model's load and the queue.
fn ended(mut line: Value, done: &v1::Done, total: Duration) -> Value {
    let (usage, timing) = (done.usage.unwrap_or_default(), done.timing.unwrap_or_default());
    let reason = if done.finish() == Finish::Length { "length" } else { "stop" };
    let of = |ms: f64| Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
    let (prompt, eval) = (of(timing.prefill_ms), of(timing.decode_ms));
    let load = total.saturating_sub(prompt + eval);
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let fields = json!({
        "done_reason": reason, "total_duration": ns(total), "load_duration": ns(load),
        "prompt_eval_count": usage.prompt_tokens, "prompt_eval_duration": ns(prompt),
        "eval_count": usage.completion_tokens, "eval_duration": ns(eval),
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
                    Channel::Content => self.style.line(&behind(seam, &text.text), "", &[], false),
                    Channel::Reasoning => self.style.line("", &text.text, &[], false),
                };
                sse::line(&line, out);
            }
            Event::Done(done) => {
                self.tell_call(self.collected.pieces.len(), out);
                sse::line(&ended(self.style.line("", "", &[], true), done, self.style.arrived.elapsed()), out);
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
