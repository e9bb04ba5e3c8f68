//! The core and the reference side by side: every operation is done to both. Tests only.

use super::*;

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
