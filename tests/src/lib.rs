//! Shared ground of the tests that cross a boundary: a generated model with an obviously correct decoder, storage that
//! fails on purpose, real processes in a temporary home. No tests of its own behaviour beyond the generator's; the
//! binaries in `tests/` use it.

pub mod reference;
pub mod rng;
pub mod tiny_model;
