//! Admin: version, stats, doctor, shutdown. Reads what others publish; never waits for the engine.

use std::{fs, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use flash_proto::{PROTOCOL_VERSION, v1};
use rustix::process::{Resource, getrlimit};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Daemon, convert};
use crate::{catalog::Entry, config::Setting, pressure::Finding, worker::State};

/// More often than this costs more than it tells.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

pub(super) struct Service {
    pub(super) daemon: Arc<Daemon>,
    /// Turns true when the server is about to end.
    pub(super) stop: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl v1::admin_server::Admin for Service {
    type WatchStatsStream = ReceiverStream<Result<v1::Snapshot, Status>>;

    async fn version(&self, _: Request<v1::VersionRequest>) -> Result<Response<v1::VersionResponse>, Status> {
        let config = &self.daemon.config;
        let state = self.daemon.worker.state();
        let log_path = config.log_path();
        Ok(Response::new(v1::VersionResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: PROTOCOL_VERSION,
            pid: std::process::id(),
            uptime_s: self.daemon.started.elapsed().as_secs_f64(),
            kernels: kernels(&state),
            home: config.home.display().to_string(),
            log_path: if log_path.exists() { log_path.display().to_string() } else { String::new() },
        }))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::Snapshot>, Status> {
        Ok(Response::new(self.daemon.snapshot()))
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
                    if snapshots.send(Ok(daemon.snapshot())).await.is_err() {
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
        let checks = self.daemon.checks(&state, &entries).into_iter().map(convert::check).collect();
        Ok(Response::new(v1::DoctorResponse { settings: settings.into_iter().map(convert::setting).collect(), checks }))
    }

    async fn shutdown(&self, request: Request<v1::ShutdownRequest>) -> Result<Response<v1::ShutdownResponse>, Status> {
        self.daemon.drain.begin(Duration::from_millis(request.into_inner().grace_ms.into()));
        Ok(Response::new(v1::ShutdownResponse {}))
    }
}

impl Daemon {
    fn snapshot(&self) -> v1::Snapshot {
        let process = self.monitor.sensors.process().unwrap_or(0);
        convert::snapshot(self.started, &self.worker.state(), &self.totals, &self.monitor.view(), process)
    }

    fn checks(&self, state: &State, entries: &[Entry]) -> Vec<Finding> {
        let config = &self.config;
        let mut checks =
            vec![Finding::good("kernels", kernels(state)), Finding::good("page size", format!("{} bytes", rustix::param::page_size()))];
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
