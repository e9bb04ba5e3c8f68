//! The cache's shell: one lock around the state machine of `core.rs`, and who wakes whom. The engine thread asks, pins and
//! evicts; loader threads only fill. No policy and no bytes here; `experts.rs` and `load.rs` are the callers.
//!
//! Lock order: there is one lock, `inner`, and nothing is read, discarded or populated under it. A slot's bytes need no
//! lock: whoever holds its claim (`claim.rs`) is alone. The state machine checks before it changes anything, so a panic
//! leaves it whole and poison is passed over.

mod claim;
mod core;
#[cfg(test)]
mod model;
mod policy;

pub use self::policy::PolicyKind;
pub(crate) use self::{
    claim::{Hold, Load, Pin, Vacant},
    core::{Core, Found, Shape, Taken},
    policy::{Use, belady},
};

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    Error, Hot, Routing, Stats,
    key::{ExpertId, LayerId, Slot},
};

#[derive(Debug)]
pub(crate) struct Cache {
    inner: Mutex<Inner>,
    /// Loaders wait here for something to do.
    work: Condvar,
    /// The engine thread waits here for what it asked for.
    arrived: Condvar,
}

#[derive(Debug)]
struct Inner {
    core: Core,
    /// Loaders go home.
    stop: bool,
    /// Loaders begin nothing.
    paused: bool,
}

/// What a loader is to do next.
#[derive(Debug)]
pub(crate) enum Job {
    Load(Load),
    Populate(Slot),
}

