//! Everything that can go wrong with an expert's bytes.
/// One enum for the crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("layer {layer} expert {expert}: cannot read {len} bytes at offset {offset} of {file}: {source}")]
    Read { layer: u16, expert: u16, file: String, offset: u64, len: u64, source: std::io::Error },
    #[error("cannot set up the expert slab of {bytes} bytes: {source}")]
    Slab { bytes: u64, source: std::io::Error },
    #[error("cannot start an expert loader thread: {0}")]
    Thread(std::io::Error),
    #[error("bad expert source: {0}")]
    Source(String),
}
