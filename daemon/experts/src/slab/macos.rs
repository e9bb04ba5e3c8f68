//! Memory calls of the slab on macOS (and any other Unix); `linux.rs` has the same names. There is no advice on page
//! sizes, and pages come with the first touch only.

use std::{ffi::c_void, io};

use rustix::mm::{self, MapFlags, ProtFlags};

/// Reserves address space; pages come with the first touch.
pub(super) fn map(len: usize) -> io::Result<*mut c_void> {
    // SAFETY: a null hint: the kernel picks a range that nothing else uses.
    Ok(unsafe { mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)? })
}

/// Nothing to say here.
///
/// # Safety
/// As on Linux; no memory is looked at.
pub(super) unsafe fn advise(_base: *mut c_void, _len: usize, _huge: bool) {}

/// Gives the pages back; they read as zero afterwards. A fresh mapping in their place rather than an madvise: only that
/// lowers the footprint at once.
///
/// # Safety
/// The range is page-aligned, lies in a mapping of [`map`], and nobody reads or writes it.
pub(super) unsafe fn discard(base: *mut c_void, len: usize) {
    // SAFETY: the caller's promise: what is replaced is ours and unused.
    let mapped = unsafe { mm::mmap_anonymous(base, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED) };
    if let Err(error) = mapped {
        tracing::warn!(%error, len, "expert pages were not given back");
    }
}

/// Pages come with the first touch.
///
/// # Safety
/// As on Linux; no memory is looked at.
pub(super) unsafe fn populate(_base: *mut c_void, _len: usize) {}

/// Gives a mapping back.
///
/// # Safety
/// It is one of [`map`], whole, and nobody uses it any more.
pub(super) unsafe fn unmap(base: *mut c_void, len: usize) {
    // SAFETY: the caller's promise.
    if let Err(error) = unsafe { mm::munmap(base, len) } {
        tracing::warn!(%error, len, "memory was not unmapped");
    }
}
