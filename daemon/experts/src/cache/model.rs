//! The state machine against a naive reference that knows experts but no slots: random operations, in any order that the
//! engine and the loaders could produce, both asked the same questions after each. Tests only.

use std::{collections::BTreeSet, io, time::Duration};

use proptest::prelude::*;

use super::{
    claim::{Load, Pin, Vacant},
    core::{Core, Found, Shape, Taken},
    policy::{PolicyKind, Use},
};
use crate::{
    Error, Routing,
    hot::HotLayer,
    key::{ExpertId, ExpertKey, LayerId, Slot, Tick},
};

const SHAPE: Shape = Shape { layers: 2, experts: 6, places: 4, loaders: 1 };
const POLICIES: [PolicyKind; 4] = [PolicyKind::Lfru, PolicyKind::Lru, PolicyKind::Lcp, PolicyKind::None];

#[derive(Clone, Copy, PartialEq)]
enum Whom {
    Demand,
    Nobody,
    Prefetch,
    Warm,
}

/// One layer as a human would keep it.
struct Layer {
    resident: BTreeSet<u16>,
    /// Of those and of what loads: brought by a prefetch, not asked for yet.
    unused: BTreeSet<u16>,
    loading: Vec<(Slot, u16, Whom)>,
    populating: Option<Slot>,
    draining: usize,
    tick: u64,
    uses: [Use; SHAPE.experts],
    /// Not to be evicted by a prefetch, and last by anything else.
    expected: BTreeSet<u16>,
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            resident: BTreeSet::new(),
            unused: BTreeSet::new(),
            loading: Vec::new(),
            populating: None,
            draining: 0,
            tick: 0,
            uses: [Use::NEVER; SHAPE.experts],
            expected: BTreeSet::new(),
        }
    }
}

/// A fetch as a human would keep it: every id is in one of these, done, or failed.
struct Demand {
    layer: usize,
    many: bool,
    pending: Vec<u16>,
    queued: Vec<u16>,
    waiting: Vec<u16>,
    ready: Vec<Result<u16, u16>>,
    pinned: Vec<u16>,
    /// Has or had a load in this fetch.
    missed: BTreeSet<u16>,
}

#[derive(Default)]
struct Model {
    budget: usize,
    policy: PolicyKind,
    layers: [Layer; SHAPE.layers],
    demand: Option<Demand>,
    wish: (usize, Vec<u16>),
    warm: Vec<(usize, u16)>,
    bad: BTreeSet<(u16, u16)>,
    /// hits, misses, joined, evictions, loads, errors, prefetched, useful, wasted, late, warm
    counts: [u64; 11],
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

    fn key(&self, l: usize, expert: u16) -> f64 {
        let layer = &self.layers[l];
        if layer.expected.contains(&expert) {
            return f64::INFINITY;
        }
        self.policy.key(&layer.uses[usize::from(expert)], l as f64)
    }

    /// What would be evicted next, and its key.
    fn victim(&self, l: usize) -> Option<(f64, u16)> {
        let pinned = self.demand.as_ref().filter(|demand| demand.layer == l).map_or(&[][..], |demand| &demand.pinned);
        let idle = self.layers[l].resident.iter().filter(|expert| !pinned.contains(expert));
        idle.map(|&expert| (self.key(l, expert), expert)).min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
    }

    fn evict(&mut self, l: usize, victim: u16) {
        let layer = &mut self.layers[l];
        assert!(layer.resident.remove(&victim));
        layer.expected.remove(&victim);
        self.counts[3] += 1;
        self.counts[8] += u64::from(layer.unused.remove(&victim));
    }

    /// Whatever nobody holds goes, if nothing is to stay.
    fn keep_none(&mut self) {
        if self.policy == PolicyKind::None {
            self.evict_all();
        }
    }

    fn evict_all(&mut self) {
        for l in 0..SHAPE.layers {
            while let Some((_, victim)) = self.victim(l) {
                self.evict(l, victim);
            }
        }
    }

    fn assign(&mut self, mut force: bool) {
        while let Some(Demand { layer, many, pending, queued, waiting, pinned, missed, .. }) = &self.demand
            && let Some(&next) = pending.first()
        {
            let l = *layer;
            if self.used(l) >= self.enabled(l) {
                let Some((key, victim)) = self.victim(l) else { return };
                let streaming = [queued, waiting, pinned].iter().flat_map(|list| list.iter()).filter(|id| missed.contains(id)).count();
                let passes = key > self.key(l, next) && *many && streaming > SHAPE.loaders;
                if passes && !force {
                    return;
                }
                force &= !(*many && streaming > SHAPE.loaders);
                self.evict(l, victim);
            }
            let demand = self.demand.as_mut().unwrap();
            demand.pending.remove(0);
            demand.queued.push(next);
            demand.missed.insert(next);
        }
    }

