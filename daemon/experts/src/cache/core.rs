//! The cache as a single-threaded state machine: which slot holds which expert, what is loading, pinned, free, over the
//! budget. It reads no bytes, blocks nobody and knows no threads: `cache/mod.rs` puts it behind a lock and does what it
//! says.
//!
//! Slot `j × layers + l` belongs to layer l for good. The states of a slot:
//!
//! ```text
//! Off ─grow─▶ Free ⇄ Populating      Free ─miss─▶ Queued ─start─▶ Loading ─ok─▶ Resident ─evict─▶ Free
//!  ▲                                                └──fetch dropped──▶ Free ◀─failed─┘
//!  └── shrink: from Free and Resident at once; from Populating and Loading through Draining, when the loader is back
//! ```
//!
//! At most one fetch is going on. What it has found is pinned until it says so or ends; what it cannot place waits in
//! `pending` until a slot of its layer can be had.

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{
    claim::{Load, Pin, Vacant},
    policy::{Lru, Policy},
};
use crate::{
    Error,
    key::{ExpertId, ExpertKey, LayerId, Slot, Tick},
    stats::{LayerStats, Stats},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Over the budget; has no pages.
    Off,
    Free,
    /// Free, and a loader faults its pages in.
    Populating,
    /// Waits for a loader; always wanted by the fetch that is going on.
    Queued(ExpertId),
    Loading {
        expert: ExpertId,
        /// The fetch that is going on waits for it.
        wanted: bool,
    },
    Resident {
        expert: ExpertId,
        pinned: bool,
    },
    /// Over the budget, and a loader has not let go of it yet.
    Draining,
}

#[derive(Debug)]
struct Entry {
    state: State,
    /// It has its pages, so filling it faults none in.
    touched: bool,
}

#[derive(Debug)]
struct Layer {
    /// Per expert: the slot that is queued for it, loads it or holds it.
    slot_of: Vec<Option<Slot>>,
    /// Free slots that are touched: taken first.
    free: Vec<Slot>,
    /// Free slots that are not. Lowest first, so that memory in use stays together.
    fresh: BTreeSet<Slot>,
    off: BTreeSet<Slot>,
    policy: Box<dyn Policy>,
    /// Slots that are not Off or Draining.
    enabled: usize,
    /// Resident and not pinned.
    idle: usize,
    /// Resident.
    resident: usize,
    /// Populating, Queued, Loading or Draining: somebody will be back with it.
    busy: usize,
    hits: u64,
    misses: u64,
}

/// The fetch that is going on.
#[derive(Debug)]
struct Demand {
    layer: LayerId,
    ids: Vec<ExpertId>,
    /// Misses without a slot.
    pending: VecDeque<ExpertId>,
    ready: Vec<Found>,
    /// Neither taken nor given up, `ready` included.
    undelivered: usize,
}

/// What became of an expert that was asked for.
#[derive(Debug)]
pub(crate) enum Found {
    Ready(Pin),
    Failed(ExpertId, Arc<Error>),
}

/// What [`Core::take`] has for the engine.
#[derive(Debug)]
pub(crate) enum Taken {
    Found(Vec<Found>),
    /// Nothing yet; a loader will bring something.
    Wait,
    /// Nothing ever: every slot is pinned by what has been handed out.
    Stuck,
    End,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) experts: usize,
    /// Slots of a layer, Off ones included.
    pub(crate) places: usize,
}

#[derive(Debug)]
pub(crate) struct Core {
    shape: Shape,
    /// The budget: slots of a layer that may be in use.
    per_layer: usize,
    slots: Vec<Entry>,
    layers: Vec<Layer>,
    demand: Option<Demand>,
    /// Queued slots, first come first served.
    queue: VecDeque<Slot>,
    /// One loader at most populates, so that the others are there for demand.
    populating: bool,
    /// The layer whose slot is populated next.
    cursor: usize,
    tick: Tick,
    bad: HashSet<ExpertKey>,
    counted: Stats,
}

impl Core {
    /// All slots Off: [`Core::resize`] sets the budget.
    pub(crate) fn new(shape: Shape) -> Self {
        let layer = |l: usize| Layer {
            slot_of: vec![None; shape.experts],
            free: Vec::new(),
            fresh: BTreeSet::new(),
            off: (0..shape.places).map(|j| Slot((j * shape.layers + l) as u32)).collect(),
            policy: Box::new(Lru::new(l, shape.layers, shape.places)),
            enabled: 0,
            idle: 0,
            resident: 0,
            busy: 0,
            hits: 0,
            misses: 0,
        };
        Self {
            shape,
            per_layer: 0,
            slots: (0..shape.places * shape.layers).map(|_| Entry { state: State::Off, touched: false }).collect(),
            layers: (0..shape.layers).map(layer).collect(),
            demand: None,
            queue: VecDeque::new(),
            populating: false,
            cursor: 0,
            tick: Tick(0),
            bad: HashSet::new(),
            counted: Stats::default(),
        }
    }

