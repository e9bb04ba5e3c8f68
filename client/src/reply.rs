//! One answer: the request built from the command line, the stream of events read to its end. What is done with the text is
//! the caller's: `run` and `chat` hand in a sink.

use std::io::{self, IsTerminal};

use flash_proto::v1::{
    Accepted, Chat, Done, GenerateEvent, GenerateRequest, Message, Progress, Routing, Sampling, generate_event::Event,
    generate_request::Prompt, progress::Phase, text::Channel,
};
use tonic::Streaming;

use crate::{
    args::{Generation, Global, Thinking},
    connect::Daemon,
    failure::Failure,
    term::{self, Paint, StatusLine},
};

/// What came back; all but `text` is absent until the daemon said so, which a broken stream may never do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) text: String,
    pub(crate) reasoning: String,
    pub(crate) accepted: Option<Accepted>,
    pub(crate) done: Option<Done>,
}

/// What a stream says on the way.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Said<'a> {
    Accepted(&'a Accepted),
    Text(&'a str),
    Reasoning(&'a str),
    /// If the request asked for it.
    Routing(&'a Routing),
}

pub(crate) fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into(), ..Message::default() }
}

pub(crate) fn chat(messages: Vec<Message>) -> Chat {
    Chat { messages, ..Chat::default() }
}

/// As [`chat`], with what the command line says of thinking.
pub(crate) fn thinking_chat(messages: Vec<Message>, thinking: &Thinking) -> Chat {
    let mut kwargs = serde_json::Map::new();
    if thinking.no_think || thinking.think.is_some() {
        kwargs.insert("enable_thinking".into(), (!thinking.no_think).into());
    }
    if let Some(effort) = thinking.think.as_deref().filter(|effort| !effort.is_empty()) {
        kwargs.insert("reasoning_effort".into(), effort.into());
    }
    let template_kwargs_json = if kwargs.is_empty() { String::new() } else { serde_json::Value::Object(kwargs).to_string() };
    Chat { template_kwargs_json, ..chat(messages) }
}

/// Shows what a model thinks on standard error, dimmed, to a person who reads the answer at a terminal.
#[derive(Debug)]
pub(crate) struct Thoughts {
    shown: bool,
    open: bool,
}

impl Thoughts {
    pub(crate) fn new(thinking: &Thinking) -> Self {
        Self { shown: !thinking.hide_thinking && io::stdout().is_terminal(), open: false }
    }

    pub(crate) fn say(&mut self, text: &str) {
        if self.shown {
            term::note_part(&Paint::stderr().dim(text));
            self.open = true;
        }
    }

    /// A blank line between thoughts and answer.
    pub(crate) fn close(&mut self) {
        if std::mem::take(&mut self.open) {
            term::note("\n");
        }
    }
}

/// A thought that is cut off ends its line, too.
impl Drop for Thoughts {
    fn drop(&mut self) {
        self.close();
    }
}

pub(crate) fn request(model: &str, prompt: Prompt, generation: &Generation) -> GenerateRequest {
    let sampling = Sampling {
        temperature: generation.temperature,
        top_k: generation.top_k,
        top_p: generation.top_p,
        min_p: generation.min_p,
        repetition_penalty: generation.repeat_penalty,
        frequency_penalty: generation.frequency_penalty,
        presence_penalty: generation.presence_penalty,
        seed: generation.seed,
        ..Sampling::default()
    };
    GenerateRequest {
        model: model.into(),
        prompt: Some(prompt),
        sampling: Some(sampling),
        stop: generation.stop.clone(),
        max_tokens: generation.max_tokens,
        client: format!("flashctl-{}", std::process::id()),
        ..GenerateRequest::default()
    }
}

/// Reads the answer into `reply`, which keeps what came even if this fails or is dropped. Dropping it cancels the request.
pub(crate) async fn receive(
    daemon: &Daemon,
    request: GenerateRequest,
    global: &Global,
    reply: &mut Reply,
    sink: &mut (dyn FnMut(Said) -> Result<(), Failure> + Send),
) -> Result<(), Failure> {
    let mut line = StatusLine::new(global.quiet);
    let stream = daemon.generate().generate(request).await;
    let mut stream: Streaming<GenerateEvent> = stream.map_err(|status| daemon.failure(&status, "answering"))?.into_inner();
    loop {
        let event = stream.message().await.map_err(|status| daemon.failure(&status, "answering"))?;
        let Some(event) = event else { return Err(daemon.went_away("answering")) };
        match event.event {
            Some(Event::Accepted(accepted)) => sink(Said::Accepted(reply.accepted.insert(accepted)))?,
            Some(Event::Progress(progress)) => line.show(&progress_text(&progress)),
            Some(Event::Text(text)) if text.text.is_empty() => {}
            Some(Event::Text(text)) if text.channel() == Channel::Reasoning => {
                line.clear();
                reply.reasoning += &text.text;
                sink(Said::Reasoning(&text.text))?;
            }
            Some(Event::Text(text)) => {
                line.clear();
                reply.text += &text.text;
                sink(Said::Text(&text.text))?;
            }
            Some(Event::Routing(routing)) => {
                sink(Said::Routing(&routing))?;
            }
            Some(Event::Done(done)) => {
                reply.done = Some(done);
                return Ok(());
            }
            Some(Event::Failed(failed)) => return Err(Failure::from_failed(&failed, &daemon.log())),
            // Nothing that is asked for here calls tools.
            Some(Event::Prompt(_) | Event::ToolCall(_)) => {}
            // An event of a newer daemon.
            None => {}
        }
    }
}

fn progress_text(progress: &Progress) -> String {
    match progress.phase() {
        Phase::Queued => "waiting to begin".into(),
        Phase::Prefill => format!("reading the prompt {}/{} tokens", progress.done_tokens, progress.total_tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinking_is_the_templates_business() {
        let check = |thinking: Thinking, expected: &str| assert_eq!(thinking_chat(Vec::new(), &thinking).template_kwargs_json, expected);
        let think = |effort: &str| Thinking { think: Some(effort.into()), ..Thinking::default() };
        check(Thinking::default(), "");
        check(think(""), r#"{"enable_thinking":true}"#);
        check(think("low"), r#"{"enable_thinking":true,"reasoning_effort":"low"}"#);
        check(Thinking { no_think: true, ..Thinking::default() }, r#"{"enable_thinking":false}"#);
    }

    #[test]
    fn absent_flags_stay_absent() {
        let request = request("m", Prompt::Text("p".into()), &Generation { temperature: Some(0.0), ..Generation::default() });
        let sampling = request.sampling.expect("always sent");
        assert_eq!((sampling.temperature, sampling.top_p, sampling.seed), (Some(0.0), None, None));
        assert_eq!(request.max_tokens, None);
    }
}
