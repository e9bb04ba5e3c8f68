//! OpenAI's dialect: handlers that join the pure translations (`chat.rs`, `models.rs`) to the daemon and the wire.

pub(crate) mod chat;
pub(crate) mod models;
pub(crate) mod types;

use std::{sync::Arc, time::SystemTime};

use axum::{
    Extension,
    body::Body,
    extract::State,
    http::{HeaderValue, header},
    response::Response,
};
use flash_proto::v1::generate_event::Event;
use tokio::time::{Instant, timeout};

use self::{
    chat::{Chunks, Collected},
    types::Head,
};
use crate::{App, body, error::Failure, router::Caller, sse, upstream::Feed};

/// `POST /v1/chat/completions`.
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: axum::extract::Request,
) -> Result<Response, Failure> {
    let arrived = Instant::now();
    let chat::Request { mut generate, stream, include_usage, unknown } = chat::read(&body::json(request, &app.config.timing).await?)?;
    app.note_unknown(&unknown)?;
    let requested = std::mem::take(&mut generate.model);
    generate.model = app.upstream.resolve(&requested).await?;
    generate.request_id.clone_from(&caller.request_id);
    generate.client.clone_from(&caller.client);
    let logprobs = generate.top_logprobs.is_some();
    let mut head = Head {
        id: format!("chatcmpl-{}", crate::router::unique_id()),
        created: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        model: if requested.is_empty() { "local".into() } else { requested },
        system_fingerprint: String::new(),
    };
    let mut feed = Feed::open(&app, generate, arrived);
    if !stream {
        let mut collected = Collected::default();
        let mut model = String::new();
        loop {
            let event = feed.next().await?;
            if let Event::Accepted(accepted) = &event {
                model.clone_from(&accepted.model);
            }
            if let Some(text) = collected.add(event, &mut head, logprobs) {
                return Ok(answer(Body::from(text), "application/json", &model));
            }
        }
    }
    // What can be refused is refused with a real status, unless the client would wait too long for its headers.
    let first = timeout(app.config.timing.commit, feed.next()).await.ok().transpose()?;
    let model = match &first {
        Some(Event::Accepted(accepted)) => accepted.model.clone(),
        _ => String::new(),
    };
    let mut chunks = Chunks { head, include_usage, logprobs };
    let body = sse::stream(&app, feed, first, move |item, out| match item {
        sse::Item::Event(event) => chunks.write(event, out),
        sse::Item::Heartbeat => out.push_str(": keepalive\n\n"),
        sse::Item::Failed(failure) => {
            sse::data(&failure.openai(), out);
            out.push_str("data: [DONE]\n\n");
        }
    });
    let mut response = answer(body, "text/event-stream; charset=utf-8", &model);
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// A 200 with the canonical id of the model, if it is known by now.
fn answer(body: Body, content_type: &'static str, model: &str) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(model) = HeaderValue::from_str(model).ok().filter(|model| !model.is_empty()) {
        response.headers_mut().insert("x-flash-model", model);
    }
    response
}
