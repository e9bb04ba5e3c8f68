//! Reaches the daemon: connects, starts one if none listens, and refuses to talk to another protocol. It does not keep
//! the daemon alive; that is launchd's or systemd's part.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf, absolute},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use flash_proto::{
    PROTOCOL_VERSION, socket,
    v1::{
        DoctorRequest, DoctorResponse, VersionRequest, VersionResponse, admin_client::AdminClient, generate_client::GenerateClient,
        models_client::ModelsClient,
    },
};
use tokio::time::{sleep, timeout};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::interceptor::{InterceptedService, Interceptor},
    transport::{Channel, Endpoint},
};

use crate::{
    args::Global,
    failure::{Failure, exit, is_disconnect},
    log_file,
    term::StatusLine,
    url::Url,
};

/// From the spawn to the first answer.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Whoever has the socket and does not answer for so long is ending.
const BUSY_FOR: Duration = Duration::from_secs(1);
/// A daemon answers Version from memory.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// Of a connection to another machine, which may end without a word.
const PROBE_EVERY: Duration = Duration::from_secs(20);
const RETRY_EVERY: Duration = Duration::from_millis(10);

/// The way to a daemon: its socket, or a gateway that wants a key.
pub(crate) type Line = InterceptedService<Channel, Key>;

#[derive(Clone, Debug, Default)]
pub(crate) struct Key(Option<MetadataValue<Ascii>>);

impl Interceptor for Key {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

/// A daemon that answered.
#[derive(Clone, Debug)]
pub(crate) struct Daemon {
    line: Line,
    /// It is on another machine, behind this.
    gateway: Option<Url>,
    pub(crate) version: VersionResponse,
    /// This call started it.
    pub(crate) started: bool,
}

impl Daemon {
    pub(crate) fn admin(&self) -> AdminClient<Line> {
        AdminClient::new(self.line.clone())
    }

    pub(crate) fn models(&self) -> ModelsClient<Line> {
        ModelsClient::new(self.line.clone())
    }

    pub(crate) fn generate(&self) -> GenerateClient<Line> {
        GenerateClient::new(self.line.clone())
    }

    pub(crate) fn log(&self) -> String {
        let log = match self.version.log_path.as_str() {
            "" => "on standard error, where it was started",
            path => path,
        };
        self.gateway.as_ref().map_or_else(|| log.into(), |url| format!("{log} behind {url}"))
    }

    /// Its settings and checks.
    pub(crate) async fn report(&self) -> Result<DoctorResponse, Failure> {
        let report = self.admin().doctor(DoctorRequest {}).await;
        Ok(report.map_err(|status| self.failure(&status, "being examined"))?.into_inner())
    }

    /// A status of this daemon, for the user; `doing` completes "the daemon went away while it was …".
    pub(crate) fn failure(&self, status: &Status, doing: &str) -> Failure {
        match is_disconnect(status) {
            true => self.went_away(doing),
            false => Failure::from_status(status, doing, &self.log()),
        }
    }

