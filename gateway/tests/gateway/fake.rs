//! A daemon without a model: the generated services over a Unix socket, answering from scripts. It runs on a runtime of
//! its own, so that dropping it is as sudden as kill -9.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use flash_proto::v1::{
    self,
    admin_server::{Admin, AdminServer},
    generate_event::Event,
    generate_server::{Generate, GenerateServer},
    models_server::{Models, ModelsServer},
};
use tempfile::TempDir;
use tokio::{
    net::UnixListener,
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, transport::Server};

/// Of which a message is one.
const CONTEXT: u32 = 8;

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Send(Event),
    /// Ends the request with a status; as a first step, instead of a stream.
    Refuse(Status),
    /// Nothing more until the client goes away; as a first step, not even the head of a stream.
    Hang,
    /// Text without end.
    Flood,
    /// Goes on when the gate opens.
    Wait(watch::Receiver<bool>),
}

#[derive(Debug, Default)]
struct Shared {
    scripts: Mutex<VecDeque<Vec<Step>>>,
    requests: Mutex<Vec<v1::GenerateRequest>>,
    /// Conversations that were only counted.
    counted: Mutex<Vec<v1::TokenizeRequest>>,
    /// What was loaded and unloaded.
    managed: Mutex<Vec<String>>,
    snapshot: Mutex<v1::Snapshot>,
}

#[derive(Clone, Debug)]
struct Service {
    shared: Arc<Shared>,
    /// Generations whose client went away.
    gone: watch::Sender<usize>,
}

pub(crate) struct Fake {
    directory: TempDir,
    service: Service,
    runtime: Option<Runtime>,
}

impl Fake {
    pub(crate) fn start() -> Self {
        let mut fake = Self::absent();
        fake.resume();
        fake
    }

    /// A socket path with nobody behind it.
    pub(crate) fn absent() -> Self {
        let service = Service { shared: Arc::default(), gone: watch::Sender::new(0) };
        Self { directory: tempfile::tempdir().expect("a directory"), service, runtime: None }
    }

