//! What a client is told when something fails: [`Failure`], the table of codes, the shapes that the dialects give it, and
//! the one mapping from the daemon's gRPC statuses to HTTP. Messages never quote the prompt. Start-up errors are in `config.rs`.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use flash_proto::{code, v1};
use serde_json::{Value, json};
use tonic::Status;

use crate::remote;

/// The machine-readable `code` of an error body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    InvalidJson,
    InvalidValue,
    MissingParameter,
    UnsupportedValue,
    ContextLength,
    InvalidApiKey,
    HostNotAllowed,
    OriginNotAllowed,
    PreviousResponseNotFound,
    ModelNotFound,
    ResponseNotFound,
    ThreadNotFound,
    UnknownUrl,
    MethodNotAllowed,
    RequestTooLarge,
    UnsupportedMediaType,
    ChatTemplate,
    SchemaNotSupported,
    UnsupportedModality,
    EmbeddingsNotSupported,
    FimNotSupported,
    ModelInvalid,
    QueueFull,
    Engine,
    Cancelled,
    DaemonUnavailable,
    ModelLoading,
    Draining,
    Busy,
    InsufficientMemory,
    QueueTimeout,
}

impl Code {
    /// Name, HTTP status and OpenAI error type. 408 and 409 are avoided: the SDKs retry them.
    const fn row(self) -> (&'static str, u16, &'static str) {
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        match self {
            Self::InvalidJson => ("invalid_json", 400, INVALID),
            Self::InvalidValue => ("invalid_value", 400, INVALID),
            Self::MissingParameter => ("missing_required_parameter", 400, INVALID),
            Self::UnsupportedValue => ("unsupported_value", 400, INVALID),
            Self::ContextLength => (code::CONTEXT_LENGTH, 400, INVALID),
            Self::InvalidApiKey => ("invalid_api_key", 401, "authentication_error"),
            Self::HostNotAllowed => ("host_not_allowed", 403, "permission_error"),
            Self::OriginNotAllowed => ("origin_not_allowed", 403, "permission_error"),
            Self::PreviousResponseNotFound => ("previous_response_not_found", 400, INVALID),
            Self::ModelNotFound => (code::MODEL_NOT_FOUND, 404, INVALID),
            Self::ResponseNotFound => ("response_not_found", 404, INVALID),
            Self::ThreadNotFound => ("thread_not_found", 404, INVALID),
            Self::UnknownUrl => ("unknown_url", 404, INVALID),
            Self::MethodNotAllowed => ("method_not_allowed", 405, INVALID),
            Self::RequestTooLarge => ("request_too_large", 413, INVALID),
            Self::UnsupportedMediaType => ("unsupported_media_type", 415, INVALID),
            Self::ChatTemplate => (code::CHAT_TEMPLATE, 422, INVALID),
            Self::SchemaNotSupported => (code::SCHEMA_NOT_SUPPORTED, 422, INVALID),
            Self::UnsupportedModality => ("unsupported_modality", 422, INVALID),
            Self::EmbeddingsNotSupported => ("embeddings_not_supported", 422, INVALID),
            Self::FimNotSupported => (code::FIM_NOT_SUPPORTED, 422, INVALID),
            Self::ModelInvalid => (code::MODEL_INVALID, 422, INVALID),
            Self::QueueFull => (code::QUEUE_FULL, 429, "rate_limit_error"),
            Self::Engine => (code::ENGINE, 500, SERVER),
            Self::Cancelled => (code::CANCELLED, 500, SERVER),
            Self::DaemonUnavailable => ("daemon_unavailable", 503, SERVER),
            Self::ModelLoading => (code::MODEL_LOADING, 503, SERVER),
            Self::Draining => (code::DRAINING, 503, SERVER),
            Self::Busy => (code::BUSY, 503, SERVER),
            Self::InsufficientMemory => (code::INSUFFICIENT_MEMORY, 503, SERVER),
            Self::QueueTimeout => ("queue_timeout", 504, SERVER),
        }
    }

