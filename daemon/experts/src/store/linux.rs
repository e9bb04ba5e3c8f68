//! Linux: O_DIRECT, and advice about the page cache. `macos.rs` has the same functions for everything else.

use std::{fs::File, io, path::Path};

use rustix::fs::{Advice, Mode, OFlags};

/// What offset, length and memory of a direct read must be multiples of: the largest logical block in use.
pub(super) const ALIGN: usize = 4096;

/// Opens for reads past the page cache; where the file system has none, the error's kind is `Unsupported`.
pub(super) fn open_direct(path: &Path) -> io::Result<File> {
    // NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for regular files.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::DIRECT;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|error| unsupported(error.into()))?))
}

/// EINVAL is how the open or the first read says that the file system cannot.
pub(super) fn unsupported(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::InvalidInput => io::Error::new(io::ErrorKind::Unsupported, "the file system has no direct I/O"),
        _ => error,
    }
}

/// No read-ahead: routing jumps about, it would spend the disk on experts nobody asked for.
pub(super) fn expect_jumps(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, Advice::Random)?)
}

/// Lets the page cache forget these bytes, if they are on the disk already; length 0 means all that follow.
pub(crate) fn forget(file: &File, offset: u64, len: u64) {
    // Advice: nothing is wrong if it is not taken.
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(len), Advice::DontNeed);
}
