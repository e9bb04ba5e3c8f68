//! Models: what is installed and what is loaded, loading and unloading, and the jobs that write models. List answers from
//! the catalog and the worker's published state and never waits for the engine.

use std::{pin::Pin, sync::Arc, time::Instant};

use flash_engine::{ModelInfo, Tell, synth};
use flash_proto::v1;
use tokio::sync::oneshot;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use super::{Daemon, convert};
use crate::{
    Error,
    catalog::Entry,
    folders, jobs,
    worker::{Command, Load, Model, Reservation, Reserve, Unload},
};

pub(super) struct Service {
    pub(super) daemon: Arc<Daemon>,
}

type JobStream = Pin<Box<dyn Stream<Item = Result<v1::JobEvent, Status>> + Send>>;

fn stream(job: Result<jobs::Events, Error>) -> Result<Response<JobStream>, Status> {
    let events = ReceiverStream::new(job.map_err(|error| convert::status(&error))?);
    Ok(Response::new(Box::pin(events.map(|event| event.map(convert::job).map_err(|error| convert::status(&error))))))
}

#[tonic::async_trait]
impl v1::models_server::Models for Service {
    type ConvertStream = JobStream;
    type VerifyStream = JobStream;
    type SynthStream = JobStream;
    type CopyStream = JobStream;

    async fn convert(&self, request: Request<v1::ConvertRequest>) -> Result<Response<JobStream>, Status> {
        stream(self.convert(request.into_inner()).await)
    }

    async fn verify(&self, request: Request<v1::VerifyRequest>) -> Result<Response<JobStream>, Status> {
        stream(self.verify(request.into_inner()).await)
    }

    async fn synth(&self, request: Request<v1::SynthRequest>) -> Result<Response<JobStream>, Status> {
        stream(self.synth(request.into_inner()).await)
    }

    async fn copy(&self, request: Request<v1::CopyRequest>) -> Result<Response<JobStream>, Status> {
        stream(self.copy(request.into_inner()).await)
    }

    async fn remove(&self, request: Request<v1::RemoveRequest>) -> Result<Response<v1::RemoveResponse>, Status> {
        self.remove(request.into_inner()).await.map(Response::new).map_err(|error| convert::status(&error))
    }

