//! What the engine's thread can be asked for, and what it answers. Plain data.

use std::{path::PathBuf, sync::Arc, time::Duration};

use flash_engine::{
    Bytes, CacheBudget, Cleared, Event, Request,
    bench::{BenchEvent, BenchOptions},
    replay::Trace,
};
use tokio::sync::{mpsc, oneshot};

use crate::{Error, config::KeepAlive, jobs::Running};

pub(crate) type Events = mpsc::Sender<Result<Event, Error>>;
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

pub(crate) enum Command {
    Generate(Box<Generate>),
    Load(Box<Load>),
    Unload(Unload),
    Reserve(Reserve),
    Bench(Box<Bench>),
    Recent(Recent),
    ClearCache(ClearCache),
    /// Look again: a reader has left or caught up, or the ceiling has moved.
    Wake,
}

/// A model on disk, by its canonical id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
}

pub(crate) struct Generate {
    pub(crate) model: Model,
    pub(crate) request: Request,
    pub(crate) keep_alive: Option<KeepAlive>,
    pub(crate) events: Events,
    pub(crate) reply: Reply<Admitted>,
    pub(crate) span: tracing::Span,
}

pub(crate) struct Admitted {
    pub(crate) position: usize,
    pub(crate) context: usize,
    pub(crate) fingerprint: String,
}

pub(crate) struct Load {
    pub(crate) model: Model,
    pub(crate) expert_cache: Option<CacheBudget>,
    pub(crate) memory: Option<Option<Bytes>>,
    pub(crate) context: Option<Option<usize>>,
    pub(crate) keep_alive: Option<KeepAlive>,
    pub(crate) reply: Reply<Loaded>,
}

pub(crate) struct Loaded {
    pub(crate) now: bool,
    pub(crate) took: Duration,
    pub(crate) warnings: Vec<String>,
}

pub(crate) struct Unload {
    /// `None`: whatever is loaded.
    pub(crate) model: Option<Model>,
    pub(crate) force: bool,
    /// Whether it was loaded.
    pub(crate) reply: Reply<bool>,
}

/// Asks for a folder that a job is going to write in.
pub(crate) struct Reserve {
    pub(crate) model: Model,
    /// The checkpoint itself changes: it must not be loaded, now or meanwhile.
    pub(crate) exclusive: bool,
    pub(crate) reply: Reply<Reservation>,
}

/// Holds a folder until it is dropped.
pub(crate) type Reservation = Arc<()>;

/// Measures a model on the engine's thread, which has unloaded its own.
pub(crate) struct Bench {
    pub(crate) model: Model,
    pub(crate) options: BenchOptions,
    pub(crate) events: mpsc::Sender<Result<BenchEvent, Error>>,
    /// Answered when it begins.
    pub(crate) reply: Reply<()>,
    pub(crate) running: Running,
}

/// Asks for the routing of the latest tokens; `None`: no model is loaded.
pub(crate) struct Recent {
    pub(crate) reply: oneshot::Sender<Option<Trace>>,
}

/// Forgets prefixes, of the loaded model and in this folder.
pub(crate) struct ClearCache {
    pub(crate) dir: PathBuf,
    pub(crate) reply: Reply<Cleared>,
}
