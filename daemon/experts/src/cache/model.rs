//! The state machine against a naive reference that knows experts but no slots: random operations, in any order that the
//! engine and the loaders could produce, both asked the same questions after each. Tests only.

use std::{collections::BTreeSet, io, time::Duration};

use proptest::prelude::*;

use super::{
    claim::{Load, Pin, Vacant},
    core::{Core, Found, Shape, Taken},
};
use crate::{
    Error,
    key::{ExpertId, ExpertKey, LayerId, Slot},
};

const SHAPE: Shape = Shape { layers: 2, experts: 6, places: 4 };

/// One layer as a human would keep it.
#[derive(Default)]
struct Layer {
    /// Resident, the least recently used first.
    resident: Vec<u16>,
    loading: Vec<(Slot, u16)>,
    populating: Option<Slot>,
    draining: usize,
}

/// A fetch as a human would keep it: every id is in one of these, or failed.
struct Demand {
    layer: usize,
    pending: Vec<u16>,
    queued: Vec<u16>,
    waiting: Vec<u16>,
    ready: Vec<Result<u16, u16>>,
    pinned: Vec<u16>,
}

#[derive(Default)]
struct Model {
    budget: usize,
    layers: [Layer; SHAPE.layers],
    demand: Option<Demand>,
    bad: BTreeSet<(u16, u16)>,
    /// hits, misses, joined, evictions, loads, errors
    counts: [u64; 6],
}

impl Model {
    fn enabled(&self, l: usize) -> usize {
        self.budget.min(SHAPE.places - self.layers[l].draining)
    }

    /// Slots in use, by whatever.
    fn used(&self, l: usize) -> usize {
        let queued = self.demand.as_ref().filter(|demand| demand.layer == l).map_or(0, |demand| demand.queued.len());
        let layer = &self.layers[l];
        layer.resident.len() + layer.loading.len() + usize::from(layer.populating.is_some()) + queued
    }

    fn evict(&mut self, l: usize) -> bool {
        let pinned = self.demand.as_ref().filter(|demand| demand.layer == l).map_or(&[][..], |demand| &demand.pinned);
        let victim = self.layers[l].resident.iter().position(|expert| !pinned.contains(expert));
        victim.is_some_and(|victim| {
            self.layers[l].resident.remove(victim);
            self.counts[3] += 1;
            true
        })
    }

    fn assign(&mut self) {
        while let Some(Demand { layer, pending, .. }) = &self.demand
            && !pending.is_empty()
        {
            let layer = *layer;
            if self.used(layer) >= self.enabled(layer) && !self.evict(layer) {
                return;
            }
            let demand = self.demand.as_mut().unwrap();
            let expert = demand.pending.remove(0);
            demand.queued.push(expert);
        }
    }

    fn begin(&mut self, l: usize, ids: &[u16]) {
        let mut demand = Demand { layer: l, pending: vec![], queued: vec![], waiting: vec![], ready: vec![], pinned: vec![] };
        let layer = &mut self.layers[l];
        for &id in ids {
            if let Some(at) = layer.resident.iter().position(|&expert| expert == id) {
                layer.resident.remove(at);
                layer.resident.push(id);
                demand.pinned.push(id);
                demand.ready.push(Ok(id));
                self.counts[0] += 1;
            } else if layer.loading.iter().any(|&(_, expert)| expert == id) {
                demand.waiting.push(id);
                self.counts[2] += 1;
            } else {
                demand.pending.push(id);
                self.counts[1] += 1;
            }
        }
        self.demand = Some(demand);
        self.assign();
    }

    fn start(&mut self, slot: Slot) -> (usize, u16) {
        let demand = self.demand.as_mut().unwrap();
        let expert = demand.queued.remove(0);
        demand.waiting.push(expert);
        self.layers[demand.layer].loading.push((slot, expert));
        (demand.layer, expert)
    }

