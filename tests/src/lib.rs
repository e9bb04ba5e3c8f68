//! Shared ground of the tests that cross a boundary: a generated model with an obviously correct decoder, storage that
//! fails on purpose, a model that says what it is told, an engine driven step by step, real processes in a temporary home and at a terminal, HTTP as bytes. Not a test itself;
//! the binaries in `tests/` use it.

use std::time::Duration;

pub mod daemon;
pub mod drive;
pub mod fault_storage;
pub mod golden;
pub mod http;
pub mod reference;
pub mod rng;
pub mod scripted;
#[cfg(target_os = "linux")]
pub mod soak;
#[cfg(target_os = "linux")]
pub mod terminal;
pub mod tiny_model;

/// How long a condition may take to come true before a test gives up. Generous: machines are busy, and nothing is
/// measured with it.
pub const DEADLINE: Duration = Duration::from_secs(60);
