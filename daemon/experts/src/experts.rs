//! The façade: experts by name, slots by number. Owned by the engine thread, which asks for a layer's experts, computes
//! what has arrived while the rest loads, and says when it is done with each. It computes nothing itself.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use crate::{
    BankPtr, Error, ExpertId, Hot, LayerId, PolicyKind, Routing, Slab, Slot, SlotPtr, Source, Stats,
    cache::{Cache, Found, Hold, Pin, Shape},
    load::{self, Shared},
    recent::Recent,
    replay::Trace,
    store::Store,
};

#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Experts that one token uses; fewer slots than that work, in waves.
    pub top_k: usize,
    pub slots_per_layer: usize,
    /// Threads that read; at least one is started.
    pub loaders: usize,
    pub policy: PolicyKind,
}

/// A model's routed experts, some of them in memory.
#[derive(Debug)]
pub struct Experts {
    shared: Arc<Shared>,
    loaders: Vec<JoinHandle<()>>,
    shape: Shape,
    /// What the fetch has handed out and is not done with. Here, so that fetches use one list.
    pins: Vec<Pin>,
    found: Vec<Found>,
    /// What [`Experts::held`] has found.
    surveyed: Vec<Option<Slot>>,
    recent: Recent,
}

/// The experts that one layer's step needs, as they arrive. Dropping it unpins them all, takes waiting loads back and lets
/// running ones finish for later.
#[derive(Debug)]
pub struct Fetch<'a> {
    experts: &'a mut Experts,
}

/// What is in memory, where it stays until this is dropped.
#[derive(Debug)]
pub struct Held<'a> {
    shared: &'a Shared,
    shape: Shape,
    hold: Hold<'a>,
    recent: Mutex<&'a mut Recent>,
}

/// What became of one expert of a fetch.
#[derive(Clone, Debug)]
pub enum Arrival {
    Ready { expert: ExpertId, slot: Slot },
    Failed { expert: ExpertId, error: Arc<Error> },
}

impl Experts {
    /// Checks that every expert's bytes lie inside its files and its slot, and starts the loaders.
    pub fn open(source: Source, slab: Slab, config: Config) -> Result<Self, Error> {
        let store = Store::new(source, &slab)?;
        let (layers, experts) = (store.layers(), store.experts());
        if config.top_k == 0 || config.top_k > experts {
            return Err(Error::Source(format!("top-{} of {experts} experts", config.top_k)));
        }
        let loaders = config.loaders.max(1);
        let shape = Shape { layers, experts, places: (slab.slots() / layers).min(experts), loaders };
        if shape.places == 0 {
            return Err(Error::Source(format!("{} slots for {layers} layers; each needs one at least", slab.slots())));
        }
        let shared = Arc::new(Shared { store, slab, cache: Cache::new(shape, config.policy) });
        let recent = Recent::new(layers, experts, config.top_k);
        let mut opened = Self { shared, loaders: Vec::new(), shape, pins: Vec::new(), found: Vec::new(), surveyed: Vec::new(), recent };
        opened.set_slots(config.slots_per_layer);
        opened.set_wanted(opened.slots());
        for number in 0..loaders {
            opened.loaders.push(load::spawn(number, &opened.shared)?);
        }
        Ok(opened)
    }

    /// Starts loading what is missing of `routing.experts`, which arrive in that order where they are in memory.
    pub fn fetch(&mut self, layer: LayerId, routing: &Routing<'_>) -> Fetch<'_> {
        self.pins.clear();
        self.shared.cache.begin(layer, routing);
        self.recent.record(layer, routing);
        Fetch { experts: self }
    }

    /// Says which experts the layer's next fetch is likely to want, the likeliest first. Those in memory stay there; the
    /// others are loaded while at least half of the loaders have nothing better to do. Replaces what was said before, and
    /// is over when that fetch begins. No effect with [`PolicyKind::None`] or during a fetch of that very layer.
    pub fn prefetch(&mut self, layer: LayerId, ranked: &[ExpertId]) {
        let (layers, experts) = (self.shape.layers, self.shape.experts);
        assert!(layer.index() < layers, "layer {} of {layers}", layer.0);
        assert!(ranked.iter().all(|expert| expert.index() < experts), "experts {ranked:?} of {experts}");
        self.shared.cache.prefetch(layer, ranked);
    }

    /// Fills `into` with the slot of every expert in memory, [layers, experts]. With `hold` all of them stay there until the next
    /// fetch or [`Experts::release`]: for a backend that computes before it says with which of them.
    pub fn survey(&self, hold: bool, into: &mut Vec<Option<Slot>>) {
        self.shared.cache.survey(hold, into);
    }

    /// What is in memory, for threads that each compute with experts of their own choice and say afterwards which these were.
    pub fn held(&mut self) -> Held<'_> {
        let Self { shared, shape, pins, surveyed, recent, .. } = self;
        pins.clear();
        Held { shared, shape: *shape, hold: shared.cache.hold(surveyed), recent: Mutex::new(recent) }
    }

