//! Everything that can go wrong with an expert's bytes. One enum for the crate; the engine wraps it in its own.

use std::io;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The next fetch of the expert tries again.
    #[error("layer {layer} expert {expert}: cannot read {len} bytes from offset {offset} of {file}: {source}; check the file and its disk")]
    Read { layer: u16, expert: u16, file: String, offset: u64, len: u64, source: io::Error },
    #[error("cannot set up the expert slab of {bytes} bytes: {source}")]
    Slab { bytes: u64, source: io::Error },
    #[error("cannot start an expert loader thread: {0}")]
    Thread(io::Error),
    #[error("bad expert source: {0}")]
    Source(String),
}
