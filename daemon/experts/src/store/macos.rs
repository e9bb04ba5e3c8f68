//! macOS, and any other system: F_NOCACHE where there is one. `linux.rs` has the same functions for Linux.

use std::{fs::File, io, path::Path};

use rustix::fs::{Mode, OFlags};

/// F_NOCACHE asks for nothing: every read goes straight.
pub(super) const ALIGN: usize = 1;

/// Opens for reads past the page cache; where there are none, the error's kind is `Unsupported`.
pub(super) fn open_direct(path: &Path) -> io::Result<File> {
    // NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for regular files.
    let file = File::from(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?);
    no_cache(&file)?;
    Ok(file)
}

#[cfg(target_vendor = "apple")]
fn no_cache(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fcntl_nocache(file, true)?)
}

#[cfg(not(target_vendor = "apple"))]
fn no_cache(_: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(super) fn unsupported(error: io::Error) -> io::Error {
    error
}

/// Read-ahead ends by itself here when reads jump about.
pub(super) fn expect_jumps(_: &File) -> io::Result<()> {
    Ok(())
}

/// There is no such call here; buffered reads are measured as they come.
pub(crate) fn forget(_: &File, _offset: u64, _len: u64) {}