    fn begin(&mut self, l: usize, ids: &[u16], tokens: u32, rows: impl Fn(u16) -> Vec<u32>, first_time: bool) {
        let mut demand = Demand {
            layer: l,
            many: tokens > 1,
            pending: vec![],
            queued: vec![],
            waiting: vec![],
            ready: vec![],
            pinned: vec![],
            missed: BTreeSet::new(),
        };
        if self.wish.0 == l {
            self.wish.1.clear();
        }
        let layer = &mut self.layers[l];
        layer.expected.clear();
        let count = u64::from(first_time);
        for &id in ids {
            if first_time {
                rows(id).into_iter().for_each(|row| layer.uses[usize::from(id)].used(Tick(layer.tick + 1 + u64::from(row))));
            }
            if layer.resident.contains(&id) {
                demand.pinned.push(id);
                demand.ready.push(Ok(id));
                self.counts[0] += count;
                self.counts[7] += u64::from(layer.unused.remove(&id));
            } else if let Some((_, _, whom)) = layer.loading.iter_mut().find(|(_, expert, _)| *expert == id) {
                self.counts[9] += u64::from(*whom == Whom::Prefetch);
                *whom = Whom::Demand;
                demand.waiting.push(id);
                demand.missed.insert(id);
                self.counts[2] += count;
            } else {
                demand.pending.push(id);
                self.counts[1] += count;
            }
        }
        layer.tick += u64::from(tokens) * count;
        self.demand = Some(demand);
        self.assign(false);
    }

    fn end(&mut self) {
        if let Some(Demand { layer, .. }) = self.demand.take() {
            let loading = self.layers[layer].loading.iter_mut().filter(|(.., whom)| *whom == Whom::Demand);
            loading.for_each(|(.., whom)| *whom = Whom::Nobody);
            self.keep_none();
        }
    }

    fn background(&self) -> usize {
        let loading = self.layers.iter().flat_map(|layer| &layer.loading);
        loading.filter(|(.., whom)| matches!(whom, Whom::Prefetch | Whom::Warm)).count()
    }

    fn start(&mut self) -> Option<(usize, u16, Whom)> {
        if let Some(demand) = self.demand.as_mut().filter(|demand| !demand.queued.is_empty()) {
            let expert = demand.queued.remove(0);
            demand.waiting.push(expert);
            return Some((demand.layer, expert, Whom::Demand));
        }
        if self.background() >= SHAPE.loaders.div_ceil(2) {
            return None;
        }
        let l = self.wish.0;
        while !self.wish.1.is_empty() {
            let expert = self.wish.1.remove(0);
            if self.there(l, expert) {
                continue;
            }
            if self.used(l) >= self.enabled(l) {
                match self.victim(l) {
                    Some((key, victim)) if key < f64::INFINITY => self.evict(l, victim),
                    _ => {
                        self.wish.1.clear();
                        return None;
                    }
                }
            }
            self.layers[l].expected.insert(expert);
            self.counts[6] += 1;
            return Some((l, expert, Whom::Prefetch));
        }
        None
    }

    fn start_warm(&mut self) -> Option<(usize, u16, Whom)> {
        while self.background() < SHAPE.loaders.div_ceil(2) {
            let (l, expert) = self.warm.pop()?;
            if !self.there(l, expert) && self.used(l) < self.enabled(l) {
                self.counts[10] += 1;
                return Some((l, expert, Whom::Warm));
            }
        }
        None
    }

    fn there(&self, l: usize, expert: u16) -> bool {
        let queued = self.demand.as_ref().is_some_and(|demand| demand.layer == l && demand.queued.contains(&expert));
        let layer = &self.layers[l];
        queued || layer.resident.contains(&expert) || layer.loading.iter().any(|(_, loading, _)| *loading == expert)
    }

    fn prefetch(&mut self, l: usize, ranked: &[u16]) {
        self.wish.1.clear();
        if self.policy != PolicyKind::None && self.demand.as_ref().is_none_or(|demand| demand.layer != l) {
            let (there, wished): (Vec<u16>, Vec<u16>) = ranked.iter().partition(|&&expert| self.there(l, expert));
            self.layers[l].expected = there.into_iter().collect();
            self.wish = (l, wished);
        }
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
        let Some(at) = layer.loading.iter().position(|&(loading, ..)| loading == slot) else { return true };
        let (.., whom) = layer.loading.remove(at);
        if ok {
            layer.resident.insert(id);
            if whom == Whom::Prefetch {
                layer.unused.insert(id);
            }
        } else {
            layer.expected.remove(&id);
        }
        if whom == Whom::Demand {
            let demand = self.demand.as_mut().unwrap();
            demand.waiting.retain(|&expert| expert != id);
            demand.ready.push(if ok { Ok(id) } else { Err(id) });
            demand.pinned.extend(ok.then_some(id));
        }
        self.keep_none();
        self.assign(false);
        false
    }

