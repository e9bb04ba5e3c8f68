//! Mixture-of-Experts inference on one machine, with routed experts streamed from disk through a bounded cache.
//!
//! Synchronous: the caller owns an [`Engine`] on a thread of its own and calls [`Engine::step`]. What may be used from
//! any thread (tokenizer, chat template, limits) is in [`Text`], the counters in [`Report`]. No RPC, no async, no clock
//! but for timings.

mod api;
mod backend;
pub mod bench;
mod convert;
mod engine;
mod error;
mod forward;
mod kv;
mod machine;
mod memory;
mod model;
mod moe;
mod profile;
mod sample;
mod schedule;
mod sequence;
mod storage;
pub mod synth;
mod trace;

pub use api::*;
pub use backend::backend;
pub use convert::{Converted, Verified, convert, verify};
pub use engine::Engine;
pub use error::Error;
pub use flash_experts::{Hot, replay};
pub use kv::disk::clear_disk_cache;
pub use model::{Chat, Choice, Format, Message, Parameters, Reply, Text, Tool, ToolCall, ToolChoice, hub};
pub use profile::{Profile, Stage};
pub use schedule::{Lookahead, Split};
pub use storage::{StorageReport, storage_report};
pub use trace::read_trace;
