//! The disk seam: what an expert's bytes are read through. Tests of other crates bring faults and delays in here.
//! Not a file system: no names to open, nothing written. `store/mod.rs` is the caller, from loader threads.

use std::{fmt, io, str::FromStr};

/// How files are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Io {
    /// The fastest that this file and this system allow.
    #[default]
    Auto,
    /// Past the page cache: O_DIRECT on Linux, F_NOCACHE on macOS.
    Direct,
    /// Through the page cache.
    Buffered,
    /// io_uring, past the page cache; Linux only.
    Uring,
    /// Page faults; to compare with.
    Mmap,
}

impl Io {
    pub const ALL: [(&str, Self); 5] =
        [("auto", Self::Auto), ("direct", Self::Direct), ("buffered", Self::Buffered), ("uring", Self::Uring), ("mmap", Self::Mmap)];
}

impl FromStr for Io {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, io)| *io).ok_or_else(|| format!("`{text}` is not one of {}", Self::ALL.map(|(name, _)| name).join(", ")))
    }
}

impl fmt::Display for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(_, io)| io == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

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

    /// How it reads, for reports.
    fn kind(&self) -> Io {
        Io::Buffered
    }
}
