//! Counters of a cache, copied out for whoever asks. No logic and no locks: `cache/` counts, `Experts::stats` copies.

use crate::PolicyKind;
use std::time::Duration;

/// What the cache has done since it was opened, and what it holds now.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub policy: PolicyKind,
    pub slots_per_layer: usize,
    /// What the configured budget asks for, before pressure.
    pub slots_wanted: usize,
    /// Memory that one slot takes, rounding to pages included.
    pub slot_bytes: u64,
    /// Slots that hold an expert × `slot_bytes`.
    pub resident_bytes: u64,
    /// Slots that have their pages, filled or not, × `slot_bytes`: what the slab takes.
    pub slab_bytes: u64,
    pub hits: u64,
    pub misses: u64,
    /// Asked for while a load was running for a fetch that was dropped, or for a prefetch: neither hit nor miss.
    pub joined: u64,
    pub evictions: u64,
    /// Loads that succeeded.
    pub loads: u64,
    pub load_errors: u64,
    /// Those of `load_errors` whose bytes came and were not what was written.
    pub checksum_errors: u64,
    /// Prefetches that were read; `hits` or `joined` when they were wanted, `evictions` when not.
    pub prefetched: u64,
    /// Asked for when in memory already.
    pub prefetch_useful: u64,
    /// Gone from memory without having been asked for.
    pub prefetch_wasted: u64,
    /// Asked for while still being read.
    pub prefetch_late: u64,
    /// Reads that a hot set asked for.
    pub warm_loads: u64,
    /// Experts whose last load failed.
    pub bad_records: usize,
    pub bytes_read: u64,
    /// Summed over the loader threads, so it may exceed the time that passed.
    pub read_time: Duration,
    /// The engine thread's time blocked on loads.
    pub wait_time: Duration,
    pub layers: Vec<LayerStats>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerStats {
    pub hits: u64,
    pub misses: u64,
    pub resident: usize,
}
