//! What direct reads have in common: which requests may go straight into their memory, which aligned pieces of the file
//! cover the others, and the aligned memory between. Opens nothing and reads nothing; `direct.rs` and `uring.rs` do.

use std::cell::RefCell;

use super::{os::ALIGN, storage::Read};

/// Aligned bytes of a file that hold what some unaligned reads want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    /// A multiple of the alignment, so it may reach beyond the file's end.
    pub(super) len: usize,
    /// Bytes up to the last that is wanted; fewer are a short read.
    pub(super) needed: usize,
}

/// Offset, length and memory suit the device: no copy is needed.
pub(super) fn straight(read: &Read<'_>) -> bool {
    read.offset.is_multiple_of(ALIGN as u64) && read.into.len().is_multiple_of(ALIGN) && read.into.as_ptr().addr().is_multiple_of(ALIGN)
}

/// Covers the reads that are not straight: blocks that several of them touch are read once, in pieces of at most `max`.
pub(super) fn pieces(reads: &[Read<'_>], max: usize) -> Vec<Piece> {
    let align = ALIGN as u64;
    let unaligned = reads.iter().filter(|read| !straight(read) && !read.into.is_empty());
    let mut wanted: Vec<(u64, u64)> = unaligned.map(|read| (read.offset, read.offset + read.into.len() as u64)).collect();
    wanted.sort_unstable();
    let mut pieces = Vec::new();
    let mut cover = |(start, end): (u64, u64)| {
        for offset in (start..end).step_by(max) {
            let needed = (end - offset).min(max as u64) as usize;
            pieces.push(Piece { offset, len: needed.next_multiple_of(ALIGN), needed });
        }
    };
    // A span begins at a block; it takes in the next read if that begins in its last block, or right after it.
    let mut span: Option<(u64, u64)> = None;
    for (start, end) in wanted {
        let start = start - start % align;
        match &mut span {
            Some(span) if start <= span.1.next_multiple_of(align) => span.1 = span.1.max(end),
            _ => span.replace((start, end)).into_iter().for_each(&mut cover),
        }
    }
    span.into_iter().for_each(&mut cover);
    pieces
}

/// Copies to every read that is not straight what it wants of these bytes.
pub(super) fn scatter(offset: u64, bytes: &[u8], reads: &mut [Read<'_>]) {
    let end = offset + bytes.len() as u64;
    for read in reads.iter_mut().filter(|read| !straight(read)) {
        let (from, to) = (offset.max(read.offset), end.min(read.offset + read.into.len() as u64));
        if from < to {
            let len = (to - from) as usize;
            read.into[(from - read.offset) as usize..][..len].copy_from_slice(&bytes[(from - offset) as usize..][..len]);
        }
    }
}

/// Calls `act` with this thread's `len` aligned bytes; they stay with the thread.
pub(super) fn with_bounce<T>(len: usize, act: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local! {
        static BOUNCE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    BOUNCE.with_borrow_mut(|bytes| {
        if bytes.len() < len + ALIGN {
            *bytes = vec![0; len + ALIGN];
        }
        let start = bytes.as_ptr().addr().wrapping_neg() % ALIGN;
        act(&mut bytes[start..start + len])
    })
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_once_and_touching_ones_together() {
        let mut memory = vec![0; 64 << 10];
        let mut check = |wanted: &[(u64, usize)], max: usize, expected: &[(u64, usize, usize)]| {
            // Memory at an odd address: nothing is straight.
            let mut rest = &mut memory[1 + 4096..];
            let mut reads = Vec::new();
            for &(offset, len) in wanted {
                let (into, after) = rest.split_at_mut(len);
                reads.push(Read { offset, into });
                rest = after;
            }
            let expected: Vec<_> = expected.iter().map(|&(offset, len, needed)| Piece { offset, len, needed }).collect();
            assert_eq!(pieces(&reads, max), expected, "{wanted:?}");
        };
        check(&[], 8192, &[]);
        check(&[(5, 0)], 8192, &[]);
        check(&[(0, 4096)], 8192, &[(0, 4096, 4096)]);
        check(&[(4095, 2)], 8192, &[(0, 8192, 4097)]);
        check(&[(4097, 1)], 8192, &[(4096, 4096, 2)]);
        check(&[(9000, 10), (100, 10)], 1 << 20, &[(0, 4096, 110), (8192, 4096, 818)]); // a block between
        check(&[(5000, 10), (100, 10)], 1 << 20, &[(0, 8192, 5010)]); // neighbouring blocks
        check(&[(100, 5000), (200, 10)], 1 << 20, &[(0, 8192, 5100)]); // one in the other
        check(&[(1, 20_000)], 8192, &[(0, 8192, 8192), (8192, 8192, 8192), (16384, 4096, 3617)]);
    }
}
