//! Bytes in pages of their own, huge ones where they fill some: for weights that are read whole with every token, where walking
//! page tables would take a good part of the time. Not the slab: nothing comes or goes here.

use std::{fmt, io, ptr::NonNull};

use super::{HUGE, os, reserve};

/// Zeroed memory, aligned to 2 MiB, that takes pages as it is written.
pub struct Pages {
    mapping: NonNull<u8>,
    mapped: usize,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to this value alone, as a vector's would.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    pub fn new(len: usize) -> io::Result<Self> {
        let (mapping, mapped, start) = reserve(len, len >= HUGE)?;
        Ok(Self { mapping, mapped, start, len })
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `reserve` gave `len` bytes from `start` on; they are zero until written.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; borrows have ended.
        unsafe { os::unmap(self.mapping.as_ptr().cast(), self.mapped) }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_zero_aligned_and_ones_own() {
        for len in [1, 4096, HUGE + 5] {
            let (mut a, b) = (Pages::new(len).unwrap(), Pages::new(len).unwrap());
            assert!(a.as_slice().iter().all(|byte| *byte == 0) && a.as_slice().as_ptr().addr() % HUGE == 0);
            a.as_mut_slice().fill(7);
            assert_eq!((a.as_slice()[len - 1], b.as_slice()[len - 1], a.as_slice().len()), (7, 0, len));
        }
        assert!(Pages::new(usize::MAX).is_err());
    }
}