    /// Starts a fetch: pins what is there, joins what is loading, queues what there is a slot for.
    pub(crate) fn begin(&mut self, layer_id: LayerId, ids: &[ExpertId]) {
        self.end(); // no-op, unless the last Fetch was leaked
        self.tick.0 += 1;
        let mut demand = Demand { layer: layer_id, ids: ids.to_vec(), pending: VecDeque::new(), ready: Vec::new(), undelivered: ids.len() };
        let layer = &mut self.layers[layer_id.index()];
        // All hits and joins before the first miss: no miss may evict what the same fetch needs.
        for &expert in ids {
            let Some(slot) = layer.slot_of[expert.index()] else {
                demand.pending.push_back(expert);
                continue;
            };
            match &mut self.slots[slot.index()].state {
                State::Resident { pinned: pinned @ false, .. } => {
                    *pinned = true;
                    layer.idle -= 1;
                    layer.hits += 1;
                    layer.policy.hit(slot, self.tick);
                    demand.ready.push(Found::Ready(Pin { slot, expert }));
                }
                State::Loading { wanted: wanted @ false, .. } => {
                    *wanted = true;
                    self.counted.joined += 1;
                }
                state => panic!("expert {} is asked for twice in one fetch: {state:?}", expert.0),
            }
        }
        layer.misses += demand.pending.len() as u64;
        self.demand = Some(demand);
        self.assign();
    }

    /// Everything found and not taken yet.
    pub(crate) fn take(&mut self) -> Taken {
        let Some(demand) = &mut self.demand else { return Taken::End };
        if !demand.ready.is_empty() {
            demand.undelivered -= demand.ready.len();
            return Taken::Found(std::mem::take(&mut demand.ready));
        }
        match (demand.undelivered, self.layers[demand.layer.index()].busy) {
            (0, _) => Taken::End,
            (_, 0) => Taken::Stuck,
            _ => Taken::Wait,
        }
    }

    /// An expert has been used: its slot may be taken for what is pending.
    pub(crate) fn done(&mut self, pin: Pin) {
        self.unpin(pin.slot);
        self.assign();
    }

    /// Ends the fetch: unpins what it holds and takes its waiting loads back. Loads that run go on, for nobody.
    pub(crate) fn end(&mut self) {
        let Some(demand) = self.demand.take() else { return };
        while let Some(slot) = self.queue.pop_front() {
            let State::Queued(expert) = self.slots[slot.index()].state else { unreachable!("queued slots are in state Queued") };
            let layer = self.layer_of(slot);
            layer.slot_of[expert.index()] = None;
            layer.busy -= 1;
            self.free(slot);
        }
        for expert in demand.ids {
            let Some(slot) = self.layers[demand.layer.index()].slot_of[expert.index()] else { continue };
            match &mut self.slots[slot.index()].state {
                State::Loading { wanted, .. } => *wanted = false,
                State::Resident { pinned: true, .. } => self.unpin(slot),
                _ => {}
            }
        }
    }

    /// The next load, for a loader that has nothing to do.
    pub(crate) fn start(&mut self) -> Option<Load> {
        let slot = self.queue.pop_front()?;
        let entry = &mut self.slots[slot.index()];
        let State::Queued(expert) = entry.state else { unreachable!("queued slots are in state Queued") };
        *entry = Entry { state: State::Loading { expert, wanted: true }, touched: true };
        Some(Load { slot, key: ExpertKey { layer: self.layer_id(slot), expert } })
    }

