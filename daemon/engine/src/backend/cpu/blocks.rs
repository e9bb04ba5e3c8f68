//! Memory of the KV cache's blocks. Neighbours share a mapping, so that huge pages can back them: read from pages of 4 KiB, a long
//! context waits a fifth of its time for the page table.

use flash_experts::Pages;
use flash_kernels::attention::Stored;

use crate::kv::BlockId;

/// Bytes of a mapping, about; returned when the last block in it is freed, a single block's memory before that.
const CHUNK: usize = 32 << 20;

/// Blocks of equal size by number. Their memory is taken when they are first written.
#[derive(Debug)]
pub(super) struct Blocks<N> {
    chunks: Vec<Option<Chunk>>,
    /// Numbers of a block; 0 until the first one is written.
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

    /// `None` if nobody has written it.
    pub(super) fn get(&self, id: BlockId) -> Option<&[N]> {
        // SAFETY: blocks begin at a multiple of N's size, as pages begin at a multiple of its alignment, and any bits are a number.
        Some(unsafe { self.bytes(id)?.align_to().1 })
    }

    /// For writing; what is in it besides is of no meaning. All blocks have `size` numbers.
    pub(super) fn get_mut(&mut self, id: BlockId, size: usize) -> &mut [N] {
        // SAFETY: as above; the borrow is exclusive.
        unsafe { self.bytes_mut(id, size).align_to_mut().1 }
    }

    /// As [`Blocks::get`].
    pub(super) fn bytes(&self, id: BlockId) -> Option<&[u8]> {
        let (chunk, at) = self.chunk_of(id);
        let chunk = self.chunks.get(chunk)?.as_ref().filter(|chunk| chunk.used[at])?;
        let bytes = self.size * size_of::<N>();
        Some(&chunk.pages.as_slice()[at * bytes..][..bytes])
    }

    /// As [`Blocks::get_mut`].
    pub(super) fn bytes_mut(&mut self, id: BlockId, size: usize) -> &mut [u8] {
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
        &mut chunk.pages.as_mut_slice()[at * bytes..][..bytes]
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
