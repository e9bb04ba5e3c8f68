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

    /// Where every expert in memory is, [layers, experts]. `hold`: and stays until the next fetch begins or this one ends, so
    /// that no wish takes its slot.
    pub(crate) fn survey(&mut self, hold: bool, into: &mut Vec<Option<Slot>>) {
        self.held |= hold;
        into.clear();
        let resident = |slot: Slot| matches!(self.slots[slot.index()].state, State::Resident { .. });
        into.extend(self.layers.iter().flat_map(|layer| &layer.slot_of).map(|slot| slot.filter(|slot| resident(*slot))));
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
            if free.is_none() && self.held {
                self.wish.1.push(expert);
                return None;
            }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        Routing,
        cache::core::{Shape, Taken},
    };

    #[test]
    fn a_wish_takes_no_slot_that_a_survey_holds() {
        let mut core = Core::new(Shape { layers: 2, experts: 4, places: 2, loaders: 4 }, PolicyKind::Lru);
        core.resize(2);
        core.begin(LayerId(0), &Routing::token(&[ExpertId(2), ExpertId(0)]));
        while let Some(load) = core.start() {
            core.loaded(load, Ok(1), Duration::ZERO);
        }
        let mut found = Vec::new();
        assert_eq!(core.take(&mut found), Taken::Found);
        core.end();
        let mut slots = Vec::new();
        core.survey(false, &mut slots);
        let (some, none) = (|slot| Some(Slot(slot)), None);
        assert_eq!(slots, [some(2), none, some(0), none, none, none, none, none]);
        core.survey(true, &mut slots);
        core.prefetch(LayerId(0), &[ExpertId(1)]);
        assert!(core.start().is_none(), "both slots of the layer are held");
        core.prefetch(LayerId(1), &[ExpertId(3)]);
        assert!(core.start().is_some(), "a free one is not");
        core.prefetch(LayerId(0), &[ExpertId(1)]);
        core.end();
        let load = core.start().expect("the wish is still there");
        core.survey(true, &mut slots);
        assert_eq!(slots.iter().flatten().count(), 1, "what loads is not in memory yet: {slots:?}");
        core.loaded(load, Ok(1), Duration::ZERO);
    }
}
