//! The disk seam: what an expert's bytes are read through. Tests of other crates bring faults and delays in here.
//! Not a file system: no names to open, nothing written. `store/mod.rs` is the caller, from loader threads.

use std::io;

/// One read of a batch: the bytes at `offset` fill all of `into`.
#[derive(Debug)]
pub struct Read<'a> {
    pub offset: u64,
    pub into: &'a mut [u8],
}

/// Bytes that may be read from many threads at once.
#[expect(clippy::len_without_is_empty, reason = "an empty file holds no expert, nobody asks")]
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// For messages; a path where there is one.
    fn name(&self) -> &str;

    /// Fixed when opened: what lies beyond is never asked for.
    fn len(&self) -> u64;

    /// Blocks until every byte of every `into` is read, or fails: a short read is `UnexpectedEof`.
    fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()>;
}
