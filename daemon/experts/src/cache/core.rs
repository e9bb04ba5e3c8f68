//! The cache as a single-threaded state machine: which slot holds which expert, what is loading, pinned, free, over the
//! budget. It reads no bytes, blocks nobody and knows no threads: `cache/mod.rs` puts it behind a lock and does what it
//! says.
//!
//! Slot `j × layers + l` belongs to layer l for good. The states of a slot:
//!
//! ```text
//! Off ─grow─▶ Free ⇄ Populating      Free ─miss─▶ Queued ─start─▶ Loading ─ok─▶ Resident ─evict─▶ Free
//!  ▲                                    ▲           └──fetch dropped──▶ Free ◀─failed─┤
//!  │                                    └── joined by the fetch, and failed ───────────┘
//!  └── shrink: from Free and Resident at once; from Populating and Loading through Draining, when the loader is back
//! ```
//!
//! At most one fetch is going on. What it has found is pinned until it says so or ends; what it cannot place waits in
//! `pending` until a slot of its layer can be had.
//!
//! Loads start in this order: what the fetch waits for; what a prefetch has wished for; what a warm start brings back. The
//! last two go from Free to Loading at once, are never waited for, and together leave half of the loaders to demand. A fetch
//! joins loads that others began; should such a one fail, the fetch has its own, since the disk may be well by then.

mod ahead;
mod asked;
mod budget;
#[cfg(test)]
mod validate;

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{
    claim::{Load, Pin, Vacant},
    policy::{Idle, PolicyKind, Use},
};
use crate::{
    Error, Routing,
    key::{ExpertId, ExpertKey, LayerId, Slot, Tick},
    stats::Stats,
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
        for_whom: ForWhom,
    },
    Resident {
        expert: ExpertId,
        pinned: bool,
        /// A prefetch brought it, and nobody has asked for it.
        unused: bool,
    },
    /// Over the budget, and a loader has not let go of it yet.
    Draining,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ForWhom {
    /// The fetch that is going on waits for it.
    Demand,
    /// It too, since the load began: if that fails, it is queued again.
    Joined,
    /// A fetch that has ended.
    Nobody,
    Prefetch,
    Warm,
}

#[derive(Debug)]
struct Entry {
    state: State,
    /// It has its pages, so filling it faults none in.
    touched: bool,
}

#[derive(Debug)]
struct Layer {
    /// 0 for the first layer to 1 for the last.
    depth: f64,
    /// Per expert: the slot that is queued for it, loads it or holds it.
    slot_of: Vec<Option<Slot>>,
    /// Free slots that are touched: taken first.
    free: Vec<Slot>,
    /// Free slots that are not. Lowest first, so that memory in use stays together.
    fresh: BTreeSet<Slot>,
    off: BTreeSet<Slot>,
    /// Per expert, resident or not.
    uses: Vec<Use>,
    /// Tokens so far.
    tick: Tick,
    /// Resident and not pinned.
    idle: Idle,
    /// What a prefetch says that the layer's next fetch wants: loading or resident, and the last to be evicted.
    expected: Vec<ExpertId>,
    /// Slots that are not Off or Draining.
    enabled: usize,
    /// Resident.
    resident: usize,
    /// Populating, Queued, Loading or Draining: somebody will be back with it.
    busy: usize,
    hits: u64,
    misses: u64,
}

/// The fetch that is going on. Its lists are used again by the next one.
#[derive(Debug, Default)]
struct Demand {
    layer: Option<LayerId>,
    ids: Vec<ExpertId>,
    /// Misses without a slot.
    pending: VecDeque<ExpertId>,
    ready: Vec<Found>,
    /// Neither taken nor given up, `ready` included.
    undelivered: usize,
    /// Neither done nor failed.
    undone: usize,
    /// Of those, misses that have a slot.
    streaming: usize,
    /// More than one token asks.
    many: bool,
}

