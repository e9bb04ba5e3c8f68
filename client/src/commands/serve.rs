//! `flashctl serve`: the gateway in the foreground, on a daemon that runs already or is started for as long as this lasts.

use std::{
    io::{self, IsTerminal},
    os::unix::process::CommandExt,
    process::{Command, ExitStatus, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStderr},
    signal::unix::{self as signal, SignalKind},
};

use super::{daemon, listen, terminations};
use crate::{
    args::{Global, ServeArgs, Settings},
    connect,
    failure::{Failure, exit},
    load, term,
};

const GRACE_S: f64 = 30.0;

pub(crate) async fn run(args: ServeArgs, global: &Global) -> Result<(), Failure> {
    let gateway = connect::program("flash-gateway")?;
    let parallel = args.parallel.map(|parallel| ("FLASH_PARALLEL", parallel.to_string()));
    // Before there is a daemon that would be left behind.
    let signals = (listen(SignalKind::interrupt())?, terminations()?, hangups()?);
    let daemon = connect::connect_or_start(global, parallel.as_slice()).await?;
    let outcome = serve(&args, &gateway, &daemon, global, signals).await;
    // Ours may have been killed, and another one started since.
    let is_ours = |now: &connect::Daemon| now.version.pid == daemon.version.pid;
    if daemon.started && connect::find(global).await?.as_ref().is_some_and(is_ours) {
        daemon::stop(GRACE_S, global).await?;
    }
    outcome
}

/// A running daemon keeps what it was started with.
async fn has_parallel(daemon: &connect::Daemon, wanted: &str) -> Result<(), Failure> {
    match daemon.report().await?.settings.iter().find(|setting| setting.name == "parallel") {
        Some(setting) if setting.value != wanted => {
            let message = format!("the running daemon computes up to {} requests together, not {wanted}", setting.value);
            Err(Failure::new(exit::BAD_DATA, "parallel", message).hint("`flashctl daemon stop` first, or leave out --parallel"))
        }
        _ => Ok(()),
    }
}

async fn serve(
    args: &ServeArgs,
    gateway: &std::path::Path,
    daemon: &connect::Daemon,
    global: &Global,
    (mut interrupt, mut terminate, mut hangup): (signal::Signal, signal::Signal, Option<signal::Signal>),
) -> Result<(), Failure> {
    if let Some(parallel) = args.parallel.filter(|_| !daemon.started) {
        has_parallel(daemon, &parallel.to_string()).await?;
    }
    if args.model.is_some() || args.settings != Settings::default() {
        let model = args.model.as_deref().unwrap_or("local");
        tokio::select! {
            loaded = load::load(daemon, model, &args.settings, global) => { loaded?; }
            _ = interrupt.recv() => return Err(Failure::silent(exit::SIGINT)),
            _ = terminate.recv() => return Err(Failure::silent(exit::SIGTERM)),
            () = hung_up(&mut hangup) => return Err(Failure::silent(exit::SIGHUP)),
        }
    }
    let mut child = spawn(args, gateway, global)?;
    let heard = child.stderr.take().map(|stderr| tokio::spawn(listen_in(stderr)));
    let mut stopped_by = None;
    loop {
        let (signal, exit) = tokio::select! {
            status = child.wait() => {
                let said = match heard {
                    Some(heard) => Some(heard.await.unwrap_or_default()),
                    None => None,
                };
                return ended(status, stopped_by, said);
            }
            _ = interrupt.recv() => (Signal::INT, exit::SIGINT),
            _ = terminate.recv() => (Signal::TERM, exit::SIGTERM),
            () = hung_up(&mut hangup) => (Signal::TERM, exit::SIGHUP),
        };
        forward(&child, signal);
        stopped_by = Some(exit);
    }
}

/// The terminal's end, if there is one: under nohup there is none, and the signal stays ignored.
fn hangups() -> Result<Option<signal::Signal>, Failure> {
    let terminal = io::stdin().is_terminal() || io::stdout().is_terminal() || io::stderr().is_terminal();
    terminal.then(|| listen(SignalKind::hangup())).transpose()
}

async fn hung_up(hangup: &mut Option<signal::Signal>) {
    match hangup {
        Some(hangup) => drop(hangup.recv().await),
        None => std::future::pending().await,
    }
}

/// In a process group of its own, so that Ctrl-C reaches it once, through us. The key goes by environment: arguments can
/// be read by every user of the machine. Its ready line and its log appear on our stderr.
fn spawn(args: &ServeArgs, gateway: &std::path::Path, global: &Global) -> Result<Child, Failure> {
    let mut command = Command::new(gateway);
    command.process_group(0).arg("--host").arg(&args.host).arg("--port").arg(args.port.to_string());
    command.arg("--socket").arg(connect::socket_path(global)?);
    let repeated = |flag: &str, values: &[String]| values.iter().flat_map(|value| [flag.to_owned(), value.clone()]).collect::<Vec<_>>();
    command.args(repeated("--allowed-host", &args.allowed_host)).args(repeated("--cors-origin", &args.cors_origin));
    if args.insecure_no_auth {
        command.arg("--insecure-no-auth");
    }
    if let Some(key) = &args.api_key {
        command.env("FLASH_API_KEY", key);
    }
    if global.json {
        command.stderr(Stdio::piped());
    }
    let mut command = tokio::process::Command::from(command);
    let child = command.stdin(Stdio::null()).kill_on_drop(true).spawn();
    child.map_err(|error| Failure::new(exit::GENERIC, "gateway_start", format!("cannot start {}: {error}", gateway.display())))
}

pub(super) fn forward(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
        // It may have ended this moment, which `wait` is about to tell.
        let _ = kill_process(pid, signal);
    }
}

/// What the gateway said last of why it ends, for a caller that reads JSON.
#[derive(Default)]
struct Said {
    error: String,
    hint: Option<String>,
}

/// Passes on what the gateway writes.
async fn listen_in(stderr: ChildStderr) -> Said {
    let (mut lines, mut said) = (BufReader::new(stderr).lines(), Said::default());
    while let Ok(Some(line)) = lines.next_line().await {
        term::note(&line);
        if let Some(error) = line.strip_prefix("error: ") {
            said = Said { error: error.into(), hint: None };
        } else if let Some(hint) = line.strip_prefix("hint: ") {
            said.hint = Some(hint.into());
        }
    }
    said
}

/// The gateway has said why, on our stderr unless it was listened to; its exit code is ours. A signal that we passed on is not a failure of
/// its.
fn ended(status: io::Result<ExitStatus>, stopped_by: Option<u8>, said: Option<Said>) -> Result<(), Failure> {
    let status = status.map_err(|error| Failure::new(exit::INTERNAL, "gateway", format!("cannot wait for the gateway: {error}")))?;
    match (status.code(), stopped_by) {
        (Some(0), _) => Ok(()),
        (Some(code), _) => {
            let code = u8::try_from(code).unwrap_or(exit::GENERIC);
            Err(match said {
                None => Failure::silent(code),
                Some(Said { error, .. }) if error.is_empty() => {
                    Failure::new(code, "gateway", format!("the gateway ended: {status}")).hint("standard error has what it wrote")
                }
                Some(Said { error, hint }) => Failure { hint, ..Failure::new(code, "gateway", error) },
            })
        }
        (None, Some(exit)) => Err(Failure::silent(exit)),
        (None, None) => Err(Failure::new(exit::GENERIC, "gateway", format!("the gateway ended: {status}"))),
    }
}
