//! What changes a cache as a whole: slots faulted in ahead of use, a budget that moves both ways while loads run, another policy,
//! a cold start. Part of the state machine of `core.rs`; no fetch is going on in any of it but populating.

use super::{Core, Entry, ForWhom, State, Use, Vacant};
use crate::{
    PolicyKind,
    key::{LayerId, Slot},
};

impl Core {
    /// A slot to fault in, for a loader that has nothing to load.
    pub(crate) fn populate(&mut self) -> Option<Slot> {
        if self.populating {
            return None;
        }
        let layers = self.layers.len();
        let l = (self.cursor..self.cursor + layers).map(|l| l % layers).find(|&l| !self.layers[l].fresh.is_empty())?;
        let slot = self.layers[l].fresh.pop_first()?;
        self.layers[l].busy += 1;
        self.slots[slot.index()].state = State::Populating;
        self.cursor = (l + 1) % layers;
        self.populating = true;
        Some(slot)
    }

    /// It is faulted in. Some: as for [`Core::loaded`].
    pub(crate) fn populated(&mut self, slot: Slot) -> Option<Vacant> {
        self.populating = false;
        let state = self.slots[slot.index()].state;
        if state == State::Draining {
            return Some(Vacant { slot });
        }
        assert_eq!(state, State::Populating, "nobody else takes a slot that is being populated");
        self.touch(slot);
        self.layer_of(slot).busy -= 1;
        self.free(slot);
        self.assign(false);
        None
    }

    /// The pages of a slot that was given up under a loader are gone; the budget may want it again by now.
    pub(crate) fn drained(&mut self, vacant: Vacant) {
        let (slot, per_layer) = (vacant.slot, self.per_layer);
        let layer = self.layer_of(slot);
        layer.busy -= 1;
        layer.off.insert(slot);
        self.off(slot);
        self.enable(self.layer_id(slot).index(), per_layer);
        self.assign(false);
    }

    /// Sets the budget, between fetches. The result's pages are to be given back before the next call: until then nothing
    /// enables those slots, because a layer that gave one up has all the slots it may have.
    pub(crate) fn resize(&mut self, per_layer: usize) -> Vec<Vacant> {
        assert!(
            self.demand.layer.is_none() && (1..=self.shape.places).contains(&per_layer),
            "a budget of 1..={} between fetches",
            self.shape.places
        );
        self.per_layer = per_layer;
        let mut vacant = Vec::new();
        for l in 0..self.layers.len() {
            self.enable(l, per_layer);
            while self.layers[l].enabled > per_layer {
                vacant.extend(self.give_up(l));
            }
        }
        vacant
    }

    /// A loader holds a slot.
    pub(crate) fn busy(&self) -> bool {
        self.layers.iter().any(|layer| layer.busy > 0)
    }

    /// As [`Core::resize`], for memory that is as large as the budget and has all its pages: what stays moves to each layer's
    /// first slots. Per layer: where it was and where it goes, as numbers within the layer.
    pub(crate) fn pack(&mut self, per_layer: usize) -> Vec<Vec<(usize, usize)>> {
        assert!(!self.busy(), "loaders are held back");
        self.resize(per_layer);
        self.touched = per_layer * self.layers.len();
        (0..self.layers.len()).map(|l| self.pack_layer(l)).collect()
    }

    fn pack_layer(&mut self, l: usize) -> Vec<(usize, usize)> {
        let (layers, places, per_layer) = (self.layers.len(), self.shape.places, self.per_layer);
        let slot = |number: usize| Slot((number * layers + l) as u32);
        let state = |number: &usize| self.slots[slot(*number).index()].state;
        let (from, held): (Vec<usize>, Vec<State>) =
            (0..places).map(|number| (number, state(&number))).filter(|(_, state)| matches!(state, State::Resident { .. })).unzip();
        let layer = &mut self.layers[l];
        layer.fresh.clear();
        layer.free = (held.len()..per_layer).rev().map(slot).collect();
        layer.off = (per_layer..places).map(slot).collect();
        for number in 0..places {
            let state = held.get(number).copied().unwrap_or(if number < per_layer { State::Free } else { State::Off });
            if let State::Resident { expert, .. } = state {
                layer.slot_of[expert.index()] = Some(slot(number));
            }
            self.slots[slot(number).index()] = Entry { state, touched: number < per_layer };
        }
        from.into_iter().zip(0..).collect()
    }

    /// Evicts what is not pinned, forgets what was learned, and starts no more loads ahead of demand. Those that run end.
    pub(crate) fn clear(&mut self) {
        self.wish.1.clear();
        self.warm.clear();
        for l in 0..self.layers.len() {
            let layer = &mut self.layers[l];
            layer.expected.clear();
            layer.uses.fill(Use::NEVER);
            self.evict_idle(l);
        }
    }

    pub(crate) fn set_policy(&mut self, policy: PolicyKind) {
        self.policy = policy;
        for l in 0..self.layers.len() {
            self.layers[l].rekey(policy);
            if policy == PolicyKind::None {
                self.evict_idle(l);
            }
        }
        if policy == PolicyKind::None {
            self.wish.1.clear();
            self.warm.clear();
        }
    }

    fn evict_idle(&mut self, l: usize) {
        while let Some((_, victim)) = self.layers[l].idle.lowest() {
            let slot = self.evict(LayerId(l as u16), victim);
            self.free(slot);
        }
    }

    /// Takes Off slots of a layer into use, up to the budget; fewer if some are still draining.
    fn enable(&mut self, l: usize, per_layer: usize) {
        let layer = &mut self.layers[l];
        while layer.enabled < per_layer
            && let Some(slot) = layer.off.pop_first()
        {
            self.slots[slot.index()].state = State::Free;
            layer.fresh.insert(slot);
            layer.enabled += 1;
        }
    }

    /// Takes one slot of a layer out of use: a free one, else the policy's victim, else one that a loader is busy with.
    /// Some: its pages can go now.
    fn give_up(&mut self, l: usize) -> Option<Vacant> {
        let layer = &mut self.layers[l];
        layer.enabled -= 1;
        if let Some(slot) = layer.fresh.pop_last() {
            self.slots[slot.index()].state = State::Off;
            layer.off.insert(slot);
            return None;
        }
        let (free, victim) = (layer.free.pop(), layer.idle.lowest());
        if let Some(slot) = free.or_else(|| victim.map(|(_, victim)| self.evict(LayerId(l as u16), victim))) {
            self.off(slot);
            self.layers[l].off.insert(slot);
            return Some(Vacant { slot });
        }
        let busy = |slot: &usize| matches!(self.slots[*slot].state, State::Loading { .. } | State::Populating);
        let slot =
            (l..self.slots.len()).step_by(self.shape.layers).find(busy).expect("between fetches a slot is free, idle or with a loader");
        let layer = &mut self.layers[l];
        if let State::Loading { expert, for_whom } = self.slots[slot].state {
            self.background -= usize::from(matches!(for_whom, ForWhom::Prefetch | ForWhom::Warm));
            self.counted.prefetch_wasted += u64::from(for_whom == ForWhom::Prefetch);
            layer.slot_of[expert.index()] = None;
            layer.expected.retain(|other| *other != expert);
        }
        self.slots[slot].state = State::Draining;
        None
    }
}