    fn resize(&mut self, budget: usize) {
        self.budget = budget;
        for l in 0..SHAPE.layers {
            while self.used(l) > self.enabled(l) {
                if let Some((_, victim)) = self.victim(l) {
                    self.evict(l, victim);
                    continue;
                }
                let layer = &mut self.layers[l];
                let lowest = layer.loading.iter().map(|&(slot, ..)| slot).chain(layer.populating).min().unwrap();
                if let Some(at) = layer.loading.iter().position(|&(slot, ..)| slot == lowest) {
                    let (_, expert, whom) = layer.loading.remove(at);
                    layer.expected.remove(&expert);
                    self.counts[8] += u64::from(whom == Whom::Prefetch);
                }
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
        let mut core = Core::new(SHAPE, PolicyKind::default());
        core.resize(2);
        let model = Model { budget: 2, ..Model::default() };
        Self { core, model, loads: vec![], pins: vec![], populating: None, vacant: vec![] }
    }

    /// `which` chooses an operation; what cannot be done now is passed over.
    fn apply(&mut self, which: u8, a: u8, b: u8) {
        match which {
            0..=2 => self.fetch(usize::from(a) % SHAPE.layers, u32::from(a / 2) % 4, a < 220, b),
            3..=5 => self.take(),
            6..=7 => self.done(a),
            8 => self.end(),
            9..=11 => self.start(),
            12..=14 => self.loaded(a, b >= 50),
            15 => self.populate(),
            16 => self.populated(),
            17 => self.drained(a),
            18 => self.resize(usize::from(a) % SHAPE.places + 1, b.is_multiple_of(2)),
            19..=20 => self.prefetch(usize::from(a) % SHAPE.layers, b),
            21 => self.start_warm(),
            22 => self.warm(a, b),
            23 => self.set_policy(POLICIES[usize::from(a) % POLICIES.len()]),
            _ => self.clear(b),
        }
        self.compare();
    }

    /// The experts that the bits of `mask` name, in an order that its highest bits choose.
    fn chosen(mask: u8) -> Vec<u16> {
        let mut ids: Vec<u16> = (0..SHAPE.experts as u16).filter(|&id| mask & (1 << id) != 0).collect();
        let turn = usize::from(mask >> 6).min(ids.len());
        ids.rotate_left(turn);
        ids
    }

    fn fetch(&mut self, layer: usize, more: u32, first_time: bool, mask: u8) {
        self.end();
        let ids = Self::chosen(mask);
        let tokens = more + 1;
        // Every expert has one row at least, some have two.
        let rows_of =
            |id: u16| (0..tokens).filter(|row| *row == u32::from(id) % tokens || (row + u32::from(id)) % 3 == 1).collect::<Vec<_>>();
        let experts: Vec<ExpertId> = ids.iter().copied().map(ExpertId).collect();
        let (mut first, mut rows) = (vec![0], vec![]);
        for &id in &ids {
            rows.extend(rows_of(id));
            first.push(rows.len());
        }
        self.core.begin(LayerId(layer as u16), &Routing { experts: &experts, first: &first, rows: &rows, tokens, first_time });
        self.model.begin(layer, &ids, tokens, rows_of, first_time);
    }

    fn take(&mut self) {
        let mut found = Vec::new();
        let taken = self.core.take(&mut found);
        let found: Vec<_> = found.into_iter().map(|found| self.pinned(found)).collect();
        let Some(demand) = &mut self.model.demand else { return assert_eq!(taken, Taken::End) };
        assert_eq!(found, std::mem::take(&mut demand.ready));
        assert_eq!(taken == Taken::Found, !found.is_empty());
        if taken == Taken::Found {
            return;
        }
        let l = demand.layer;
        let busy = |model: &Model| {
            let (layer, demand) = (&model.layers[l], model.demand.as_ref().unwrap());
            demand.queued.len() + layer.loading.len() + layer.draining + usize::from(layer.populating.is_some())
        };
        let outstanding = demand.pending.len() + demand.queued.len() + demand.waiting.len();
        if outstanding > 0 && busy(&self.model) == 0 {
            self.model.assign(true);
        }
        let expected = match (outstanding, busy(&self.model)) {
            (0, _) => Taken::End,
            (_, 0) => Taken::Stuck,
            _ => Taken::Wait,
        };
        assert_eq!(taken, expected);
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
            self.model.keep_none();
            self.model.assign(false);
        }
    }

    fn end(&mut self) {
        self.pins.clear();
        self.core.end();
        self.model.end();
    }

    fn start(&mut self) {
        let (load, expected) = (self.core.start(), self.model.start());
        self.started(load, expected);
    }

    fn start_warm(&mut self) {
        let (load, expected) = (self.core.start_warm(), self.model.start_warm());
        self.started(load, expected);
    }

    fn started(&mut self, load: Option<Load>, expected: Option<(usize, u16, Whom)>) {
        let key = |load: &Load| (load.key().layer.index(), load.key().expert.0);
        assert_eq!(load.as_ref().map(key), expected.map(|(layer, expert, _)| (layer, expert)));
        if let (Some(load), Some((layer, expert, whom))) = (load, expected) {
            self.model.layers[layer].loading.push((load.slot(), expert, whom));
            self.loads.push(load);
        }
    }

    fn prefetch(&mut self, layer: usize, mask: u8) {
        let ids = Self::chosen(mask);
        self.core.prefetch(LayerId(layer as u16), &ids.iter().copied().map(ExpertId).collect::<Vec<_>>());
        self.model.prefetch(layer, &ids);
    }

    /// What was learned is taken from the other layer, as if another run had saved it.
    fn warm(&mut self, turn: u8, mask: u8) {
        self.end();
        let mut hot = self.core.hot();
        hot.layers.rotate_left(usize::from(turn) % SHAPE.layers);
        let wanted = |expert: usize| mask & (1 << expert) != 0;
        for HotLayer { uses, .. } in &mut hot.layers {
            uses.iter_mut().enumerate().for_each(|(expert, (_, resident))| *resident = wanted(expert));
        }
        self.core.warm(&hot);
        let key = |key: ExpertKey| (key.layer.index(), key.expert.0);
        self.model.warm = if self.model.policy == PolicyKind::None { vec![] } else { hot.resident().into_iter().map(key).collect() };
        for (layer, HotLayer { tick, uses }) in self.model.layers.iter_mut().zip(hot.layers) {
            layer.tick = tick.0;
            layer.uses.iter_mut().zip(uses).for_each(|(seen, (saved, _))| *seen = saved);
        }
    }

    fn set_policy(&mut self, policy: PolicyKind) {
        self.end();
        self.core.set_policy(policy);
        self.model.policy = policy;
        if policy == PolicyKind::None {
            self.model.wish.1.clear();
            self.model.warm.clear();
        }
        self.model.keep_none();
    }

    fn clear(&mut self, b: u8) {
        if b < 64 {
            self.end();
            self.core.clear();
            self.model.wish.1.clear();
            self.model.warm.clear();
            self.model.evict_all();
            for layer in &mut self.model.layers {
                layer.expected.clear();
                layer.uses = [Use::NEVER; SHAPE.experts];
            }
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
            self.model.assign(false);
        }
    }

    fn drained(&mut self, a: u8) {
        if !self.vacant.is_empty() {
            let vacant = self.vacant.swap_remove(usize::from(a) % self.vacant.len());
            self.model.layers[vacant.slot().index() % SHAPE.layers].draining -= 1;
            self.core.drained(vacant);
            self.model.assign(false);
        }
    }

    fn resize(&mut self, budget: usize, pack: bool) {
        self.end();
        if pack && !self.core.busy() {
            for (l, stay) in self.core.pack(budget).into_iter().enumerate() {
                assert_eq!(stay.len(), self.core.resident(LayerId(l as u16)).len());
                assert!(stay.iter().enumerate().all(|(to, (from, at))| to == *at && from >= at && *at < budget), "{stay:?}");
            }
        } else {
            self.core.resize(budget); // discarding is the shell's
        }
        self.model.resize(budget);
    }

    fn compare(&self) {
        self.core.validate();
        let stats = self.core.stats();
        let prefetch = [stats.prefetched, stats.prefetch_useful, stats.prefetch_wasted, stats.prefetch_late, stats.warm_loads];
        let counts = [stats.hits, stats.misses, stats.joined, stats.evictions, stats.loads, stats.load_errors];
        assert_eq!([&counts[..], &prefetch].concat(), self.model.counts);
        assert_eq!((stats.bad_records, stats.policy), (self.model.bad.len(), self.model.policy));
        assert_eq!((stats.bytes_read, stats.slots_per_layer), (stats.loads, self.model.budget));
        for (l, layer) in self.model.layers.iter().enumerate() {
            let expected: Vec<ExpertId> = layer.resident.iter().copied().map(ExpertId).collect();
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
        assert_eq!(self.core.take(&mut Vec::new()), Taken::End, "{:?}", self.core);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_core_does_what_the_reference_does(operations in prop::collection::vec((0u8..25, any::<u8>(), any::<u8>()), 1..200)) {
        let mut pair = Pair::new();
        for (which, a, b) in operations {
            pair.apply(which, a, b);
        }
        pair.finish();
    }
}
