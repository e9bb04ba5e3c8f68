//! Memory calls of the slab on Linux; `macos.rs` has the same names. Advice that an old kernel refuses is passed over:
//! it only makes things faster or smaller.

use std::{ffi::c_void, io};

use rustix::mm::{self, Advice, MapFlags, ProtFlags};

/// Reserves address space; pages come with the first touch.
pub(super) fn map(len: usize) -> io::Result<*mut c_void> {
    // SAFETY: a null hint: the kernel picks a range that nothing else uses.
    unsafe {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        Ok(mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)?)
    }
}

/// Huge pages, or no more of them.
///
/// # Safety
/// `[base, base + len)` is a mapping of [`map`].
pub(super) unsafe fn advise(base: *mut c_void, len: usize, huge: bool) {
    let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
    // SAFETY: the caller's promise; neither advice changes contents.
    if let Err(error) = unsafe { mm::madvise(base, len, advice) } {
        tracing::debug!(%error, huge, "no advice on huge pages");
    }
}

/// Gives the pages back; they read as zero afterwards. If huge pages are not forbidden by [`advise`] before, khugepaged may fill
/// the hole again, joining it to its neighbours.
///
/// # Safety
/// The range is page-aligned, lies in a mapping of [`map`], and nobody reads or writes it.
pub(super) unsafe fn discard(base: *mut c_void, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        // Huge pages that reach out of the range are split by this advice; left whole, the kernel would keep all of one until it runs
        // out of memory itself.
        if let Err(error) = mm::madvise(base, len, Advice::LinuxCold) {
            tracing::debug!(%error, len, "huge pages are not split");
        }
        if let Err(error) = mm::madvise(base, len, Advice::LinuxDontNeed) {
            tracing::warn!(%error, len, "expert pages were not given back");
        }
    }
}

/// Faults pages in; never changes contents.
///
/// # Safety
/// The range is page-aligned and lies in a mapping of [`map`].
pub(super) unsafe fn populate(base: *mut c_void, len: usize) {
    // SAFETY: the caller's promise; the kernel faults pages as if written to, and leaves the bytes as they are.
    if let Err(error) = unsafe { mm::madvise(base, len, Advice::LinuxPopulateWrite) } {
        tracing::debug!(%error, len, "expert pages are not faulted in ahead"); // EINVAL before 5.14
    }
}

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