impl Cache {
    pub(crate) fn new(shape: Shape, policy: PolicyKind) -> Self {
        Self {
            inner: Mutex::new(Inner { core: Core::new(shape, policy), stop: false, paused: false }),
            work: Condvar::new(),
            arrived: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- the engine thread ----

    pub(crate) fn begin(&self, layer: LayerId, routing: &Routing<'_>) {
        let mut inner = self.lock();
        inner.core.begin(layer, routing);
        self.wake(inner);
    }

    /// Blocks until something is found, and puts it into `into`, which is empty; false when everything has been handed out.
    pub(crate) fn take(&self, into: &mut Vec<Found>) -> bool {
        let mut inner = self.lock();
        let mut since = None;
        let found = loop {
            match inner.core.take(into) {
                Taken::Found => break true,
                Taken::End => break false,
                Taken::Stuck => {
                    drop(inner);
                    panic!(
                        "Fetch::next would wait for ever: every slot is held by an expert that was handed out; call Fetch::done for those"
                    );
                }
                Taken::Wait => {
                    if since.is_none() && inner.core.startable() > 0 {
                        self.work.notify_one(); // to ask may have made room
                    }
                    since.get_or_insert_with(Instant::now);
                    inner = self.arrived.wait(inner).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        if let Some(since) = since {
            inner.core.waited(since.elapsed());
        }
        found
    }

    pub(crate) fn done(&self, pins: impl Iterator<Item = Pin>) {
        let mut inner = self.lock();
        pins.for_each(|pin| inner.core.done(pin));
        self.wake(inner);
    }

    pub(crate) fn end(&self) {
        self.lock().core.end();
    }

    /// The result's pages are to be given back before the next call.
    pub(crate) fn resize(&self, per_layer: usize) -> Vec<Vacant> {
        let mut inner = self.lock();
        let vacant = inner.core.resize(per_layer);
        drop(inner);
        self.work.notify_one(); // to populate what is new
        vacant
    }

    /// For memory that is as large as the budget: see [`Core::pack`]. No loader is at work from here to [`Cache::resume`].
    pub(crate) fn pack(&self, per_layer: usize) -> Vec<Vec<(usize, usize)>> {
        let mut inner = self.lock();
        inner.paused = true;
        while inner.core.busy() {
            inner = self.arrived.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.core.pack(per_layer)
    }

    pub(crate) fn resume(&self) {
        self.lock().paused = false;
        self.work.notify_all();
    }

    pub(crate) fn prefetch(&self, layer: LayerId, ranked: &[ExpertId]) {
        let mut inner = self.lock();
        inner.core.prefetch(layer, ranked);
        self.wake(inner);
    }

    pub(crate) fn survey(&self, hold: bool, into: &mut Vec<Option<Slot>>) {
        self.lock().core.survey(hold, into);
    }

    /// Until the next fetch, or [`Cache::end`].
    pub(crate) fn hold<'a>(&self, into: &'a mut Vec<Option<Slot>>) -> Hold<'a> {
        self.survey(true, into);
        Hold { slots: into }
    }

    pub(crate) fn used(&self, layer: LayerId, routing: &Routing<'_>) {
        self.lock().core.used(layer, routing);
    }

    pub(crate) fn warm(&self, hot: &Hot) {
        let mut inner = self.lock();
        inner.core.warm(hot);
        self.wake(inner);
    }

    pub(crate) fn hot(&self) -> Hot {
        self.lock().core.hot()
    }

    pub(crate) fn set_policy(&self, policy: PolicyKind) {
        self.lock().core.set_policy(policy);
    }

    pub(crate) fn clear(&self) {
        self.lock().core.clear();
    }

    pub(crate) fn counters(&self) -> (u64, u64, u64) {
        self.lock().core.counters()
    }

    pub(crate) fn prefetches(&self) -> (u64, u64) {
        self.lock().core.prefetches()
    }

    pub(crate) fn want(&self, per_layer: usize) {
        self.lock().core.want(per_layer);
    }

    pub(crate) fn per_layer(&self) -> usize {
        self.lock().core.per_layer()
    }

    pub(crate) fn resident(&self, layer: LayerId) -> Vec<ExpertId> {
        self.lock().core.resident(layer)
    }

    #[cfg(test)]
    pub(crate) fn settled(&self) -> bool {
        self.lock().core.settled()
    }

    /// And the number of slots that have pages.
    pub(crate) fn stats(&self) -> (Stats, usize) {
        let inner = self.lock();
        (inner.core.stats(), inner.core.touched())
    }

    /// Loaders finish what they are at and return.
    pub(crate) fn stop(&self) {
        self.lock().stop = true;
        self.work.notify_all();
    }

    /// One loader per load that could start; a loader that is busy looks again by itself.
    fn wake(&self, inner: MutexGuard<'_, Inner>) {
        let startable = inner.core.startable();
        drop(inner);
        (0..startable).for_each(|_| self.work.notify_one());
    }

    // ---- loader threads ----

    /// Blocks for work, what is waited for first; `None`: stop.
    pub(crate) fn job(&self) -> Option<Job> {
        let mut inner = self.lock();
        loop {
            if inner.stop {
                return None;
            }
            if !inner.paused {
                if let Some(load) = inner.core.start() {
                    return Some(Job::Load(load));
                }
                if let Some(slot) = inner.core.populate() {
                    return Some(Job::Populate(slot));
                }
                if let Some(load) = inner.core.start_warm() {
                    return Some(Job::Load(load));
                }
            }
            inner = self.work.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Some: discard it, then call [`Cache::drained`].
    pub(crate) fn loaded(&self, load: Load, result: Result<u64, Error>, time: Duration) -> Option<Vacant> {
        let vacant = self.lock().core.loaded(load, result, time);
        self.arrived.notify_one();
        vacant
    }

    /// As for [`Cache::loaded`].
    pub(crate) fn populated(&self, slot: Slot) -> Option<Vacant> {
        // A fetch that waited for this slot has its load queued by now; the caller is the loader that takes it.
        let vacant = self.lock().core.populated(slot);
        self.arrived.notify_one();
        vacant
    }

    pub(crate) fn drained(&self, vacant: Vacant) {
        self.lock().core.drained(vacant);
        self.arrived.notify_one();
    }
}
