//! Bytes in pages of their own, huge ones where they fill some: for weights that are read whole with every token, where walking
//! page tables would take a good part of the time. Not the slab: nothing comes or goes here.

use std::{ffi::c_void, fmt, io, ops::Range, ptr::NonNull};

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
        let (mapping, mapped, start) = reserve(len)?;
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

    /// Where they begin, for parts that are written side by side.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// Gives the memory of a part back, as far as it is whole pages; what was in it is lost.
    pub fn discard(&mut self, part: Range<usize>) {
        if let Some((at, len)) = self.whole_pages(part) {
            // SAFETY: whole pages of the mapping, and the borrow is exclusive; the advice changes no contents.
            unsafe {
                os::advise(at, len, false);
                os::discard(at, len);
            }
        }
    }

    /// Before a part that was discarded is written again: huge pages may come back.
    pub fn restore(&mut self, part: Range<usize>) {
        if let Some((at, len)) = self.whole_pages(part) {
            // SAFETY: as above; no contents change.
            unsafe { os::advise(at, len, self.len >= HUGE) }
        }
    }

    fn whole_pages(&self, part: Range<usize>) -> Option<(*mut c_void, usize)> {
        let page = rustix::param::page_size();
        let (from, to) = (part.start.next_multiple_of(page), part.end.min(self.len) / page * page);
        // In bounds, so that it stays within the allocation.
        (from < to).then(|| (self.start.as_ptr().wrapping_add(from).cast(), to - from))
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
    fn a_part_is_given_back_without_its_neighbours() {
        let mut pages = Pages::new(3 * HUGE).unwrap();
        pages.as_mut_slice().fill(7);
        let page = rustix::param::page_size();
        pages.discard(HUGE + 5..HUGE + 4 * page);
        let zero = HUGE + page..HUGE + 4 * page;
        assert!(pages.as_slice().iter().enumerate().all(|(at, byte)| *byte == if zero.contains(&at) { 0 } else { 7 }));
        pages.restore(HUGE + 5..HUGE + 4 * page);
        pages.discard(5..page);
        pages.as_mut_slice()[HUGE + page] = 8;
        assert_eq!((pages.as_slice()[5], pages.as_slice()[HUGE + page]), (7, 8));
    }

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
