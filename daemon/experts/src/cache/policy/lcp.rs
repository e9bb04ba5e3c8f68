//! Least critical priority: uses × 0.25^(age / 128) × (1 + β (1 − layer / (layers − 1))). As a logarithm, where the age of all
//! grows alike and drops out. The last factor prefers early layers; each layer having slots of its own, it compares experts of
//! one layer only and changes nothing.

use super::Use;

const AGE: f64 = 128.0;
/// log2 0.25
const DECAY: f64 = -2.0;
/// β
const BIAS: f64 = 0.5;

pub(super) fn key(seen: &Use, depth: f64) -> f64 {
    f64::from(seen.count).log2() - DECAY * seen.last.as_f64() / AGE + (1.0 + BIAS * (1.0 - depth)).log2()
}
