//! Mixture-of-Experts inference on one machine, with routed experts streamed from disk through a bounded cache.
//!
//! Synchronous: the caller owns an [`Engine`] on a thread of its own and calls [`Engine::step`]. What may be used from
//! any thread (tokenizer, chat template, limits) is in [`Text`], the counters in [`Report`]. No RPC, no async, no clock
//! but for timings.

mod api;
mod backend;
mod engine;
mod error;
mod forward;
mod kv;
mod memory;
mod model;
mod moe;
mod sample;
mod schedule;
mod sequence;

pub use api::*;
pub use engine::Engine;
pub use error::Error;
pub use model::{Message, Text, hub};
