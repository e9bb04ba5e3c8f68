//! `/v1/responses`, the reply: events → numbered and named server-sent events, or what was collected → one response. Pure.

use flash_proto::v1::{self, done::Finish, generate_event::Event};
use serde_json::{Map, Value, json};

use super::request::Echo;
use crate::{
    ask::{
        tools::{self, Names, Unquoted, unquoted},
        turns::Turns,
    },
    error::Failure,
    openai::types::logprobs,
    reply::{Collected, Piece},
    sse::{self, Item},
};

/// What the request says about its reply.
#[derive(Debug)]
pub(crate) struct Style {
    /// Without a prefix; items derive theirs from it.
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) logprobs: bool,
    pub(crate) names: Names,
    pub(crate) echo: Echo,
}

/// How far a response or an item of it is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

impl Status {
    fn of(finish: Finish) -> Self {
        if finish == Finish::Length { Self::Incomplete } else { Self::Completed }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
        }
    }
}

/// How a text stands in its item.
#[derive(Clone, Copy)]
struct Place {
    /// In events' names.
    text: &'static str,
    part: &'static str,
    index: &'static str,
}

impl Style {
    /// Whether thoughts stand where their summary would: who asks for one looks only there.
    fn summary(&self) -> bool {
        !self.echo.reasoning["summary"].is_null()
    }

    fn place(&self, piece: &Piece) -> Place {
        match piece {
            Piece::Reasoning(_) if self.summary() => {
                Place { text: "reasoning_summary_text", part: "reasoning_summary_part", index: "summary_index" }
            }
            Piece::Reasoning(_) => Place { text: "reasoning_text", part: "content_part", index: "content_index" },
            Piece::Content { .. } | Piece::Call { .. } => Place { text: "output_text", part: "content_part", index: "content_index" },
        }
    }

    pub(crate) fn response(&self, reply: &Collected) -> Value {
        let status = Status::of(reply.finish());
        let last = reply.pieces.len().saturating_sub(1);
        // Only what was being said when the tokens ran out is cut short.
        let status_of = |at| if at == last { status } else { Status::Completed };
        let output = reply.pieces.iter().enumerate().map(|(at, piece)| self.item(at, piece, status_of(at)));
        let usage = reply.usage();
        let usage = json!({
            "input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
        });
        self.object(status, output.collect(), usage, Value::Null)
    }

    fn object(&self, status: Status, output: Vec<Value>, usage: Value, error: Value) -> Value {
        let echo = &self.echo;
        let incomplete = (status == Status::Incomplete).then(|| json!({"reason": "max_output_tokens"}));
        json!({
            "id": format!("resp_{}", self.id), "object": "response", "created_at": self.created, "status": status.name(),
            "background": false, "error": error, "incomplete_details": incomplete, "instructions": echo.instructions,
            "max_output_tokens": echo.max_output_tokens, "model": self.model, "output": output,
            "parallel_tool_calls": echo.parallel_tool_calls, "previous_response_id": echo.previous_response_id,
            "reasoning": echo.reasoning, "store": false, "temperature": echo.temperature, "text": echo.text,
            "tool_choice": echo.tool_choice, "tools": echo.tools, "top_logprobs": echo.top_logprobs, "top_p": echo.top_p, "truncation": echo.truncation,
            "usage": usage, "user": echo.user, "metadata": echo.metadata,
        })
    }

    /// The messages by which the conversation goes on.
    pub(crate) fn said(&self, reply: &Collected) -> Vec<v1::Message> {
        let mut turns = Turns::default();
        for (at, piece) in reply.pieces.iter().enumerate() {
            match piece {
                Piece::Reasoning(text) => turns.reasoning(text),
                Piece::Content { text, .. } => turns.content(text),
                Piece::Call { name, arguments } => turns.call(&self.id_of("call", at), name.clone(), tools::arguments(arguments)),
            }
        }
        turns.messages
    }

    fn id_of(&self, kind: &str, at: usize) -> String {
        format!("{kind}_{}_{at}", self.id)
    }

    fn item_id(&self, at: usize, piece: &Piece) -> String {
        let kind = match piece {
            Piece::Reasoning(_) => "rs",
            Piece::Content { .. } => "msg",
            Piece::Call { name, .. } if self.names.of(name).custom => "ctc",
            Piece::Call { .. } => "fc",
        };
        self.id_of(kind, at)
    }

