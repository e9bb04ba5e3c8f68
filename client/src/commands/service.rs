//! `flashctl service`: files for launchd or systemd, written, removed or shown, and the manager told about it. What the
//! files mean is in the launchd crate; who runs them afterwards is the manager.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf, absolute},
    process::{Command, Stdio},
};

use flash_proto::socket;
use launchd_plist::{Agent, KeepAlive, ProcessType, Unit};
use serde_json::json;

use crate::{
    args::{Global, Manager, ServiceAction, ServiceArgs},
    connect,
    failure::{Failure, exit},
    log_file, term,
};

/// Beyond the 30 s that the programs give running requests.
const STOP_TIMEOUT_S: u32 = 40;

/// The settings of this shell that the service keeps: all but FLASH_API_KEY, which would lie readable in the file. A test holds them against
/// the daemon's.
const KEPT: [&str; 22] = [
    "FLASH_HOME",
    "FLASH_SOCKET",
    "FLASH_MODEL",
    "FLASH_MODELS",
    "FLASH_EXPERT_CACHE",
    "FLASH_MEMORY",
    "FLASH_CTX",
    "FLASH_PARALLEL",
    "FLASH_QUEUE",
    "FLASH_THREADS",
    "FLASH_KERNELS",
    "FLASH_LOADERS",
    "FLASH_IO",
    "FLASH_POLICY",
    "FLASH_LOOKAHEAD",
    "FLASH_PREFIX_CACHE",
    "FLASH_DISK_CACHE",
    "FLASH_DISK_CACHE_WRITES",
    "FLASH_KEEP_ALIVE",
    "FLASH_WARM_START",
    "FLASH_LOG",
    "FLASH_LOG_FORMAT",
];

/// One program to keep running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Daemon,
    Gateway,
}

impl Job {
    fn label(self) -> &'static str {
        if self == Job::Daemon { "dev.flash.flashd" } else { "dev.flash.gateway" }
    }

    fn program(self) -> &'static str {
        if self == Job::Daemon { "flashd" } else { "flash-gateway" }
    }

    fn unit(self) -> &'static str {
        if self == Job::Daemon { "flashd.service" } else { "flash-gateway.service" }
    }

    fn file(self, manager: Manager) -> String {
        match manager {
            Manager::Launchd => format!("{}.plist", self.label()),
            Manager::Systemd => self.unit().into(),
        }
    }

    fn text(self, manager: Manager, program: &str, flash_home: &str, environment: &BTreeMap<String, String>) -> String {
        let log = format!("{flash_home}/log/{}.log", self.program());
        let mut environment = environment.clone();
        environment.insert("FLASH_HOME".into(), flash_home.into());
        match manager {
            Manager::Launchd => Agent {
                label: self.label().into(),
                program_arguments: vec![program.into()],
                environment_variables: environment,
                run_at_load: true,
                keep_alive: KeepAlive { successful_exit: false },
                throttle_interval: 10,
                exit_time_out: STOP_TIMEOUT_S,
                process_type: ProcessType::Interactive,
                low_priority_io: false,
                standard_out_path: log.clone(),
                standard_error_path: log,
                umask: 0o077,
            }
            .to_xml(),
            Manager::Systemd => Unit {
                description: if self == Job::Daemon {
                    "flashd, Mixture-of-Experts models larger than memory"
                } else {
                    "flashd's HTTP gateway"
                }
                .into(),
                exec: vec![program.into()],
                environment,
                log,
                after: (self == Job::Gateway).then(|| Job::Daemon.unit().into()),
                no_restart_on: vec![exit::BUSY, exit::CONFIG],
                stop_timeout_s: STOP_TIMEOUT_S,
            }
            .to_text(),
        }
    }
}

pub(crate) async fn run(args: &ServiceArgs, global: &Global) -> Result<(), Failure> {
    let jobs = if args.daemon_only { vec![Job::Daemon] } else { vec![Job::Daemon, Job::Gateway] };
    let folder = folder(args.manager)?;
    match args.action {
        ServiceAction::Install => install(args, &jobs, &folder, global),
        ServiceAction::Uninstall => uninstall(args, &jobs, &folder, global),
        ServiceAction::Status => status(args, &jobs, &folder, global),
    }
}

