//! `/v1/chat/completions`, the reply: events → chunks of a stream, or what was collected → one completion. Pure; the
//! request is in `chat.rs`.

use flash_proto::v1::{self, done::Finish, generate_event::Event, text::Channel};

use super::types::{
    Call, Choice, Chunk, Completion, Custom, Delta, DeltaMessage, Function, Head, Logprobs, Measured, Message, Usage, logprobs, measured,
    usage,
};
use crate::{
    ask::tools::{Names, Unquoted, unquoted},
    config::ReasoningField,
    reply::{Collected, Seams, behind},
    sse,
};

/// What the request says about its reply.
#[derive(Debug)]
pub(crate) struct Style {
    pub(crate) head: Head,
    pub(crate) include_usage: bool,
    /// Whether log-probabilities were asked for: then even text-less tokens are told.
    pub(crate) logprobs: bool,
    pub(crate) names: Names,
    /// `function_call` instead of `tool_calls`.
    pub(crate) legacy: bool,
    pub(crate) reasoning: ReasoningField,
}

impl Style {
    fn finish_reason(&self, finish: Finish) -> &'static str {
        match finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls if self.legacy => "function_call",
            Finish::ToolCalls => "tool_calls",
        }
    }

    fn logprobs(&self, tokens: &[v1::TokenLogprob]) -> Option<Logprobs> {
        self.logprobs.then(|| Logprobs { content: logprobs(tokens), refusal: None })
    }

    fn call_id(&self, choice: usize, index: u32) -> String {
        let id = self.head.id.rsplit('-').next().unwrap_or_default();
        format!("call_{id}_{choice}_{index}")
    }
}

impl ReasoningField {
    /// The text for `reasoning_content` and for `reasoning`.
    fn fields(self, text: &str) -> (Option<&str>, Option<&str>) {
        match self {
            Self::ReasoningContent => (Some(text), None),
            Self::Reasoning => (None, Some(text)),
            Self::Both => (Some(text), Some(text)),
            Self::Inline => (None, None),
        }
    }
}

const OPEN: &str = "<think>\n";
const CLOSE: &str = "\n</think>\n\n";

/// Events → the text of a stream.
#[derive(Debug)]
pub(crate) struct Chunks {
    style: Style,
    choices: Vec<State>,
}

/// Of one choice.
#[derive(Debug, Default)]
struct State {
    calls: u32,
    /// A mark of thinking in the text is open.
    thinking: bool,
    /// The running call's input, if its tool takes text.
    custom: Option<Unquoted>,
    seams: Seams,
    done: Option<v1::Done>,
}

impl Chunks {
    pub(crate) fn new(style: Style, n: u32) -> Self {
        Self { style, choices: (0..n).map(|_| State::default()).collect() }
    }

    pub(crate) fn event(&mut self, choice: usize, event: &Event, out: &mut String) {
        let ends_thinking = match event {
            Event::Text(text) => text.channel() == Channel::Content && !text.text.is_empty(),
            Event::ToolCall(_) | Event::Done(_) => true,
            _ => false,
        };
        if ends_thinking && std::mem::take(&mut self.choices[choice].thinking) {
            self.content(choice, CLOSE, &[], out);
        }
        let seam = self.choices[choice].seams.before(event);
        match event {
            Event::Accepted(accepted) => {
                self.style.head.system_fingerprint.clone_from(&accepted.fingerprint);
                let delta = DeltaMessage { role: Some("assistant"), content: Some(""), ..Default::default() };
                self.choice(choice, delta, None, None, out);
            }
            Event::Text(text) if text.channel() == Channel::Reasoning => {
                if text.text.is_empty() {
                    return;
                }
                if self.style.reasoning == ReasoningField::Inline {
                    if !std::mem::replace(&mut self.choices[choice].thinking, true) {
                        self.content(choice, OPEN, &[], out);
                    }
                    return self.content(choice, &text.text, &[], out);
                }
                let (reasoning_content, reasoning) = self.style.reasoning.fields(&text.text);
                let delta = DeltaMessage { reasoning_content, reasoning, ..Default::default() };
                self.choice(choice, delta, self.style.logprobs(&[]), None, out);
            }
            Event::Text(text) => {
                if !text.text.is_empty() || !text.logprobs.is_empty() {
                    self.content(choice, &behind(seam, &text.text), &text.logprobs, out);
                }
            }
            Event::ToolCall(part) => self.call(choice, part, out),
            Event::Done(done) => {
                self.choice(choice, DeltaMessage::default(), None, Some(self.style.finish_reason(done.finish())), out);
                self.choices[choice].done = Some(done.clone());
                self.end(out);
            }
            Event::Progress(_) | Event::Prompt(_) | Event::Failed(_) | Event::Routing(_) => {}
        }
    }

    fn content(&self, choice: usize, text: &str, tokens: &[v1::TokenLogprob], out: &mut String) {
        let delta = DeltaMessage { content: Some(text), ..Default::default() };
        self.choice(choice, delta, self.style.logprobs(tokens), None, out);
    }