    /// A piece as an item of the output; empty as long as it is in progress.
    fn item(&self, at: usize, piece: &Piece, status: Status) -> Value {
        let id = self.item_id(at, piece);
        let whole = status != Status::InProgress;
        let content: Vec<_> = whole.then(|| self.part(piece)).into_iter().collect();
        match piece {
            Piece::Reasoning(_) => {
                let (summary, content) = if self.summary() { (content, Vec::new()) } else { (Vec::new(), content) };
                json!({
                    "id": id, "type": "reasoning", "summary": summary, "content": content, "encrypted_content": null, "status": status.name(),
                })
            }
            Piece::Content { .. } => {
                json!({"id": id, "type": "message", "status": status.name(), "role": "assistant", "content": content})
            }
            Piece::Call { name: wire, arguments } => {
                let name = self.names.of(wire);
                let (kind, key) = if name.custom { ("custom_tool_call", "input") } else { ("function_call", "arguments") };
                let mut item = json!({"id": id, "type": kind, "status": status.name(), "call_id": self.id_of("call", at)});
                if let Some(namespace) = name.namespace {
                    item["namespace"] = namespace.into();
                }
                item["name"] = name.name.into();
                item[key] = match (whole, name.custom) {
                    (false, _) => "".into(),
                    (true, false) => arguments.as_str().into(),
                    (true, true) => unquoted(arguments).into(),
                };
                item
            }
        }
    }

    /// The only part of a text's content.
    fn part(&self, piece: &Piece) -> Value {
        match piece {
            Piece::Reasoning(text) => json!({"type": if self.summary() { "summary_text" } else { "reasoning_text" }, "text": text}),
            Piece::Content { text, logprobs } => {
                json!({"type": "output_text", "annotations": [], "logprobs": self.logprobs(logprobs), "text": text})
            }
            Piece::Call { .. } => Value::Null,
        }
    }

    fn logprobs(&self, tokens: &[v1::TokenLogprob]) -> Value {
        if self.logprobs { json!(logprobs(tokens)) } else { json!([]) }
    }
}

/// Events → the text of a stream.
#[derive(Debug)]
pub(crate) struct Events {
    style: Style,
    sequence: u64,
    started: bool,
    collected: Collected,
    /// The running call's input, if its tool takes text.
    custom: Option<Unquoted>,
}

impl Events {
    pub(crate) fn new(style: Style) -> Self {
        Self { style, sequence: 0, started: false, collected: Collected::default(), custom: None }
    }

    pub(crate) fn said(&self) -> Vec<v1::Message> {
        self.style.said(&self.collected)
    }

    /// The response, when it is whole.
    pub(crate) fn write(&mut self, item: Item<'_>, out: &mut String) -> Option<Value> {
        match item {
            Item::Event(_, event) => return self.said_more(event, out),
            // Codex's patience takes no notice of comments.
            Item::Heartbeat if self.started => self.progress("response.in_progress", out),
            Item::Heartbeat => self.start(out),
            Item::Failed(failure) => self.failed(failure, out),
        }
        None
    }

    fn start(&mut self, out: &mut String) {
        if !self.started {
            self.started = true;
            self.progress("response.created", out);
            self.progress("response.in_progress", out);
        }
    }

    fn progress(&mut self, kind: &str, out: &mut String) {
        let response = self.style.object(Status::InProgress, Vec::new(), Value::Null, Value::Null);
        self.event(kind, json!({"response": response}), out);
    }

    fn failed(&mut self, failure: &Failure, out: &mut String) {
        self.start(out);
        let error = failure.openai();
        let error = json!({"code": error["error"]["code"], "message": error["error"]["message"]});
        let response = self.style.object(Status::Failed, Vec::new(), Value::Null, error);
        self.event("response.failed", json!({"response": response}), out);
    }

