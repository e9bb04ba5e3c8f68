//! Anthropic's dialect, which Claude Code speaks: handlers that join the pure translations to the daemon and the wire.

mod reply;
mod request;

use axum::{Json, response::Response};
use serde_json::{Value, json};

use self::reply::{Events, Style};
use crate::{
    call::{self, Asked, Framing},
    error::Failure,
    router::unique_id,
};

/// `POST /v1/messages`.
pub(crate) async fn messages(Asked { call, body }: Asked) -> Result<Response, Failure> {
    let request::Request { generate, stream, thinking, prompt_only, unknown } = request::read(&body)?;
    call.app.note_unknown(&unknown)?;
    let (model, request_id) = (call::shown(&generate.model), call.caller.request_id.clone());
    let style = Style { id: unique_id(), model, request_id, thinking, prompt_only };
    if stream {
        let mut events = Events::new(style);
        return call.stream(vec![generate], Framing::Events, move |item, out| events.write(item, out)).await;
    }
    let replies = call.collect(vec![generate]).await?;
    Ok(call::json(&style.message(&replies[0])))
}

/// `POST /v1/messages/count_tokens`; asked in bursts, so it stays out of the queue.
pub(crate) async fn count_tokens(Asked { call, body }: Asked) -> Result<Json<Value>, Failure> {
    let request::Counted { model, chat, unknown } = request::counted(&body)?;
    call.app.note_unknown(&unknown)?;
    Ok(Json(json!({"input_tokens": call.count(&model, chat).await?.0})))
}
