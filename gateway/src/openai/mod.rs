//! OpenAI's dialect: handlers that join the pure translations to the daemon and the wire.

pub(crate) mod chat;
mod chunks;
pub(crate) mod models;
pub(crate) mod types;

use axum::response::Response;

use self::{
    chunks::{Chunks, Style},
    types::Head,
};
use crate::{
    ask,
    call::{self, Asked, Framing},
    error::Failure,
    router::unique_id,
};

/// What all of a reply's chunks repeat.
fn head(prefix: &str, model: &str) -> Head {
    Head { id: format!("{prefix}-{}", unique_id()), created: call::now(), model: call::shown(model), system_fingerprint: String::new() }
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
        return call.stream(requests, Framing::Events, move |item, out| chunks.write(item, out)).await;
    }
    let replies = call.collect(requests).await?;
    Ok(chunks::completion(style, &replies, |body| call::json(body, &replies)))
}