    /// The connection broke, or a stream ended before its last event.
    pub(crate) fn went_away(&self, doing: &str) -> Failure {
        let Some(url) = &self.gateway else { return Failure::went_away(doing, &self.log()) };
        Failure::new(exit::UNAVAILABLE, "gateway_gone", format!("the connection to {url} broke while the daemon behind it was {doing}"))
            .hint("see whether that machine can be reached, and its gateway's log")
    }
}

/// The running daemon, of whatever version; `None` if nobody listens.
pub(crate) async fn find(global: &Global) -> Result<Option<Daemon>, Failure> {
    if let Some(url) = &global.gateway {
        return behind(url).await.map(Some);
    }
    hello(&socket_path(global)?).await
}

/// The running daemon, if it speaks our protocol.
pub(crate) async fn running(global: &Global) -> Result<Option<Daemon>, Failure> {
    find(global).await?.map(same_protocol).transpose()
}

/// The running daemon, or a new one.
pub(crate) async fn connect(global: &Global) -> Result<Daemon, Failure> {
    connect_or_start(global, &[]).await
}

/// The running daemon, or a new one with these settings, by the names of their variables.
pub(crate) async fn connect_or_start(global: &Global, settings: &[(&str, String)]) -> Result<Daemon, Failure> {
    if let Some(daemon) = running(global).await? {
        return Ok(daemon);
    }
    let socket = socket_path(global)?;
    if global.no_autostart {
        let failure = Failure::new(exit::UNAVAILABLE, "daemon_unavailable", format!("no daemon is listening on {}", socket.display()));
        return Err(failure.hint("start it with `flashctl daemon start`, or leave out --no-autostart"));
    }
    let mut line = StatusLine::new(global.quiet);
    line.show("starting the daemon");
    same_protocol(start(&socket, settings).await?)
}

pub(crate) fn socket_path(global: &Global) -> Result<PathBuf, Failure> {
    let path = match &global.socket {
        Some(path) => Ok(path.clone()),
        None => socket::default_path(),
    };
    let path = path.map_err(|error| socket_failure(&error))?;
    Ok(absolute(&path).unwrap_or(path))
}

/// A program of ours: beside this executable, else on PATH.
pub(crate) fn program(name: &str) -> Result<PathBuf, Failure> {
    let beside = env::current_exe().and_then(|exe| exe.canonicalize()).ok().and_then(|exe| Some(exe.parent()?.join(name)));
    beside.filter(|path| is_executable(path)).or_else(|| on_path(name)).ok_or_else(|| {
        let message = format!("{name} is neither beside flashctl nor on PATH");
        Failure::new(exit::UNAVAILABLE, "program_not_found", message).hint(format!("build or install {name} next to flashctl"))
    })
}

pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|folder| folder.join(name)).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