    fn said_more(&mut self, event: &Event, out: &mut String) -> Option<Value> {
        self.start(out);
        let begun = self.collected.pieces.len();
        if self.collected.add(event) {
            self.close(begun, Status::Completed, out);
            self.open(begun, out);
        }
        let at = self.collected.pieces.len().saturating_sub(1);
        match event {
            Event::Text(text) if !text.text.is_empty() || !text.logprobs.is_empty() => {
                let piece = self.collected.pieces.get(at)?;
                let place = self.style.place(piece);
                let mut fields = json!({place.index: 0, "delta": text.text});
                match piece {
                    Piece::Content { .. } => fields["logprobs"] = self.style.logprobs(&text.logprobs),
                    _ if text.text.is_empty() => return None,
                    _ => {}
                }
                self.of_item(&format!("response.{}.delta", place.text), at, fields, out);
            }
            Event::ToolCall(part) => {
                let (kind, delta) = match &mut self.custom {
                    Some(input) => ("response.custom_tool_call_input.delta", input.push(&part.arguments)),
                    None => ("response.function_call_arguments.delta", part.arguments.clone()),
                };
                if !delta.is_empty() {
                    self.of_item(kind, at, json!({"delta": delta}), out);
                }
            }
            Event::Done(done) => {
                let status = Status::of(done.finish());
                self.close(self.collected.pieces.len(), status, out);
                let response = self.style.response(&self.collected);
                self.event(&format!("response.{}", status.name()), json!({"response": response}), out);
                return Some(response);
            }
            _ => {}
        }
        None
    }

    fn open(&mut self, at: usize, out: &mut String) {
        let piece = &self.collected.pieces[at];
        let item = self.style.item(at, piece, Status::InProgress);
        let place = self.style.place(piece);
        let part = match piece {
            Piece::Reasoning(_) => Some(self.style.part(&Piece::Reasoning(String::new()))),
            Piece::Content { .. } => Some(self.style.part(&Piece::Content { text: String::new(), logprobs: Vec::new() })),
            Piece::Call { name, .. } => {
                self.custom = self.style.names.of(name).custom.then(Unquoted::default);
                None
            }
        };
        self.event("response.output_item.added", json!({"output_index": at, "item": item}), out);
        if let Some(part) = part {
            self.of_item(&format!("response.{}.added", place.part), at, json!({place.index: 0, "part": part}), out);
        }
    }

    /// Ends the last of the first `count` pieces.
    fn close(&mut self, count: usize, status: Status, out: &mut String) {
        let Some(at) = count.checked_sub(1) else { return };
        let piece = &self.collected.pieces[at];
        let item = self.style.item(at, piece, status);
        let part = self.style.part(piece);
        let place = self.style.place(piece);
        let said = format!("response.{}.done", place.text);
        match piece {
            Piece::Reasoning(text) => {
                let fields = json!({place.index: 0, "text": text});
                self.of_item(&said, at, fields, out);
            }
            Piece::Content { text, logprobs } => {
                let fields = json!({place.index: 0, "text": text, "logprobs": self.style.logprobs(logprobs)});
                self.of_item(&said, at, fields, out);
            }
            Piece::Call { .. } if item["type"] == "custom_tool_call" => {
                self.of_item("response.custom_tool_call_input.done", at, json!({"input": item["input"]}), out);
            }
            Piece::Call { .. } => {
                self.of_item("response.function_call_arguments.done", at, json!({"arguments": item["arguments"]}), out);
            }
        }
        if !part.is_null() {
            self.of_item(&format!("response.{}.done", place.part), at, json!({place.index: 0, "part": part}), out);
        }
        self.event("response.output_item.done", json!({"output_index": at, "item": item}), out);
    }

    fn of_item(&mut self, kind: &str, at: usize, fields: Value, out: &mut String) {
        let id = self.style.item_id(at, &self.collected.pieces[at]);
        let mut all = Map::new();
        all.insert("item_id".into(), id.into());
        all.insert("output_index".into(), at.into());
        if let Value::Object(fields) = fields {
            all.extend(fields);
        }
        self.event(kind, Value::Object(all), out);
    }

    /// Appends `{"type": kind, "sequence_number": …, …fields}` under its name.
    fn event(&mut self, kind: &str, fields: Value, out: &mut String) {
        let mut body = json!({"type": kind, "sequence_number": self.sequence});
        if let (Value::Object(body), Value::Object(fields)) = (&mut body, fields) {
            body.extend(fields);
        }
        self.sequence += 1;
        sse::named(kind, &body, out);
    }
}

#[cfg(test)]
#[path = "reply_tests.rs"]
mod tests;
