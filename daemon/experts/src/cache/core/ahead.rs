//! Loads that nobody waits for yet: what the next layer is likely to want, and what a warm start brings back. They use slots as
//! the state machine of `core.rs` does, of which this is a part.

use super::{Core, ForWhom, Layer, State};
use crate::{
    Hot, PolicyKind,
    cache::claim::Load,
    hot::HotLayer,
    key::{ExpertId, ExpertKey, LayerId, Slot},
};

impl Core {
    /// Loads these while the loaders idle, the first first, in place of what was wished for before. Those in memory are
    /// kept there. Holds until the layer's fetch.
    pub(crate) fn prefetch(&mut self, layer_id: LayerId, ranked: &[ExpertId]) {
        self.wish.1.clear();
        if self.demand.layer == Some(layer_id) || self.policy == PolicyKind::None {
            return;
        }
        self.wish.0 = layer_id;
        let layer = &mut self.layers[layer_id.index()];
        layer.expected.clear();
        for &expert in ranked.iter().rev() {
            match layer.slot_of[expert.index()] {
                Some(_) => layer.expected.push(expert),
                None => self.wish.1.push(expert),
            }
        }
        layer.rekey(self.policy);
    }

    /// Takes over what is known of experts, and loads those that were in memory while there is nothing else to do and a free
    /// slot. `hot` has the shape of this cache.
    pub(crate) fn warm(&mut self, hot: &Hot) {
        for (layer, saved) in self.layers.iter_mut().zip(&hot.layers) {
            layer.tick = saved.tick;
            layer.uses.iter_mut().zip(&saved.uses).for_each(|(seen, (saved, _))| *seen = *saved);
            layer.rekey(self.policy);
        }
        self.warm = if self.policy == PolicyKind::None { Vec::new() } else { hot.resident() };
    }

    /// What [`Core::warm`] takes.
    pub(crate) fn hot(&self) -> Hot {
        let resident = |slot: &Option<Slot>| slot.is_some_and(|slot| matches!(self.slots[slot.index()].state, State::Resident { .. }));
        let uses = |layer: &Layer| layer.uses.iter().copied().zip(layer.slot_of.iter().map(resident)).collect();
        let layers = self.layers.iter().map(|layer| HotLayer { tick: layer.tick, uses: uses(layer) }).collect();
        Hot { experts: self.shape.experts, layers }
    }

    /// The next load of the wish.
    pub(super) fn start_wish(&mut self) -> Option<Load> {
        if self.background >= self.shape.quota() {
            return None;
        }
        let layer_id = self.wish.0;
        while let Some(expert) = self.wish.1.pop() {
            let layer = &mut self.layers[layer_id.index()];
            if layer.slot_of[expert.index()].is_some() {
                continue; // a warm start was quicker
            }
            let free = layer.free.pop().or_else(|| layer.fresh.pop_first());
            let victim = layer.idle.lowest().filter(|(key, _)| *key < f64::INFINITY);
            let Some(slot) = free.or_else(|| victim.map(|(_, victim)| self.evict(layer_id, victim))) else {
                self.wish.1.clear(); // nothing is left but what is expected too
                return None;
            };
            let layer = &mut self.layers[layer_id.index()];
            layer.expected.push(expert);
            self.counted.prefetched += 1;
            return Some(self.ahead(layer_id, slot, expert, ForWhom::Prefetch));
        }
        None
    }

    /// The next load of a warm start, for a loader that has nothing else to do.
    pub(crate) fn start_warm(&mut self) -> Option<Load> {
        while self.background < self.shape.quota() {
            let ExpertKey { layer: layer_id, expert } = self.warm.pop()?;
            let layer = &mut self.layers[layer_id.index()];
            if layer.slot_of[expert.index()].is_none()
                && let Some(slot) = layer.free.pop().or_else(|| layer.fresh.pop_first())
            {
                self.counted.warm_loads += 1;
                return Some(self.ahead(layer_id, slot, expert, ForWhom::Warm));
            }
        }
        None
    }

    fn ahead(&mut self, layer_id: LayerId, slot: Slot, expert: ExpertId, for_whom: ForWhom) -> Load {
        self.background += 1;
        let layer = &mut self.layers[layer_id.index()];
        layer.slot_of[expert.index()] = Some(slot);
        layer.busy += 1;
        self.load(slot, expert, for_whom)
    }
}
