//! Everything that can go wrong in the daemon outside the engine. `service/convert.rs` turns it into a gRPC status,
//! `main.rs` into an exit code; nothing else looks inside.

use std::{io, path::PathBuf, sync::Arc};

/// One enum for the crate; each message says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{name} = `{value}` (from {origin}) is not {wants}")]
    Setting { name: &'static str, value: String, origin: String, wants: &'static str },
    #[error("{path}: {reason}")]
    ConfigFile { path: PathBuf, reason: String },
    #[error("there is no file {path}; --check-config alone checks the settings that a start would have")]
    NoFile { path: PathBuf },
    #[error(transparent)]
    Socket(#[from] flash_proto::socket::Error),
    #[error("cannot {what} {path}: {source}")]
    Create { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{needed} bytes are needed on the disk of {path}, and {free} are free")]
    NoSpace { path: PathBuf, needed: u64, free: u64 },
    #[error("cannot listen: {0}")]
    Listen(io::Error),
    #[error("the gRPC server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    #[error("cannot start the thread {name}: {source}")]
    Thread { name: &'static str, source: io::Error },

    #[error("no model named `{wanted}` is installed; {available}")]
    ModelNotFound { wanted: String, available: String },
    #[error("{param}: {reason}")]
    Value { param: &'static str, reason: String },
    #[error(transparent)]
    Engine(#[from] flash_engine::Error),
    /// Loading failed; every request that waited for it gets the same answer.
    #[error("cannot load {id}: {source}")]
    Load { id: String, source: Arc<flash_engine::Error> },
    #[error("{waiting} requests are waiting already; try again in {retry_after_s} s")]
    QueueFull { waiting: usize, retry_after_s: u64 },
    /// Something else holds the model or the engine; says what to do.
    #[error("{0}")]
    Busy(String),
    #[error("the daemon is shutting down")]
    Draining,
    #[error("cancelled: {0}")]
    Cancelled(&'static str),
    #[error("the engine stopped at an internal error ({0}); its model is reloaded at the next request")]
    Panicked(String),
}
