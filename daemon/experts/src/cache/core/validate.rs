//! What must hold between any two calls of the state machine, asserted after each random operation of `cache/model.rs`.
//! Tests only.

use std::collections::BTreeSet;

use super::{Core, Entry, ForWhom, State};
use crate::{PolicyKind, key::Slot};

impl Core {
    /// Every slot of the budget has its pages, so loaders touch no slot but for a load.
    pub(crate) fn settled(&self) -> bool {
        !self.populating && self.layers.iter().all(|layer| layer.fresh.is_empty())
    }

    /// Everything that must hold between any two calls.
    pub(crate) fn validate(&self) {
        for l in 0..self.layers.len() {
            self.validate_layer(l);
        }
        let in_state = |wanted: &dyn Fn(State) -> bool| {
            (0u32..).map(Slot).zip(&self.slots).filter(|(_, entry)| wanted(entry.state)).map(|(slot, _)| slot).collect::<BTreeSet<_>>()
        };
        assert_eq!(self.queue.iter().copied().collect::<BTreeSet<_>>(), in_state(&|state| matches!(state, State::Queued(_))));
        assert!(in_state(&|state| state == State::Populating).len() <= usize::from(self.populating));
        let ahead = |state| matches!(state, State::Loading { for_whom: ForWhom::Prefetch | ForWhom::Warm, .. });
        assert_eq!(self.background, in_state(&ahead).len());
        assert_eq!(self.touched, self.slots.iter().filter(|entry| entry.touched).count());
        let held = in_state(&|state| {
            let wanted = |whom| matches!(whom, ForWhom::Demand | ForWhom::Joined);
            matches!(state, State::Queued(_) | State::Resident { pinned: true, .. })
                || matches!(state, State::Loading { for_whom, .. } if wanted(for_whom))
        });
        let demand = &self.demand;
        let Some(layer_id) = demand.layer else { return assert!(held.is_empty(), "held by no fetch: {held:?}") };
        let layer = &self.layers[layer_id.index()];
        let slots: BTreeSet<Slot> = demand.ids.iter().filter_map(|expert| layer.slot_of[expert.index()]).collect();
        assert!(held.is_subset(&slots), "{held:?} are held, the fetch asked for {slots:?}");
        let none = layer.free.is_empty() && layer.fresh.is_empty() && layer.idle.lowest().is_none();
        assert!(demand.pending.is_empty() || none || demand.many, "pending beside a slot to be had");
        assert!(layer.expected.is_empty(), "the fetch has come");
        assert_eq!(demand.undone, held.len() + demand.pending.len());
        let waiting = held.iter().filter(|slot| !matches!(self.slots[slot.index()].state, State::Resident { .. })).count();
        assert_eq!(demand.undelivered, demand.ready.len() + demand.pending.len() + waiting);
    }

    fn validate_layer(&self, l: usize) {
        let (layer, mut free, mut fresh, mut off) = (&self.layers[l], BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let (mut idle, mut resident, mut busy, mut draining) = (BTreeSet::new(), 0, 0, 0);
        for slot in (l..self.slots.len()).step_by(self.shape.layers).map(|slot| Slot(slot as u32)) {
            let Entry { state, touched } = self.slots[slot.index()];
            match state {
                State::Off => assert!(off.insert(slot) && !touched),
                State::Free => assert!(if touched { &mut free } else { &mut fresh }.insert(slot)),
                State::Populating => busy += 1,
                State::Draining => (busy, draining) = (busy + 1, draining + 1),
                State::Queued(expert) | State::Loading { expert, .. } => {
                    assert_eq!(layer.slot_of[expert.index()], Some(slot));
                    busy += 1;
                }
                State::Resident { expert, pinned, .. } => {
                    assert!(layer.slot_of[expert.index()] == Some(slot) && touched);
                    assert!(pinned || idle.insert(expert));
                    resident += 1;
                }
            }
        }
        assert_eq!((layer.busy, layer.resident), (busy, resident));
        assert_eq!(layer.idle.iter().map(|(_, expert)| expert).collect::<BTreeSet<_>>(), idle);
        assert!(layer.idle.iter().all(|(key, expert)| key == layer.key(self.policy, expert)), "keys are up to date");
        assert!(layer.expected.iter().all(|expert| layer.slot_of[expert.index()].is_some()), "expected without a slot");
        assert!(idle.is_empty() || self.policy != PolicyKind::None);
        assert_eq!((layer.free.iter().copied().collect(), &layer.fresh, &layer.off), (free, &fresh, &off));
        assert_eq!(layer.enabled, self.per_layer.min(self.shape.places - draining));
        assert_eq!(layer.enabled, self.shape.places - off.len() - draining);
        let held = layer.slot_of.iter().flatten().count();
        assert_eq!(
            held + layer.free.len() + layer.fresh.len() + usize::from(self.populates(l)),
            layer.enabled,
            "an expert in two slots, or in none"
        );
    }

    fn populates(&self, l: usize) -> bool {
        self.slots.iter().skip(l).step_by(self.shape.layers).any(|entry| entry.state == State::Populating)
    }
}