/// What became of an expert that was asked for.
#[derive(Debug)]
pub(crate) enum Found {
    Ready(Pin),
    Failed(ExpertId, Arc<Error>),
}

/// What [`Core::take`] has for the engine.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Found,
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
    pub(crate) loaders: usize,
}

impl Shape {
    /// Loads at a time that nobody waits for.
    fn quota(&self) -> usize {
        self.loaders.div_ceil(2)
    }

    /// Misses of a prompt that may hold slots which dearer experts had to leave: enough to keep every loader busy while one
    /// is computed.
    fn stream(&self) -> usize {
        self.loaders + 1
    }
}

#[derive(Debug)]
pub(crate) struct Core {
    shape: Shape,
    policy: PolicyKind,
    /// The budget: slots of a layer that may be in use.
    per_layer: usize,
    slots: Vec<Entry>,
    layers: Vec<Layer>,
    demand: Demand,
    /// Queued slots, first come first served.
    queue: VecDeque<Slot>,
    /// What to prefetch, and for which layer; the likeliest last.
    wish: (LayerId, Vec<ExpertId>),
    /// What a warm start is still to bring back, the dearest last.
    warm: Vec<ExpertKey>,
    /// Slots that are touched.
    touched: usize,
    /// Loads that run for a prefetch or a warm start.
    background: usize,
    /// Somebody reads everything that is in memory: see [`Core::survey`].
    held: bool,
    /// One loader at most populates, so that the others are there for demand.
    populating: bool,
    /// The layer whose slot is populated next.
    cursor: usize,
    /// Per expert the number of the latest fetch that asked for it, whatever the layer: nobody asks twice.
    asked: Vec<u64>,
    fetches: u64,
    bad: HashSet<ExpertKey>,
    counted: Stats,
}

impl Core {
    /// All slots Off: [`Core::resize`] sets the budget.
    pub(crate) fn new(shape: Shape, policy: PolicyKind) -> Self {
        let layer = |l: usize| Layer {
            depth: l as f64 / (shape.layers - 1).max(1) as f64,
            slot_of: vec![None; shape.experts],
            free: Vec::new(),
            fresh: BTreeSet::new(),
            off: (0..shape.places).map(|j| Slot((j * shape.layers + l) as u32)).collect(),
            uses: vec![Use::NEVER; shape.experts],
            tick: Tick(0),
            idle: Idle::new(shape.experts),
            expected: Vec::new(),
            enabled: 0,
            resident: 0,
            busy: 0,
            hits: 0,
            misses: 0,
        };
        Self {
            shape,
            policy,
            per_layer: 0,
            slots: (0..shape.places * shape.layers).map(|_| Entry { state: State::Off, touched: false }).collect(),
            layers: (0..shape.layers).map(layer).collect(),
            demand: Demand::default(),
            queue: VecDeque::new(),
            wish: (LayerId(0), Vec::new()),
            warm: Vec::new(),
            touched: 0,
            background: 0,
            held: false,
            populating: false,
            cursor: 0,
            asked: vec![0; shape.experts],
            fetches: 0,
            bad: HashSet::new(),
            counted: Stats::default(),
        }
    }

    // ---- the fetch ----

    /// Starts a fetch: learns its uses, pins what is there, joins what is loading, queues what there is a slot for.
    pub(crate) fn begin(&mut self, layer_id: LayerId, routing: &Routing<'_>) {
        self.check(layer_id, routing);
        self.end(); // no-op, unless the last Fetch was leaked
        if self.wish.0 == layer_id {
            self.wish.1.clear();
        }
        let ids = routing.experts;
        let demand = &mut self.demand;
        demand.layer = Some(layer_id);
        demand.ids.extend_from_slice(ids);
        (demand.undelivered, demand.undone, demand.many) = (ids.len(), ids.len(), routing.tokens > 1);
        if routing.first_time {
            self.layers[layer_id.index()].learn(routing);
        }
        // All hits and joins before the first miss: no miss may evict what the same fetch needs.
        for &expert in ids {
            self.claim(layer_id, expert, u64::from(routing.first_time));
        }
        let layer = &mut self.layers[layer_id.index()];
        while let Some(expert) = layer.expected.pop() {
            if layer.idle.contains(expert) {
                layer.idle.remove(expert);
                layer.idle.push(layer.key(self.policy, expert), expert);
            }
        }
        self.assign(false);
    }

