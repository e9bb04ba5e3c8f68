//! The policy: readings and a little history in, a ceiling on the expert slab out. Pure; `mod.rs` reads the sensors and
//! carries the verdict to the engine.
//!
//! What the process cannot give back (everything but clean page cache) stays below 95% of the tightest limit, and the
//! machine keeps some memory available. Shrinking happens at once. Growing back takes a calm spell, goes in steps of an
//! eighth, and only where a whole step fits, so that the ceiling cannot swing around a limit.

use flash_engine::Bytes;

/// Share of a limit that may be held: the kernel needs the rest for charges that come in batches, and for page cache.
const HELD_MAX: f64 = 0.95;
/// Cut a little deeper than needed, and grow only with as much to spare, as a share of the configured slab: or noise would
/// move the ceiling at every sample.
const CUT_DEEPER: u64 = 64;
/// Cut below a limit that is falling, as a share of the limit.
const AHEAD: u64 = 8;
/// As shares of a limit: so near to it a group is full, and with so much page cache the kernel has something else to take.
const FULL: u64 = 32;
const CHURN: u64 = 16;
/// Growth steps, as a share of the configured slab.
const STEP: u64 = 8;
/// Samples without pressure before growing: five seconds while requests run.
const CALM: u32 = 100;
/// Per cent of the last ten seconds in which everything runnable waited for memory.
const STALL_WARN: f64 = 10.0;
const STALL_CRITICAL: f64 = 25.0;
/// Share of the machine's memory whose being available says that nobody lacks it.
const PLENTY: u64 = 4;
/// A stall average falls slowly: samples before the next cut for the same stall.
const STALL_PATIENCE: u32 = 40;
/// Cut for one squeeze, as a share of the configured slab.
const SQUEEZE: u64 = 32;
/// Stalls and squeezes name no limit, so they never cost more than three quarters of the slab.
const FLOOR: u64 = 4;

/// How bad it is, in the words of `flashctl stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    #[default]
    Normal,
    Warn,
    Critical,
}

/// A bound on this process or a group it is in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Limit {
    pub(crate) name: String,
    pub(crate) bytes: Bytes,
    /// Charged to the group and not reclaimable.
    pub(crate) held: Bytes,
    /// Charged and reclaimable: page cache.
    pub(crate) cached: Bytes,
    /// Whether code counts too: not where only the process's own memory is bounded.
    pub(crate) code: bool,
}

/// What the sensors said in one sample; absent = no such sensor here.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Readings {
    pub(crate) limits: Vec<Limit>,
    /// Available and total memory of the machine.
    pub(crate) machine: Option<(Bytes, Bytes)>,
    /// File pages that our group has mapped: code, for the most part.
    pub(crate) mapped: Bytes,
    /// PSI some and full of our own group, avg10, in per cent.
    pub(crate) stall: Option<(f64, f64)>,
    /// The same of the whole machine.
    pub(crate) machine_stall: Option<(f64, f64)>,
    /// Someone is trying to take memory from our group, with a limit we do not see yet.
    pub(crate) squeezed: bool,
    /// The system's own opinion (macOS).
    pub(crate) system: Level,
    /// Memory of this process that is its own: RssAnon + RssShmem, or phys_footprint.
    pub(crate) process: Option<Bytes>,
}

/// The expert slab as it stands: what it may take, and what it takes, slots without an expert included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slab {
    pub(crate) configured: Bytes,
    pub(crate) resident: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) level: Level,
    /// `None`: as configured.
    pub(crate) ceiling: Option<Bytes>,
    /// Said when the ceiling moved.
    pub(crate) decision: Option<String>,
    /// So close to a bound that the next sample should come soon.
    pub(crate) close: bool,
}

/// The history that hysteresis needs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Governor {
    ceiling: Option<Bytes>,
    calm: u32,
    stall_age: u32,
    /// The lowest cgroup limit of the last sample.
    tightest: Option<Bytes>,
    /// The most of [`Readings::mapped`] since the model was loaded: what running takes when nothing is in the way.
    code: Bytes,
}

