//! flashd's wire contract: messages and services generated from `flash/v1/*.proto`, the error codes that travel with a
//! gRPC status, and [`socket`], the only place that knows where the daemon listens. Beside it what both servers do about their [`heap`].

pub mod code;
pub mod heap;
pub mod socket;

/// Raised whenever an old peer could misread a new one; the two sides compare it before anything else.
pub const PROTOCOL_VERSION: u32 = 2;

/// Generated from the .proto files.
#[allow(missing_debug_implementations, unreachable_pub, clippy::all, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("flash.v1");
}
