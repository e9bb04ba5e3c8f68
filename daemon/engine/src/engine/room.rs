//! Whose memory is whose: what is always taken, what running requests take, and what is left for prefixes and the slab.

use super::Engine;
use crate::{Bytes, Error, kv::BLOCK, schedule::CHUNK_MIN};

impl Engine {
    /// Makes idle blocks as many and the slab as large as setting, cap and pressure allow together.
    pub(super) fn settle(&mut self) {
        let wanted = self.wanted;
        let kv = self.busy_bytes();
        // Beyond what is always set aside.
        let passes = self.passes_bytes().saturating_sub(CHUNK_MIN as Bytes * self.backend.row_bytes());
        let left = self.options.memory.map(|cap| cap.saturating_sub(self.fixed_bytes() + kv + passes));
        // One token's experts come first, then idle blocks, then all the others.
        let allowed = self.idle_allowed(left.map(|left| left.saturating_sub(self.slab.bytes(self.least_slots()))));
        self.reuse.allowed = allowed;
        self.evict(allowed);
        let left = left.map(|left| left - left.min(self.reuse.blocks.idle() as Bytes * self.backend.kv_block_bytes()));
        let ceiling = self.ceiling.map(|ceiling| ceiling.saturating_sub(passes));
        let limit = left.into_iter().chain(ceiling).min();
        let slots = limit.map_or(wanted, |bytes| wanted.min(self.slab.slots_in(bytes))).max(1);
        self.experts.set_wanted(wanted);
        if slots != self.experts.slots()
            && let Err(refused) = self.backend.set_slots(&mut self.experts, slots)
        {
            tracing::error!(%refused, slots, "the expert cache keeps its size");
            // Not asked for again until somebody sets another size.
            self.wanted = self.experts.slots();
            self.refused = Some(refused);
        }
    }

    /// KV blocks that requests hold, and their copies of those.
    pub(super) fn busy_bytes(&self) -> Bytes {
        let copied = self.running.iter().map(|sequence| self.reuse.copied(sequence.reused / BLOCK)).sum::<usize>();
        (self.reuse.blocks.busy() + copied) as Bytes * self.backend.kv_block_bytes()
    }

    /// What a full cache may shrink to so that another request fits: one token's working set.
    pub(super) fn least_slots(&self) -> usize {
        self.info.top_k.min(self.wanted)
    }

    /// Resident whatever happens: weights, scratch, the activations of decoding and of one small chunk.
    pub(super) fn fixed_bytes(&self) -> Bytes {
        let buffers = self.backend.scratch_bytes() + self.buffer_bytes();
        self.backend.trunk_bytes() + buffers + (self.options.parallel + CHUNK_MIN) as Bytes * self.backend.row_bytes()
    }

    /// Whether this model can run under such a cap at all.
    pub fn fits(&self, cap: Option<Bytes>) -> Result<(), Error> {
        let needed = self.fixed_bytes() + self.slab.bytes(1);
        match cap.filter(|cap| *cap < needed) {
            Some(left) => Err(Error::Memory { what: "weights, scratch and one expert a layer", needed, left }),
            None => Ok(()),
        }
    }

    /// Activations of the chunks that are being read.
    pub(super) fn passes_bytes(&self) -> Bytes {
        let rows = self.running.iter().filter_map(|sequence| sequence.pass.as_ref()).map(|pass| pass.batch.rows.len()).sum::<usize>();
        rows as Bytes * self.backend.row_bytes()
    }
}

pub(super) fn kv_bytes(block_bytes: Bytes, positions: usize) -> Bytes {
    positions.div_ceil(BLOCK) as Bytes * block_bytes
}