impl Governor {
    /// One sample. `slab` is absent while no model is loaded: then the ceiling is simply what would fit.
    pub(crate) fn decide(&mut self, readings: &Readings, slab: Option<Slab>) -> Verdict {
        let readings = &heard(self.with_code(readings));
        let before = self.ceiling;
        let resident = slab.map_or(0, |slab| slab.resident);
        let fits = allowed(readings, resident);
        let level = level(readings);
        let mut why = fits.as_ref().map_or("", |(_, name)| name.as_str());
        let ahead = self.ahead(readings);
        let Some(Slab { configured, .. }) = slab else {
            *self = Self { ceiling: fits.as_ref().map(|(bytes, _)| *bytes), tightest: self.tightest, ..Self::default() };
            return Verdict { level, ceiling: self.ceiling, decision: None, close: false };
        };
        let fits_bytes = fits.as_ref().map_or(u64::MAX, |(bytes, _)| bytes.saturating_sub(ahead));
        let now = self.ceiling.unwrap_or(configured).min(configured);
        let stalled = stalled(readings);
        self.stall_age = if stalled { self.stall_age + 1 } else { 0 };
        self.calm = if stalled || readings.squeezed || fits_bytes < now { 0 } else { self.calm + 1 };
        let mut next = now;
        let floor = now.min(configured / FLOOR);
        if stalled && self.stall_age % STALL_PATIENCE == 1 {
            next = (now - now / STEP).max(floor);
        }
        if readings.squeezed {
            // What is held, not what is allowed, is in the way.
            next = next.min(resident.saturating_sub(configured / SQUEEZE).max(floor));
        }
        if fits_bytes < now {
            next = next.min(fits_bytes.saturating_sub(configured / CUT_DEEPER));
        } else if readings.squeezed {
            why = "a cgroup limit is being lowered";
        } else if stalled {
            why = "memory stalls";
        } else if self.calm >= CALM && now < configured && fits_bytes >= grown(now, configured) + configured / CUT_DEEPER {
            next = grown(now, configured);
            self.calm = 0;
        }
        self.ceiling = (next < configured).then_some(next);
        let decision = (self.ceiling != before).then(|| describe(before, self.ceiling, configured, why)).flatten();
        Verdict { level, ceiling: self.ceiling, decision, close: close(readings) }
    }

    /// How far to stay ahead of a cgroup limit that has just fallen: it may fall again before the next sample, and a process
    /// at its limit is killed at the first page it cannot have. Grown back like everything else when the limit stands.
    fn ahead(&mut self, readings: &Readings) -> Bytes {
        let tightest = readings.limits.iter().filter(|limit| limit.code).map(|limit| limit.bytes).min();
        let before = std::mem::replace(&mut self.tightest, tightest);
        let fell = tightest < before || before.is_none();
        tightest.filter(|_| fell).map_or(0, |bytes| bytes / AHEAD)
    }

    /// The readings as they would be with all our code in memory. The kernel takes code first when a limit falls; counted as
    /// it is then, it would make room for experts, and the process would wait for its own pages at every step.
    fn with_code(&mut self, readings: &Readings) -> Readings {
        self.code = self.code.max(readings.mapped);
        let counted = |limit: &Limit| {
            let code = if limit.code { self.code } else { 0 };
            Limit { held: limit.held + code, cached: limit.cached.saturating_sub(code), ..limit.clone() }
        };
        Readings { limits: readings.limits.iter().map(counted).collect(), ..readings.clone() }
    }
}

/// The kernel also says squeezed when a group at its limit churns page cache: whoever reads files through it there does that, and
/// giving experts up would only make room for more of it. While such cache is left, that is all it says.
fn heard(readings: Readings) -> Readings {
    let churns = |limit: &Limit| {
        let full = limit.held + limit.cached >= limit.bytes - limit.bytes / FULL;
        full && limit.cached >= limit.bytes / CHURN && limit.held < share(limit.bytes)
    };
    Readings { squeezed: readings.squeezed && !readings.limits.iter().any(churns), ..readings }
}

/// Slab bytes that keep every bound, and the bound that is tightest.
fn allowed(readings: &Readings, resident: Bytes) -> Option<(Bytes, String)> {
    let limits = readings.limits.iter().map(|limit| {
        let others = limit.held.saturating_sub(resident);
        (share(limit.bytes).saturating_sub(others), limit.name.clone())
    });
    let machine = readings
        .machine
        .map(|(available, total)| ((resident + available).saturating_sub(reserve(total)), "memory available on this machine".to_owned()));
    limits.chain(machine).min_by_key(|(bytes, _)| *bytes)
}

fn share(limit: Bytes) -> Bytes {
    (limit as f64 * HELD_MAX) as Bytes
}

/// What the machine keeps available for others: 5%, at least 256 MiB, on tiny machines an eighth.
fn reserve(total: Bytes) -> Bytes {
    (total / 20).max((256 << 20).min(total / 8))
}