    /// The code of the daemon with this name; what it invents later is an engine error.
    fn of_daemon(name: &str) -> Self {
        match name {
            code::MODEL_NOT_FOUND => Self::ModelNotFound,
            code::MODEL_INVALID => Self::ModelInvalid,
            code::MODEL_LOADING => Self::ModelLoading,
            code::CONTEXT_LENGTH => Self::ContextLength,
            code::INVALID_VALUE => Self::InvalidValue,
            code::CHAT_TEMPLATE => Self::ChatTemplate,
            code::SCHEMA_NOT_SUPPORTED => Self::SchemaNotSupported,
            code::FIM_NOT_SUPPORTED => Self::FimNotSupported,
            code::QUEUE_FULL => Self::QueueFull,
            code::INSUFFICIENT_MEMORY => Self::InsufficientMemory,
            code::DRAINING => Self::Draining,
            code::BUSY => Self::Busy,
            code::CANCELLED => Self::Cancelled,
            _ => Self::Engine,
        }
    }

    /// Seconds to wait when nobody knows better; 429 and 503 always carry some.
    fn retry_after(self) -> Option<u64> {
        match self {
            Self::QueueFull | Self::DaemonUnavailable | Self::Draining => Some(2),
            Self::ModelLoading => Some(5),
            Self::InsufficientMemory | Self::Busy => Some(10),
            _ => None,
        }
    }
}

/// One refusal, before a dialect gives it a shape.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
    /// The request field at fault, as the client wrote it.
    pub(crate) param: Option<String>,
    pub(crate) retry_after: Option<u64>,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: None, retry_after: code.retry_after() }
    }

    pub(crate) fn at(code: Code, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(code, message) }
    }

    pub(crate) fn status(&self, dialect: Dialect) -> StatusCode {
        let status = match (dialect, self.code) {
            // Anthropic's clients know 503 and this one for a service that is there and busy.
            (Dialect::Anthropic, Code::ModelLoading | Code::Busy | Code::InsufficientMemory) => 529,
            _ => self.code.row().1,
        };
        StatusCode::from_u16(status).expect("the table holds valid statuses")
    }

    /// The body in OpenAI's dialect: all four keys, always.
    pub(crate) fn openai(&self) -> Value {
        let (code, _, kind) = self.code.row();
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": code}})
    }

    pub(crate) fn anthropic(&self, request_id: &str) -> Value {
        let kind = match self.status(Dialect::Anthropic).as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            500 => "api_error",
            503 | 529 => "overloaded_error",
            504 => "timeout_error",
            _ => "invalid_request_error",
        };
        let message = match self.code {
            Code::ContextLength => prompt_too_long(&self.message),
            _ => None,
        };
        let mut error = json!({"type": kind, "message": message.as_ref().unwrap_or(&self.message)});
        if self.code == Code::ThreadNotFound {
            // By this the SDKs know to send the whole conversation.
            error["details"] = json!({"error_code": self.code.row().0});
        }
        json!({"type": "error", "error": error, "request_id": request_id})
    }

    pub(crate) fn ollama(&self) -> Value {
        json!({"error": self.message})
    }

    pub(crate) fn body(&self, dialect: Dialect, request_id: &str) -> Value {
        match dialect {
            Dialect::OpenAi => self.openai(),
            Dialect::Anthropic => self.anthropic(request_id),
            Dialect::Ollama => self.ollama(),
            Dialect::Grpc => unreachable!("gRPC has its failures in its headers"),
        }
    }

    /// For flashctl, which reads the code beside the status.
    pub(crate) fn grpc(&self) -> Status {
        let (name, http, _) = self.code.row();
        let code = match http {
            401 => tonic::Code::Unauthenticated,
            403 => tonic::Code::PermissionDenied,
            404 | 405 => tonic::Code::Unimplemented,
            429 => tonic::Code::ResourceExhausted,
            500.. => tonic::Code::Unavailable,
            _ => tonic::Code::InvalidArgument,
        };
        let mut status = Status::new(code, &self.message);
        status.metadata_mut().insert("flash-code", tonic::metadata::MetadataValue::from_static(name));
        match self.retry_after {
            Some(seconds) => code::with_retry_after(status, seconds),
            None => status,
        }
    }
}

