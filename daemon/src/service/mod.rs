//! The gRPC services: one file per service, [`convert`] for everything between wire types and the engine's. No state but
//! [`Daemon`]; the engine is reached through `worker.rs` only.

mod admin;
mod convert;
mod gap;
mod generate;
mod models;

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use flash_proto::v1::{admin_server::AdminServer, generate_server::GenerateServer, models_server::ModelsServer};
use tokio::sync::watch;
use tonic::{
    Status,
    transport::{Server, server::Router},
};

use self::gap::Gap;
use crate::{
    Config, Error,
    catalog::Catalog,
    hot::HotSets,
    jobs::Jobs,
    pressure::{Monitor, Sensors},
    sessions::Sessions,
    shutdown::Drain,
    stats::Totals,
    worker::{Model, Worker},
};

/// The longest request: a context full of text is far below, and what is above is said to be too long for the context
/// only after it was read.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// What the services share.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) config: Config,
    pub(crate) worker: Worker,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) drain: Drain,
    pub(crate) jobs: Arc<Jobs>,
    catalog: Arc<Catalog>,
    totals: Arc<Totals>,
    gap: Gap,
    monitor: Monitor,
    started: Instant,
}

impl Daemon {
    pub(crate) fn start(config: Config) -> Result<Self, Error> {
        let totals = Arc::new(Totals::default());
        let hot = HotSets(config.warm_start.then(|| config.home.join("state")));
        let worker = Worker::start(config.options.clone(), config.keep_alive, hot, totals.clone())?;
        Ok(Self {
            monitor: Monitor::start(Sensors::default(), worker.clone())?,
            catalog: Arc::new(Catalog::new(config.model_roots.clone(), config.model.clone())),
            sessions: Sessions::new(),
            drain: Drain::new(),
            jobs: Arc::new(Jobs::default()),
            gap: Gap::default(),
            started: Instant::now(),
            worker,
            totals,
            config,
        })
    }

    /// A refusal that no one else has counted.
    fn refused(&self, error: &Error) -> Status {
        self.totals.refused.fetch_add(1, Relaxed);
        convert::status(error)
    }

    /// The text side of a model, loaded or not.
    async fn text(&self, model: &Model) -> Result<Arc<flash_engine::Text>, Error> {
        let state = self.worker.state();
        self.catalog.text(model, state.ready().map(|(model, ready)| (model, &ready.text))).await
    }

    /// Tokens a request may have on `model`: as loaded, else as it would be loaded.
    async fn context_length(&self, model: &Model) -> usize {
        let state = self.worker.state();
        if let Some((_, ready)) = state.ready().filter(|(loaded, _)| loaded.path == model.path) {
            return ready.context;
        }
        let entries = self.catalog.list().await;
        let info = entries.iter().find(|entry| entry.model.path == model.path).and_then(|entry| entry.info.as_ref().ok());
        info.map_or(0, |info| crate::config::context_length(info, state.options.context))
    }
}

/// The server, not yet serving. Streams that never end by themselves end when `stop` turns true.
pub(crate) fn router(daemon: &Arc<Daemon>, stop: &watch::Sender<bool>) -> Router {
    let generate = GenerateServer::new(generate::Service { daemon: daemon.clone() });
    Server::builder()
        .add_service(generate.max_decoding_message_size(MESSAGE_BYTES_MAX))
        .add_service(ModelsServer::new(models::Service { daemon: daemon.clone() }))
        .add_service(AdminServer::new(admin::Service { daemon: daemon.clone(), stop: stop.subscribe() }))
}