fn grown(now: Bytes, configured: Bytes) -> Bytes {
    (now + (configured / STEP).max(1)).min(configured)
}

fn stalled(readings: &Readings) -> bool {
    readings.system > Level::Normal || stall(readings) >= STALL_WARN
}

/// Per cent of the time in which all stood still for memory that we might give. While the machine has plenty, its stalls are those
/// of some other group at a limit of its own.
fn stall(readings: &Readings) -> f64 {
    let plenty = readings.machine.is_some_and(|(available, total)| available >= total / PLENTY);
    let machine = readings.machine_stall.filter(|_| !plenty);
    [readings.stall, machine].into_iter().flatten().map(|(_, full)| full).fold(0.0, f64::max)
}

/// Within a tenth of a bound.
fn close(readings: &Readings) -> bool {
    readings.squeezed
        || readings.limits.iter().any(|limit| limit.held as f64 > limit.bytes as f64 * (HELD_MAX - 0.1))
        || readings.machine.is_some_and(|(available, total)| available < reserve(total) + total / 10)
}

fn level(readings: &Readings) -> Level {
    let held = readings.limits.iter().map(|limit| limit.held as f64 / limit.bytes.max(1) as f64).fold(0.0, f64::max);
    let full = stall(readings);
    // How much of the reserve is left.
    let left = readings.machine.map_or(f64::MAX, |(available, total)| available as f64 / reserve(total).max(1) as f64);
    let own = if held > 0.98 || left < 0.5 || full >= STALL_CRITICAL {
        Level::Critical
    } else if readings.squeezed || held > HELD_MAX || left < 1.0 || full >= STALL_WARN {
        Level::Warn
    } else {
        Level::Normal
    };
    own.max(readings.system)
}