    /// What has been learned and what is in memory, to be kept for the next run.
    pub fn hot(&self) -> Hot {
        self.shared.cache.hot()
    }

    /// Takes over what another run has learned, and has half of the loaders bring back what it had in memory, the dearest
    /// first, where slots are free and there is nothing better to do. Of use to a cache that was just opened; another model's
    /// is passed over.
    pub fn warm(&mut self, hot: &Hot) {
        let Shape { layers, experts, .. } = self.shape;
        if (hot.layers.len(), hot.experts) == (layers, experts) {
            self.shared.cache.warm(hot);
        } else {
            let of = format!("{} layers of {} experts", hot.layers.len(), hot.experts);
            tracing::warn!(of, "a hot set of another model; the cache starts cold");
        }
    }

    /// Which experts the latest tokens used, for [`crate::replay`]: about a thousand, without those of prompts.
    pub fn recent(&self) -> Trace {
        self.recent.trace()
    }

    /// What was learned about experts is kept, whatever the policy.
    pub fn set_policy(&mut self, policy: PolicyKind) {
        self.shared.cache.set_policy(policy);
    }

    /// Evicts everything and forgets what was learned: a cold cache. Loads that run for nobody still end in it.
    pub fn clear(&mut self) {
        self.shared.cache.clear();
    }

    /// Changes the slots of every layer, within 1 and the number of experts. Fewer: the policy's victims go, and their
    /// pages with them. More: loaders fault the new ones in when they have nothing else to do.
    pub fn set_slots(&mut self, per_layer: usize) {
        let per_layer = per_layer.clamp(1, self.shape.places);
        for vacant in self.shared.cache.resize(per_layer) {
            self.shared.slab.discard(&vacant);
        }
    }

    /// As [`Experts::set_slots`], for a slab of banks: `make` gets memory for that many slots of each layer and calls what it is
    /// given with the address of the first, which brings over what stays; then the layer's old memory may go. Waits for
    /// loads that run. After an error the layers that had their turn have the new size, and nothing may be fetched before
    /// [`Experts::clear`] and another call.
    pub fn set_banks<E>(
        &mut self,
        per_layer: usize,
        mut make: impl FnMut(LayerId, usize, &mut dyn FnMut(BankPtr)) -> Result<(), E>,
    ) -> Result<(), E> {
        let Shared { cache, slab, .. } = &*self.shared;
        let per_layer = per_layer.clamp(1, self.shape.places);
        for (layer, stay) in (0u16..).map(LayerId).zip(cache.pack(per_layer)) {
            make(layer, per_layer, &mut |bank| slab.set_bank(layer, bank, &stay))?;
        }
        cache.resume();
        Ok(())
    }

    /// What the configured budget asks for, for [`Stats::slots_wanted`] only.
    pub fn set_wanted(&mut self, per_layer: usize) {
        self.shared.cache.want(per_layer);
    }

    /// Unpins what the last fetch holds since [`Fetch::hold`], and what [`Experts::survey`] holds.
    pub fn release(&mut self) {
        self.pins.clear();
        self.shared.cache.end();
    }

    /// Slots of each layer.
    pub fn slots(&self) -> usize {
        self.shared.cache.per_layer()
    }

    /// Memory that one slot takes.
    pub fn slot_bytes(&self) -> u64 {
        self.shared.slab.stride_bytes() as u64
    }

    /// Where a slot lies, for a backend to read while the slot is pinned.
    pub fn slot(&self, slot: Slot) -> SlotPtr {
        self.shared.slab.slot(slot)
    }

    /// The layer's experts in memory, in order of their numbers.
    pub fn resident(&self, layer: LayerId) -> Vec<ExpertId> {
        self.shared.cache.resident(layer)
    }

