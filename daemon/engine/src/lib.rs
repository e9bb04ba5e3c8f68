//! Mixture-of-Experts inference on one machine, with routed experts streamed from disk through a bounded cache.
//!
//! Synchronous: the caller owns an [`Engine`] on a thread of its own and calls [`Engine::step`]. What may be used from
//! any thread (tokenizer, chat template, limits) is in [`Text`], the counters in [`Report`]. No RPC, no async, no clock
//! but for timings.

mod api;
mod error;
mod model;

pub use api::*;
pub use error::Error;
pub use model::{Message, Text, hub};

// ---- skeleton of the façade: bodies follow ----
use std::{path::Path, sync::Arc};
/// The engine.
#[derive(Debug)]
pub struct Engine {}
impl Engine {
    pub fn load(_dir: &Path, _options: &Options, _progress: &mut dyn FnMut(f64)) -> Result<Self, Error> {
        unimplemented!()
    }
    pub fn text(&self) -> Arc<Text> {
        unimplemented!()
    }
    pub fn info(&self) -> &ModelInfo {
        unimplemented!()
    }
    pub fn context(&self) -> usize {
        unimplemented!()
    }
    pub fn fingerprint(&self) -> String {
        unimplemented!()
    }
    pub fn warnings(&self) -> Vec<String> {
        unimplemented!()
    }
    /// Err: refused (context, queue, memory, empty prompt …). usize = requests ahead of it.
    pub fn admit(&mut self, _request: Request) -> Result<(RequestId, usize), Error> {
        unimplemented!()
    }
    pub fn cancel(&mut self, _id: RequestId) {
        unimplemented!()
    }
    pub fn resume(&mut self, _id: RequestId) {
        unimplemented!()
    }
    pub fn step(&mut self, _deliver: &mut dyn FnMut(RequestId, Event) -> Delivery) -> Step {
        unimplemented!()
    }
    /// The configured budget (live).
    pub fn set_cache(&mut self, _budget: CacheBudget) {
        unimplemented!()
    }
    pub fn set_memory(&mut self, _cap: Option<Bytes>) {
        unimplemented!()
    }
    /// Pressure's ceiling on the slab (live); None = as configured.
    pub fn set_ceiling(&mut self, _bytes: Option<Bytes>) {
        unimplemented!()
    }
    pub fn report(&self) -> Report {
        unimplemented!()
    }
}