fn describe(before: Option<Bytes>, after: Option<Bytes>, configured: Bytes, why: &str) -> Option<String> {
    let mib = |bytes: Bytes| bytes as f64 / f64::from(1 << 20);
    let (from, to) = (before.unwrap_or(configured).min(configured), after.unwrap_or(configured));
    match from.cmp(&to) {
        std::cmp::Ordering::Greater => Some(format!("expert cache down from {:.1} to {:.1} MiB: {why}", mib(from), mib(to))),
        std::cmp::Ordering::Less => Some(format!("expert cache up from {:.1} to {:.1} MiB: calm", mib(from), mib(to))),
        std::cmp::Ordering::Equal => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn limited(bytes: Bytes, held: Bytes) -> Readings {
        Readings { limits: vec![Limit { name: "a limit".into(), bytes, held, cached: 0, code: true }], ..Readings::default() }
    }

    /// A process of `others` plus a slab that follows the ceiling, under a limit.
    fn settle(governor: &mut Governor, limit: Bytes, others: Bytes, slab: &mut Slab, samples: u32) -> Vec<Verdict> {
        let turn = |_| {
            let verdict = governor.decide(&limited(limit, others + slab.resident), Some(*slab));
            slab.resident = verdict.ceiling.unwrap_or(slab.configured);
            verdict
        };
        (0..samples).map(turn).collect()
    }

    #[test]
    fn a_group_full_of_page_cache_is_not_squeezed() {
        let slab = Some(Slab { configured: 80 * MIB, resident: 80 * MIB });
        let check = |cached: Bytes, held: Bytes, cuts: bool| {
            let limit = Limit { name: "a limit".into(), bytes: 200 * MIB, held, cached, code: true };
            let readings = Readings { limits: vec![limit], squeezed: true, ..Readings::default() };
            assert_eq!(Governor::default().decide(&readings, slab).ceiling.is_some(), cuts, "{cached} cached, {held} held");
        };
        check(110 * MIB, 90 * MIB, false);
        check(4 * MIB, 170 * MIB, true); // hardly any cache left
        check(20 * MIB, 90 * MIB, true); // far from this limit: there must be another
    }

    #[test]
    fn shrinks_at_once_and_grows_back_in_steps() {
        let mut governor = Governor::default();
        let mut slab = Slab { configured: 80 * MIB, resident: 80 * MIB };
        let calm = settle(&mut governor, 200 * MIB, 20 * MIB, &mut slab, 5);
        assert!(calm.iter().all(|verdict| verdict.ceiling.is_none() && verdict.decision.is_none() && verdict.level == Level::Normal));
        let cut = settle(&mut governor, 80 * MIB, 20 * MIB, &mut slab, 1);
        // 80 × 0.95 − 20 = 56, and 80/8 ahead of the next fall, and 80/64 deeper.
        assert_eq!((cut[0].ceiling, cut[0].level, cut[0].close), (Some((56 - 10) * MIB - 80 * MIB / 64), Level::Critical, true));
        assert!(cut[0].decision.as_ref().is_some_and(|text| text.contains("down from 80.0 to 44.8 MiB: a limit")), "{cut:?}");
        // The limit stays: what was given up ahead of it comes back, once.
        let steady = settle(&mut governor, 80 * MIB, 20 * MIB, &mut slab, 1000);
        let moves: Vec<_> = steady.iter().filter_map(|verdict| verdict.ceiling.filter(|_| verdict.decision.is_some())).collect();
        assert_eq!(moves, [56 * MIB - 80 * MIB / 64]);
        assert!(steady.iter().all(|verdict| verdict.level == Level::Normal), "{:?}", steady.last());
        let back = settle(&mut governor, 200 * MIB, 20 * MIB, &mut slab, 5 * CALM);
        let moves: Vec<_> = back.iter().filter_map(|verdict| verdict.decision.as_ref()).collect();
        assert_eq!((moves.len(), back.last().and_then(|verdict| verdict.ceiling)), (3, None), "{moves:?}");
    }

    /// The kernel takes mapped code before it refuses a limit; the slab gives way as if the code were still there.
    #[test]
    fn evicted_code_is_no_room_for_experts() {
        let mut governor = Governor::default();
        let slab = Slab { configured: 64 * MIB, resident: 64 * MIB };
        let sample = |limit, mapped| Readings { mapped, ..limited(limit, 70 * MIB) };
        assert_eq!(governor.decide(&sample(200 * MIB, 20 * MIB), Some(slab)).ceiling, None);
        // 120 × 0.95 − 26 held by others, code included, − 15 ahead: all 64 and more.
        assert_eq!(governor.decide(&sample(120 * MIB, 20 * MIB), Some(slab)).ceiling, None);
        // 80 × 0.95 − 26 − 10 = 40, and 64/64 deeper, although only 70 of 80 are held now.
        assert_eq!(governor.decide(&sample(80 * MIB, 0), Some(slab)).ceiling, Some(39 * MIB));
    }

    #[test]
    fn a_falling_limit_is_followed_all_the_way() {
        let mut governor = Governor::default();
        let (others, mut slab) = (40 * MIB, Slab { configured: 80 * MIB, resident: 80 * MIB });
        for percent in (60..=100).rev().step_by(2) {
            let limit = 120 * MIB * percent / 100;
            settle(&mut governor, limit, others, &mut slab, 2);
            assert!(others + slab.resident <= limit * 95 / 100, "{percent}%");
        }
    }

    #[test]
    fn stalls_cost_a_step_each_but_not_the_whole_slab() {
        let mut governor = Governor::default();
        let slab = Slab { configured: 64 * MIB, resident: 0 };
        let stalled = Readings { stall: Some((40.0, 30.0)), ..Readings::default() };
        let verdicts: Vec<_> = (0..8).map(|_| governor.decide(&stalled, Some(slab))).collect();
        assert_eq!(verdicts.iter().filter(|verdict| verdict.decision.is_some()).count(), 1);
        assert_eq!((verdicts[7].ceiling, verdicts[7].level), (Some(56 * MIB), Level::Critical));
        // A neighbour's, on a machine with memory to spare.
        let machine = Some((3000 * MIB, 8000 * MIB));
        let elsewhere = Readings { stall: None, machine_stall: stalled.stall, machine, ..Readings::default() };
        assert_eq!(Governor::default().decide(&elsewhere, Some(slab)).ceiling, None);
        let scarce = Readings { machine: Some((1500 * MIB, 8000 * MIB)), ..elsewhere };
        assert!(Governor::default().decide(&scarce, Some(slab)).ceiling.is_some());
        let last = (0..500).map(|_| governor.decide(&stalled, Some(slab))).last().expect("many");
        assert_eq!(last.ceiling, Some(16 * MIB));
        let squeezed = Readings { squeezed: true, ..Readings::default() };
        let mut governor = Governor::default();
        let mut slab = Slab { configured: 64 * MIB, resident: 48 * MIB };
        let mut ceilings = vec![];
        for _ in 0..40 {
            slab.resident = governor.decide(&squeezed, Some(slab)).ceiling.expect("a cut");
            ceilings.push(slab.resident / MIB);
        }
        assert_eq!((ceilings[..3].to_vec(), ceilings[39]), (vec![46, 44, 42], 16));
        let slab = Slab { resident: 0, ..slab };
        let pressed = Readings { system: Level::Warn, ..Readings::default() };
        assert_eq!(Governor::default().decide(&pressed, Some(slab)).ceiling, Some(56 * MIB));
    }

    #[test]
    fn the_machine_keeps_its_reserve() {
        let check = |available_mib: u64, total_mib: u64, expected: Option<u64>| {
            let readings = Readings { machine: Some((available_mib * MIB, total_mib * MIB)), ..Readings::default() };
            let slab = Slab { configured: 640 * MIB, resident: 640 * MIB };
            let ceiling = Governor::default().decide(&readings, Some(slab)).ceiling;
            assert_eq!(ceiling, expected.map(|mib| mib * MIB), "{available_mib} of {total_mib}");
        };
        check(1024, 16 * 1024, None);
        check(156, 4 * 1024, Some(640 - 100 - 10));
        check(0, 4 * 1024, Some(640 - 256 - 10));
    }

    #[test]
    fn without_a_model_the_ceiling_is_what_would_fit() {
        let mut governor = Governor::default();
        assert_eq!(governor.decide(&limited(100 * MIB, 20 * MIB), None).ceiling, Some(75 * MIB));
        assert_eq!(governor.decide(&Readings::default(), None).ceiling, None);
        governor.decide(&limited(100 * MIB, 20 * MIB), None);
        let loaded = governor.decide(&limited(100 * MIB, 20 * MIB), Some(Slab { configured: 50 * MIB, resident: 0 }));
        assert_eq!((loaded.ceiling, loaded.decision), (None, None));
    }

    fn readings() -> impl Strategy<Value = Readings> {
        let limit =
            (1..1u64 << 40, 0..1u64 << 40).prop_map(|(bytes, held)| Limit { name: "limit".into(), bytes, held, cached: 0, code: false });
        let stall = proptest::option::of((0.0..100.0, 0.0..100.0));
        let machine = proptest::option::of((0..1u64 << 40, 0..1u64 << 41));
        (proptest::collection::vec(limit, 0..3), machine, stall).prop_map(|(limits, machine, stall)| Readings {
            limits,
            machine,
            stall,
            ..Readings::default()
        })
    }

    proptest! {
        #[test]
        fn never_above_the_configured_slab(samples in proptest::collection::vec((readings(), 0..1u64 << 40, 0..1u64 << 40), 1..50)) {
            let mut governor = Governor::default();
            for (readings, configured, resident) in samples {
                let verdict = governor.decide(&readings, Some(Slab { configured, resident }));
                prop_assert!(verdict.ceiling.is_none_or(|ceiling| ceiling < configured));
                let fits = allowed(&readings, resident).map_or(u64::MAX, |(bytes, _)| bytes);
                prop_assert!(verdict.ceiling.unwrap_or(configured) <= fits);
            }
        }

        #[test]
        fn a_higher_limit_never_allows_less(readings in readings(), more in 0..1u64 << 40, configured in 0..1u64 << 40, resident in 0..1u64 << 40) {
            let mut roomier = readings.clone();
            roomier.limits.iter_mut().for_each(|limit| limit.bytes += more);
            let slab = Some(Slab { configured, resident });
            let ceiling = |readings: &Readings| Governor::default().decide(readings, slab).ceiling.unwrap_or(configured);
            prop_assert!(ceiling(&roomier) >= ceiling(&readings));
        }

        #[test]
        fn no_flapping_at_a_steady_limit(limit in 1..400u64, others in 0..400u64, noise in proptest::collection::vec(0..512u64, 400)) {
            // Up to half a MiB of noise in what others hold, a slab of 64 MiB.
            let mut governor = Governor::default();
            // The limit stood before the model was loaded.
            governor.decide(&limited(limit * MIB, others * MIB), None);
            let mut slab = Slab { configured: 64 * MIB, resident: 64 * MIB };
            let mut moves = 0;
            for kib in noise {
                let verdict = governor.decide(&limited(limit * MIB, others * MIB + slab.resident + kib * 1024), Some(slab));
                slab.resident = verdict.ceiling.unwrap_or(slab.configured);
                moves += usize::from(verdict.decision.is_some());
            }
            prop_assert!(moves <= 3, "{moves} moves");
        }
    }
}
