//! Least frequently recently used: each use weighs 1 and halves every [`HALF_LIFE`] tokens. Decaying all weights alike keeps
//! their order, so instead of aging them the later use weighs more: the key is log2 Σ 2^(tick / half-life), in logarithms
//! because the sum itself would overflow. Not a counter with an age beside it: that forgets nothing (`lcp.rs`).

use crate::key::Tick;

/// In tokens of a layer. Chosen by replay: tests/experiments.tsv, "half-life of LFRU".
pub(super) const HALF_LIFE: f64 = 32.0;

/// The key after a use.
pub(super) fn used(frequency: f64, tick: Tick) -> f64 {
    let now = tick.as_f64() / HALF_LIFE;
    now + (1.0 + (frequency - now).exp2()).log2()
}

/// Uses at every tick until `now` sum up to less than this; more is no frequency.
pub(super) fn plausible(frequency: f64, now: Tick) -> bool {
    frequency <= now.as_f64() / HALF_LIFE + HALF_LIFE.log2() + 1.0
}