    fn call(&mut self, choice: usize, part: &v1::ToolCallPart, out: &mut String) {
        let state = &mut self.choices[choice];
        if part.index >= state.calls {
            state.calls = part.index + 1;
            state.custom = self.style.names.of(&part.name).custom.then(Unquoted::default);
            let custom = state.custom.is_some();
            let call = Call {
                index: Some(part.index),
                id: Some(self.style.call_id(choice, part.index)),
                kind: Some(if custom { "custom" } else { "function" }),
                function: (!custom).then_some(Function { name: Some(&part.name), arguments: "" }),
                custom: custom.then(|| Custom { name: Some(&part.name), input: String::new() }),
            };
            self.call_delta(choice, call, out);
        }
        if part.arguments.is_empty() {
            return;
        }
        let call = Call { index: Some(part.index), ..Default::default() };
        let call = match &mut self.choices[choice].custom {
            Some(input) => Call { custom: Some(Custom { name: None, input: input.push(&part.arguments) }), ..call },
            None => Call { function: Some(Function { name: None, arguments: &part.arguments }), ..call },
        };
        if call.custom.as_ref().is_none_or(|custom| !custom.input.is_empty()) {
            self.call_delta(choice, call, out);
        }
    }

    fn call_delta(&self, choice: usize, call: Call<'_>, out: &mut String) {
        let delta = match call {
            Call { function: Some(function), .. } if self.style.legacy => {
                DeltaMessage { function_call: Some(function), ..Default::default() }
            }
            call => DeltaMessage { tool_calls: Some([call]), ..Default::default() },
        };
        self.choice(choice, delta, None, None, out);
    }

    /// Once every choice is done.
    fn end(&self, out: &mut String) {
        let dones: Vec<_> = self.choices.iter().filter_map(|state| state.done.as_ref()).collect();
        if dones.len() < self.choices.len() {
            return;
        }
        if self.style.include_usage {
            let usages: Vec<_> = dones.iter().map(|done| done.usage.unwrap_or_default()).collect();
            self.chunk(Vec::new(), Some(Some(usage(&[&usages]))), dones.first().map(|done| measured(done)), out);
        }
        out.push_str(sse::DONE);
    }

    fn choice(
        &self,
        index: usize,
        delta: DeltaMessage<'_>,
        logprobs: Option<Logprobs>,
        finish_reason: Option<&'static str>,
        out: &mut String,
    ) {
        let usage = self.style.include_usage.then_some(None);
        self.chunk(vec![Delta { index, delta, logprobs, finish_reason }], usage, None, out);
    }

    fn chunk(&self, choices: Vec<Delta<'_>>, usage: Option<Option<Usage>>, x_flash: Option<Measured>, out: &mut String) {
        sse::data(&Chunk { head: &self.style.head, object: "chat.completion.chunk", choices, usage, x_flash }, out);
    }
}

/// What was collected → one completion, serialised by `give` because it borrows.
pub(crate) fn completion<T>(mut style: Style, replies: &[Collected], give: impl FnOnce(&Completion<'_>) -> T) -> T {
    if let Some(first) = replies.first() {
        style.head.system_fingerprint.clone_from(&first.accepted.fingerprint);
    }
    let inline = style.reasoning == ReasoningField::Inline;
    let texts = replies.iter().map(|reply| match (reply.content(), reply.reasoning()) {
        (content, reasoning) if inline && !reasoning.is_empty() => (format!("{OPEN}{reasoning}{CLOSE}{content}"), reasoning),
        texts => texts,
    });
    let texts: Vec<_> = texts.collect();
    let choices = replies.iter().zip(&texts).enumerate();
    let choices = choices.map(|(index, (reply, (content, reasoning)))| Choice {
        index,
        message: message(&style, index, reply, content, reasoning),
        logprobs: style.logprobs(&reply.logprobs()),
        finish_reason: style.finish_reason(reply.finish()),
    });
    let choices = choices.collect();
    let usages: Vec<_> = replies.iter().map(Collected::usage).collect();
    let x_flash = measured(replies.first().and_then(|reply| reply.done.as_ref()).unwrap_or(&v1::Done::default()));
    give(&Completion { head: &style.head, object: "chat.completion", choices, usage: usage(&[&usages]), x_flash })
}

fn message<'a>(style: &Style, choice: usize, reply: &'a Collected, content: &'a str, reasoning: &'a str) -> Message<'a> {
    let call = |(index, (name, arguments)): (u32, (&'a str, &'a str))| {
        let custom = style.names.of(name).custom;
        Call {
            index: None,
            id: Some(style.call_id(choice, index)),
            kind: Some(if custom { "custom" } else { "function" }),
            function: (!custom).then_some(Function { name: Some(name), arguments }),
            custom: custom.then(|| Custom { name: Some(name), input: unquoted(arguments) }),
        }
    };
    let mut tool_calls: Vec<_> = (0..).zip(reply.calls()).map(call).collect();
    let only_calls = content.is_empty() && !tool_calls.is_empty();
    let function_call = tool_calls.pop_if(|_| style.legacy).and_then(|call| call.function);
    let (reasoning_content, reasoning) = if reasoning.is_empty() { (None, None) } else { style.reasoning.fields(reasoning) };
    Message {
        role: "assistant",
        content: (!only_calls).then_some(content),
        refusal: None,
        reasoning_content,
        reasoning,
        tool_calls,
        function_call,
    }
}

#[cfg(test)]
#[path = "chunks_tests.rs"]
mod tests;