fn socket_failure(error: &socket::Error) -> Failure {
    let exit = match error {
        socket::Error::NotListening { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => exit::PERMISSION,
        socket::Error::NotListening { .. } => exit::UNAVAILABLE,
        socket::Error::NotOurs { .. } => exit::PERMISSION,
        _ => exit::CONFIG,
    };
    match error {
        socket::Error::NotListening { path, source } if exit == exit::PERMISSION => {
            Failure::new(exit, "socket", format!("cannot reach the daemon's socket {}: {source}", path.display()))
                .hint("a daemon answers its own user only; --socket or FLASH_SOCKET names another one's place")
        }
        _ => Failure::new(exit, "socket", error.to_string()),
    }
}

async fn hello(socket: &Path) -> Result<Option<Daemon>, Failure> {
    let channel = match socket::connect(socket).await {
        Ok(channel) => channel,
        Err(socket::Error::NotListening { source, .. }) if source.kind() != std::io::ErrorKind::PermissionDenied => return Ok(None),
        Err(error) => return Err(socket_failure(&error)),
    };
    let line = InterceptedService::new(channel, Key::default());
    match timeout(HELLO_DEADLINE, AdminClient::new(line.clone()).version(VersionRequest {})).await {
        Ok(Ok(version)) => Ok(Some(Daemon { line, gateway: None, version: version.into_inner(), started: false })),
        // It was on its way out.
        Ok(Err(status)) if is_disconnect(&status) => Ok(None),
        Ok(Err(status)) => Err(Failure::from_status(&status, "greeting", &log_path_text())),
        Err(_) => {
            let message = format!("the daemon on {} does not answer", socket.display());
            Err(Failure::new(exit::UNAVAILABLE, "daemon_silent", message).hint("end it by hand and try again; see `flashctl daemon logs`"))
        }
    }
}

/// The daemon behind a gateway, usually another machine's. Nothing is started there.
async fn behind(url: &Url) -> Result<Daemon, Failure> {
    let unavailable = |message: String| Failure::new(exit::UNAVAILABLE, "gateway_unavailable", message);
    if url.tls {
        let failure = Failure::new(exit::USAGE, "usage", format!("flashctl has no TLS, which {url} asks for"));
        return Err(failure.hint("ssh -N -L 8080:127.0.0.1:8080 HOST, then --host http://127.0.0.1:8080"));
    }
    let no_answer = |error: &dyn std::fmt::Display| {
        let hint = "there: flashctl serve --host ADDRESS --api-key KEY; here: --host, or FLASH_HOST, which may be unset";
        unavailable(format!("no gateway answers on {url}: {error}")).hint(hint)
    };
    // Before gRPC, whose errors say less.
    match timeout(HELLO_DEADLINE, tokio::net::TcpStream::connect(url.address())).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(no_answer(&error)),
        Err(_) => return Err(no_answer(&"it takes too long")),
    }
    let key = env::var("FLASH_API_KEY").ok().filter(|key| !key.is_empty());
    let key = key.map(|key| format!("Bearer {key}").parse()).transpose();
    let key = key.map_err(|_| Failure::new(exit::CONFIG, "config", "FLASH_API_KEY has characters that no key has"))?;
    let endpoint = Endpoint::from_shared(url.to_string()).map_err(|error| no_answer(&error))?;
    let endpoint = socket::tuned(endpoint).http2_keep_alive_interval(PROBE_EVERY).keep_alive_timeout(HELLO_DEADLINE).tcp_nodelay(true);
    let line = InterceptedService::new(endpoint.connect_lazy(), Key(key));
    match timeout(HELLO_DEADLINE, AdminClient::new(line.clone()).version(VersionRequest {})).await {
        Ok(Ok(version)) => Ok(Daemon { line, gateway: Some(url.clone()), version: version.into_inner(), started: false }),
        Ok(Err(status)) if is_disconnect(&status) || flash_proto::code::of(&status).is_none() => {
            Err(unavailable(format!("what listens on {url} is no flash-gateway that knows --host")))
        }
        Ok(Err(status)) => Err(Failure::from_status(&status, "greeting", &format!("behind {url}"))),
        Err(_) => Err(no_answer(&"it takes too long")),
    }
}

fn same_protocol(daemon: Daemon) -> Result<Daemon, Failure> {
    let VersionResponse { version, protocol, pid, .. } = &daemon.version;
    if *protocol == PROTOCOL_VERSION {
        return Ok(daemon);
    }
    let ours = env!("CARGO_PKG_VERSION");
    let message =
        format!("flashctl {ours} speaks protocol {PROTOCOL_VERSION}, the daemon (flashd {version}, pid {pid}) speaks protocol {protocol}");
    let hint = match daemon.gateway {
        Some(_) => "install the same release on both machines",
        None => "`flashctl daemon restart` replaces the daemon",
    };
    Err(Failure::new(exit::UNAVAILABLE, "protocol_mismatch", message).hint(hint))
}

/// Spawns flashd and waits until somebody answers: it, or the daemon of whoever was quicker.
async fn start(socket: &Path, settings: &[(&str, String)]) -> Result<Daemon, Failure> {
    let (child, log, from) = spawn(socket, settings)?;
    let (mut child, mut taken) = (Some(child), None);
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        if let Some(daemon) = hello(socket).await? {
            return Ok(Daemon { started: child.as_ref().is_some_and(|child| child.id() == daemon.version.pid), ..daemon });
        }
        match child.as_mut().map(Child::try_wait) {
            // Another daemon has the socket: it is about to answer, or about to be gone.
            Some(Ok(Some(status))) if status.code() == Some(i32::from(exit::BUSY)) => (child, taken) = (None, Some(Instant::now())),
            Some(Ok(Some(status))) => return Err(died(status.code(), &status.to_string(), &log, from)),
            None if taken.is_some_and(|at| at.elapsed() > BUSY_FOR) && Instant::now() < deadline => {
                child = Some(spawn(socket, settings)?.0);
            }
            _ if Instant::now() > deadline => return Err(died(None, "it did not answer in time", &log, from)),
            _ => sleep(RETRY_EVERY).await,
        }
    }
}