    pub(crate) fn resume(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(self.socket()).expect("a free socket")
        };
        let service = self.service.clone();
        let server = Server::builder()
            .add_service(GenerateServer::new(service.clone()))
            .add_service(ModelsServer::new(service.clone()))
            .add_service(AdminServer::new(service));
        runtime.spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        self.runtime = Some(runtime);
    }

    pub(crate) fn kill(&mut self) {
        self.runtime.take().expect("a running daemon").shutdown_background();
        std::fs::remove_file(self.socket()).expect("its socket");
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    /// What the next request gets.
    pub(crate) fn script(&self, steps: impl Into<Vec<Step>>) {
        self.service.shared.scripts.lock().expect("scripts").push_back(steps.into());
    }

    pub(crate) fn requests(&self) -> Vec<v1::GenerateRequest> {
        self.service.shared.requests.lock().expect("requests").clone()
    }

    pub(crate) fn counted(&self) -> Vec<v1::TokenizeRequest> {
        self.service.shared.counted.lock().expect("counted").clone()
    }

    pub(crate) fn managed(&self) -> Vec<String> {
        self.service.shared.managed.lock().expect("managed").clone()
    }

    pub(crate) fn snapshot(&self, snapshot: v1::Snapshot) {
        *self.service.shared.snapshot.lock().expect("snapshot") = snapshot;
    }

    /// Until `count` clients have gone away in the middle.
    pub(crate) async fn gone(&self, count: usize) {
        crate::soon("the end of the gRPC stream", self.service.gone.subscribe().wait_for(|gone| *gone >= count))
            .await
            .expect("the fake lives");
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Counts a call that is dropped before its answer.
struct Dropped(watch::Sender<usize>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.send_modify(|gone| *gone += 1);
    }
}

#[tonic::async_trait]
impl Generate for Service {
    type GenerateStream = ReceiverStream<Result<v1::GenerateEvent, Status>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        self.shared.requests.lock().expect("requests").push(request.into_inner());
        let script = self.shared.scripts.lock().expect("scripts").pop_front().expect("a script for every request");
        match script.first() {
            Some(Step::Refuse(status)) => return Err(status.clone()),
            Some(Step::Hang) => {
                let _dropped = Dropped(self.gone.clone());
                std::future::pending::<()>().await;
            }
            _ => {}
        }
        let (sender, receiver) = mpsc::channel(1);
        let gone = self.gone.clone();
        tokio::spawn(async move {
            for step in script {
                let sent = match step {
                    Step::Send(event) => sender.send(Ok(v1::GenerateEvent { event: Some(event) })).await.is_ok(),
                    Step::Refuse(status) => sender.send(Err(status)).await.is_ok(),
                    Step::Wait(mut gate) => gate.wait_for(|open| *open).await.is_ok(),
                    Step::Hang => {
                        sender.closed().await;
                        false
                    }
                    Step::Flood => {
                        let flood = || Ok(v1::GenerateEvent { event: Some(text(&"x".repeat(1 << 16))) });
                        while sender.send(flood()).await.is_ok() {}
                        false
                    }
                };
                if !sent {
                    gone.send_modify(|gone| *gone += 1);
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    /// A token per message, tools included.
    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let count = match &request.prompt {
            Some(v1::tokenize_request::Prompt::Chat(chat)) => chat.messages.len() + chat.tools.len(),
            _ => 0,
        };
        self.shared.counted.lock().expect("counted").push(request);
        Ok(Response::new(v1::TokenizeResponse { ids: vec![1; count], context_length: CONTEXT, ..Default::default() }))
    }
}

#[tonic::async_trait]
impl Models for Service {
    async fn list(&self, _: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let model = |id: &str, state: v1::model::State| v1::Model {
            id: id.into(),
            arch: "qwen3_moe".into(),
            quantization: "4-bit g64".into(),
            context_length: 2048,
            modified: 1_760_000_000,
            state: state.into(),
            tools: id == "flash-tiny-moe",
            reasoning: id == "flash-tiny-moe",
            ..Default::default()
        };
        let models = vec![model("org/big", v1::model::State::NotLoaded), model("flash-tiny-moe", v1::model::State::Ready)];
        Ok(Response::new(v1::ListResponse { models, default_model: "flash-tiny-moe".into() }))
    }

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<v1::LoadResponse>, Status> {
        let request = request.into_inner();
        let keep_alive = request.keep_alive.unwrap_or_default();
        self.shared.managed.lock().expect("managed").push(format!("load {} {keep_alive}", request.model));
        Ok(Response::new(v1::LoadResponse::default()))
    }

    async fn unload(&self, request: Request<v1::UnloadRequest>) -> Result<Response<v1::UnloadResponse>, Status> {
        self.shared.managed.lock().expect("managed").push(format!("unload {}", request.into_inner().model));
        Ok(Response::new(v1::UnloadResponse::default()))
    }

    type ConvertStream = ReceiverStream<Result<v1::JobEvent, Status>>;
    type VerifyStream = ReceiverStream<Result<v1::JobEvent, Status>>;
    type SynthStream = ReceiverStream<Result<v1::JobEvent, Status>>;
    type CopyStream = ReceiverStream<Result<v1::JobEvent, Status>>;

    async fn copy(&self, _: Request<v1::CopyRequest>) -> Result<Response<Self::CopyStream>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    async fn remove(&self, _: Request<v1::RemoveRequest>) -> Result<Response<v1::RemoveResponse>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    async fn show(&self, request: Request<v1::ShowRequest>) -> Result<Response<v1::ShowResponse>, Status> {
        let infills = request.into_inner().model == "flash-tiny-moe";
        let chat_template = "{{ messages }}".into();
        Ok(Response::new(v1::ShowResponse { infills, chat_template, temperature: 0.5, top_k: 20, ..Default::default() }))
    }

    async fn convert(&self, _: Request<v1::ConvertRequest>) -> Result<Response<Self::ConvertStream>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    async fn verify(&self, _: Request<v1::VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    async fn synth(&self, _: Request<v1::SynthRequest>) -> Result<Response<Self::SynthStream>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Result<Response<v1::VersionResponse>, Status> {
        let version = v1::VersionResponse { version: "9.9.9".into(), protocol: flash_proto::PROTOCOL_VERSION, ..Default::default() };
        Ok(Response::new(version))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::Snapshot>, Status> {
        Ok(Response::new(self.shared.snapshot.lock().expect("snapshot").clone()))
    }

    type WatchStatsStream = ReceiverStream<Result<v1::Snapshot, Status>>;

    async fn watch_stats(&self, _: Request<v1::WatchStatsRequest>) -> Result<Response<Self::WatchStatsStream>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    async fn doctor(&self, _: Request<v1::DoctorRequest>) -> Result<Response<v1::DoctorResponse>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    type BenchStream = ReceiverStream<Result<v1::BenchEvent, Status>>;

    async fn bench(&self, _: Request<v1::BenchRequest>) -> Result<Response<Self::BenchStream>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    async fn clear_cache(&self, _: Request<v1::ClearCacheRequest>) -> Result<Response<v1::ClearCacheResponse>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    async fn replay(&self, _: Request<v1::ReplayRequest>) -> Result<Response<v1::ReplayResponse>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }

    async fn shutdown(&self, _: Request<v1::ShutdownRequest>) -> Result<Response<v1::ShutdownResponse>, Status> {
        Err(Status::unimplemented("no test needs it"))
    }
}

pub(crate) fn accepted() -> Event {
    let fingerprint = "fp_flash".into();
    Event::Accepted(v1::Accepted {
        model: "flash-tiny-moe".into(),
        prompt_tokens: 11,
        context_length: 2048,
        queue_position: 0,
        fingerprint,
    })
}

pub(crate) fn text(text: &str) -> Event {
    Event::Text(v1::Text { text: text.into(), ..v1::Text::default() })
}

pub(crate) fn done(finish: v1::done::Finish) -> Event {
    let usage = Some(v1::Usage { prompt_tokens: 11, cached_tokens: 3, completion_tokens: 5, reasoning_tokens: 0 });
    let timing =
        v1::Timing { queue_ms: 1.0, prefill_ms: 100.0, ttft_ms: 110.0, decode_ms: 40.0, expert_hits: 3, expert_misses: 1, ssd_bytes: 4096 };
    Event::Done(v1::Done { finish: finish.into(), usage, timing: Some(timing), ..Default::default() })
}

pub(crate) fn thought(text: &str) -> Event {
    Event::Text(v1::Text { text: text.into(), channel: v1::text::Channel::Reasoning.into(), ..v1::Text::default() })
}

pub(crate) fn call(index: u32, name: &str, arguments: &str) -> Event {
    Event::ToolCall(v1::ToolCallPart { index, name: name.into(), arguments: arguments.into() })
}

/// Two calls, each in three parts.
pub(crate) fn calls() -> Vec<Step> {
    let city =
        |index, city: &str| [call(index, "get_weather", ""), call(index, "", "{\"city\": "), call(index, "", &format!("\"{city}\"}}"))];
    let calls = city(0, "Paris").into_iter().chain(city(1, "Rome"));
    [accepted()].into_iter().chain(calls).chain([done(v1::done::Finish::ToolCalls)]).map(Step::Send).collect()
}

/// Thought, then said.
pub(crate) fn considered() -> Vec<Step> {
    [accepted(), thought("hmm ok"), text("Hello "), text("there."), done(v1::done::Finish::Stop)].map(Step::Send).into()
}

/// Accepted, the texts, stop.
pub(crate) fn reply(texts: &[&str]) -> Vec<Step> {
    let texts = texts.iter().map(|part| text(part));
    [accepted()].into_iter().chain(texts).chain([done(v1::done::Finish::Stop)]).map(Step::Send).collect()
}
