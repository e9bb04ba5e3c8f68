//! Memory of the KV cache's blocks. Neighbours share a mapping, so that huge pages can back them: read from pages of 4 KiB, a long
//! context waits a fifth of its time for the page table.

use std::ptr::NonNull;

use flash_experts::Pages;
use flash_kernels::attention::Stored;

use crate::kv::BlockId;

/// Bytes of a mapping, about; returned when the last block in it is freed, a single block's memory before that.
const CHUNK: usize = 32 << 20;

/// Blocks of equal size by number. Their memory is taken before they are first written.
#[derive(Debug)]
pub(super) struct Blocks<N> {
    chunks: Vec<Option<Chunk>>,
    /// Numbers of a block; 0 until the first one is reserved.
    size: usize,
    kind: std::marker::PhantomData<N>,
}

#[derive(Debug)]
struct Chunk {
    pages: Pages,
    used: Vec<bool>,
    /// Some block's memory was given back by itself.
    holes: bool,
}

impl<N> Default for Blocks<N> {
    fn default() -> Self {
        Self { chunks: Vec::new(), size: 0, kind: std::marker::PhantomData }
    }
}

impl<N: Stored> Blocks<N> {
    fn per_chunk(&self) -> usize {
        (CHUNK / (self.size * size_of::<N>()).max(1)).max(1)
    }

    fn chunk_of(&self, id: BlockId) -> (usize, usize) {
        (id.0 as usize / self.per_chunk(), id.0 as usize % self.per_chunk())
    }

    /// `None` if nobody has reserved it.
    pub(super) fn get(&self, id: BlockId) -> Option<&[N]> {
        // SAFETY: blocks begin at a multiple of N's size, as pages begin at a multiple of its alignment, and any bits are a number.
        Some(unsafe { self.bytes(id)?.align_to().1 })
    }

    /// For writing; what is in it besides is of no meaning. All blocks have `size` numbers.
    #[cfg(test)]
    fn get_mut(&mut self, id: BlockId, size: usize) -> &mut [N] {
        self.reserve(id, size);
        // SAFETY: the borrow is exclusive.
        unsafe { self.share_mut(id) }
    }

    /// A block that is reserved, for writing beside others.
    ///
    /// # Safety
    /// While the result lives, nobody else reads or writes this block.
    #[expect(clippy::mut_from_ref, reason = "blocks are apart")]
    pub(super) unsafe fn share_mut(&self, id: BlockId) -> &mut [N] {
        let (start, bytes) = self.part(id).expect("blocks are reserved before they are written");
        // SAFETY: a block of the mapping, which the caller has alone; it begins at a multiple of N's size, as pages begin at a multiple of
        // its alignment, and any bits are a number.
        unsafe { std::slice::from_raw_parts_mut(start.cast().as_ptr(), bytes / size_of::<N>()) }
    }

    /// As [`Blocks::get`].
    pub(super) fn bytes(&self, id: BlockId) -> Option<&[u8]> {
        let (start, bytes) = self.part(id)?;
        // SAFETY: a block of the mapping, borrowed with the blocks; who shares one for writing has it alone.
        Some(unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) })
    }

    /// Where a block lies, and how many bytes it has; not the rest of its mapping, which others may be writing.
    fn part(&self, id: BlockId) -> Option<(NonNull<u8>, usize)> {
        let (chunk, at) = self.chunk_of(id);
        let chunk = self.chunks.get(chunk)?.as_ref().filter(|chunk| chunk.used[at])?;
        let bytes = self.size * size_of::<N>();
        // SAFETY: a mapping has room for as many blocks as `used` has flags.
        Some((unsafe { chunk.pages.as_ptr().add(at * bytes) }, bytes))
    }

    /// For writing, as bytes.
    pub(super) fn bytes_mut(&mut self, id: BlockId, size: usize) -> &mut [u8] {
        self.reserve(id, size);
        let (start, bytes) = self.part(id).expect("just reserved");
        // SAFETY: a block of the mapping, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), bytes) }
    }

    /// Takes the memory for a block, unless it has it. What is in it is of no meaning. All blocks have `size` numbers.
    pub(super) fn reserve(&mut self, id: BlockId, size: usize) {
        self.size = size;
        let ((chunk, at), blocks, bytes) = (self.chunk_of(id), self.per_chunk(), size * size_of::<N>());
        if self.chunks.len() <= chunk {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let chunk = self.chunks[chunk].get_or_insert_with(|| {
            // As with any allocation, there is no going on without it; a budget has been held against before.
            let pages = Pages::new(blocks * bytes).unwrap_or_else(|error| panic!("no memory for the KV cache: {error}"));
            Chunk { pages, used: vec![false; blocks], holes: false }
        });
        if !std::mem::replace(&mut chunk.used[at], true) && chunk.holes {
            chunk.pages.restore(at * bytes..(at + 1) * bytes);
        }
    }

    /// Its memory goes back, with that of the whole mapping if it was the last in it.
    pub(super) fn free(&mut self, id: BlockId) {
        let ((chunk, at), bytes) = (self.chunk_of(id), self.size * size_of::<N>());
        let Some(slot) = self.chunks.get_mut(chunk) else { return };
        if let Some(chunk) = slot.as_mut().filter(|chunk| chunk.used[at]) {
            chunk.used[at] = false;
            if chunk.used.contains(&true) {
                chunk.pages.discard(at * bytes..(at + 1) * bytes);
                chunk.holes = true;
            } else {
                *slot = None;
            }
        }
    }

    #[expect(clippy::unused_self, reason = "of its kind")]
    pub(super) fn number_bytes(&self) -> usize {
        size_of::<N>()
    }

    pub(super) fn used(&self) -> usize {
        self.chunks.iter().flatten().map(|chunk| chunk.used.iter().filter(|used| **used).count()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_apart_and_their_memory_goes_with_the_last() {
        let mut blocks = Blocks::<f32>::default();
        let size = CHUNK / 4 / 3; // three to a chunk
        for id in [0, 1, 4] {
            blocks.get_mut(BlockId(id), size).fill(id as f32 + 1.0);
        }
        for id in [0, 1, 4] {
            assert!(blocks.get(BlockId(id)).unwrap().iter().all(|number| *number == id as f32 + 1.0));
        }
        assert_eq!((blocks.get(BlockId(2)), blocks.get(BlockId(9)), blocks.used()), (None, None, 3));
        blocks.free(BlockId(9));
        blocks.free(BlockId(0));
        assert_eq!((blocks.get(BlockId(0)), blocks.used(), blocks.chunks.iter().flatten().count()), (None, 2, 2));
        assert_eq!(blocks.get_mut(BlockId(0), size)[size / 2], 0.0, "whole pages are given back, though a neighbour stays");
        blocks.free(BlockId(0));
        assert!(blocks.get(BlockId(1)).unwrap().iter().all(|number| *number == 2.0));
        blocks.free(BlockId(1));
        assert_eq!((blocks.used(), blocks.chunks.iter().flatten().count()), (1, 1));
    }
}
