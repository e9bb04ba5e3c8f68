//! Which expert makes room for another: the one with the lowest key. A key says how dear an expert of a layer is; it changes
//! only when that expert is used, whatever the policy, so that nothing has to be aged and a victim costs O(log n). There is no
//! trait: a policy is one pure function of what has been seen of an expert. No slots, threads or clocks; `cache/core.rs` calls.

mod belady;
mod idle;
mod lcp;
mod lfru;

pub(crate) use belady::belady;
pub(super) use idle::Idle;

use crate::key::Tick;
use std::{fmt, str::FromStr};

/// How the cache chooses what stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyKind {
    /// The least frequently used goes, uses counting less the older they are.
    #[default]
    Lfru,
    /// The least recently used goes.
    Lru,
    /// The least critical priority goes: uses ever, discounted by the age of the last.
    Lcp,
    /// Nothing stays after its fetch.
    None,
}

/// Their names, as settings spell them.
const NAMES: [(&str, PolicyKind); 4] =
    [("lfru", PolicyKind::Lfru), ("lru", PolicyKind::Lru), ("lcp", PolicyKind::Lcp), ("none", PolicyKind::None)];

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, _) = NAMES.iter().find(|(_, kind)| kind == self).expect("every policy has a name");
        f.pad(name)
    }
}

impl FromStr for PolicyKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        found.map(|(_, kind)| *kind).ok_or_else(|| format!("{text:?} is no cache policy; use lfru, lru, lcp or none"))
    }
}

/// What has been seen of an expert. All policies' figures are kept, so that the policy can change while running; they outlive
/// the expert's stay in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Use {
    /// The latest use.
    pub(crate) last: Tick,
    /// Uses ever.
    pub(crate) count: u32,
    /// log2 of the decayed number of uses; see `lfru.rs`.
    pub(crate) frequency: f64,
}

impl Use {
    pub(crate) const NEVER: Self = Self { last: Tick(0), count: 0, frequency: f64::NEG_INFINITY };

    /// Ticks of an expert's uses ascend.
    pub(crate) fn used(&mut self, tick: Tick) {
        self.last = tick;
        self.count = self.count.saturating_add(1);
        self.frequency = lfru::used(self.frequency, tick);
    }

    /// Whether [`Use::used`] could have made this by `now`.
    pub(crate) fn plausible(&self, now: Tick) -> bool {
        self.last <= now && (self.count == 0) == (self.frequency == f64::NEG_INFINITY) && lfru::plausible(self.frequency, now)
    }
}

impl PolicyKind {
    /// The lowest of a layer goes first. `depth`: 0 for the first layer to 1 for the last.
    pub(super) fn key(self, seen: &Use, depth: f64) -> f64 {
        match self {
            Self::Lfru => seen.frequency,
            Self::Lru | Self::None => seen.last.as_f64(),
            Self::Lcp => lcp::key(seen, depth),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order in which experts with uses at these ticks go.
    fn order(policy: PolicyKind, uses: &[&[u64]]) -> Vec<usize> {
        let key = |ticks: &&[u64]| {
            let mut seen = Use::NEVER;
            ticks.iter().for_each(|&tick| seen.used(Tick(tick)));
            policy.key(&seen, 0.5)
        };
        let keys: Vec<f64> = uses.iter().map(key).collect();
        let mut order: Vec<usize> = (0..uses.len()).collect();
        order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
        order
    }

    #[test]
    fn policies_differ_in_what_goes_first() {
        let uses: [&[u64]; 4] = [&[1, 2, 3, 4], &[50], &[60, 65], &[]];
        assert_eq!(order(PolicyKind::Lru, &uses), [3, 0, 1, 2]);
        assert_eq!(order(PolicyKind::Lfru, &uses), [3, 1, 0, 2]);
        // Old uses have lost most of their weight, wherever the clock stands; four at once outlive one for two half-lives.
        for start in [0, 1_000_000_000] {
            let burst: Vec<u64> = (start + 1..start + 5).collect();
            for (policy, half_life) in [(PolicyKind::Lfru, 32), (PolicyKind::Lcp, 64)] {
                let check = |after: u64, expected: [usize; 2]| {
                    assert_eq!(order(policy, &[&burst, &[start + after]]), expected, "{policy} after {after}");
                };
                check(2 * half_life - 4, [1, 0]);
                check(2 * half_life + 8, [0, 1]);
            }
        }
        // LCP counts uses ever, so an old favourite comes back with all its weight; LFRU has forgotten.
        let uses: [&[u64]; 2] = [&[1, 2, 3, 4, 5, 1000], &[990, 1000]];
        assert_eq!((order(PolicyKind::Lcp, &uses), order(PolicyKind::Lfru, &uses)), (vec![1, 0], vec![0, 1]));
    }

    #[test]
    fn names_go_both_ways() {
        for (name, kind) in NAMES {
            assert_eq!((name.parse(), kind.to_string()), (Ok(kind), name.to_owned()));
        }
        assert_eq!("LRU".parse(), Ok(PolicyKind::Lru));
        assert!("fifo".parse::<PolicyKind>().unwrap_err().contains("use lfru, lru, lcp or none"));
    }
}