    /// True if the slot was given up.
    fn loaded(&mut self, key: ExpertKey, slot: Slot, ok: bool) -> bool {
        let (l, id) = (key.layer.index(), key.expert.0);
        self.counts[if ok { 4 } else { 5 }] += 1;
        if ok {
            self.bad.remove(&(key.layer.0, id))
        } else {
            self.bad.insert((key.layer.0, id))
        };
        let layer = &mut self.layers[l];
        let Some(at) = layer.loading.iter().position(|&(loading, _)| loading == slot) else { return true };
        layer.loading.remove(at);
        if ok {
            layer.resident.push(id);
        }
        if let Some(demand) = self.demand.as_mut().filter(|demand| demand.layer == l)
            && let Some(at) = demand.waiting.iter().position(|&expert| expert == id)
        {
            demand.waiting.remove(at);
            demand.ready.push(if ok { Ok(id) } else { Err(id) });
            demand.pinned.extend(ok.then_some(id));
        }
        self.assign();
        false
    }

    fn resize(&mut self, budget: usize) {
        self.budget = budget;
        for l in 0..SHAPE.layers {
            while self.used(l) > self.enabled(l) {
                if self.evict(l) {
                    continue;
                }
                let layer = &mut self.layers[l];
                let lowest = layer.loading.iter().map(|&(slot, _)| slot).chain(layer.populating).min().unwrap();
                layer.loading.retain(|&(slot, _)| slot != lowest);
                layer.populating = layer.populating.filter(|&slot| slot != lowest);
                layer.draining += 1;
            }
        }
    }
}

/// Both, and the claims that are out.
struct Pair {
    core: Core,
    model: Model,
    loads: Vec<Load>,
    pins: Vec<Pin>,
    populating: Option<Slot>,
    vacant: Vec<Vacant>,
}

impl Pair {
    fn new() -> Self {
        let mut core = Core::new(SHAPE);
        core.resize(2);
        let model = Model { budget: 2, ..Model::default() };
        Self { core, model, loads: vec![], pins: vec![], populating: None, vacant: vec![] }
    }

    /// `which` chooses an operation; what cannot be done now is passed over.
    fn apply(&mut self, which: u8, a: u8, b: u8) {
        match which {
            0..=2 => self.fetch(usize::from(a) % SHAPE.layers, b),
            3..=5 => self.take(),
            6..=7 => self.done(a),
            8 => self.end(),
            9..=11 => self.start(),
            12..=14 => self.loaded(a, b % 5 != 0),
            15 => self.populate(),
            16 => self.populated(),
            17 => self.drained(a),
            _ => self.resize(usize::from(a) % SHAPE.places + 1),
        }
        self.compare();
    }

    fn fetch(&mut self, layer: usize, mask: u8) {
        self.end();
        let mut ids: Vec<u16> = (0..SHAPE.experts as u16).filter(|&id| mask & (1 << id) != 0).collect();
        let turn = usize::from(mask >> 6).min(ids.len());
        ids.rotate_left(turn);
        self.core.begin(LayerId(layer as u16), &ids.iter().copied().map(ExpertId).collect::<Vec<_>>());
        self.model.begin(layer, &ids);
    }

    fn take(&mut self) {
        match (self.core.take(), &mut self.model.demand) {
            (Taken::Found(found), Some(demand)) => {
                let expected = std::mem::take(&mut demand.ready);
                let found: Vec<_> = found.into_iter().map(|found| self.pinned(found)).collect();
                assert_eq!(found, expected);
                assert!(!found.is_empty());
            }
            (Taken::End, None) => {}
            (taken, Some(Demand { layer, pending, queued, waiting, ready, .. })) => {
                assert!(ready.is_empty());
                let (layer, outstanding) = (&self.model.layers[*layer], pending.len() + queued.len() + waiting.len());
                let busy = queued.len() + layer.loading.len() + layer.draining + usize::from(layer.populating.is_some());
                assert!(match taken {
                    Taken::End => outstanding == 0,
                    Taken::Wait => outstanding > 0 && busy > 0,
                    _ => outstanding > 0 && busy == 0,
                });
            }
            (taken, None) => panic!("{taken:?} without a fetch"),
        }
    }

    fn pinned(&mut self, found: Found) -> Result<u16, u16> {
        match found {
            Found::Failed(expert, _) => Err(expert.0),
            Found::Ready(pin) => {
                let expert = pin.expert().0;
                self.pins.push(pin);
                Ok(expert)
            }
        }
    }

