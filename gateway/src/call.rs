//! The one way from a request to its reply, whatever the dialect: read the body, find the model, open the generations,
//! refuse with a real status what can be refused, then collect everything or stream it.

use std::{sync::Arc, time::SystemTime};

use axum::{
    Extension, RequestPartsExt,
    body::Body,
    extract::{FromRequest, Request},
    http::{HeaderValue, header},
    response::Response,
};
use flash_proto::v1::{self, generate_event::Event};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::{
    App, body,
    error::{Code, Failure},
    reply::Collected,
    router::Caller,
    sse::{self, Item},
    upstream::Feeds,
};

/// Who asks, and since when.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) app: Arc<App>,
    pub(crate) caller: Caller,
    pub(crate) arrived: Instant,
}

/// A request whose body is JSON.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) call: Call,
    pub(crate) body: Value,
}

impl FromRequest<Arc<App>> for Asked {
    type Rejection = Failure;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Failure> {
        let arrived = Instant::now();
        let (mut parts, body) = request.into_parts();
        let Extension(caller) = parts.extract::<Extension<Caller>>().await.expect("the envelope says who asks");
        let call = Call { app: app.clone(), caller, arrived };
        let body = body::json(Request::from_parts(parts, body), &app.config.timing).await?;
        Ok(Self { call, body })
    }
}

/// How a stream is framed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Framing {
    Events,
    Lines,
}

impl Call {
    /// Opens one generation per request; all are of the model that the first one names.
    async fn open(&self, mut requests: Vec<v1::GenerateRequest>) -> Result<Feeds, Failure> {
        let model = self.resolve(&requests[0].model).await?;
        let several = requests.len() > 1;
        let together = u32::try_from(requests.len()).unwrap_or(u32::MAX);
        for (index, request) in requests.iter_mut().enumerate() {
            request.model.clone_from(&model);
            request.together = together;
            request.client.clone_from(&self.caller.client);
            request.request_id = match several {
                true => format!("{}-{index}", self.caller.request_id),
                false => self.caller.request_id.clone(),
            };
        }
        Ok(Feeds::open(&self.app, requests, self.arrived))
    }

    pub(crate) async fn resolve(&self, model: &str) -> Result<String, Failure> {
        let model = self.app.upstream.resolve(model).await?;
        self.caller.asks(&model);
        Ok(model)
    }

    /// What the default model is, the daemon has just said.
    fn heard(&self, event: &Event) {
        if let Event::Accepted(accepted) = event {
            self.caller.asks(&accepted.model);
        }
    }

    /// Everything that the generations say.
    pub(crate) async fn collect(&self, requests: Vec<v1::GenerateRequest>) -> Result<Vec<Collected>, Failure> {
        let mut feeds = self.open(requests).await?;
        let mut replies: Vec<_> = (0..feeds.len()).map(|_| Collected::default()).collect();
        let mut cut = std::pin::pin!(self.app.cut.cancelled());
        while !feeds.over() {
            let (choice, event) = tokio::select! {
                event = feeds.next() => event?,
                () = &mut cut => {
                    feeds.reason("shutdown");
                    return Err(Failure::new(Code::Draining, "the gateway is shutting down"));
                }
            };
            self.heard(&event);
            replies[choice].add(&event);
        }
        Ok(replies)
    }

    /// A 200 whose body `write` writes. What can be refused is refused with a real status, unless the client would wait too
    /// long for its headers.
    pub(crate) async fn stream(
        &self,
        requests: Vec<v1::GenerateRequest>,
        framing: Framing,
        write: impl FnMut(Item<'_>, &mut String) + Send + 'static,
    ) -> Result<Response, Failure> {
        let mut feeds = self.open(requests).await?;
        let commit = Instant::now() + self.app.config.timing.commit;
        let mut early = Vec::new();
        let mut accepted = 0;
        while accepted < feeds.len()
            && let Ok(event) = timeout_at(commit, feeds.next()).await
        {
            let event = event?;
            self.heard(&event.1);
            accepted += usize::from(matches!(event.1, Event::Accepted(_)));
            early.push(event);
        }
        if let Some(list) = self.app.upstream.known_models().filter(|_| accepted == 0) {
            // Too late to hear of it: nobody but the default model has no name by now.
            self.caller.asks(&list.default_model);
        }
        let body = sse::stream(&self.app, feeds, early, write);
        let content_type = match framing {
            Framing::Events => "text/event-stream; charset=utf-8",
            Framing::Lines => "application/x-ndjson",
        };
        let mut response = answer(body, content_type);
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }

    /// How many tokens the conversation is, and how many the context has.
    pub(crate) async fn count(&self, model: &str, chat: v1::Chat) -> Result<(u32, u32), Failure> {
        let model = self.resolve(model).await?;
        let request = v1::TokenizeRequest { model, prompt: Some(v1::tokenize_request::Prompt::Chat(chat)) };
        let counted = self.app.upstream.count(request, self.app.config.timing.load_wait).await?;
        self.caller.asks(&counted.model);
        Ok((u32::try_from(counted.ids.len()).unwrap_or(u32::MAX), counted.context_length))
    }
}

/// One JSON body.
pub(crate) fn json(body: &impl serde::Serialize) -> Response {
    answer(Body::from(serde_json::to_string(body).expect("plain data is always JSON")), "application/json")
}

fn answer(body: Body, content_type: &'static str) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs())
}

/// The model as the client wrote it, which is what replies repeat.
pub(crate) fn shown(model: &str) -> String {
    if model.is_empty() { "local".to_owned() } else { model.to_owned() }
}
