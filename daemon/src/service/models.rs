//! Models: what is installed and what is loaded, loading and unloading. List answers from the catalog and the worker's
//! published state and never waits for the engine.

use std::sync::Arc;

use flash_proto::v1;
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::{Daemon, convert};
use crate::{
    Error,
    worker::{Command, Load, Unload},
};

pub(super) struct Service {
    pub(super) daemon: Arc<Daemon>,
}

#[tonic::async_trait]
impl v1::models_server::Models for Service {
    async fn list(&self, _: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let entries = self.daemon.catalog.list().await;
        let default_model = self.daemon.catalog.default_model(&entries).unwrap_or_default();
        let state = self.daemon.worker.state();
        let mut models: Vec<_> = entries.iter().map(|entry| convert::model(entry, &default_model, &state)).collect();
        // One that was loaded by its path lies outside of the folders that were searched.
        if let Some((model, ready)) = state.ready().filter(|(model, _)| entries.iter().all(|entry| entry.model.path != model.path)) {
            models.push(convert::loaded_model(model, &ready.info, &state));
        }
        Ok(Response::new(v1::ListResponse { models, default_model }))
    }

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<v1::LoadResponse>, Status> {
        let request = request.into_inner();
        self.load(request).await.map(Response::new).map_err(|error| convert::status(&error))
    }

    async fn unload(&self, request: Request<v1::UnloadRequest>) -> Result<Response<v1::UnloadResponse>, Status> {
        let request = request.into_inner();
        self.unload(request).await.map(Response::new).map_err(|error| convert::status(&error))
    }
}

impl Service {
    async fn load(&self, request: v1::LoadRequest) -> Result<v1::LoadResponse, Error> {
        let daemon = &self.daemon;
        if daemon.drain.begun() {
            return Err(Error::Draining);
        }
        let settings = convert::load_settings(&request)?;
        let model = daemon.catalog.resolve(&request.model).await?;
        let (reply, loaded) = oneshot::channel();
        daemon.worker.send(Command::Load(Box::new(Load {
            model: model.clone(),
            expert_cache: settings.expert_cache,
            memory: settings.memory,
            context: settings.context,
            keep_alive: settings.keep_alive,
            reply,
        })))?;
        let loaded = loaded.await.map_err(|_| Error::Draining)??;
        daemon.catalog.forget_text(&model);
        let state = daemon.worker.state();
        let ready = state.ready().filter(|(ready, _)| **ready == model).map(|(_, ready)| ready);
        Ok(v1::LoadResponse {
            model: ready.map(|ready| convert::loaded_model(&model, &ready.info, &state)),
            loaded_now: loaded.now,
            load_ms: loaded.took.as_secs_f64() * 1e3,
            cache: ready.map(|ready| convert::cache(ready)),
            warnings: loaded.warnings,
        })
    }

    async fn unload(&self, request: v1::UnloadRequest) -> Result<v1::UnloadResponse, Error> {
        let daemon = &self.daemon;
        let model = if request.model.is_empty() { None } else { Some(daemon.catalog.resolve(&request.model).await?) };
        let (reply, done) = oneshot::channel();
        daemon.worker.send(Command::Unload(Unload { model, force: request.force, reply }))?;
        let was_loaded = done.await.map_err(|_| Error::Draining)??;
        Ok(v1::UnloadResponse { was_loaded })
    }
}
