//! Machine-readable error codes beside a gRPC status: `flash-code` names the error, `flash-param` the field at fault,
//! `flash-retry-after` the seconds to wait. The daemon writes them once; client and gateway read them.

use tonic::{Code, Status, metadata::MetadataValue};

pub const MODEL_NOT_FOUND: &str = "model_not_found";
pub const MODEL_INVALID: &str = "model_invalid";
pub const MODEL_LOADING: &str = "model_loading";
pub const CONTEXT_LENGTH: &str = "context_length_exceeded";
pub const INVALID_VALUE: &str = "invalid_value";
pub const CHAT_TEMPLATE: &str = "chat_template_error";
pub const SCHEMA_NOT_SUPPORTED: &str = "schema_not_supported";
/// The tokenizer has no tokens that frame a gap.
pub const FIM_NOT_SUPPORTED: &str = "fim_not_supported";
pub const QUEUE_FULL: &str = "queue_full";
pub const INSUFFICIENT_MEMORY: &str = "insufficient_memory";
pub const DRAINING: &str = "draining";
pub const ENGINE: &str = "engine_error";
/// Something else holds the model or the engine; the message says what to do.
pub const BUSY: &str = "busy";
/// A disk has too little room for what is to be written.
pub const NO_SPACE: &str = "no_space";
pub const CANCELLED: &str = "cancelled";

/// Longer messages do not fit into a response's headers, where non-ASCII takes three times its bytes.
const MESSAGE_BYTES_MAX: usize = 2000;

/// A status that carries `code`.
pub fn status(code: &'static str, message: impl Into<String>) -> Status {
    let mut message = message.into();
    if message.len() > MESSAGE_BYTES_MAX {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        message += " ...";
    }
    let grpc = match code {
        MODEL_NOT_FOUND => Code::NotFound,
        MODEL_INVALID | INSUFFICIENT_MEMORY | BUSY | NO_SPACE => Code::FailedPrecondition,
        CONTEXT_LENGTH | INVALID_VALUE | CHAT_TEMPLATE | SCHEMA_NOT_SUPPORTED | FIM_NOT_SUPPORTED => Code::InvalidArgument,
        QUEUE_FULL => Code::ResourceExhausted,
        MODEL_LOADING | DRAINING => Code::Unavailable,
        CANCELLED => Code::Cancelled,
        _ => Code::Internal,
    };
    let mut status = Status::new(grpc, message);
    status.metadata_mut().insert("flash-code", MetadataValue::from_static(code));
    status
}

/// Names the request field at fault, as the caller wrote it.
pub fn with_param(mut status: Status, param: &str) -> Status {
    if let Ok(value) = param.parse() {
        status.metadata_mut().insert("flash-param", value);
    }
    status
}

/// Says when trying again makes sense.
pub fn with_retry_after(mut status: Status, seconds: u64) -> Status {
    status.metadata_mut().insert("flash-retry-after", seconds.into());
    status
}

/// The code of a status that the daemon made.
pub fn of(status: &Status) -> Option<&str> {
    status.metadata().get("flash-code")?.to_str().ok()
}

pub fn param(status: &Status) -> Option<&str> {
    status.metadata().get("flash-param")?.to_str().ok()
}

pub fn retry_after(status: &Status) -> Option<u64> {
    status.metadata().get("flash-retry-after")?.to_str().ok()?.parse().ok()
}
