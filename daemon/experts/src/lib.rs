//! Bytes and residency of experts. (façade skeleton)
mod error;
pub use error::Error;
/// Counters.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub slots_per_layer: usize,
    /// What the configured budget asks for, before pressure.
    pub slots_wanted: usize,
    pub slot_bytes: u64,
    pub resident_bytes: u64,
    pub hits: u64,
    pub misses: u64,
    pub joined: u64,
    pub evictions: u64,
    pub loads: u64,
    pub load_errors: u64,
    pub bad_records: usize,
    pub bytes_read: u64,
    pub read_time: std::time::Duration,
    pub wait_time: std::time::Duration,
    pub layers: Vec<LayerStats>,
}
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerStats {
    pub hits: u64,
    pub misses: u64,
    pub resident: usize,
}
