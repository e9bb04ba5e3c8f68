//! From a connection's request to a handler: one spelling per path, then the envelope that every answer shares (Host,
//! Origin, key, draining, request id, timing, access log), then axum's routes.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, header, request::Parts},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::body::{Frame, SizeHint};
use tokio::time::Instant;

use crate::{
    App, anthropic,
    body::discard,
    config::{Compat, digest},
    error::{Code, Dialect, Failure},
    guard,
    io::Activity,
    lmstudio, ollama, openai, ops, remote,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Where a request came from; put there by the connection.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pub(crate) peer: SocketAddr,
    pub(crate) bound: IpAddr,
    pub(crate) activity: Arc<Activity>,
}

/// The path as the client spelled it, where [`canonical`] changed it; put there by the connection.
#[derive(Clone, Debug)]
pub(crate) struct Spelled(pub(crate) Uri);

/// Who is asking; put there by the envelope.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) request_id: String,
    /// The daemon's fairness key: a digest of the presented key, or the address.
    pub(crate) client: String,
    /// The canonical id of the model that is asked, as soon as it is known: a header of the answer.
    model: Arc<OnceLock<HeaderValue>>,
}

impl Caller {
    pub(crate) fn asks(&self, model: &str) {
        if let Some(model) = HeaderValue::from_str(model).ok().filter(|model| !model.is_empty()) {
            let _ = self.model.set(model);
        }
    }
}

pub(crate) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    if app.config.compat.contains(&Compat::Ollama) {
        router = router
            .route("/api/version", get(ollama::version))
            .route("/api/tags", get(ollama::tags))
            .route("/api/ps", get(ollama::ps))
            .route("/api/show", post(ollama::show))
            .route("/api/pull", post(ollama::pull))
            .route("/api/chat", post(ollama::chat))
            .route("/api/generate", post(ollama::generate))
            .route("/api/embed", post(ollama::embed))
            .route("/api/embeddings", post(ollama::embed));
    }
    if app.config.compat.contains(&Compat::Lmstudio) {
        router = router
            .route("/api/v0/models", get(lmstudio::list_v0))
            .route("/api/v0/models/{*id}", get(lmstudio::one_v0))
            .route("/api/v0/chat/completions", post(openai::chat))
            .route("/api/v0/completions", post(openai::completions))
            .route("/api/v0/embeddings", post(openai::embeddings))
            .route("/api/v1/models", get(lmstudio::list_v1));
    }
    remote::routes(router)
        .route("/", get(ops::hello))
        .route("/api/hello", get(ops::hello))
        .route("/livez", get(ops::livez))
        .route("/health", get(ops::health))
        .route("/readyz", get(ops::health))
        .route("/metrics", get(ops::metrics))
        .route("/models", get(openai::models::list))
        .route("/models/{*id}", get(openai::models::one))
        .route("/chat/completions", post(openai::chat))
        .route("/completions", post(openai::completions))
        .route("/embeddings", post(openai::embeddings))
        .route("/responses", post(openai::responses::create))
        .route("/responses/input_tokens", post(openai::responses::input_tokens))
        .route("/responses/compact", post(openai::responses::compact))
        .route("/responses/{id}/input_items", get(openai::responses::input_items))
        .route("/responses/{id}/cancel", post(openai::responses::cancel))
        .route("/responses/{id}", get(openai::responses::one).delete(openai::responses::delete))
        .route("/messages", post(anthropic::messages))
        .route("/messages/count_tokens", post(anthropic::count_tokens))
        .fallback(unknown_url)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(app.clone(), envelope))
        .with_state(app)
}

/// `/v1/x/`, `/v1//x`, `/v1/v1/x` and `/x` are one route.
pub(crate) fn canonical(app: &App, uri: &Uri) -> Option<Uri> {
    // A base URL that ends in a slash, and a path that begins with one.
    let mut path = std::borrow::Cow::from(uri.path());
    while path.contains("//") {
        path = path.replace("//", "/").into();
    }
    let path = &*path;
    let once = path.strip_prefix("/v1").filter(|rest| rest.len() > 1 && rest.starts_with('/'));
    let twice = once.and_then(|rest| rest.strip_prefix("/v1")).filter(|rest| rest.len() > 1 && rest.starts_with('/'));
    if twice.is_some() {
        app.hint_v1_v1.call_once(|| tracing::info!("a client calls /v1/v1/…: its base URL should not end in /v1 twice"));
    }
    let short = twice.or(once).unwrap_or(path);
    let short = short.strip_suffix('/').filter(|rest| !rest.is_empty()).unwrap_or(short);
    if short == uri.path() {
        return None;
    }
    let target = uri.query().map_or_else(|| short.to_owned(), |query| format!("{short}?{query}"));
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(target.parse().ok()?);
    Uri::from_parts(parts).ok()
}

fn spelled(parts: &Parts) -> &str {
    parts.extensions.get().map_or(&parts.uri, |Spelled(uri)| uri).path()
}

async fn unknown_url(request: Request) -> Failure {
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    Failure::new(Code::UnknownUrl, format!("Unknown request URL: {} {}.", parts.method, spelled(&parts)))
}

