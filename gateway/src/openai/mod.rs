//! OpenAI's dialect: handlers that join the pure translations to the daemon and the wire.

pub(crate) mod chat;
mod chunks;
mod completions;
pub(crate) mod models;
pub(crate) mod responses;
pub(crate) mod types;

use axum::response::Response;
use flash_proto::v1::generate_event::Event;

use self::{
    chunks::{Chunks, Style},
    types::Head,
};
use crate::{
    ask,
    call::{self, Asked, Framing},
    error::{Code, Failure},
    json::Node,
    router::unique_id,
    sse::{self, Item},
};

/// What all of a reply's chunks repeat.
fn head(prefix: &str, model: &str) -> Head {
    Head { id: format!("{prefix}-{}", unique_id()), created: call::now(), model: call::shown(model), system_fingerprint: String::new() }
}

/// A writer of streams as both routes have them: events as `event` writes them, comments while there are none, and what fails before the
/// end.
fn writer(mut event: impl FnMut(usize, &Event, &mut String) + Send + 'static) -> impl FnMut(Item<'_>, &mut String) + Send + 'static {
    move |item, out| match item {
        Item::Event(choice, said) => event(choice, said, out),
        Item::Heartbeat => sse::comment(out),
        Item::Failed(failure) => {
            sse::data(&failure.openai(), out);
            out.push_str(sse::DONE);
        }
    }
}

/// `POST /v1/chat/completions`.
pub(crate) async fn chat(Asked { call, body }: Asked) -> Result<Response, Failure> {
    let chat::Request { generate, n, stream, include_usage, names, legacy, unknown } = chat::read(&body)?;
    call.app.note_unknown(&unknown)?;
    let logprobs = generate.top_logprobs.is_some();
    let reasoning = call.app.config.reasoning_field;
    let style = Style { head: head("chatcmpl", &generate.model), include_usage, logprobs, names, legacy, reasoning };
    let requests = ask::choices(generate, n);
    if stream {
        let mut chunks = Chunks::new(style, n);
        return call.stream(requests, Framing::Events, writer(move |choice, event, out| chunks.event(choice, event, out))).await;
    }
    let replies = call.collect(requests).await?;
    Ok(chunks::completion(style, &replies, |body| call::json(body)))
}

/// `POST /v1/completions`.
pub(crate) async fn completions(Asked { call, body }: Asked) -> Result<Response, Failure> {
    let completions::Request { requests, stream, mut style, unknown } = completions::read(&body, |model| head("cmpl", model))?;
    call.app.note_unknown(&unknown)?;
    if stream {
        let mut chunks = completions::Chunks::new(style, requests.len());
        return call.stream(requests, Framing::Events, writer(move |choice, event, out| chunks.event(choice, event, out))).await;
    }
    let replies = call.collect(requests).await?;
    Ok(call::json(&style.completion(&replies)))
}

/// `POST /v1/embeddings`: no model that can be loaded here makes any.
pub(crate) async fn embeddings(Asked { call, body }: Asked) -> Result<Response, Failure> {
    let mut top = Node::root(&body).object()?;
    let model = top.read("model", |node| node.text())?.unwrap_or_default();
    top.require("input")?;
    call.resolve(model).await?;
    Err(Failure::at(Code::EmbeddingsNotSupported, "model", "The model answers in text and makes no embeddings."))
}