    /// Hits, misses and bytes read so far: what a step looks at, for less than [`Experts::stats`].
    pub fn counters(&self) -> (u64, u64, u64) {
        self.shared.cache.counters()
    }

    /// Useful and wasted prefetches so far.
    pub fn prefetches(&self) -> (u64, u64) {
        self.shared.cache.prefetches()
    }

    #[cfg(test)]
    pub(crate) fn settled(&self) -> bool {
        self.shared.cache.settled()
    }

    pub fn stats(&self) -> Stats {
        let (mut stats, touched) = self.shared.cache.stats();
        stats.slot_bytes = self.slot_bytes();
        stats.slab_bytes = touched as u64 * stats.slot_bytes;
        stats.resident_bytes = stats.layers.iter().map(|layer| layer.resident as u64).sum::<u64>() * stats.slot_bytes;
        stats
    }
}

impl Drop for Experts {
    fn drop(&mut self) {
        self.shared.cache.stop();
        for loader in self.loaders.drain(..) {
            if loader.join().is_err() {
                tracing::error!("an expert loader thread has panicked");
            }
        }
    }
}

impl Fetch<'_> {
    /// Fills `into` with everything that has arrived since the last call: first what was in memory, in the order asked for,
    /// then loads as they end. Blocks only if there is nothing; false, with nothing, once every expert has been handed out.
    ///
    /// # Panics
    /// If it could only wait for ever: nothing loads, and every slot is held by an expert that [`Fetch::done`] was not
    /// called for.
    pub fn next(&mut self, into: &mut Vec<Arrival>) -> bool {
        into.clear();
        let Experts { shared, pins, found, .. } = &mut *self.experts;
        let more = shared.cache.take(found);
        into.extend(found.drain(..).map(|found| match found {
            Found::Ready(pin) => {
                let arrival = Arrival::Ready { expert: pin.expert(), slot: pin.slot() };
                pins.push(pin);
                arrival
            }
            Found::Failed(expert, error) => Arrival::Failed { expert, error },
        }));
        more
    }

    /// These have been computed: their slots may go to experts that wait for one. Failed ones hold none and are passed over.
    pub fn done(&mut self, experts: &[ExpertId]) {
        let Experts { shared, pins, .. } = &mut *self.experts;
        shared.cache.done(pins.extract_if(.., |pin| experts.contains(&pin.expert())));
    }

    /// As [`Experts::prefetch`], while this layer's experts load.
    pub fn prefetch(&mut self, layer: LayerId, ranked: &[ExpertId]) {
        self.experts.prefetch(layer, ranked);
    }

    /// Ends the fetch, but keeps pinned what it holds until the next one begins or [`Experts::release`]: for a backend that
    /// computes later, when it is asked for something that builds on these experts.
    pub fn hold(self) {
        std::mem::forget(self);
    }

    /// The slot of an expert that was handed out, until [`Fetch::done`].
    ///
    /// # Panics
    /// If this fetch does not hold the expert.
    pub fn slot(&self, expert: ExpertId) -> Slot {
        self.pin(expert).slot()
    }

    /// As [`Fetch::slot`], its bytes.
    pub fn bytes(&self, expert: ExpertId) -> &[u8] {
        self.experts.shared.slab.bytes(self.pin(expert))
    }

    fn pin(&self, expert: ExpertId) -> &Pin {
        let pin = self.experts.pins.iter().find(|pin| pin.expert() == expert);
        pin.unwrap_or_else(|| panic!("expert {} is not held by this fetch", expert.0))
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        self.experts.pins.clear();
        self.experts.shared.cache.end();
    }
}

impl Held<'_> {
    /// An expert's slot, if it is in memory.
    pub fn bytes(&self, layer: LayerId, expert: ExpertId) -> Option<&[u8]> {
        self.shared.slab.held(&self.hold, layer.index() * self.shape.experts + expert.index())
    }

    /// Has the cache learn what a step of one thread used, as from fetches: all of it is in memory. Others wait meanwhile, so that the
    /// layers of a token stay together.
    pub fn learn(&self) -> impl FnMut(LayerId, &Routing<'_>) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        move |layer, routing| {
            self.shared.cache.used(layer, routing);
            recent.record(layer, routing);
        }
    }

    /// As [`Experts::counters`].
    pub fn counters(&self) -> (u64, u64, u64) {
        self.shared.cache.counters()
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.shared.cache.end();
    }
}