async fn method_not_allowed(request: Request) -> Failure {
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    Failure::new(Code::MethodNotAllowed, format!("{} is not allowed on {}.", parts.method, spelled(&parts)))
}

async fn envelope(State(app): State<Arc<App>>, route: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let (mut parts, body) = request.into_parts();
    let connection = parts.extensions.get::<Connection>().cloned().expect("every connection names itself");
    let request_id = request_id(&parts.headers);
    let client = guard::credentials(&parts.headers).next();
    let client = client.map_or_else(|| connection.peer.ip().to_string(), |key| format!("key-{:.8}", hex(&digest(key))));
    let model = Arc::new(OnceLock::new());
    parts.extensions.insert(Caller { request_id: request_id.clone(), client, model: model.clone() });
    let mut account = Account {
        app: app.clone(),
        connection: connection.clone(),
        route: route.as_ref().map_or("other", MatchedPath::as_str).to_owned(),
        method: method_label(&parts.method),
        request_id: request_id.clone(),
        code: 499,
        arrived,
    };
    connection.activity.begin(parts.version == Version::HTTP_2);
    let is_head = parts.method == Method::HEAD;
    let (dialect, path) = (Dialect::of(parts.uri.path(), &parts.headers), parts.uri.path().to_owned());
    let origin = guard::host(&parts, &app.config).and_then(|()| guard::origin(&parts.method, &parts.headers, &app.config));
    // A page that is welcome may read why its key is not.
    let (origin, admitted) = match origin {
        Ok(origin) => (origin, guard::key(&parts, &app.config, connection.bound)),
        Err(failure) => (None, Err(failure)),
    };
    let mut response = match admitted {
        Err(failure) => refuse(&parts.headers, body, failure).await,
        Ok(()) if parts.method == Method::OPTIONS => {
            let mut response = axum::http::StatusCode::NO_CONTENT.into_response();
            guard::preflight(&parts.headers, response.headers_mut());
            response
        }
        Ok(()) if app.draining() && parts.method == Method::POST => {
            refuse(&parts.headers, body, Failure::new(Code::Draining, "the gateway is shutting down")).await
        }
        Ok(()) => next.run(Request::from_parts(parts, body)).await,
    };
    if let Some(failure) = response.extensions_mut().remove::<Failure>().map(|failure| failure.in_words_of(&path)) {
        if dialect == Dialect::Grpc {
            response = failure.grpc().into_http();
        } else {
            *response.status_mut() = failure.status(dialect);
            *response.body_mut() = Body::from(failure.body(dialect, &request_id).to_string());
            response.headers_mut().remove(header::CONTENT_LENGTH);
        }
    }
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    if let Some(origin) = origin {
        guard::cors(origin, headers);
    }
    if app.draining() {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(model) = model.get() {
        headers.insert("x-flash-model", model.clone());
    }
    headers.insert("openai-processing-ms", u64::try_from(arrived.elapsed().as_millis()).unwrap_or(u64::MAX).into());
    let id = HeaderValue::from_str(&request_id).expect("an id is plain ASCII");
    if dialect == Dialect::Anthropic {
        headers.insert("request-id", id.clone());
    }
    headers.insert(REQUEST_ID, id);
    let code = response.status().as_u16();
    if is_head {
        // The body will be dropped unread, and that is its end.
        account.code = code;
    }
    response.map(|body| Body::new(Observed { body, account, code }))
}

async fn refuse(headers: &HeaderMap, body: Body, failure: Failure) -> Response {
    discard(headers, body).await;
    failure.into_response()
}

/// The client's own id if it is a sane one, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let sane = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte));
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(sane);
    given.map_or_else(|| format!("req_{}", unique_id()), str::to_owned)
}

/// 96 bits that differ in every call and every process. Names, not secrets.
pub(crate) fn unique_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(count);
    format!("{:016x}{count:08x}", hasher.finish())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}

/// A request until its last byte is out; logged and counted when dropped, as 499 if nothing said otherwise.
#[derive(Debug)]
struct Account {
    app: Arc<App>,
    connection: Connection,
    route: String,
    method: &'static str,
    request_id: String,
    code: u16,
    arrived: Instant,
}

impl Drop for Account {
    fn drop(&mut self) {
        self.connection.activity.end();
        let elapsed = self.arrived.elapsed();
        self.app.metrics.answered(&self.route, self.method, self.code, elapsed.as_secs_f64());
        let ms = elapsed.as_millis();
        tracing::info!(id = %self.request_id, method = self.method, route = %self.route, code = self.code, ms, peer = %self.connection.peer, "request");
    }
}

/// A body that tells its account how it ended.
#[derive(Debug)]
struct Observed {
    body: Body,
    account: Account,
    code: u16,
}

impl HttpBody for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let poll = Pin::new(&mut self.body).poll_frame(context);
        if matches!(poll, Poll::Ready(None)) {
            self.account.code = self.code;
        }
        poll
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.account.code = self.code;
        }
    }
}