    /// A load is over, `Ok` with its bytes. Some: the slot was given up meanwhile; discard it, then [`Core::drained`].
    pub(crate) fn loaded(&mut self, load: Load, result: Result<u64, Error>, time: Duration) -> Option<Vacant> {
        let Load { slot, key } = load;
        self.count(key, &result, time);
        let (expert, wanted) = match self.slots[slot.index()].state {
            State::Loading { expert, wanted } => (expert, wanted),
            State::Draining => return Some(Vacant { slot }),
            state => unreachable!("a load ends in state {state:?}"),
        };
        let tick = self.tick;
        let layer = self.layer_of(slot);
        layer.busy -= 1;
        let found = match result {
            Ok(_) => {
                layer.policy.fill(slot, tick);
                layer.resident += 1;
                layer.idle += usize::from(!wanted);
                self.slots[slot.index()].state = State::Resident { expert, pinned: wanted };
                wanted.then_some(Found::Ready(Pin { slot, expert }))
            }
            Err(error) => {
                layer.slot_of[expert.index()] = None;
                self.free(slot);
                wanted.then(|| Found::Failed(expert, Arc::new(error)))
            }
        };
        if let (Some(found), Some(demand)) = (found, &mut self.demand) {
            demand.ready.push(found);
        }
        self.assign();
        None
    }

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
        let entry = &mut self.slots[slot.index()];
        if entry.state == State::Draining {
            return Some(Vacant { slot });
        }
        assert_eq!(entry.state, State::Populating, "nobody else takes a slot that is being populated");
        entry.touched = true;
        self.layer_of(slot).busy -= 1;
        self.free(slot);
        self.assign();
        None
    }

    /// The pages of a slot that was given up under a loader are gone; the budget may want it again by now.
    pub(crate) fn drained(&mut self, vacant: Vacant) {
        let (slot, per_layer) = (vacant.slot, self.per_layer);
        let layer = self.layer_of(slot);
        layer.busy -= 1;
        layer.off.insert(slot);
        self.slots[slot.index()] = Entry { state: State::Off, touched: false };
        self.enable(self.layer_id(slot).index(), per_layer);
        self.assign();
    }

    /// Sets the budget, between fetches. The result's pages are to be given back before the next call: until then nothing
    /// enables those slots, because a layer that gave one up has all the slots it may have.
    pub(crate) fn resize(&mut self, per_layer: usize) -> Vec<Vacant> {
        assert!(
            self.demand.is_none() && (1..=self.shape.places).contains(&per_layer),
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

    pub(crate) fn want(&mut self, per_layer: usize) {
        self.counted.slots_wanted = per_layer;
    }

    pub(crate) fn waited(&mut self, time: Duration) {
        self.counted.wait_time += time;
    }

    pub(crate) fn per_layer(&self) -> usize {
        self.per_layer
    }

    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn resident(&self, layer: LayerId) -> Vec<ExpertId> {
        let held = |slot: &Slot| matches!(self.slots[slot.index()].state, State::Resident { .. });
        let experts = self.layers[layer.index()].slot_of.iter().zip(0u16..);
        experts.filter(|(slot, _)| slot.as_ref().is_some_and(held)).map(|(_, expert)| ExpertId(expert)).collect()
    }

    /// All but `slot_bytes` and `resident_bytes`, which are the slab's to say.
    pub(crate) fn stats(&self) -> Stats {
        let layers: Vec<_> =
            self.layers.iter().map(|layer| LayerStats { hits: layer.hits, misses: layer.misses, resident: layer.resident }).collect();
        Stats {
            slots_per_layer: self.per_layer,
            hits: layers.iter().map(|layer| layer.hits).sum(),
            misses: layers.iter().map(|layer| layer.misses).sum(),
            bad_records: self.bad.len(),
            layers,
            ..self.counted.clone()
        }
    }

    /// Gives pending experts slots while there are any.
    fn assign(&mut self) {
        let Some(demand) = &mut self.demand else { return };
        let layer = &mut self.layers[demand.layer.index()];
        while let Some(&expert) = demand.pending.front() {
            let free = layer.free.pop().or_else(|| layer.fresh.pop_first());
            let Some(slot) = free.or_else(|| layer.evict(&self.slots)) else { return };
            if let State::Resident { expert: old, .. } = self.slots[slot.index()].state {
                layer.slot_of[old.index()] = None;
                self.counted.evictions += 1;
            }
            assert!(layer.slot_of[expert.index()].is_none(), "expert {} is asked for twice in one fetch", expert.0);
            demand.pending.pop_front();
            layer.slot_of[expert.index()] = Some(slot);
            layer.busy += 1;
            self.slots[slot.index()].state = State::Queued(expert);
            self.queue.push_back(slot);
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
        if let Some(slot) = layer.free.pop().or_else(|| layer.evict(&self.slots)) {
            if let State::Resident { expert, .. } = self.slots[slot.index()].state {
                layer.slot_of[expert.index()] = None;
                self.counted.evictions += 1;
            }
            self.slots[slot.index()] = Entry { state: State::Off, touched: false };
            layer.off.insert(slot);
            return Some(Vacant { slot });
        }
        let busy = |slot: &usize| matches!(self.slots[*slot].state, State::Loading { .. } | State::Populating);
        let slot =
            (l..self.slots.len()).step_by(self.shape.layers).find(busy).expect("between fetches a slot is free, idle or with a loader");
        if let State::Loading { expert, .. } = self.slots[slot].state {
            layer.slot_of[expert.index()] = None;
        }
        self.slots[slot].state = State::Draining;
        None
    }

    fn free(&mut self, slot: Slot) {
        let entry = &mut self.slots[slot.index()];
        entry.state = State::Free;
        if entry.touched {
            self.layer_of(slot).free.push(slot);
        } else {
            self.layer_of(slot).fresh.insert(slot);
        }
    }

    fn unpin(&mut self, slot: Slot) {
        match &mut self.slots[slot.index()].state {
            State::Resident { pinned: pinned @ true, .. } => *pinned = false,
            state => unreachable!("a pin on a slot in state {state:?}"),
        }
        self.layer_of(slot).idle += 1;
    }

    fn count(&mut self, key: ExpertKey, result: &Result<u64, Error>, time: Duration) {
        self.counted.read_time += time;
        match result {
            Ok(bytes) => {
                self.counted.loads += 1;
                self.counted.bytes_read += bytes;
                self.bad.remove(&key);
            }
            Err(error) => {
                tracing::error!(%error, "expert not loaded");
                self.counted.load_errors += 1;
                self.bad.insert(key);
            }
        }
    }

    fn layer_id(&self, slot: Slot) -> LayerId {
        LayerId((slot.index() % self.shape.layers) as u16)
    }

    fn layer_of(&mut self, slot: Slot) -> &mut Layer {
        &mut self.layers[slot.index() % self.shape.layers]
    }
}

impl Layer {
    /// Takes the policy's victim out of its order; the caller sees to the rest.
    fn evict(&mut self, slots: &[Entry]) -> Option<Slot> {
        if self.idle == 0 {
            return None; // spares the policy a walk over pinned slots
        }
        let idle = |slot: Slot| matches!(slots[slot.index()].state, State::Resident { pinned: false, .. });
        let slot = self.policy.victim(&idle).expect("the policy knows every idle slot");
        self.policy.evicted(slot);
        self.idle -= 1;
        self.resident -= 1;
        Some(slot)
    }
}

#[cfg(test)]
impl Core {
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
        let held = in_state(&|state| {
            matches!(state, State::Queued(_) | State::Loading { wanted: true, .. } | State::Resident { pinned: true, .. })
        });
        let Some(demand) = &self.demand else { return assert!(held.is_empty(), "held by no fetch: {held:?}") };
        let layer = &self.layers[demand.layer.index()];
        let slots: BTreeSet<Slot> = demand.ids.iter().filter_map(|expert| layer.slot_of[expert.index()]).collect();
        assert!(held.is_subset(&slots), "{held:?} are held, the fetch asked for {slots:?}");
        assert!(
            demand.pending.is_empty() || layer.free.is_empty() && layer.fresh.is_empty() && layer.idle == 0,
            "pending beside a slot to be had"
        );
        let waiting = held.iter().filter(|slot| !matches!(self.slots[slot.index()].state, State::Resident { .. })).count();
        assert_eq!(demand.undelivered, demand.ready.len() + demand.pending.len() + waiting);
    }

    fn validate_layer(&self, l: usize) {
        let (layer, mut free, mut fresh, mut off) = (&self.layers[l], BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let (mut idle, mut resident, mut busy, mut draining) = (0, BTreeSet::new(), 0, 0);
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
                State::Resident { expert, pinned } => {
                    assert!(layer.slot_of[expert.index()] == Some(slot) && resident.insert(slot) && touched);
                    idle += usize::from(!pinned);
                }
            }
        }
        assert_eq!((layer.idle, layer.busy, layer.resident), (idle, busy, resident.len()));
        assert_eq!((layer.free.iter().copied().collect(), &layer.fresh, &layer.off), (free, &fresh, &off));
        assert_eq!(layer.enabled, self.per_layer.min(self.shape.places - draining));
        assert_eq!(layer.enabled, self.shape.places - off.len() - draining);
        let held = layer.slot_of.iter().flatten().count();
        assert_eq!(
            held + layer.free.len() + layer.fresh.len() + usize::from(self.populates(l)),
            layer.enabled,
            "an expert in two slots, or in none"
        );
        let ranked = std::cell::RefCell::new(BTreeSet::new());
        layer.policy.victim(&|slot| !ranked.borrow_mut().insert(slot));
        assert_eq!(ranked.into_inner(), resident, "the policy ranks what is resident");
    }

    fn populates(&self, l: usize) -> bool {
        self.slots.iter().skip(l).step_by(self.shape.layers).any(|entry| entry.state == State::Populating)
    }
}