/// Where the manager looks for this user's services.
fn folder(manager: Manager) -> Result<PathBuf, Failure> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home =
        || set("HOME").ok_or_else(|| Failure::new(exit::CONFIG, "config", "HOME is not set").hint("set HOME to your home directory"));
    match manager {
        Manager::Launchd => Ok(home()?.join("Library/LaunchAgents")),
        Manager::Systemd => Ok(match set("XDG_CONFIG_HOME") {
            Some(config) => config,
            None => home()?.join(".config"),
        }
        .join("systemd/user")),
    }
}

fn files(args: &ServiceArgs, jobs: &[Job], folder: &Path) -> Result<Vec<(PathBuf, String)>, Failure> {
    let config = |error: socket::Error| Failure::new(exit::CONFIG, "config", error.to_string());
    let home = socket::home().map_err(config)?;
    let home = text_of(&absolute(&home).unwrap_or(home))?;
    let kept = KEPT.iter().filter_map(|name| Some(((*name).to_owned(), env::var(name).ok().filter(|value| !value.is_empty())?)));
    let environment: BTreeMap<String, String> = kept.collect();
    jobs.iter()
        .map(|job| {
            let program = text_of(&connect::program(job.program())?)?;
            Ok((folder.join(job.file(args.manager)), job.text(args.manager, &program, &home, &environment)))
        })
        .collect()
}

fn text_of(path: &Path) -> Result<String, Failure> {
    let message = || format!("{} is not UTF-8, which the service manager's file must be", path.display());
    path.to_str().map(str::to_owned).ok_or_else(|| Failure::new(exit::CONFIG, "config", message()))
}

fn install(args: &ServiceArgs, jobs: &[Job], folder: &Path, global: &Global) -> Result<(), Failure> {
    let files = files(args, jobs, folder)?;
    if args.dry_run {
        if global.json {
            let files: Vec<_> = files.iter().map(|(path, text)| json!({"path": path, "text": text})).collect();
            return term::print_json(&json!({"files": files}));
        }
        return files.iter().try_for_each(|(path, text)| {
            term::note(&format!("# {}", path.display()));
            term::print(text)
        });
    }
    let cannot = |path: &Path, error| Failure::new(exit::CANNOT_CREATE, "service", format!("cannot write {}: {error}", path.display()));
    fs::create_dir_all(folder).map_err(|error| cannot(folder, error))?;
    // The manager opens the log before our programs could make its folder.
    let log = log_file::path().map_err(|error| Failure::new(exit::CONFIG, "config", error.to_string()))?;
    log_file::open(&log).map_err(|error| cannot(&log, error))?;
    for (path, text) in &files {
        fs::write(path, text).map_err(|error| cannot(path, error))?;
    }
    register(args, jobs, folder)?;
    let paths: Vec<&PathBuf> = files.iter().map(|(path, _)| path).collect();
    if global.json {
        return term::print_json(&json!({"installed": paths, "started": args.now}));
    }
    for path in paths {
        term::println(&format!("installed {}", path.display()))?;
    }
    if !args.now {
        term::note("hint: they start at the next login; `flashctl service install --now` starts them now");
    }
    Ok(())
}

fn register(args: &ServiceArgs, jobs: &[Job], folder: &Path) -> Result<(), Failure> {
    match args.manager {
        Manager::Launchd => {
            for job in jobs.iter().filter(|_| args.now) {
                let file = folder.join(job.file(args.manager));
                let file = text_of(&file)?;
                // A second install replaces the first; an agent that was not loaded makes this fail, rightly.
                let _ = call("launchctl", &["bootout", &format!("{}/{}", domain(), job.label())]);
                // `bootstrap` needs a GUI session; `load -w` is the older way and works over ssh too.
                call("launchctl", &["bootstrap", &domain(), &file]).or_else(|_| call("launchctl", &["load", "-w", &file]))?;
            }
            Ok(())
        }
        Manager::Systemd => {
            call("systemctl", &["--user", "daemon-reload"])?;
            let verb: &[&str] = if args.now { &["--user", "enable", "--now"] } else { &["--user", "enable"] };
            let units: Vec<&str> = jobs.iter().map(|job| job.unit()).collect();
            call("systemctl", &[verb, &units].concat())
        }
    }
}

