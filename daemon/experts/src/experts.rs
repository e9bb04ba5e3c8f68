//! The façade: experts by name, slots by number. Owned by the engine thread, which asks for a layer's experts, computes
//! what has arrived while the rest loads, and says when it is done with each. It computes nothing itself.

use std::{sync::Arc, thread::JoinHandle};

use crate::{
    Error, ExpertId, LayerId, Slab, Slot, SlotPtr, Source, Stats,
    cache::{Cache, Found, Pin, Shape},
    load::{self, Shared},
    store::Store,
};

#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Experts that one token uses; fewer slots than that work, in waves.
    pub top_k: usize,
    pub slots_per_layer: usize,
    /// Threads that read; at least one is started.
    pub loaders: usize,
}

/// A model's routed experts, some of them in memory.
#[derive(Debug)]
pub struct Experts {
    shared: Arc<Shared>,
    loaders: Vec<JoinHandle<()>>,
    shape: Shape,
}

/// The experts that one layer's step needs, as they arrive. Dropping it unpins them all, takes waiting loads back and lets
/// running ones finish for later.
#[derive(Debug)]
pub struct Fetch<'a> {
    experts: &'a mut Experts,
    /// Handed out, not done.
    pins: Vec<Pin>,
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
        let shape = Shape { layers, experts, places: (slab.slots() / layers).min(experts) };
        if shape.places == 0 {
            return Err(Error::Source(format!("{} slots for {layers} layers; each needs one at least", slab.slots())));
        }
        let shared = Arc::new(Shared { store, slab, cache: Cache::new(shape) });
        let mut opened = Self { shared, loaders: Vec::new(), shape };
        opened.set_slots(config.slots_per_layer);
        opened.set_wanted(opened.slots());
        for number in 0..config.loaders.max(1) {
            opened.loaders.push(load::spawn(number, &opened.shared)?);
        }
        Ok(opened)
    }

    /// Starts loading what is missing. `ids` are distinct experts of the layer.
    pub fn fetch(&mut self, layer: LayerId, ids: &[ExpertId]) -> Fetch<'_> {
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        assert!(layer.index() < self.shape.layers, "layer {} of {}", layer.0, self.shape.layers);
        assert!(sorted.last().is_none_or(|last| last.index() < self.shape.experts), "experts {sorted:?} of {}", self.shape.experts);
        assert!(sorted.is_sorted_by(|a, b| a < b), "one fetch asks for an expert twice: {sorted:?}");
        self.shared.cache.begin(layer, ids);
        Fetch { experts: self, pins: Vec::new() }
    }

    /// Changes the slots of every layer, within 1 and the number of experts. Fewer: the policy's victims go, and their
    /// pages with them. More: loaders fault the new ones in when they have nothing else to do.
    pub fn set_slots(&mut self, per_layer: usize) {
        let per_layer = per_layer.clamp(1, self.shape.places);
        for vacant in self.shared.cache.resize(per_layer) {
            self.shared.slab.discard(&vacant);
        }
    }

    /// What the configured budget asks for, for [`Stats::slots_wanted`] only.
    pub fn set_wanted(&mut self, per_layer: usize) {
        self.shared.cache.want(per_layer);
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

    pub fn stats(&self) -> Stats {
        let mut stats = self.shared.cache.stats();
        stats.slot_bytes = self.slot_bytes();
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
    /// Everything that has arrived since the last call: first what was in memory, in the order asked for, then loads as
    /// they end. Blocks only if there is nothing; `None` once every expert has been handed out.
    ///
    /// # Panics
    /// If it could only wait for ever: nothing loads, and every slot is held by an expert that [`Fetch::done`] was not
    /// called for.
    #[expect(clippy::should_implement_trait, reason = "a `for` loop would hold the borrow that `done` needs")]
    pub fn next(&mut self) -> Option<Vec<Arrival>> {
        let found = self.experts.shared.cache.take()?;
        let arrival = |found| match found {
            Found::Ready(pin) => {
                let arrival = Arrival::Ready { expert: pin.expert(), slot: pin.slot() };
                self.pins.push(pin);
                arrival
            }
            Found::Failed(expert, error) => Arrival::Failed { expert, error },
        };
        Some(found.into_iter().map(arrival).collect())
    }

    /// These have been computed: their slots may go to experts that wait for one. Failed ones hold none and are passed over.
    pub fn done(&mut self, experts: &[ExpertId]) {
        let done = self.pins.extract_if(.., |pin| experts.contains(&pin.expert()));
        self.experts.shared.cache.done(done);
    }

    /// The bytes of an expert that was handed out (region 0), until [`Fetch::done`].
    ///
    /// # Panics
    /// If the slot is not one that this fetch holds.
    pub fn slot_bytes(&self, slot: Slot) -> &[u8] {
        let pin = self.pins.iter().find(|pin| pin.slot() == slot);
        self.experts.shared.slab.bytes(pin.unwrap_or_else(|| panic!("slot {} is not held by this fetch", slot.0)))
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        self.experts.shared.cache.end();
    }
}
