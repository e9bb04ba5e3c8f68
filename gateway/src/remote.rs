//! `flashctl --host`: the daemon's own gRPC calls on the gateway's port, over HTTP/2 and behind the same checks as every route. What
//! talks to a model or reads goes on to the daemon as it is; what changes the daemon's machine (its settings, its files, its end) is
//! for its own user, on its socket.

use std::sync::Arc;

use axum::{
    Extension, Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{self, HeaderMap, HeaderValue, Method, Version, header, request::Parts},
    response::Response,
    routing::post,
};
use flash_proto::v1;
use prost::Message;
use tonic::Status;

use crate::{
    App,
    body::collect,
    error::{Code, Failure},
    router::Caller,
};

/// The paths of all calls begin with it.
pub(crate) const PREFIX: &str = "/flash.v1.";

/// A message's length comes before it, and before that whether it is compressed.
const FRAME: usize = 5;

pub(crate) fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    let path = |call: &str| format!("{PREFIX}{call}");
    let router = ["Admin/Version", "Admin/Stats", "Admin/WatchStats", "Models/List"]
        .iter()
        .fold(router, |router, call| router.route(&path(call), post(pass)));
    let router = ["Admin", "Models", "Generate"]
        .iter()
        .fold(router, |router, service| router.route(&path(&format!("{service}/{{call}}")), post(refuse)));
    router
        .route(&path("Models/Show"), post(show))
        .route(&path("Models/Load"), post(load))
        .route(&path("Generate/Tokenize"), post(tokenize))
        .route(&path("Generate/Generate"), post(generate))
}

/// What no web page can send unasked, and answers can end with trailers.
pub(crate) fn speaks(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|media| media.as_bytes().starts_with(b"application/grpc"))
}

fn checked(parts: &Parts) -> Result<(), Failure> {
    match speaks(&parts.headers) && parts.version == Version::HTTP_2 {
        true => Ok(()),
        false => Err(Failure::new(Code::UnsupportedMediaType, "this is for `flashctl --host`, which speaks gRPC over HTTP/2")),
    }
}

async fn pass(State(app): State<Arc<App>>, request: Request) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    checked(&parts)?;
    Ok(forward(&app, parts.uri.path(), &parts.headers, body).await)
}

async fn show(State(app): State<Arc<App>>, request: Request) -> Result<Response, Failure> {
    rewrite(&app, request, |request: &mut v1::ShowRequest| Ok(&mut request.model)).await
}

async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, Failure> {
    rewrite(&app, request, |request: &mut v1::TokenizeRequest| Ok(&mut request.model)).await
}

/// Everybody takes turns as who they are, whatever they call themselves.
async fn generate(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>, request: Request) -> Result<Response, Failure> {
    rewrite(&app, request, |request: &mut v1::GenerateRequest| {
        request.client.clone_from(&caller.client);
        Ok(&mut request.model)
    })
    .await
}

/// A model may be asked for, as by any other route, with the settings that the daemon has.
async fn load(State(app): State<Arc<App>>, request: Request) -> Result<Response, Failure> {
    rewrite(&app, request, |request: &mut v1::LoadRequest| {
        let v1::LoadRequest { model, keep_alive: _, expert_cache, memory, context_length } = request;
        match expert_cache.is_some() || memory.is_some() || context_length.is_some() {
            true => Err(Failure::new(Code::InvalidValue, "the daemon's memory and context are set on its own machine")),
            false => Ok(model),
        }
    })
    .await
}

async fn refuse(request: Request) -> Result<Response, Failure> {
    checked(&request.into_parts().0)?;
    let message = "that is for the daemon's own machine; from another one its models can be asked, and asked for";
    Ok(Status::permission_denied(message).into_http())
}

/// Forwards the message as `change` leaves it, which says where in it the model is: by its name, never a path on the daemon's machine.
#[expect(clippy::big_endian_bytes, reason = "gRPC's lengths are")]
async fn rewrite<M: Message + Default>(
    app: &Arc<App>,
    request: Request,
    change: impl FnOnce(&mut M) -> Result<&mut String, Failure>,
) -> Result<Response, Failure> {
    let (parts, mut body) = request.into_parts();
    checked(&parts)?;
    let bytes = collect(&mut body, app.config.timing.body_idle).await?;
    let broken = || Failure::new(Code::InvalidValue, "the request is not one uncompressed gRPC message");
    let (frame, message) = bytes.split_at_checked(FRAME).ok_or_else(broken)?;
    let whole = frame[0] == 0 && u32::from_be_bytes([frame[1], frame[2], frame[3], frame[4]]) as usize == message.len();
    let mut message = whole.then(|| M::decode(message).ok()).flatten().ok_or_else(broken)?;
    let model = change(&mut message)?;
    *model = app.upstream.resolve(model).await?;
    let len = u32::try_from(message.encoded_len()).map_err(|_| broken())?;
    let mut framed = vec![0];
    framed.extend(len.to_be_bytes());
    framed.extend(message.encode_to_vec());
    Ok(forward(app, parts.uri.path(), &parts.headers, Body::from(Bytes::from(framed))).await)
}

/// Dropping the response drops the call. Of the headers only gRPC's own are the daemon's business.
async fn forward(app: &App, path: &str, headers: &HeaderMap, body: Body) -> Response {
    let mut request = http::Request::new(tonic::body::Body::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path.parse().expect("the path of a request");
    let ours = headers.iter().filter(|(name, _)| name.as_str().starts_with("grpc-"));
    request.headers_mut().extend(ours.map(|(name, value)| (name.clone(), value.clone())));
    request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    app.upstream.forward(request).await.map_or_else(|failure| failure.grpc().into_http(), |response| response.map(Body::new))
}
