//! `/v1/responses`, which Codex and the newer SDKs speak: handlers that join the pure translations to the daemon, the wire
//! and the store of earlier responses.

mod fit;
mod items;
mod reply;
mod request;
pub(crate) mod store;

use std::sync::{Arc, PoisonError};

use axum::{
    Extension, Json,
    extract::{Path, Query, Request as Received, State, rejection::PathRejection},
    http::{Uri, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use flash_proto::v1;
use serde_json::{Value, json};

use self::{
    reply::{Events, Style},
    request::Request,
    store::Stored,
};
use crate::{
    App,
    body::discard,
    call::{self, Asked, Call, Framing},
    error::{Code, Failure},
    router::{Caller, unique_id},
};

fn read(call: &Call, body: &Value) -> Result<Request, Failure> {
    let request = request::read(body, &|id| find(&call.app, &call.caller, id))?;
    call.app.note_unknown(&request.unknown)?;
    Ok(request)
}

fn find(app: &App, caller: &Caller, id: &str) -> Option<Arc<Stored>> {
    app.responses.lock().unwrap_or_else(PoisonError::into_inner).get(id, &caller.client)
}

/// Shortens the conversation if it is longer than the context; what cannot be shortened is the daemon's to refuse.
async fn fit(call: &Call, generate: &mut v1::GenerateRequest) -> Result<(), Failure> {
    let Some(v1::generate_request::Prompt::Chat(chat)) = &mut generate.prompt else { return Ok(()) };
    let (mut tokens, context) = call.count(&generate.model, chat.clone()).await?;
    // A context of 0 is not known.
    let mut most = context.wrapping_sub(1);
    while tokens > most {
        most = fit::target(context, generate.max_tokens);
        let share = f64::from(tokens.saturating_sub(most)) / f64::from(tokens);
        if !fit::shorten(&mut chat.messages, share) {
            break;
        }
        (tokens, _) = call.count(&generate.model, chat.clone()).await?;
    }
    Ok(())
}

/// `POST /v1/responses`.
pub(crate) async fn create(Asked { call, body }: Asked) -> Result<Response, Failure> {
    let Request { mut generate, stream, truncates, kept, echo, names, unknown: _ } = read(&call, &body)?;
    if truncates {
        fit(&call, &mut generate).await?;
    }
    let style = Style {
        id: unique_id(),
        created: call::now(),
        model: call::shown(&generate.model),
        logprobs: generate.top_logprobs.is_some(),
        names,
        echo,
    };
    let (app, client) = (call.app.clone(), call.caller.client.clone());
    let input = kept.as_ref().map(|_| items::of(&body["input"], &style.id).to_string()).unwrap_or_default();
    let keep = move |response: Value, said: Vec<v1::Message>| {
        let Some(mut messages) = kept.clone() else { return };
        messages.extend(said);
        let stored = Stored::new(client.clone(), &response, messages, &input);
        app.responses.lock().unwrap_or_else(PoisonError::into_inner).put(stored);
    };
    if stream {
        let mut events = Events::new(style);
        let write = move |item: crate::sse::Item<'_>, out: &mut String| {
            if let Some(response) = events.write(item, out) {
                keep(response, events.said());
            }
        };
        return call.stream(vec![generate], Framing::Events, write).await;
    }
    let replies = call.collect(vec![generate]).await?;
    let response = style.response(&replies[0]);
    let answer = call::json(&response);
    keep(response, style.said(&replies[0]));
    Ok(answer)
}

/// `POST /v1/responses/input_tokens`.
pub(crate) async fn input_tokens(Asked { call, body }: Asked) -> Result<Json<Value>, Failure> {
    let Request { generate, .. } = read(&call, &body)?;
    let Some(v1::generate_request::Prompt::Chat(chat)) = generate.prompt else { unreachable!("requests of this route are chats") };
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": call.count(&generate.model, chat).await?.0})))
}

/// `GET /v1/responses/{id}`.
pub(crate) async fn one(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    id: Result<Path<String>, PathRejection>,
) -> Result<impl IntoResponse, Failure> {
    let stored = find(&app, &caller, &named(id)).ok_or_else(not_found)?;
    Ok(([(CONTENT_TYPE, "application/json")], stored.response.to_string()))
}

/// `DELETE /v1/responses/{id}`.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, Failure> {
    let id = named(id);
    let removed = app.responses.lock().unwrap_or_else(PoisonError::into_inner).remove(&id, &caller.client);
    if removed { Ok(Json(json!({"id": id, "object": "response", "deleted": true}))) } else { Err(not_found()) }
}

/// `GET /v1/responses/{id}/input_items`.
pub(crate) async fn input_items(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    id: Result<Path<String>, PathRejection>,
    uri: Uri,
) -> Result<Json<Value>, Failure> {
    let stored = find(&app, &caller, &named(id)).ok_or_else(not_found)?;
    let query = Query::try_from_uri(&uri).map(|Query(query)| query).unwrap_or_default();
    Ok(Json(items::page(&stored.input, &query)))
}

/// `POST /v1/responses/{id}/cancel`.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    id: Result<Path<String>, PathRejection>,
    request: Received,
) -> Failure {
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    let message = "Only responses made in the background can be cancelled, and none are here; close the connection to end one.";
    find(&app, &caller, &named(id)).map_or_else(not_found, |_| Failure::new(Code::UnsupportedValue, message))
}

/// `POST /v1/responses/compact`.
pub(crate) async fn compact(request: Received) -> Failure {
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    let message = "Conversations are not compacted here; ask for a summary with a request of its own and go on with that as input.";
    Failure::new(Code::UnsupportedValue, message)
}

/// An id that is not UTF-8 names nothing.
fn named(id: Result<Path<String>, PathRejection>) -> String {
    id.map_or_else(|_| "\u{fffd}".to_owned(), |Path(id)| id)
}

fn not_found() -> Failure {
    Failure::new(Code::ResponseNotFound, "No response with this id is kept; only recent ones are, and none sent with store: false.")
}
