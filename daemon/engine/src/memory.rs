//! How many bytes this machine could give, and how many of them the expert slab may take. Pure but for one file read.

use crate::{Bytes, CacheBudget};

/// MemAvailable; `None` where the system does not say (the caller then passes [`crate::Options::available`]).
pub(crate) fn available() -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: Bytes = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The slab: `layers` layers of at most `experts` slots of `stride` bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlabShape {
    pub(crate) layers: usize,
    pub(crate) experts: usize,
    pub(crate) stride: Bytes,
}

impl SlabShape {
    /// Slots per layer that `bytes` hold.
    pub(crate) fn slots_in(&self, bytes: Bytes) -> usize {
        usize::try_from(bytes / (self.stride * self.layers as Bytes)).unwrap_or(usize::MAX).min(self.experts)
    }

    pub(crate) fn bytes(&self, slots: usize) -> Bytes {
        self.stride * (self.layers * slots) as Bytes
    }

    /// Slots per layer that the setting asks for; `available` is what `auto` divides.
    pub(crate) fn wanted(&self, budget: CacheBudget, available: Bytes) -> usize {
        match budget {
            CacheBudget::Share(share) => (self.experts as f64 * share) as usize,
            CacheBudget::Bytes(bytes) => self.slots_in(bytes),
            CacheBudget::Auto => self.slots_in(available / 2),
        }
        .max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_become_slots() {
        let shape = SlabShape { layers: 8, experts: 64, stride: 86_016 };
        let check = |budget, available, expected| assert_eq!(shape.wanted(budget, available), expected, "{budget:?}");
        check(CacheBudget::Share(0.25), 0, 16);
        check(CacheBudget::Share(1.0), 0, 64);
        check(CacheBudget::Share(0.0), 0, 1);
        check(CacheBudget::Bytes(8 * 86_016 * 10 + 5), 0, 10);
        check(CacheBudget::Bytes(u64::MAX), 0, 64);
        check(CacheBudget::Bytes(0), 0, 1);
        check(CacheBudget::Auto, 1 << 40, 64);
        check(CacheBudget::Auto, 2 * shape.bytes(7), 7);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_says_what_is_available() {
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
    }
}
