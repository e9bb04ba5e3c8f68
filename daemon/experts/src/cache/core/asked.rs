//! What others ask of a cache, and what they tell it for its counts. A part of the state machine of `core.rs` that changes no slot.

use std::time::Duration;

use super::{Core, State};
use crate::{
    key::{ExpertId, LayerId, Slot},
    stats::{LayerStats, Stats},
};

impl Core {
    pub(crate) fn want(&mut self, per_layer: usize) {
        self.counted.slots_wanted = per_layer;
    }

    pub(crate) fn waited(&mut self, time: Duration) {
        self.counted.wait_time += time;
    }

    pub(crate) fn per_layer(&self) -> usize {
        self.per_layer
    }

    /// Loads that could start now.
    pub(crate) fn startable(&self) -> usize {
        let ahead = self.wish.1.len() + self.warm.len();
        self.queue.len() + ahead.min(self.shape.quota().saturating_sub(self.background))
    }

    /// Hits, misses and bytes read, without the rest of [`Core::stats`].
    pub(crate) fn counters(&self) -> (u64, u64, u64) {
        (self.counted.hits, self.counted.misses, self.counted.bytes_read)
    }

    /// Useful and wasted ones.
    pub(crate) fn prefetches(&self) -> (u64, u64) {
        (self.counted.prefetch_useful + self.counted.prefetch_late, self.counted.prefetch_wasted)
    }

    pub(crate) fn resident(&self, layer: LayerId) -> Vec<ExpertId> {
        let held = |slot: &Slot| matches!(self.slots[slot.index()].state, State::Resident { .. });
        let experts = self.layers[layer.index()].slot_of.iter().zip(0u16..);
        experts.filter(|(slot, _)| slot.as_ref().is_some_and(held)).map(|(_, expert)| ExpertId(expert)).collect()
    }

    pub(crate) fn touched(&self) -> usize {
        self.touched
    }

    /// All but `slot_bytes`, `resident_bytes` and `slab_bytes`, which are the slab's to say.
    pub(crate) fn stats(&self) -> Stats {
        let layers: Vec<_> =
            self.layers.iter().map(|layer| LayerStats { hits: layer.hits, misses: layer.misses, resident: layer.resident }).collect();
        Stats { policy: self.policy, slots_per_layer: self.per_layer, bad_records: self.bad.len(), layers, ..self.counted.clone() }
    }
}
