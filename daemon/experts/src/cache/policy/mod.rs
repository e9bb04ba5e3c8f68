//! Which expert makes room for another. A policy orders the slots of one layer; it knows neither experts nor threads nor
//! clocks, and it holds no bytes. `cache/core.rs` keeps one per layer.

mod lru;

pub(super) use lru::Lru;

use crate::key::{Slot, Tick};

/// Told of every use of a layer's slots; asked for a victim in O(log n), not counting refusals.
pub(super) trait Policy: Send + std::fmt::Debug {
    /// An expert was asked for and was there.
    fn hit(&mut self, slot: Slot, tick: Tick);

    /// An expert has been loaded into the slot.
    fn fill(&mut self, slot: Slot, tick: Tick);

    /// The slot holds nothing now.
    fn evicted(&mut self, slot: Slot);

    /// The first slot in order of eviction that may be evicted.
    fn victim(&self, evictable: &dyn Fn(Slot) -> bool) -> Option<Slot>;
}