    fn check(&mut self, layer_id: LayerId, routing: &Routing<'_>) {
        let (layers, experts, ids) = (self.shape.layers, self.shape.experts, routing.experts);
        assert!(layer_id.index() < layers, "layer {} of {layers}", layer_id.0);
        assert!(!routing.first_time || routing.first.len() == ids.len() + 1, "a routing has one list of rows per expert");
        self.fetches += 1;
        for expert in ids {
            let asked = self.asked.get_mut(expert.index()).unwrap_or_else(|| panic!("expert {} of {experts}", expert.0));
            assert!(std::mem::replace(asked, self.fetches) != self.fetches, "one fetch asks for expert {} twice", expert.0);
        }
    }

    /// Pins or joins an expert, or has it wait for a slot.
    fn claim(&mut self, layer_id: LayerId, expert: ExpertId, count: u64) {
        let (layer, counted) = (&mut self.layers[layer_id.index()], &mut self.counted);
        let Some(slot) = layer.slot_of[expert.index()] else {
            self.demand.pending.push_back(expert);
            layer.misses += count;
            counted.misses += count;
            return;
        };
        match &mut self.slots[slot.index()].state {
            State::Resident { pinned: pinned @ false, unused, .. } => {
                *pinned = true;
                counted.prefetch_useful += u64::from(std::mem::take(unused));
                layer.idle.remove(expert);
                layer.hits += count;
                counted.hits += count;
                self.demand.ready.push(Found::Ready(Pin { slot, expert, missed: false }));
            }
            State::Loading { for_whom, .. } => {
                self.background -= usize::from(matches!(for_whom, ForWhom::Prefetch | ForWhom::Warm));
                counted.prefetch_late += u64::from(*for_whom == ForWhom::Prefetch);
                counted.joined += count;
                self.demand.streaming += 1;
                *for_whom = ForWhom::Joined;
            }
            state => unreachable!("between fetches nothing is in state {state:?}"),
        }
    }

    /// A fetch of experts that are in memory and stay there, by somebody who has read them already.
    pub(crate) fn used(&mut self, layer_id: LayerId, routing: &Routing<'_>) {
        let held = self.held;
        self.begin(layer_id, routing);
        self.end();
        self.held = held;
    }

    /// Everything found and not taken yet; `into` is empty.
    pub(crate) fn take(&mut self, into: &mut Vec<Found>) -> Taken {
        let Some(layer) = self.demand.layer.map(LayerId::index) else { return Taken::End };
        if !self.demand.ready.is_empty() {
            self.demand.undelivered -= self.demand.ready.len();
            std::mem::swap(into, &mut self.demand.ready);
            return Taken::Found;
        }
        if self.demand.undelivered > 0 && self.layers[layer].busy == 0 {
            self.assign(true); // the engine waits before it is done with what it has
        }
        match (self.demand.undelivered, self.layers[layer].busy) {
            (0, _) => Taken::End,
            (_, 0) => Taken::Stuck,
            _ => Taken::Wait,
        }
    }

    /// An expert has been used: its slot may be taken for what is pending.
    pub(crate) fn done(&mut self, pin: Pin) {
        self.demand.undone -= 1;
        self.demand.streaming -= usize::from(pin.missed);
        self.unpin(pin.slot);
        self.assign(false);
    }

