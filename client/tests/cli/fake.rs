//! A daemon that answers by script, on a socket of its own: the seam below flashctl. What it does depends on the last
//! message; it knows no model. Used by the tests beside it.

use std::{
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use flash_proto::{
    PROTOCOL_VERSION, code, socket,
    v1::{
        admin_server::{Admin, AdminServer},
        generate_event::Event,
        generate_server::{Generate, GenerateServer},
        models_server::{Models, ModelsServer},
        text::Channel,
        *,
    },
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status, transport::Server};

/// No room for a token in so long means that its reader does not read.
const PAUSE: Duration = Duration::from_millis(300);

/// Tokens are words; a conversation may have this many.
pub const CONTEXT: u32 = 40;

type Answer<T> = Result<Response<T>, Status>;
type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Default)]
pub struct Seen {
    pub generate: Mutex<Vec<GenerateRequest>>,
    pub load: Mutex<Vec<LoadRequest>>,
    pub removed: Mutex<Vec<String>>,
    /// A stream without end was dropped by its reader.
    pub cancelled: AtomicBool,
    /// A long stream had to wait for its reader.
    pub paused: AtomicBool,
}

/// Dropping it is the daemon's sudden death.
pub struct Fake {
    runtime: Option<tokio::runtime::Runtime>,
    pub seen: Arc<Seen>,
}

impl Fake {
    pub fn start(socket: &Path, protocol: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (listener, bound) = socket::bind(socket).expect("a socket");
        let seen = Arc::new(Seen::default());
        let script = Script { seen: Arc::clone(&seen), protocol };
        runtime.spawn(async move {
            let _bound = bound;
            let listener = tokio::net::UnixListener::from_std(listener).expect("a listener");
            let server = Server::builder().add_service(AdminServer::new(script.clone()));
            let server = server.add_service(GenerateServer::new(script.clone())).add_service(ModelsServer::new(script));
            server.serve_with_incoming(UnixListenerStream::new(listener)).await.expect("served");
        });
        Self { runtime: Some(runtime), seen }
    }

    pub fn ours(socket: &Path) -> Self {
        Self::start(socket, PROTOCOL_VERSION)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone)]
struct Script {
    seen: Arc<Seen>,
    protocol: u32,
}

fn conversation(chat: &Chat) -> String {
    chat.messages.iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join(" ")
}

fn words(text: &str) -> u32 {
    text.split_whitespace().count() as u32
}

fn event(event: Event) -> Result<GenerateEvent, Status> {
    Ok(GenerateEvent { event: Some(event) })
}

fn text(text: &str) -> Result<GenerateEvent, Status> {
    event(Event::Text(Text { text: text.into(), ..Text::default() }))
}

fn done(prompt_tokens: u32, completion_tokens: u32) -> Result<GenerateEvent, Status> {
    let usage = Usage { prompt_tokens, completion_tokens, ..Usage::default() };
    let timing = Timing { ttft_ms: 50.0, decode_ms: 20.0, expert_hits: 3, expert_misses: 1, ssd_bytes: 1_000_000, ..Timing::default() };
    event(Event::Done(Done { usage: Some(usage), timing: Some(timing), ..Done::default() }))
}