    async fn show(&self, request: Request<v1::ShowRequest>) -> Result<Response<v1::ShowResponse>, Status> {
        self.show(request.into_inner()).await.map(Response::new).map_err(|error| convert::status(&error))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let entries = self.daemon.catalog.list().await;
        let default_model = self.daemon.catalog.default_model(&entries).unwrap_or_default();
        let state = self.daemon.worker.state();
        let mut models: Vec<_> = entries.iter().map(|entry| convert::model(entry, &default_model, &state)).collect();
        // One that was loaded by its path lies outside of the folders that were searched.
        if let Some((model, ready)) = state.ready().filter(|(model, _)| entries.iter().all(|entry| entry.model.path != model.path)) {
            let (modified, disk_bytes) = (folders::modified(&model.path), folders::bytes(&model.path));
            let entry = Entry { model: model.clone(), modified, info: Ok(ModelInfo::clone(&ready.info)), disk_bytes };
            // A name that it shares with the default model is not it.
            models.push(convert::model(&entry, "", &state));
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
        self.taken()?;
        let settings = convert::load_settings(&request, &daemon.config)?;
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

    async fn convert(&self, request: v1::ConvertRequest) -> Result<jobs::Events, Error> {
        let in_place = request.in_place;
        let model = self.daemon.catalog.locate(&request.model).await?;
        self.write(model, in_place, move |model, tell| {
            let packed = flash_engine::convert(&model.path, in_place, tell)?;
            let (records, bytes, seconds) = (packed.records as u64, packed.bytes, packed.seconds);
            Ok(jobs::Done { path: packed.path.display().to_string(), records, bytes, seconds, ..jobs::Done::default() })
        })
        .await
    }

    async fn verify(&self, request: v1::VerifyRequest) -> Result<jobs::Events, Error> {
        self.taken()?;
        let model = self.daemon.catalog.locate(&request.model).await?;
        self.daemon.jobs.start(move |tell| {
            let started = Instant::now();
            let found = flash_engine::verify(&model.path, tell)?;
            let (path, seconds) = (model.path.display().to_string(), started.elapsed().as_secs_f64());
            Ok(jobs::Done { model: model.id, path, records: found.records as u64, bytes: found.bytes, seconds, bad: found.bad })
        })
    }

    async fn synth(&self, request: v1::SynthRequest) -> Result<jobs::Events, Error> {
        let wanted = convert::synth(&request)?;
        let path = match request.path.as_str() {
            "" => self.daemon.config.home.join("models").join(format!("synth-{}", wanted.shape)),
            path => convert::absolute("path", path)?,
        };
        let id = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.write(Model { id, path }, true, move |model, tell| {
            let written = synth::write(&model.path, &wanted, tell)?;
            let (records, bytes, seconds) = (written.records, written.bytes, written.time.as_secs_f64());
            Ok(jobs::Done { path: written.path.display().to_string(), records, bytes, seconds, ..jobs::Done::default() })
        })
        .await
    }

    async fn show(&self, request: v1::ShowRequest) -> Result<v1::ShowResponse, Error> {
        let daemon = &self.daemon;
        let model = daemon.catalog.resolve(&request.model).await?;
        let text = daemon.text(&model).await?;
        let path = model.path.clone();
        let described = daemon.catalog.encode(move || Ok((flash_engine::hub::describe(&path)?, folders::bytes(&path)))).await;
        let (info, disk_bytes) = described?;
        let entries = daemon.catalog.list().await;
        let listed = entries.iter().find(|entry| entry.model.path == model.path).cloned();
        let entry = listed.unwrap_or_else(|| Entry { modified: folders::modified(&model.path), info: Ok(info), model, disk_bytes });
        let default_model = daemon.catalog.default_model(&entries).unwrap_or_default();
        Ok(convert::shown(convert::model(&entry, &default_model, &daemon.worker.state()), &text))
    }

    async fn copy(&self, request: v1::CopyRequest) -> Result<jobs::Events, Error> {
        let source = self.daemon.catalog.locate(&request.model).await?;
        let name = convert::folder_name("name", request.name)?;
        // In another folder too: only one of two could be asked for.
        if let Some(other) = self.daemon.catalog.list().await.iter().find(|entry| entry.model.id == name) {
            let reason = format!("a model of that name exists already, {}; choose another name", other.model.path.display());
            return Err(Error::Value { param: "name", reason });
        }
        let path = self.daemon.config.home.join("models").join(&name);
        // The source may be loaded; nobody may change it meanwhile.
        let held = self.reserve(source.clone(), false).await?;
        self.write(Model { id: name, path }, true, move |model, tell| {
            let _held = held;
            let started = Instant::now();
            let bytes = folders::copy(&source.path, &model.path, tell)?;
            let (path, seconds) = (model.path.display().to_string(), started.elapsed().as_secs_f64());
            Ok(jobs::Done { path, bytes, seconds, ..jobs::Done::default() })
        })
        .await
    }

    async fn remove(&self, request: v1::RemoveRequest) -> Result<v1::RemoveResponse, Error> {
        self.taken()?;
        let config = &self.daemon.config;
        let model = self.daemon.catalog.locate(&request.model).await?;
        // The configured folders come first, ours after them; the rest belongs to others.
        let ours = config.home.join("models");
        let roots: Vec<_> = config.model_roots.iter().take_while(|root| **root != ours).chain([&ours]).cloned().collect();
        let reservation = self.reserve(model.clone(), true).await?;
        let (catalog, path) = (self.daemon.catalog.clone(), model.path.display().to_string());
        let removed = tokio::task::spawn_blocking(move || {
            let _held = reservation;
            let bytes = folders::remove(&model.path, &roots);
            catalog.forget_listing();
            catalog.forget_text(&model);
            bytes
        });
        let bytes = removed.await.map_err(|error| flash_engine::Error::Internal(error.to_string()))??;
        Ok(v1::RemoveResponse { path, bytes })
    }

    /// A folder that the engine's thread keeps for us until what comes back is dropped.
    async fn reserve(&self, model: Model, exclusive: bool) -> Result<Reservation, Error> {
        let (reply, reserved) = oneshot::channel();
        self.daemon.worker.send(Command::Reserve(Reserve { model, exclusive, reply }))?;
        reserved.await.map_err(|_| Error::Draining)?
    }

    /// Starts a job that writes in a model's folder, which nobody else writes in meanwhile; nor loads from it if `exclusive`.
    async fn write(
        &self,
        model: Model,
        exclusive: bool,
        work: impl FnOnce(&Model, Tell<'_>) -> Result<jobs::Done, Error> + Send + 'static,
    ) -> Result<jobs::Events, Error> {
        self.taken()?;
        let reservation = self.reserve(model.clone(), exclusive).await?;
        let catalog = self.daemon.catalog.clone();
        self.daemon.jobs.start(move |tell| {
            let _held = reservation;
            let done = work(&model, tell);
            catalog.forget_listing();
            Ok(jobs::Done { model: model.id, ..done? })
        })
    }

    fn taken(&self) -> Result<(), Error> {
        if self.daemon.drain.begun() { Err(Error::Draining) } else { Ok(()) }
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