    /// Ends the fetch: unpins what it holds and takes its waiting loads back. Loads that run go on, for nobody.
    pub(crate) fn end(&mut self) {
        self.held = false;
        let Some(layer_id) = self.demand.layer.take() else { return };
        while let Some(slot) = self.queue.pop_front() {
            let State::Queued(expert) = self.slots[slot.index()].state else { unreachable!("queued slots are in state Queued") };
            let layer = self.layer_of(slot);
            layer.slot_of[expert.index()] = None;
            layer.busy -= 1;
            self.free(slot);
        }
        let ids = std::mem::take(&mut self.demand.ids);
        let held = if self.demand.undone > 0 { &ids[..] } else { &[] };
        for expert in held {
            let Some(slot) = self.layers[layer_id.index()].slot_of[expert.index()] else { continue };
            match &mut self.slots[slot.index()].state {
                State::Loading { for_whom: whom @ (ForWhom::Demand | ForWhom::Joined), .. } => *whom = ForWhom::Nobody,
                State::Resident { pinned: true, .. } => self.unpin(slot),
                _ => {}
            }
        }
        self.demand = Demand {
            ids,
            pending: std::mem::take(&mut self.demand.pending),
            ready: std::mem::take(&mut self.demand.ready),
            ..Demand::default()
        };
        self.demand.ids.clear();
        self.demand.pending.clear();
        self.demand.ready.clear();
    }

    /// Gives pending experts slots while there are any. An expert of a prompt that is cheaper than the one it would evict
    /// waits for a slot that passes through, while enough others stream; `force` lets one such expert evict all the same.
    fn assign(&mut self, mut force: bool) {
        let Some(layer_id) = self.demand.layer else { return };
        while let Some(&expert) = self.demand.pending.front() {
            let layer = &mut self.layers[layer_id.index()];
            let slot = match layer.free.pop().or_else(|| layer.fresh.pop_first()) {
                Some(slot) => slot,
                None => {
                    let Some((key, victim)) = layer.idle.lowest() else { return };
                    let streams = self.demand.many && self.demand.streaming >= self.shape.stream();
                    if streams && !std::mem::take(&mut force) && key > layer.key(self.policy, expert) {
                        return;
                    }
                    self.evict(layer_id, victim)
                }
            };
            self.demand.pending.pop_front();
            self.demand.streaming += 1;
            let layer = &mut self.layers[layer_id.index()];
            layer.slot_of[expert.index()] = Some(slot);
            layer.busy += 1;
            self.slots[slot.index()].state = State::Queued(expert);
            self.queue.push_back(slot);
        }
    }

    // ---- loaders ----

    /// The next load that is waited for or expected, for a loader that has nothing to do.
    pub(crate) fn start(&mut self) -> Option<Load> {
        if let Some(slot) = self.queue.pop_front() {
            let State::Queued(expert) = self.slots[slot.index()].state else { unreachable!("queued slots are in state Queued") };
            return Some(self.load(slot, expert, ForWhom::Demand));
        }
        self.start_wish()
    }

    fn load(&mut self, slot: Slot, expert: ExpertId, for_whom: ForWhom) -> Load {
        self.touch(slot);
        self.slots[slot.index()].state = State::Loading { expert, for_whom };
        Load { slot, key: ExpertKey { layer: self.layer_id(slot), expert } }
    }