#[tonic::async_trait]
impl Generate for Script {
    type GenerateStream = Events<GenerateEvent>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Answer<Self::GenerateStream> {
        let request = request.into_inner();
        self.seen.generate.lock().expect("no panic").push(request.clone());
        let (prompt, last) = match request.prompt {
            Some(generate_request::Prompt::Chat(chat)) => {
                (conversation(&chat), chat.messages.last().map(|message| message.content.clone()).unwrap_or_default())
            }
            Some(generate_request::Prompt::Text(text)) => (text.clone(), text),
            Some(generate_request::Prompt::Infill(gap)) => (gap.prefix + " " + &gap.suffix, String::new()),
            _ => return Err(code::status(code::INVALID_VALUE, "no prompt")),
        };
        let prompt_tokens = words(&prompt);
        let accepted = Accepted { model: "tiny".into(), prompt_tokens, context_length: CONTEXT, ..Accepted::default() };
        let mut events = vec![event(Event::Accepted(accepted)), event(Event::Progress(Progress::default()))];
        match last.trim() {
            "refuse" => return Err(code::with_retry_after(code::status(code::QUEUE_FULL, "64 requests are waiting already"), 7)),
            "fail" => {
                let failed = Failed { code: code::ENGINE.into(), message: "layer 3 expert 7: read failed".into() };
                events.extend([text("Once"), event(Event::Failed(failed))]);
            }
            endless @ ("forever" | "until I pause") => {
                let (sender, receiver) = mpsc::channel(1);
                let seen = Arc::clone(&self.seen);
                let ends = endless != "forever";
                tokio::spawn(async move {
                    while !(ends && seen.paused.load(SeqCst)) {
                        match timeout(PAUSE, sender.reserve()).await {
                            Ok(Ok(room)) => room.send(text("tick ")),
                            Ok(Err(_)) => return seen.cancelled.store(true, SeqCst),
                            Err(_) => seen.paused.store(true, SeqCst),
                        }
                    }
                    // A reader that never comes back is the test's failure, not this one's.
                    let _ = sender.send(done(prompt_tokens, 1)).await;
                });
                return Ok(Response::new(Box::pin(tokio_stream::iter(events).chain(ReceiverStream::new(receiver)))));
            }
            "think" => {
                let thought = Text { text: "Hm.".into(), channel: Channel::Reasoning.into(), ..Text::default() };
                events.extend([event(Event::Text(thought)), text("Yes."), done(prompt_tokens, 3)]);
            }
            _ if request.record_routing => {
                let routing = |tokens: &[u32]| {
                    let ids = tokens.iter().flat_map(|_| [0, 1, 4, 5]).collect();
                    event(Event::Routing(Routing { tokens: tokens.into(), layers: 2, ids }))
                };
                events.extend([routing(&[7, 9]), text("Once "), routing(&[3]), done(prompt_tokens, 2)]);
            }
            _ => events.extend([text("Once "), text(""), text("upon a time."), done(prompt_tokens, 4)]),
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn tokenize(&self, request: Request<TokenizeRequest>) -> Answer<TokenizeResponse> {
        let text = match request.into_inner().prompt {
            Some(tokenize_request::Prompt::Chat(chat)) => conversation(&chat),
            Some(tokenize_request::Prompt::Text(text)) => text,
            None => String::new(),
        };
        Ok(Response::new(TokenizeResponse { model: "tiny".into(), ids: (0..words(&text)).collect(), context_length: CONTEXT }))
    }
}

fn model() -> Model {
    Model {
        id: "tiny".into(),
        path: "/m/tiny".into(),
        arch: "qwen3_moe".into(),
        params: 24_500_000,
        active_params: 6_100_000,
        quantization: "4-bit g64".into(),
        size_bytes: 53_000_000,
        disk_bytes: 61_000_000,
        context_length: CONTEXT,
        experts: 64,
        reasoning: true,
        ..Model::default()
    }
}

fn cache() -> Cache {
    Cache {
        slots_per_layer: 16,
        slots_wanted: 16,
        slot_bytes: 1000,
        budget_bytes: 128_000,
        resident_bytes: 64_000,
        working_set_bytes: 64_000,
    }
}

fn job(events: impl IntoIterator<Item = job_event::Event>) -> Answer<Events<JobEvent>> {
    let events: Vec<_> = events.into_iter().map(|event| Ok(JobEvent { event: Some(event) })).collect();
    Ok(Response::new(Box::pin(tokio_stream::iter(events))))
}

fn progress(stage: &str, done: u64) -> job_event::Event {
    job_event::Event::Progress(JobProgress { stage: stage.into(), done, total: 4000 })
}

fn job_done(bad: &[&str]) -> job_event::Event {
    let bad = bad.iter().map(|text| (*text).into()).collect();
    job_event::Event::Done(JobDone { model: "tiny".into(), path: "/m/experts.flash".into(), records: 16, bytes: 4000, seconds: 2.0, bad })
}

#[tonic::async_trait]
impl Models for Script {
    type ConvertStream = Events<JobEvent>;
    type VerifyStream = Events<JobEvent>;
    type SynthStream = Events<JobEvent>;
    type CopyStream = Events<JobEvent>;

    async fn convert(&self, request: Request<ConvertRequest>) -> Answer<Self::ConvertStream> {
        match request.into_inner().model.as_str() {
            // Progress, then nothing until the client leaves.
            "endless" => {
                let progress = JobEvent { event: Some(progress("packing", 1000)) };
                let seen = Arc::clone(&self.seen);
                let (sender, receiver) = mpsc::channel(1);
                tokio::spawn(async move {
                    let _ = sender.send(Ok(progress)).await;
                    sender.closed().await;
                    seen.cancelled.store(true, SeqCst);
                });
                Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
            }
            "busy" => Err(code::status(code::BUSY, "tiny is loaded; unload it first: flashctl stop tiny")),
            "cut" => job([progress("packing", 0)]),
            _ => job([progress("packing", 0), progress("packing", 10), progress("packing", 4000), job_done(&[])]),
        }
    }

    async fn verify(&self, request: Request<VerifyRequest>) -> Answer<Self::VerifyStream> {
        let bad: &[&str] = if request.into_inner().model == "bad" { &["layer 1 expert 3: checksum"] } else { &[] };
        job([progress("verifying", 4000), job_done(bad)])
    }

    async fn synth(&self, request: Request<SynthRequest>) -> Answer<Self::SynthStream> {
        match request.into_inner().shape.as_str() {
            "tiny" => job([progress("writing", 4000), job_done(&[])]),
            shape => Err(code::with_param(code::status(code::INVALID_VALUE, format!("`{shape}` is none of tiny, olmoe")), "shape")),
        }
    }

    async fn copy(&self, request: Request<CopyRequest>) -> Answer<Self::CopyStream> {
        match request.into_inner().name.as_str() {
            "bad/name" => Err(code::with_param(code::status(code::INVALID_VALUE, "`bad/name` is no name for a model"), "name")),
            _ => job([progress("copying", 4000), job_done(&[])]),
        }
    }

    async fn remove(&self, request: Request<RemoveRequest>) -> Answer<RemoveResponse> {
        let path = request.into_inner().model;
        self.seen.removed.lock().expect("no panic").push(path.clone());
        Ok(Response::new(RemoveResponse { path, bytes: 61_000_000 }))
    }

    async fn show(&self, request: Request<ShowRequest>) -> Answer<ShowResponse> {
        if request.into_inner().model == "nope" {
            return Err(code::status(code::MODEL_NOT_FOUND, "no model named `nope` is installed; available: tiny"));
        }
        let chat_template = "{{ messages }}\n".into();
        Ok(Response::new(ShowResponse { model: Some(model()), chat_template, temperature: 0.7, top_p: 1.0, ..ShowResponse::default() }))
    }

    async fn list(&self, _: Request<ListRequest>) -> Answer<ListResponse> {
        let broken = Model { id: "broken".into(), problem: "model.safetensors is truncated".into(), ..Model::default() };
        Ok(Response::new(ListResponse { models: vec![model(), broken], default_model: "tiny".into() }))
    }

    async fn load(&self, request: Request<LoadRequest>) -> Answer<LoadResponse> {
        let request = request.into_inner();
        self.seen.load.lock().expect("no panic").push(request.clone());
        if request.model == "nope" {
            return Err(code::with_param(code::status(code::MODEL_NOT_FOUND, "no model `nope`; installed: tiny"), "model"));
        }
        let warnings = if request.expert_cache.as_deref() == Some("1%") { vec!["the cache is below a working set".into()] } else { vec![] };
        Ok(Response::new(LoadResponse { model: Some(model()), loaded_now: true, load_ms: 12.0, cache: Some(cache()), warnings }))
    }

    async fn unload(&self, _: Request<UnloadRequest>) -> Answer<UnloadResponse> {
        Ok(Response::new(UnloadResponse { was_loaded: true }))
    }
}

fn snapshot() -> Snapshot {
    let model =
        LoadedModel { id: "tiny".into(), state: loaded_model::State::Ready.into(), context_length: CONTEXT, ..LoadedModel::default() };
    let experts = Experts { cache: Some(cache()), hits: 3, misses: 1, ..Experts::default() };
    let disk =
        PrefixDisk { files: 2, bytes: 1_000_000, budget_bytes: 5_000_000, written_today_bytes: 1_000_000, bad: 1, ..PrefixDisk::default() };
    let prefix = Prefix { hits: 1, misses: 3, memory_tokens: 672, bytes: 3_000_000, disk: Some(disk), ..Prefix::default() };
    Snapshot { model: Some(model), experts: Some(experts), prefix: Some(prefix), memory: Some(Memory::default()), ..Snapshot::default() }
}

#[tonic::async_trait]
impl Admin for Script {
    type WatchStatsStream = Events<Snapshot>;

    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        let version =
            VersionResponse { version: "9.9.9".into(), protocol: self.protocol, pid: std::process::id(), ..VersionResponse::default() };
        Ok(Response::new(version))
    }

    async fn stats(&self, _: Request<StatsRequest>) -> Answer<Snapshot> {
        Ok(Response::new(snapshot()))
    }

    async fn watch_stats(&self, _: Request<WatchStatsRequest>) -> Answer<Self::WatchStatsStream> {
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(snapshot()), Ok(snapshot())]).chain(tokio_stream::pending()))))
    }

    async fn doctor(&self, _: Request<DoctorRequest>) -> Answer<DoctorResponse> {
        let setting = |name: &str, value: &str| Setting { name: name.into(), value: value.into(), origin: "default".into() };
        let check = Check { name: "simd".into(), ok: true, finding: "avx2".into(), fix: String::new() };
        Ok(Response::new(DoctorResponse { settings: vec![setting("memory", "auto"), setting("parallel", "2")], checks: vec![check] }))
    }

    type BenchStream = Events<BenchEvent>;

    async fn bench(&self, _: Request<BenchRequest>) -> Answer<Self::BenchStream> {
        let machine = BenchMachine {
            memory_bytes_s: 39.5e9,
            threads: 2,
            disk_bytes_s: 1.7e9,
            record_bytes: 82_944,
            readers: 4,
            io: "direct".into(),
            ..BenchMachine::default()
        };
        let variant = BenchVariant { io: "direct".into(), policy: "lfru".into(), lookahead: "auto".into() };
        let row = BenchRow {
            cache: "25%".into(),
            slots: 16,
            state: "cold".into(),
            variant: Some(variant),
            decode_tok_s: Some(12.3),
            stages: [("experts", 0.06), ("unaccounted", 0.02)].map(|(name, seconds)| BenchStage { name: name.into(), seconds }).into(),
            ..BenchRow::default()
        };
        let progress = BenchProgress { stage: "25% cold".into(), done: 1, total: 2 };
        let events = [bench_event::Event::Machine(machine), bench_event::Event::Progress(progress), bench_event::Event::Row(row)];
        Ok(Response::new(Box::pin(tokio_stream::iter(events.map(|event| Ok(BenchEvent { event: Some(event) }))))))
    }

    async fn replay(&self, request: Request<ReplayRequest>) -> Answer<ReplayResponse> {
        let policy = request.into_inner().policies.first().cloned().unwrap_or("lfru".into());
        let rows = vec![ReplayRow { policy, slots: 16, hits: 3, misses: 1, gap: 0.05 }];
        Ok(Response::new(ReplayResponse { tokens: 2, layers: 2, experts: 64, top_k: 8, rows }))
    }

    async fn clear_cache(&self, _: Request<ClearCacheRequest>) -> Answer<ClearCacheResponse> {
        Ok(Response::new(ClearCacheResponse { memory_bytes: 3_000_000, files: 2, disk_bytes: 1_000_000 }))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        Ok(Response::new(ShutdownResponse {}))
    }
}
