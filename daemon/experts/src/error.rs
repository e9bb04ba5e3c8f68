//! Everything that can go wrong with an expert's bytes. One enum for the crate; the engine wraps it in its own.

use std::io;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The next fetch of the expert tries again.
    #[error("layer {layer} expert {expert}: cannot read {len} bytes from offset {offset} of {file}: {source}; check the file and its disk")]
    Read { layer: u16, expert: u16, file: String, offset: u64, len: u64, source: io::Error },
    /// As for a failed read, the next fetch tries again: the disk may have lied once only.
    #[error(
        "layer {layer} expert {expert}: the {len} bytes at offset {offset} of {file} do not match their checksum; run `flashctl verify` on the model to see what is damaged"
    )]
    Checksum { layer: u16, expert: u16, file: String, offset: u64, len: u64 },
    #[error("{file}: {field} {reason}; the expert store is damaged or not from this program, run `flashctl convert` again")]
    Store { file: String, field: &'static str, reason: String },
    #[error("cannot {attempt} {file}: {source}")]
    File { attempt: &'static str, file: String, source: io::Error },
    #[error("{file} needs {needed} bytes and its disk has {free} free; make room first")]
    Space { file: String, needed: u64, free: u64 },
    #[error("cannot set up the expert slab of {bytes} bytes: {source}")]
    Slab { bytes: u64, source: io::Error },
    #[error("cannot start an expert loader thread: {0}")]
    Thread(io::Error),
    #[error("bad expert source: {0}")]
    Source(String),
    #[error("bad hot set: {0}; delete it, the cache then starts cold")]
    Hot(String),
}