fn uninstall(args: &ServiceArgs, jobs: &[Job], folder: &Path, global: &Global) -> Result<(), Failure> {
    let found: Vec<(Job, PathBuf)> =
        jobs.iter().rev().map(|&job| (job, folder.join(job.file(args.manager)))).filter(|(_, path)| path.exists()).collect();
    if args.dry_run {
        return found.iter().try_for_each(|(_, path)| term::println(&format!("would remove {}", path.display())));
    }
    for (job, path) in &found {
        // One that is not running cannot be stopped; the file goes all the same.
        let _ = match args.manager {
            Manager::Launchd => call("launchctl", &["bootout", &format!("{}/{}", domain(), job.label())])
                .or_else(|_| call("launchctl", &["unload", "-w", &text_of(path)?])),
            Manager::Systemd => call("systemctl", &["--user", "disable", "--now", job.unit()]),
        };
        let cannot = |error| Failure::new(exit::CANNOT_CREATE, "service", format!("cannot remove {}: {error}", path.display()));
        fs::remove_file(path).map_err(cannot)?;
    }
    if args.manager == Manager::Systemd && !found.is_empty() {
        call("systemctl", &["--user", "daemon-reload"])?;
    }
    let paths: Vec<&PathBuf> = found.iter().map(|(_, path)| path).collect();
    if global.json {
        return term::print_json(&json!({"removed": paths}));
    }
    if paths.is_empty() {
        return term::println("not installed");
    }
    paths.iter().try_for_each(|path| term::println(&format!("removed {}", path.display())))
}

fn status(args: &ServiceArgs, jobs: &[Job], folder: &Path, global: &Global) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for job in jobs {
        let path = folder.join(job.file(args.manager));
        let running = path.exists()
            && match args.manager {
                Manager::Launchd => call("launchctl", &["print", &format!("{}/{}", domain(), job.label())]).is_ok(),
                Manager::Systemd => call("systemctl", &["--user", "is-active", "--quiet", job.unit()]).is_ok(),
            };
        rows.push((job.program(), path.exists(), running, path));
    }
    if global.json {
        let services = rows
            .iter()
            .map(|(name, installed, running, path)| json!({"name": name, "installed": installed, "running": running, "path": path}));
        return term::print_json(&json!({"services": services.collect::<Vec<_>>()}));
    }
    rows.iter().try_for_each(|(name, installed, running, path)| {
        let state = match (installed, running) {
            (false, _) => "not installed".into(),
            (true, true) => format!("running ({})", path.display()),
            (true, false) => format!("installed, not running ({})", path.display()),
        };
        term::println(&format!("{name}: {state}"))
    })
}

/// launchd's name for the login session of this user.
fn domain() -> String {
    format!("gui/{}", rustix::process::getuid().as_raw())
}

/// Runs the manager's tool, found on PATH; what it wrote to stderr is in the error.
fn call(tool: &str, args: &[&str]) -> Result<(), Failure> {
    let failed = |why: String| {
        let failure = Failure::new(exit::GENERIC, "service_manager", format!("`{tool} {}` failed: {}", args.join(" "), why.trim()));
        failure.hint("--dry-run prints the files, to be put in place by hand")
    };
    let output = Command::new(tool).args(args).stdin(Stdio::null()).output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() { Ok(()) } else { Err(failed(format!("{} {}", output.status, String::from_utf8_lossy(&output.stderr)))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `UPDATE_EXPECT=1` rewrites the file.
    fn check(job: Job, golden: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../launchd").join(golden);
        let program = format!("/usr/local/bin/{}", job.program());
        let text = job.text(Manager::Launchd, &program, "/Users/you/.flashd", &BTreeMap::new());
        if env::var_os("UPDATE_EXPECT").is_some() {
            fs::write(&path, &text).expect("the golden is written");
        }
        assert_eq!(text, fs::read_to_string(&path).expect("the golden"), "{golden}");
    }

    #[test]
    fn install_writes_the_shipped_agents() {
        check(Job::Daemon, "dev.flash.flashd.plist");
        check(Job::Gateway, "dev.flash.gateway.plist");
    }

    #[test]
    fn the_gateway_unit_follows_the_daemon() {
        let text = Job::Gateway.text(Manager::Systemd, "/usr/bin/flash-gateway", "/home/you/.flashd", &BTreeMap::new());
        for line in [
            "After=flashd.service",
            "ExecStart=\"/usr/bin/flash-gateway\"",
            "Environment=\"FLASH_HOME=/home/you/.flashd\"",
            "StandardError=append:/home/you/.flashd/log/flash-gateway.log",
            "RestartPreventExitStatus=75 78",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
