//! `flashctl daemon`: start, stop, status, restart, logs. Start and stop say what is so afterwards, whoever did it.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use flash_proto::v1::ShutdownRequest;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    args::{DaemonCommand, Global},
    connect::{self, Daemon},
    failure::{Failure, exit},
    json, log_file, render, term,
};

/// What the daemon needs beyond the grace period to free its memory and leave.
const LEAVE: Duration = Duration::from_secs(15);
/// How often a followed log is looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

pub(crate) async fn run(command: DaemonCommand, global: &Global) -> Result<(), Failure> {
    match command {
        DaemonCommand::Start => start(global).await,
        DaemonCommand::Stop { grace } => {
            let was_running = stop(grace, global).await?;
            let text = if was_running { "stopped" } else { "was not running" };
            report(global, json!({"status": "stopped", "was_running": was_running}), text)
        }
        DaemonCommand::Restart { grace } => {
            // Else the good one has gone before the next one refuses to start.
            connect::check_config(None).map_err(|refused| refused.hint("no daemon was stopped; correct that first, then restart"))?;
            stop(grace, global).await?;
            start(global).await
        }
        DaemonCommand::Status => match connect::find(global).await? {
            Some(daemon) => running(global, &daemon, "running"),
            None => {
                report(global, json!({"status": "stopped"}), "stopped")?;
                Err(Failure::silent(exit::UNAVAILABLE))
            }
        },
        DaemonCommand::Logs { .. } if global.json => {
            let failure = Failure::new(exit::USAGE, "usage", "the daemon's log has no --json");
            Err(failure.hint("`flashctl config set log_format json` has the daemon write it as JSON, from its next start on"))
        }
        DaemonCommand::Logs { follow, lines } => logs(&log_of(global).await?, follow, lines).await,
    }
}

async fn start(global: &Global) -> Result<(), Failure> {
    // Asking for a start outweighs --no-autostart.
    let daemon = connect::connect(&Global { no_autostart: false, ..global.clone() }).await?;
    running(global, &daemon, if daemon.started { "started" } else { "running already" })
}

fn running(global: &Global, daemon: &Daemon, how: &str) -> Result<(), Failure> {
    let version = &daemon.version;
    let mut value = json::version(version);
    value["status"] = json!("running");
    value["started"] = json!(daemon.started);
    let up = render::seconds(version.uptime_s);
    report(global, value, &format!("{how}: flashd {}, pid {}, up {up}, log {}", version.version, version.pid, daemon.log()))
}

fn report(global: &Global, value: Value, text: &str) -> Result<(), Failure> {
    if global.json { term::print_json(&value) } else { term::println(text) }
}

/// True if one was running. Returns when its process is gone.
pub(crate) async fn stop(grace_s: f64, global: &Global) -> Result<bool, Failure> {
    let grace = Duration::try_from_secs_f64(grace_s).ok().filter(|grace| *grace <= Duration::from_secs(86400));
    let grace = grace.ok_or_else(|| Failure::new(exit::USAGE, "usage", format!("--grace takes 0 to 86400 seconds, not {grace_s}")))?;
    let Some(daemon) = connect::find(global).await? else { return Ok(false) };
    let pid = i32::try_from(daemon.version.pid).ok().and_then(Pid::from_raw);
    let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
    // A daemon of another version may not know Shutdown, but any knows SIGTERM.
    if let (Err(_), Some(pid)) = (daemon.admin().shutdown(ShutdownRequest { grace_ms }).await, pid) {
        let _ = kill_process(pid, Signal::TERM);
    }
    let deadline = Instant::now() + grace + LEAVE;
    let is_there = || pid.is_some_and(|pid| test_kill_process(pid).is_ok() && !is_zombie(pid));
    while is_there() || connect::find(global).await?.is_some_and(|now| now.version.pid == daemon.version.pid) {
        if Instant::now() > deadline {
            let message = format!("the daemon (pid {}) was told to stop and is still there", daemon.version.pid);
            return Err(Failure::new(exit::BUSY, "daemon_busy", message).hint(format!("kill {}", daemon.version.pid)));
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(true)
}

/// Whoever started it may not have waited for it; it is gone all the same.
fn is_zombie(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

async fn log_of(global: &Global) -> Result<PathBuf, Failure> {
    match connect::find(global).await? {
        Some(daemon) if daemon.version.log_path.is_empty() => {
            let message = format!("the daemon (pid {}) writes its log {}", daemon.version.pid, daemon.log());
            Err(Failure::new(exit::NO_INPUT, "no_log", message).hint("`flashctl daemon restart` starts one that writes to a file"))
        }
        Some(daemon) => Ok(daemon.version.log_path.into()),
        None => log_file::path().map_err(|error| Failure::new(exit::CONFIG, "config", error.to_string())),
    }
}

async fn logs(path: &Path, follow: bool, lines: usize) -> Result<(), Failure> {
    let cannot = |error| {
        Failure::new(exit::NO_INPUT, "no_log", format!("cannot read {}: {error}", path.display()))
            .hint("a daemon started by flashctl writes it")
    };
    let inode = || std::fs::metadata(path).map_or(0, |found| found.ino());
    let mut file = inode();
    let (text, mut at) = log_file::tail(path, 0, lines).map_err(cannot)?;
    term::print(&text)?;
    if !follow {
        return Ok(());
    }
    loop {
        sleep(FOLLOW_EVERY).await;
        let length = std::fs::metadata(path).map_or(0, |found| found.len());
        if inode() != file || length < at {
            // Rotated or truncated: from its beginning.
            (file, at) = (inode(), 0);
        }
        if length > at {
            let (text, end) = log_file::tail(path, at, usize::MAX).map_err(cannot)?;
            term::print(&text)?;
            at = end;
        }
    }
}