    /// A load is over, `Ok` with its bytes. Some: the slot was given up meanwhile; discard it, then [`Core::drained`].
    pub(crate) fn loaded(&mut self, load: Load, result: Result<u64, Error>, time: Duration) -> Option<Vacant> {
        let Load { slot, key } = load;
        self.count(key, &result, time);
        let (expert, for_whom) = match self.slots[slot.index()].state {
            State::Loading { expert, for_whom } => (expert, for_whom),
            State::Draining => return Some(Vacant { slot }),
            state => unreachable!("a load ends in state {state:?}"),
        };
        if for_whom == ForWhom::Joined && result.is_err() {
            self.slots[slot.index()].state = State::Queued(expert);
            self.queue.push_back(slot);
            return None;
        }
        self.background -= usize::from(matches!(for_whom, ForWhom::Prefetch | ForWhom::Warm));
        let wanted = matches!(for_whom, ForWhom::Demand | ForWhom::Joined);
        let layer = self.layer_of(slot);
        layer.busy -= 1;
        let found = match result {
            Ok(_) => {
                layer.resident += 1;
                self.slots[slot.index()].state = State::Resident { expert, pinned: wanted, unused: for_whom == ForWhom::Prefetch };
                if !wanted {
                    self.rest(slot, expert);
                }
                Found::Ready(Pin { slot, expert, missed: true })
            }
            Err(error) => {
                layer.slot_of[expert.index()] = None;
                layer.expected.retain(|other| *other != expert);
                self.free(slot);
                Found::Failed(expert, Arc::new(error))
            }
        };
        if wanted {
            if let Found::Failed(..) = found {
                self.demand.undone -= 1;
                self.demand.streaming -= 1;
            }
            self.demand.ready.push(found);
        }
        self.assign(false);
        None
    }

    fn touch(&mut self, slot: Slot) {
        self.touched += usize::from(!std::mem::replace(&mut self.slots[slot.index()].touched, true));
    }

    /// Its pages are gone, or about to go.
    fn off(&mut self, slot: Slot) {
        let before = std::mem::replace(&mut self.slots[slot.index()], Entry { state: State::Off, touched: false });
        self.touched -= usize::from(before.touched);
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

    /// Takes an idle expert out of memory; its slot is the caller's.
    fn evict(&mut self, layer_id: LayerId, victim: ExpertId) -> Slot {
        let layer = &mut self.layers[layer_id.index()];
        layer.idle.remove(victim);
        layer.expected.retain(|expert| *expert != victim);
        layer.resident -= 1;
        let slot = layer.slot_of[victim.index()].take().expect("what idles has a slot");
        let state = std::mem::replace(&mut self.slots[slot.index()].state, State::Free);
        self.counted.evictions += 1;
        self.counted.prefetch_wasted += u64::from(matches!(state, State::Resident { unused: true, .. }));
        slot
    }

    fn unpin(&mut self, slot: Slot) {
        match &mut self.slots[slot.index()].state {
            State::Resident { pinned: pinned @ true, expert, .. } => {
                *pinned = false;
                let expert = *expert;
                self.rest(slot, expert);
            }
            state => unreachable!("a pin on a slot in state {state:?}"),
        }
    }

    /// An expert in memory that nobody holds: it stays if the policy lets it.
    fn rest(&mut self, slot: Slot, expert: ExpertId) {
        let (policy, layer_id) = (self.policy, self.layer_id(slot));
        let layer = &mut self.layers[layer_id.index()];
        layer.idle.push(layer.key(policy, expert), expert);
        if policy == PolicyKind::None {
            let slot = self.evict(layer_id, expert);
            self.free(slot);
        }
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
                self.counted.checksum_errors += u64::from(matches!(error, Error::Checksum { .. }));
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
    fn learn(&mut self, routing: &Routing<'_>) {
        for (i, expert) in routing.experts.iter().enumerate() {
            let seen = &mut self.uses[expert.index()];
            routing.rows_of(i).iter().for_each(|row| seen.used(Tick(self.tick.0 + 1 + u64::from(*row))));
        }
        self.tick.0 += u64::from(routing.tokens);
    }

    fn key(&self, policy: PolicyKind, expert: ExpertId) -> f64 {
        if self.expected.contains(&expert) { f64::INFINITY } else { policy.key(&self.uses[expert.index()], self.depth) }
    }

    fn rekey(&mut self, policy: PolicyKind) {
        let mut idle = std::mem::replace(&mut self.idle, Idle::new(0));
        idle.rekey(|expert| self.key(policy, expert));
        self.idle = idle;
    }
}