/// The sentence by which Claude Code knows that it must shorten the conversation, from the daemon's, which names the limit
/// first.
fn prompt_too_long(message: &str) -> Option<String> {
    let mut numbers = message.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let (limit, prompt) = (numbers.next()?, numbers.next()?);
    numbers.next().is_none().then(|| format!("prompt is too long: {prompt} tokens > {limit} maximum"))
}

/// Whose shapes a route speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAi,
    Anthropic,
    Ollama,
    Grpc,
}

impl Dialect {
    /// `path` without `/v1`. The list of models has two masters, who tell themselves apart by a header.
    pub(crate) fn of(path: &str, headers: &HeaderMap) -> Self {
        let under = |folder: &str| path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if under("/messages") || under("/models") && headers.contains_key("anthropic-version") {
            Self::Anthropic
        } else if under("/api") && !under("/api/v0") && !under("/api/v1") && !under("/api/hello") {
            Self::Ollama
        } else if path.starts_with(remote::PREFIX) && remote::speaks(headers) {
            Self::Grpc
        } else {
            Self::OpenAi
        }
    }
}

/// Status and headers; the body is the envelope's to write, which knows the route and with it the dialect.
impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status(Dialect::OpenAi);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.clamp(1, 60).into());
        }
        match self.code {
            Code::InvalidApiKey => drop(headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            // Unloaded by force: a retry would load it again. What stopped the engine would stop it again.
            Code::Cancelled | Code::Engine => drop(headers.insert("x-should-retry", HeaderValue::from_static("false"))),
            _ => {}
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl Failure {
    /// The daemon names what is to blame as chat completions do; other routes have other words. `path` without `/v1`.
    pub(crate) fn in_words_of(mut self, path: &str) -> Self {
        let words: &[(&str, &str)] = match path {
            "/completions" => &[("messages", "prompt")],
            "/responses" | "/responses/input_tokens" => &[("messages", "input"), ("response_format", "text.format")],
            "/messages" | "/messages/count_tokens" => &[("response_format", "output_config.format")],
            "/api/chat" | "/api/generate" => &[("response_format", "format")],
            _ => &[],
        };
        for (daemon, route) in words {
            if let Some(rest) = self.message.strip_prefix(daemon).filter(|rest| rest.starts_with(':')) {
                self.message = format!("{route}{rest}");
            }
            if self.param.as_deref() == Some(daemon) {
                self.param = Some((*route).to_owned());
            }
        }
        self
    }
}

/// A gRPC status, from the daemon or from the way to it.
pub(crate) fn of_status(status: &Status) -> Failure {
    let Some(name) = code::of(status) else { return of_transport(status) };
    let code = Code::of_daemon(name);
    let default_param = match code {
        Code::ModelNotFound => Some("model"),
        Code::ContextLength | Code::ChatTemplate => Some("messages"),
        _ => None,
    };
    Failure {
        code,
        message: status.message().to_owned(),
        param: code::param(status).or(default_param).map(str::to_owned),
        retry_after: code::retry_after(status).or(code.retry_after()),
    }
}

/// A status without a code was not written by our daemon's services.
fn of_transport(status: &Status) -> Failure {
    match status.code() {
        tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => {
            Failure::new(Code::RequestTooLarge, "the request is larger than the daemon accepts")
        }
        tonic::Code::Unimplemented => {
            Failure::new(Code::DaemonUnavailable, "flashd and flash-gateway are of different versions; install both from one release")
        }
        _ => daemon_down(),
    }
}

/// A request that failed after it was accepted.
pub(crate) fn of_failed(failed: &v1::Failed) -> Failure {
    Failure::new(Code::of_daemon(&failed.code), &*failed.message)
}

pub(crate) fn daemon_down() -> Failure {
    Failure::new(Code::DaemonUnavailable, "flashd is not answering; start it with `flashctl daemon start`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemon_statuses_become_http() {
        let check = |status: Status, http: u16, code: &str, param: Option<&str>, retry_after: Option<u64>| {
            let failure = of_status(&status);
            let body = failure.openai();
            assert_eq!(failure.status(Dialect::OpenAi).as_u16(), http, "{status:?}");
            assert_eq!(body["error"]["code"], code);
            assert_eq!(body["error"]["param"].as_str(), param);
            assert_eq!(failure.retry_after, retry_after);
        };
        let coded = |code| code::status(code, "text");
        check(coded(code::MODEL_NOT_FOUND), 404, "model_not_found", Some("model"), None);
        check(coded(code::CONTEXT_LENGTH), 400, "context_length_exceeded", Some("messages"), None);
        check(code::with_param(coded(code::INVALID_VALUE), "logit_bias"), 400, "invalid_value", Some("logit_bias"), None);
        check(coded(code::CHAT_TEMPLATE), 422, "chat_template_error", Some("messages"), None);
        check(code::with_retry_after(coded(code::QUEUE_FULL), 7), 429, "queue_full", None, Some(7));
        check(coded(code::MODEL_LOADING), 503, "model_loading", None, Some(5));
        check(coded(code::DRAINING), 503, "draining", None, Some(2));
        check(coded(code::SCHEMA_NOT_SUPPORTED), 422, "schema_not_supported", None, None);
        check(coded(code::FIM_NOT_SUPPORTED), 422, "fim_not_supported", None, None);
        check(coded(code::ENGINE), 500, "engine_error", None, None);
        check(Status::unavailable("connection refused"), 503, "daemon_unavailable", None, Some(2));
        check(Status::unknown("h2 protocol error"), 503, "daemon_unavailable", None, Some(2));
        check(Status::out_of_range("decoded message length too large"), 413, "request_too_large", None, None);
    }

    #[test]
    fn anthropic_has_types_and_statuses_of_its_own() {
        let check = |code: Code, http: u16, kind: &str| {
            let failure = Failure::new(code, "text");
            let wanted = json!({"type": "error", "error": {"type": kind, "message": "text"}, "request_id": "req_1"});
            assert_eq!((failure.status(Dialect::Anthropic).as_u16(), failure.anthropic("req_1")), (http, wanted));
        };
        check(Code::InvalidValue, 400, "invalid_request_error");
        check(Code::InvalidApiKey, 401, "authentication_error");
        check(Code::HostNotAllowed, 403, "permission_error");
        check(Code::ModelNotFound, 404, "not_found_error");
        check(Code::MethodNotAllowed, 405, "invalid_request_error");
        check(Code::RequestTooLarge, 413, "request_too_large");
        check(Code::UnsupportedModality, 422, "invalid_request_error");
        check(Code::QueueFull, 429, "rate_limit_error");
        check(Code::Engine, 500, "api_error");
        check(Code::DaemonUnavailable, 503, "overloaded_error");
        check(Code::ModelLoading, 529, "overloaded_error");
        check(Code::QueueTimeout, 504, "timeout_error");
        let message = "This model's maximum context length is 2048 tokens. However, your messages resulted in 3000 tokens.";
        let failure = of_status(&code::status(code::CONTEXT_LENGTH, message));
        assert_eq!(failure.anthropic("r")["error"]["message"], "prompt is too long: 3000 tokens > 2048 maximum");
    }

    #[test]
    fn routes_have_dialects() {
        let mut anthropic = HeaderMap::new();
        anthropic.insert("anthropic-version", HeaderValue::from_static("2023-06-01"));
        let none = HeaderMap::new();
        for (path, headers, wanted) in [
            ("/messages", &none, Dialect::Anthropic),
            ("/messages/count_tokens", &none, Dialect::Anthropic),
            ("/messagesx", &none, Dialect::OpenAi),
            ("/models", &none, Dialect::OpenAi),
            ("/models/x", &anthropic, Dialect::Anthropic),
            ("/chat/completions", &anthropic, Dialect::OpenAi),
            ("/api/chat", &none, Dialect::Ollama),
            ("/api/nothing", &none, Dialect::Ollama),
            ("/api/v1/models", &none, Dialect::OpenAi),
            ("/api/hello", &none, Dialect::OpenAi),
        ] {
            assert_eq!(Dialect::of(path, headers), wanted, "{path}");
        }
    }
}
