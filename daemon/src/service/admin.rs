//! Admin: version, stats, doctor, shutdown. Reads what others publish; never waits for the engine.

use std::{
    fs, io,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use flash_engine::{
    Measured, StorageReport,
    bench::BenchEvent,
    replay::{self, ReplayPolicy, Trace},
};
use flash_proto::{PROTOCOL_VERSION, v1};
use rustix::process::{Resource, getrlimit};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use super::{Daemon, convert};
use crate::{
    Error,
    catalog::Entry,
    config::{Config, Setting, disk_cache_dir},
    pressure::Finding,
    worker::{BENCH_EVENTS, Bench, ClearCache, Command, State},
};

/// More often than this costs more than it tells.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// How much faster whole experts must have been read before packing is recommended.
const WORTH_PACKING: f64 = 1.1;

pub(super) struct Service {
    pub(super) daemon: Arc<Daemon>,
    /// Turns true when the server is about to end.
    pub(super) stop: watch::Receiver<bool>,
}

type BenchStream = Pin<Box<dyn Stream<Item = Result<v1::BenchEvent, Status>> + Send>>;

#[tonic::async_trait]
impl v1::admin_server::Admin for Service {
    type BenchStream = BenchStream;
    type WatchStatsStream = ReceiverStream<Result<v1::Snapshot, Status>>;

    async fn version(&self, _: Request<v1::VersionRequest>) -> Result<Response<v1::VersionResponse>, Status> {
        let config = &self.daemon.config;
        let state = self.daemon.worker.state();
        Ok(Response::new(v1::VersionResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: PROTOCOL_VERSION,
            pid: std::process::id(),
            uptime_s: self.daemon.started.elapsed().as_secs_f64(),
            kernels: kernels(&state),
            home: config.home.display().to_string(),
            log_path: log_of(config).map(|path| path.display().to_string()).unwrap_or_default(),
        }))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::Snapshot>, Status> {
        Ok(Response::new(self.daemon.snapshot().await))
    }

    async fn watch_stats(&self, request: Request<v1::WatchStatsRequest>) -> Result<Response<Self::WatchStatsStream>, Status> {
        let every = Duration::from_millis(request.into_inner().interval_ms.into()).max(INTERVAL_MIN);
        let (snapshots, stream) = mpsc::channel(1);
        let (daemon, mut stop) = (self.daemon.clone(), self.stop.clone());
        tokio::spawn(async move {
            let mut tick = interval(every);
            tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let ticks = async {
                loop {
                    tick.tick().await;
                    if snapshots.send(Ok(daemon.snapshot().await)).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = ticks => {}
                () = snapshots.closed() => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn doctor(&self, _: Request<v1::DoctorRequest>) -> Result<Response<v1::DoctorResponse>, Status> {
        let state = self.daemon.worker.state();
        let entries = self.daemon.catalog.list().await;
        let settings = settings(&self.daemon.config.settings, &state);
        let mut checks = self.daemon.checks(&state, &entries);
        checks.extend(self.daemon.storage(&state, &entries).await);
        let checks = checks.into_iter().map(convert::check).collect();
        Ok(Response::new(v1::DoctorResponse { settings: settings.into_iter().map(convert::setting).collect(), checks }))
    }

    async fn bench(&self, request: Request<v1::BenchRequest>) -> Result<Response<BenchStream>, Status> {
        let events = self.bench(request.into_inner()).await.map_err(|error| convert::status(&error))?;
        let events = ReceiverStream::new(events).map(|event| event.map(convert::bench_event).map_err(|error| convert::status(&error)));
        Ok(Response::new(Box::pin(events)))
    }

    async fn replay(&self, request: Request<v1::ReplayRequest>) -> Result<Response<v1::ReplayResponse>, Status> {
        self.replay(request.into_inner()).await.map(Response::new).map_err(|error| convert::status(&error))
    }

    async fn clear_cache(&self, _: Request<v1::ClearCacheRequest>) -> Result<Response<v1::ClearCacheResponse>, Status> {
        let clear = async {
            let (reply, cleared) = oneshot::channel();
            let dir = disk_cache_dir(&self.daemon.config.home);
            self.daemon.worker.send(Command::ClearCache(ClearCache { dir, reply }))?;
            cleared.await.map_err(|_| Error::Draining)?
        };
        clear.await.map(|cleared| Response::new(convert::cleared(cleared))).map_err(|error| convert::status(&error))
    }

    async fn shutdown(&self, request: Request<v1::ShutdownRequest>) -> Result<Response<v1::ShutdownResponse>, Status> {
        self.daemon.drain.begin(Duration::from_millis(request.into_inner().grace_ms.into()));
        Ok(Response::new(v1::ShutdownResponse {}))
    }
}

impl Service {
    async fn bench(&self, request: v1::BenchRequest) -> Result<mpsc::Receiver<Result<BenchEvent, Error>>, Error> {
        let daemon = &self.daemon;
        if daemon.drain.begun() {
            return Err(Error::Draining);
        }
        let live: Vec<String> = daemon.sessions.list().into_iter().map(|session| session.request_id).collect();
        if !live.is_empty() {
            return Err(busy(&live));
        }
        let model = daemon.catalog.resolve(&request.model).await?;
        let routing = match request.routing.as_str() {
            "" => None,
            path => {
                let path = convert::absolute("routing", path)?;
                Some(read_trace("routing", path).await?)
            }
        };
        let options = convert::bench(request, routing.as_ref())?;
        let (events, receiver) = mpsc::channel(BENCH_EVENTS);
        let (reply, begun) = oneshot::channel();
        daemon.worker.send(Command::Bench(Box::new(Bench { model, options, events, reply, running: daemon.jobs.enter() })))?;
        begun.await.map_err(|_| Error::Draining)??;
        Ok(receiver)
    }

    /// One row after the other on a blocking thread, so that a caller who leaves is not computed for.
    async fn replay(&self, request: v1::ReplayRequest) -> Result<v1::ReplayResponse, Error> {
        let path = convert::absolute("path", &request.path)?;
        let trace = Arc::new(read_trace("path", path).await?);
        let mut response = convert::replayed(&trace);
        let (policies, slots) = (convert::replay_policies(&request.policies)?, convert::replay_slots(&request.slots, trace.experts)?);
        for slots in slots {
            let run = |policy| {
                let trace = trace.clone();
                blocking(move || Ok(replay::replay(&trace, policy, slots)))
            };
            let best = run(ReplayPolicy::Belady).await?;
            for (name, policy) in &policies {
                let found = if *policy == ReplayPolicy::Belady { best.clone() } else { run(*policy).await? };
                response.rows.push(convert::replay_row(name, slots, &found, &best));
            }
        }
        Ok(response)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    spawn_blocking(work).await.unwrap_or_else(|error| Err(Error::Panicked(error.to_string())))
}

/// What is wrong with a trace is not the model's fault.
async fn read_trace(param: &'static str, path: PathBuf) -> Result<Trace, Error> {
    blocking(move || flash_engine::read_trace(&path).map_err(|error| Error::Value { param, reason: error.to_string() })).await
}

/// Names what is in a benchmark's way.
fn busy(requests: &[String]) -> Error {
    let named = requests.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = requests.len().checked_sub(5).filter(|more| *more > 0).map(|more| format!(" and {more} more")).unwrap_or_default();
    let what = "a benchmark needs the memory for itself; wait for them, or end them: flashctl stop --force";
    Error::Busy(format!("requests are running ({named}{more}), and {what}"))
}

impl Daemon {
    async fn snapshot(&self) -> v1::Snapshot {
        let gap = self.gap().await;
        convert::snapshot(convert::Seen {
            started: self.started,
            state: &self.worker.state(),
            totals: &self.totals,
            view: &self.monitor.view(),
            process_bytes: self.monitor.sensors.process().unwrap_or(0),
            gap,
        })
    }

    /// How fast the experts of the loaded model, else of the default one, come from its disk.
    async fn storage(&self, state: &State, entries: &[Entry]) -> Vec<Finding> {
        let loaded = state.ready().map(|(model, _)| model.clone());
        let default = || {
            let id = self.catalog.default_model(entries)?;
            entries.iter().find(|entry| entry.model.id == id && entry.info.is_ok()).map(|entry| entry.model.clone())
        };
        let Some(model) = loaded.or_else(default) else { return Vec::new() };
        let loaders = state.options.loaders;
        let measured = blocking(move || Ok((flash_engine::storage_report(&model.path, loaders)?, model.id))).await;
        match measured {
            Ok((report, id)) => storage(&id, &report),
            Err(error) => vec![Finding::bad("storage", error.to_string(), "see `flashctl models`")],
        }
    }

    fn checks(&self, state: &State, entries: &[Entry]) -> Vec<Finding> {
        let config = &self.config;
        let mut checks = vec![
            Finding::good("backend", flash_engine::backend(state.options.kernels)),
            Finding::good("kernels", kernels(state)),
            Finding::good("page size", format!("{} bytes", rustix::param::page_size())),
        ];
        checks.push(match rustix::fs::statvfs(&config.home) {
            Ok(disk) => {
                let free = disk.f_bavail * disk.f_frsize;
                Finding::check("disk", free >= 1 << 30, format!("{} MiB free in {}", free >> 20, config.home.display()), "free some space")
            }
            Err(error) => Finding::bad("disk", format!("{}: {error}", config.home.display()), "create it or set FLASH_HOME"),
        });
        let roots: Vec<_> = config.model_roots.iter().filter(|root| root.is_dir()).map(|root| root.display().to_string()).collect();
        let (good, bad) =
            (entries.iter().filter(|entry| entry.info.is_ok()).count(), entries.iter().filter(|entry| entry.info.is_err()).count());
        let found = format!("{good} usable, {bad} unusable in {}", roots.join(", "));
        checks.push(Finding::check("models", good > 0, found, "put a checkpoint under $FLASH_HOME/models or set FLASH_MODELS"));
        let mut view = self.monitor.view();
        checks.extend(view.readings.drain(..).map(|(name, value)| Finding::good("sensor", format!("{name}: {value}"))));
        checks.extend(self.monitor.sensors.findings());
        checks.push(match fs::metadata(&config.socket) {
            Ok(socket) => {
                let mode = socket.permissions().mode() & 0o777;
                Finding::check("socket", mode == 0o600, format!("{} has mode {mode:o}", config.socket.display()), "restart the daemon")
            }
            Err(error) => Finding::bad("socket", format!("{}: {error}", config.socket.display()), "restart the daemon"),
        });
        let files = getrlimit(Resource::Nofile).current;
        let found = files.map_or("unlimited".into(), |files| files.to_string());
        checks.push(Finding::check("open files", files.is_none_or(|files| files >= 256), found, "raise it: ulimit -n 1024"));
        checks
    }
}

/// The trial in words, and a recommendation where it found a gain.
fn storage(id: &str, report: &StorageReport) -> Vec<Finding> {
    let speed = |speed: &Result<f64, String>| match speed {
        Ok(speed) => format!("{:.2} GB/s", speed / 1e9),
        Err(error) => format!("no ({error})"),
    };
    let Measured { best, tried } = &report.model;
    let speeds = tried.iter().map(|(io, found)| format!("{io} {}", speed(found))).collect::<Vec<_>>().join(", ");
    let reads = if report.packed.is_some() { "experts in their pieces" } else { "packed experts" };
    let mut findings = vec![Finding::good("storage", format!("{id}, {reads}: {speeds}; the best is {best}"))];
    let now = tried.iter().find(|(io, _)| io == best).and_then(|(_, speed)| speed.as_ref().ok());
    if let (Some(packed), Some(now)) = (&report.packed, now) {
        let gain = packed.as_ref().map_or(0.0, |packed| packed / now);
        let found = format!("experts of {} kB in one piece: {}", report.expert_bytes / 1000, speed(packed));
        let fix = if gain >= WORTH_PACKING { "faster: pack the model with `flashctl convert`" } else { "" };
        findings.push(Finding { name: "packing", ok: true, finding: found, fix });
    }
    findings
}

/// The file that this daemon's log goes to. One that was started by hand writes to its terminal, whatever another has left there.
fn log_of(config: &Config) -> Option<PathBuf> {
    let path = config.log_path();
    let place = |file: fs::Metadata| (file.dev(), file.ino());
    let stderr = io::stderr().as_fd().try_clone_to_owned().and_then(|fd| fs::File::from(fd).metadata()).ok();
    let file = fs::metadata(&path).ok()?;
    (config.log_file || stderr.is_some_and(|stderr| place(stderr) == place(file))).then_some(path)
}

/// The configured settings, with what Load calls have changed since.
fn settings(configured: &[Setting], state: &State) -> Vec<Setting> {
    let live = |setting: &Setting| {
        let options = &state.options;
        let auto = |number: Option<String>| number.unwrap_or_else(|| "auto".into());
        let (same, value) = match setting.name {
            "expert_cache" => (
                setting.value.parse().is_ok_and(|was: flash_engine::CacheBudget| was == options.expert_cache),
                options.expert_cache.to_string(),
            ),
            "memory" => (flash_engine::parse_bytes(&setting.value).ok() == options.memory, auto(options.memory.map(|cap| cap.to_string()))),
            "ctx" => (setting.value.parse().ok() == options.context, auto(options.context.map(|tokens| tokens.to_string()))),
            _ => (true, String::new()),
        };
        if same { setting.clone() } else { Setting { value, origin: "a load request".into(), ..*setting } }
    };
    configured.iter().map(live).collect()
}

/// What computes, or what this CPU offers while nothing is loaded.
fn kernels(state: &State) -> String {
    if let Some((_, ready)) = state.ready() {
        return ready.report.kernels.clone();
    }
    #[cfg(target_arch = "x86_64")]
    let features = [("avx512f", std::arch::is_x86_feature_detected!("avx512f")), ("avx2", std::arch::is_x86_feature_detected!("avx2"))];
    #[cfg(target_arch = "aarch64")]
    let features = [("neon", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let features = [("", false)];
    let best = features.iter().find(|(_, there)| *there).map_or("portable", |(name, _)| name);
    format!("no model loaded; this CPU has {best}")
}
