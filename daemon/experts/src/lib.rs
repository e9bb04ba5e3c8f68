//! Bytes and residency of routed experts: where each lies on disk, which are in memory, who loads the next. No tensors,
//! no async, no serde, no RPC; `flash-engine` is the caller.
//!
//! The life of an expert: [`Source`] says which file bytes it is made of. The engine asks for it with [`Experts::fetch`].
//! If a slot of the [`Slab`] holds it, the slot is pinned and handed out. If not, the cache takes a free slot or the
//! policy's victim, and a loader thread reads the bytes through [`Storage`] straight into the slot. [`Fetch::next`]
//! hands it out, [`Fetch::done`] unpins it, and it stays until its slot is wanted for another.

mod build;
mod cache;
mod error;
mod experts;
mod format;
mod hot;
mod key;
mod load;
mod recent;
pub mod replay;
mod routing;
mod slab;
mod stats;
mod store;
#[cfg(test)]
mod tests;

pub use build::{Plan, StoreReader, StoreWriter, free_space, part_path, sync_folder};
pub use cache::PolicyKind;
pub use error::Error;
pub use experts::{Arrival, Config, Experts, Fetch, Held};
pub use format::Entry;
pub use hot::Hot;
pub use key::{ExpertId, ExpertKey, LayerId, Slot};
pub use routing::Routing;
pub use slab::{BankPtr, Pages, Slab, SlotPtr};
pub use stats::{LayerStats, Stats};
pub use store::{Io, Measured, Pread, Read, Record, Slice, Source, Storage, measure, open};