    fn done(&mut self, a: u8) {
        if !self.pins.is_empty() {
            let pin = self.pins.swap_remove(usize::from(a) % self.pins.len());
            self.model.demand.as_mut().unwrap().pinned.retain(|&expert| expert != pin.expert().0);
            self.core.done(pin);
            self.model.assign();
        }
    }

    fn end(&mut self) {
        self.pins.clear();
        self.core.end();
        self.model.demand = None;
    }

    fn start(&mut self) {
        match self.core.start() {
            Some(load) => {
                let (layer, expert) = self.model.start(load.slot());
                assert_eq!((load.key().layer.index(), load.key().expert.0), (layer, expert));
                self.loads.push(load);
            }
            None => assert!(self.model.demand.as_ref().is_none_or(|demand| demand.queued.is_empty())),
        }
    }

    fn loaded(&mut self, a: u8, ok: bool) {
        if !self.loads.is_empty() {
            let load = self.loads.swap_remove(usize::from(a) % self.loads.len());
            let given_up = self.model.loaded(load.key(), load.slot(), ok);
            let source = io::Error::other("planned");
            let error = Error::Read { layer: 0, expert: 0, file: "file".into(), offset: 0, len: 0, source };
            let vacant = self.core.loaded(load, if ok { Ok(1) } else { Err(error) }, Duration::ZERO);
            assert_eq!(vacant.is_some(), given_up);
            self.vacant.extend(vacant);
        }
    }

    fn populate(&mut self) {
        if let Some(slot) = self.core.populate() {
            assert!(self.populating.replace(slot).is_none());
            let l = slot.index() % SHAPE.layers;
            assert!(self.model.used(l) < self.model.enabled(l));
            self.model.layers[l].populating = Some(slot);
        }
    }

    fn populated(&mut self) {
        if let Some(slot) = self.populating.take() {
            let vacant = self.core.populated(slot);
            let given_up = self.model.layers[slot.index() % SHAPE.layers].populating.take().is_none();
            assert_eq!(vacant.is_some(), given_up);
            self.vacant.extend(vacant);
            self.model.assign();
        }
    }

    fn drained(&mut self, a: u8) {
        if !self.vacant.is_empty() {
            let vacant = self.vacant.swap_remove(usize::from(a) % self.vacant.len());
            self.model.layers[vacant.slot().index() % SHAPE.layers].draining -= 1;
            self.core.drained(vacant);
            self.model.assign();
        }
    }

    fn resize(&mut self, budget: usize) {
        self.end();
        self.core.resize(budget); // discarding is the shell's
        self.model.resize(budget);
    }

    fn compare(&self) {
        self.core.validate();
        let stats = self.core.stats();
        let counts = [stats.hits, stats.misses, stats.joined, stats.evictions, stats.loads, stats.load_errors];
        assert_eq!((counts, stats.bad_records), (self.model.counts, self.model.bad.len()));
        assert_eq!((stats.bytes_read, stats.slots_per_layer), (stats.loads, self.model.budget));
        for (l, layer) in self.model.layers.iter().enumerate() {
            let mut expected: Vec<ExpertId> = layer.resident.iter().copied().map(ExpertId).collect();
            expected.sort_unstable();
            assert_eq!(self.core.resident(LayerId(l as u16)), expected);
        }
    }

    /// Loaders do all they can, the engine takes and is done: the fetch must come to its end.
    fn finish(mut self) {
        for _ in 0..10 * SHAPE.experts {
            self.take();
            self.done(0);
            self.start();
            self.loaded(0, true);
            self.populated();
            self.drained(0);
            self.compare();
        }
        assert!(matches!(self.core.take(), Taken::End), "{:?}", self.core);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_core_does_what_the_reference_does(operations in prop::collection::vec((0u8..20, any::<u8>(), any::<u8>()), 1..200)) {
        let mut pair = Pair::new();
        for (which, a, b) in operations {
            pair.apply(which, a, b);
        }
        pair.finish();
    }
}
