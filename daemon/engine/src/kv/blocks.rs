//! Whose a block is. Sequences hold blocks, many of them the same one; the prefix index keeps blocks beside that. A block whose
//! last holder lets go is free. Counts only, so that tests can hold it against a naive model.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::BlockId;

/// Hands out blocks; a number is reused before a new one is made.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// The lowest first: so mappings fall free whole.
    free: BinaryHeap<Reverse<BlockId>>,
    made: Vec<Holders>,
    idle: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Holders {
    sequences: u32,
    /// The index has it too.
    kept: bool,
}

impl Blocks {
    /// Blocks that one sequence holds.
    pub(crate) fn take(&mut self, count: usize) -> impl Iterator<Item = BlockId> {
        (0..count).map(|_| {
            let id = self.free.pop().map_or(BlockId(self.made.len() as u32), |Reverse(id)| id);
            if id.0 as usize == self.made.len() {
                self.made.push(Holders::default());
            }
            self.made[id.0 as usize] = Holders { sequences: 1, kept: false };
            id
        })
    }

    /// One more sequence holds a block that somebody has.
    pub(crate) fn share(&mut self, id: BlockId) {
        let holders = &mut self.made[id.0 as usize];
        assert!(holders.sequences > 0 || holders.kept, "{id:?} is somebody's");
        self.idle -= usize::from(holders.sequences == 0);
        holders.sequences += 1;
    }

    /// A sequence lets go; true: so has everybody, and the bytes are to be freed.
    #[must_use]
    pub(crate) fn release(&mut self, id: BlockId) -> bool {
        let holders = &mut self.made[id.0 as usize];
        holders.sequences = holders.sequences.checked_sub(1).expect("a sequence holds what it lets go");
        let Holders { sequences, kept } = *holders;
        self.idle += usize::from(sequences == 0 && kept);
        self.free_if(id, sequences == 0 && !kept)
    }

    /// The index has it from now on. Some sequence holds it as well.
    pub(crate) fn keep(&mut self, id: BlockId) {
        let holders = &mut self.made[id.0 as usize];
        assert!(holders.sequences > 0 && !holders.kept, "{id:?} is a sequence's and new to the index");
        holders.kept = true;
    }

    /// The index lets go; true: so has everybody, and the bytes are to be freed.
    #[must_use]
    pub(crate) fn forget(&mut self, id: BlockId) -> bool {
        let holders = &mut self.made[id.0 as usize];
        assert!(std::mem::take(&mut holders.kept), "the index has what it lets go");
        let last = holders.sequences == 0;
        self.idle -= usize::from(last);
        self.free_if(id, last)
    }

    fn free_if(&mut self, id: BlockId, free: bool) -> bool {
        if free {
            self.free.push(Reverse(id));
        }
        free
    }

    /// Whether a sequence holds it.
    pub(crate) fn is_busy(&self, id: BlockId) -> bool {
        self.made[id.0 as usize].sequences > 0
    }

    /// Blocks that sequences hold.
    pub(crate) fn busy(&self) -> usize {
        self.made.len() - self.free.len() - self.idle
    }

    /// Blocks that only the index has.
    pub(crate) fn idle(&self) -> usize {
        self.idle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_distinct_while_held_and_reused_after() {
        let mut blocks = Blocks::default();
        let (a, b): (Vec<_>, Vec<_>) = (blocks.take(2).collect(), blocks.take(1).collect());
        assert_eq!(blocks.busy(), 3);
        assert!(!a.contains(&b[0]));
        assert!(blocks.release(a[0]) && blocks.release(a[1]));
        assert_eq!(blocks.busy(), 1);
        assert_eq!(blocks.take(2).collect::<Vec<_>>(), a, "the lowest first");
    }

    #[test]
    fn a_block_is_free_when_its_last_holder_lets_go() {
        let mut blocks = Blocks::default();
        let id = blocks.take(1).next().unwrap();
        blocks.keep(id);
        blocks.share(id);
        assert!(!blocks.release(id) && !blocks.release(id));
        assert_eq!((blocks.busy(), blocks.idle(), blocks.is_busy(id)), (0, 1, false));
        blocks.share(id);
        assert_eq!((blocks.busy(), blocks.idle()), (1, 0));
        assert!(!blocks.forget(id) && blocks.release(id));
        assert_eq!((blocks.busy(), blocks.idle()), (0, 0));
    }
}