/// Detached: own process group, no terminal input, output to the log, so that neither Ctrl-C here nor the end of
/// this program touches it.
fn spawn(socket: &Path, settings: &[(&str, String)]) -> Result<(Child, PathBuf, u64), Failure> {
    let program = program("flashd")?;
    let log = log_file::path().map_err(|error| socket_failure(&error))?;
    let log = absolute(&log).unwrap_or(log);
    let cannot = |what: &str, path: &Path, error: std::io::Error| {
        Failure::new(exit::CANNOT_CREATE, "daemon_start", format!("cannot {what} {}: {error}", path.display()))
    };
    let (file, from) = log_file::open(&log).map_err(|error| cannot("open the log", &log, error))?;
    let second = file.try_clone().map_err(|error| cannot("open the log", &log, error))?;
    let mut command = Command::new(&program);
    command.stdin(Stdio::null()).stdout(file).stderr(second).current_dir("/").process_group(0);
    command.envs(absolute_settings()).envs(settings.iter().cloned());
    if !is_default(socket) {
        command.env("FLASH_SOCKET", socket);
    }
    let child = command.spawn().map_err(|error| cannot("start", &program, error))?;
    Ok((child, log, from))
}

/// flashd listens there without being told. It would say of a setting that it was told.
fn is_default(path: &Path) -> bool {
    let told = env::var_os("FLASH_SOCKET").is_some_and(|told| !told.is_empty());
    // Which we do not go by.
    let file = socket::home().ok().and_then(|home| fs::read_to_string(home.join("flash.toml")).ok());
    let in_file = file.and_then(|text| text.parse::<toml_edit::DocumentMut>().ok()).is_some_and(|file| file.contains_key("socket"));
    !told && !in_file && socket::default_path().is_ok_and(|default| default == path)
}

/// What flashd says of the settings in `file`, else of those that it would start with.
pub(crate) fn check_config(file: Option<&Path>) -> Result<(), Failure> {
    let program = program("flashd")?;
    let output = Command::new(&program).arg("--check-config").args(file).envs(absolute_settings()).stdin(Stdio::null()).output();
    let output = output.map_err(|error| Failure::new(exit::GENERIC, "config", format!("cannot run {}: {error}", program.display())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(exit::CONFIG, "config", said.trim().trim_start_matches("flashd: ")))
}

/// Settings that hold paths, which must mean the same from another working directory.
fn absolute_settings() -> Vec<(&'static str, OsString)> {
    let whole = |path: PathBuf| absolute(&path).unwrap_or(path);
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let home = set("FLASH_HOME").map(|home| ("FLASH_HOME", whole(home.into()).into_os_string()));
    let models = set("FLASH_MODELS").and_then(|list| {
        let list: Vec<PathBuf> = env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).map(whole).collect();
        Some(("FLASH_MODELS", env::join_paths(list).ok()?))
    });
    home.into_iter().chain(models).collect()
}

/// flashd's own exit code says whether it was the configuration or the disk; the last lines of its log say the rest.
fn died(code: Option<i32>, how: &str, log: &Path, from: u64) -> Failure {
    let exit = [exit::CONFIG, exit::CANNOT_CREATE, exit::PERMISSION].into_iter().find(|&exit| code == Some(i32::from(exit)));
    let said = log_file::tail(log, from, 8).map(|(text, _)| text).unwrap_or_default();
    let said = if said.trim().is_empty() { String::new() } else { format!("\n{}", said.trim_end()) };
    Failure::new(exit.unwrap_or(exit::UNAVAILABLE), "daemon_start", format!("flashd did not start ({how}){said}"))
        .hint(format!("its log: {}", log.display()))
}

fn log_path_text() -> String {
    log_file::path().map_or_else(|_| "flashd.log".into(), |path| path.display().to_string())
}
