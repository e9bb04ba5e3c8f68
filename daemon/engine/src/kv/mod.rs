//! Which KV block belongs to whom. The bytes live in the backend; this counts.

use std::sync::Arc;

/// Tokens of a block.
pub(crate) const BLOCK: usize = 32;

/// Names a block in the backend's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct BlockId(pub(crate) u32);

/// The blocks of one sequence, in order of position.
pub(crate) type Table = Arc<[BlockId]>;

/// Hands out blocks; a number is reused before a new one is made.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    free: Vec<BlockId>,
    made: u32,
}

impl Blocks {
    /// Enough blocks for `tokens` positions.
    pub(crate) fn take(&mut self, tokens: usize) -> Table {
        (0..tokens.div_ceil(BLOCK))
            .map(|_| {
                self.free.pop().unwrap_or_else(|| {
                    self.made += 1;
                    BlockId(self.made - 1)
                })
            })
            .collect()
    }

    pub(crate) fn give_back(&mut self, blocks: &[BlockId]) {
        self.free.extend_from_slice(blocks);
    }

    /// Blocks that somebody holds.
    pub(crate) fn reserved(&self) -> usize {
        self.made as usize - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_distinct_while_held_and_reused_after() {
        let mut blocks = Blocks::default();
        let (a, b) = (blocks.take(33), blocks.take(1));
        assert_eq!((a.len(), b.len(), blocks.reserved()), (2, 1, 3));
        assert!(!a.contains(&b[0]));
        blocks.give_back(&a);
        assert_eq!(blocks.reserved(), 1);
        let c = blocks.take(64);
        assert!(c.iter().all(|id| a.contains(id)));
    }
}
