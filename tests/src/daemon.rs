//! Real processes in a temporary home: flashd, flash-gateway and flashctl as a user runs them, with nothing of the
//! user's environment. Whatever was started is gone when its guard is dropped. Used by the tests that cross a process
//! boundary; a test waits on conditions with a deadline, never for a while.

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    ops::Range,
    os::unix::{net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{LazyLock, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use flash_proto::v1::{
    self, GenerateEvent, GenerateRequest, Sampling, TokenIds, admin_client::AdminClient, generate_client::GenerateClient,
    generate_event::Event, generate_request::Prompt, models_client::ModelsClient,
};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;
use tonic::{Status, Streaming, transport::Channel};

use crate::DEADLINE;

/// Waits for `condition`, looking again every few milliseconds.
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) -> Result<()> {
    wait_until_within(DEADLINE, what, condition)
}

pub fn wait_until_within(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + limit;
    while !condition() {
        if Instant::now() > end {
            bail!("not within {limit:?}: {what}");
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The checkout's top folder.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace")
}

/// The trained model in the checkout.
pub fn bundled_model() -> PathBuf {
    checkout().join("models/flash-tiny-moe")
}

/// A binary of this workspace from the profile that the test was built with, built now if it is missing or older than
/// its sources: cargo builds the binaries of other packages only when their own tests run too.
pub fn binary(name: &str) -> PathBuf {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| build_binaries().expect("the workspace's binaries build"));
    FOLDER.join(name)
}

fn build_binaries() -> Result<PathBuf> {
    let test = env::current_exe()?;
    let folder = test.parent().and_then(Path::parent).context("a test lies in target/PROFILE/deps")?.to_path_buf();
    let newest =
        ["proto", "daemon", "client", "gateway", "launchd"].iter().map(|member| newest_source(&checkout().join(member))).max().flatten();
    let built = |name: &str| fs::metadata(folder.join(name)).and_then(|found| found.modified()).ok();
    if ["flashd", "flashctl", "flash-gateway"].iter().all(|name| built(name) >= newest) {
        return Ok(folder);
    }
    let lock = File::create(folder.join(".flash-tests.lock"))?;
    lock.lock()?;
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--workspace", "--bins", "--profile", profile]).current_dir(checkout());
    // Beside a target triple the folder is one level deeper.
    let target = folder.parent().context("a target folder")?;
    match target.file_name().and_then(|name| name.to_str()) {
        Some(triple) if !target.join("CACHEDIR.TAG").exists() && triple.contains('-') => {
            command.args(["--target", triple, "--target-dir"]).arg(target.parent().context("a target folder")?)
        }
        _ => command.arg("--target-dir").arg(target),
    };
    let status = command.status().context("running cargo")?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(folder)
}

/// When a package's own sources last changed; its tests do not go into its binaries.
fn newest_source(folder: &Path) -> Option<SystemTime> {
    let entries = fs::read_dir(folder).ok()?;
    let newest = |path: PathBuf| {
        if path.is_dir() {
            let skip = ["tests", "benches", "examples", "target"].iter().any(|name| path.ends_with(name));
            if skip { None } else { newest_source(&path) }
        } else {
            let source = path.extension().is_some_and(|end| end == "rs" || end == "toml" || end == "proto");
            source.then(|| fs::metadata(&path).and_then(|found| found.modified()).ok()).flatten()
        }
    };
    entries.flatten().filter_map(|entry| newest(entry.path())).max()
}

/// A FLASH_HOME of its own. Dropping it ends whatever daemon still listens there.
#[derive(Debug)]
pub struct Home {
    dir: TempDir,
}

impl Home {
    /// Without a model: `local` is the bundled one, found through the checkout.
    pub fn new() -> Result<Self> {
        let dir = TempDir::with_prefix("fl")?;
        fs::create_dir(dir.path().join("models"))?;
        Ok(Self { dir })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn models(&self) -> PathBuf {
        self.path().join("models")
    }

    pub fn socket(&self) -> PathBuf {
        self.path().join("run/flashd.sock")
    }

    /// One of our binaries with this home and nothing of the caller's settings.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(binary(name));
        for (variable, _) in env::vars_os() {
            let text = variable.to_string_lossy().into_owned();
            if ["FLASH_", "XDG_", "HF_"].iter().any(|prefix| text.starts_with(prefix)) {
                command.env_remove(variable);
            }
        }
        command.env("HOME", self.path()).env("FLASH_HOME", self.path()).env("FLASH_SOCKET", self.socket());
        command.env("FLASH_MODELS", self.models());
        command
    }

    /// Starts flashd and waits until it answers.
    pub fn daemon(&self, args: &[&str]) -> Result<Daemon> {
        let mut command = self.command("flashd");
        command.args(args);
        let process = Process::spawn(command, &self.path().join("flashd.stderr"))?;
        let mut daemon = Daemon { process, socket: self.socket() };
        let end = Instant::now() + DEADLINE;
        while UnixStream::connect(&daemon.socket).is_err() {
            if let Some(status) = daemon.process.exited()? {
                bail!("flashd ended with {status}: {}", daemon.process.errors());
            }
            if Instant::now() > end {
                bail!("flashd does not listen: {}", daemon.process.errors());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    /// Runs flashctl to its end.
    pub fn ctl(&self, args: &[&str]) -> Result<Output> {
        self.ctl_with(args, None)
    }

    /// As [`Home::ctl`], with `input` on standard input (else it is closed).
    pub fn ctl_with(&self, args: &[&str], input: Option<&[u8]>) -> Result<Output> {
        let mut command = self.command("flashctl");
        command.args(args);
        finish(command, input)
    }

    /// Starts flash-gateway on a free port and waits for its ready line.
    pub fn gateway(&self, args: &[&str]) -> Result<Gateway> {
        let mut command = self.command("flash-gateway");
        command.args(["--port", "0"]).args(args);
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("starting flash-gateway")?;
        let stderr = child.stderr.take().context("a pipe")?;
        let process = Process { child, stderr: PathBuf::new() };
        let (sender, lines) = mpsc::channel();
        // Reads on to the end, so that the gateway never blocks on its own log.
        thread::spawn(move || BufReader::new(stderr).lines().map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        let mut seen = String::new();
        loop {
            let line = lines.recv_timeout(DEADLINE).with_context(|| format!("flash-gateway is not ready: {seen}"))?;
            if let Some((_, address)) = line.split_once("listening on http://") {
                let address = address.split_whitespace().next().context("an address")?.trim_end_matches('/').to_owned();
                return Ok(Gateway { process, address });
            }
            seen.push_str(&line);
        }
    }

    /// The process that listens on this home's socket, whoever started it.
    #[cfg(target_os = "linux")]
    pub fn listener(&self) -> Option<Pid> {
        let stream = UnixStream::connect(self.socket()).ok()?;
        rustix::net::sockopt::socket_peercred(stream).ok().map(|peer| peer.pid)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // Failing to stop what is not there is as good.
        #[cfg(target_os = "linux")]
        if let Some(pid) = self.listener() {
            let _ = kill_process(pid, Signal::KILL);
        }
        #[cfg(not(target_os = "linux"))]
        if UnixStream::connect(self.socket()).is_ok() {
            let _ = self.ctl(&["daemon", "stop"]);
        }
    }
}

/// A child in a process group of its own, killed with it on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stderr: PathBuf,
}

impl Process {
    /// Standard error goes to the file, for messages.
    pub fn spawn(mut command: Command, stderr: &Path) -> Result<Self> {
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(stderr)?);
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        Ok(Self { child, stderr: stderr.into() })
    }

    /// A child that the caller set up as leader of its group; its standard error goes to `stderr`, if to a file.
    pub fn adopt(child: Child, stderr: PathBuf) -> Self {
        Self { child, stderr }
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid(), signal)?)
    }

    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for the end; the exit code.
    pub fn code(&mut self) -> Result<Option<i32>> {
        let mut status = None;
        wait_until("the process ends", || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })?;
        Ok(status.and_then(|status| status.code()))
    }

    pub fn errors(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Errors mean that it is gone already.
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// What a finished command left.
#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end, within the deadline.
pub fn finish(mut command: Command, input: Option<&[u8]>) -> Result<Output> {
    command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        let input = input.to_vec();
        // A command that does not read its input is its own business.
        thread::spawn(move || drop(std::io::Write::write_all(&mut stdin, &input)));
    }
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let mut process = Process::adopt(child, PathBuf::new());
    let code = process.code().with_context(|| format!("running {command:?}"))?;
    let text = |reader: thread::JoinHandle<String>| reader.join().expect("reading does not panic");
    Ok(Output { code, stdout: text(stdout), stderr: text(stderr) })
}

#[derive(Debug)]
pub struct Gateway {
    pub process: Process,
    /// host:port
    pub address: String,
}

/// A running flashd.
#[derive(Debug)]
pub struct Daemon {
    pub process: Process,
    socket: PathBuf,
}

impl Daemon {
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.socket).await
    }

    /// RssAnon + RssShmem: what cannot be dropped and read again.
    #[cfg(target_os = "linux")]
    pub fn resident_bytes(&self) -> Result<u64> {
        resident_bytes(self.process.pid())
    }
}

/// RssAnon + RssShmem of a process.
#[cfg(target_os = "linux")]
pub fn resident_bytes(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("{name} in {status}"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().context("a number of KiB")
    };
    Ok((kib("RssAnon:")? + kib("RssShmem:")?) * 1024)
}

/// The three services over one channel.
#[derive(Clone, Debug)]
pub struct Client {
    pub generate: GenerateClient<Channel>,
    pub models: ModelsClient<Channel>,
    pub admin: AdminClient<Channel>,
}

/// Everything a stream said.
#[derive(Debug, Default)]
pub struct Answer {
    pub accepted: Option<v1::Accepted>,
    pub text: String,
    pub done: Option<v1::Done>,
    pub failed: Option<v1::Failed>,
}

impl Client {
    pub async fn connect(socket: &Path) -> Result<Self> {
        Ok(Self::over(flash_proto::socket::connect(socket).await?))
    }

    pub fn over(channel: Channel) -> Self {
        Self {
            generate: GenerateClient::new(channel.clone()),
            models: ModelsClient::new(channel.clone()),
            admin: AdminClient::new(channel),
        }
    }

    pub async fn start(&self, request: GenerateRequest) -> Result<Streaming<GenerateEvent>, Status> {
        Ok(self.generate.clone().generate(request).await?.into_inner())
    }

    pub async fn ask(&self, request: GenerateRequest) -> Result<Answer, Status> {
        collect(self.start(request).await?).await
    }

    /// The ids of an answer that must come to its end.
    pub async fn ids(&self, request: GenerateRequest) -> Result<Vec<u32>> {
        let answer = self.ask(request).await?;
        Ok(answer.done.with_context(|| format!("no end: {:?}", answer.failed))?.token_ids)
    }

    pub async fn stats(&self) -> Result<v1::Snapshot> {
        Ok(self.admin.clone().stats(v1::StatsRequest {}).await?.into_inner())
    }

    pub async fn load(&self, model: &str, expert_cache: Option<&str>) -> Result<v1::LoadResponse, Status> {
        let request = v1::LoadRequest { model: model.into(), expert_cache: expert_cache.map(Into::into), ..Default::default() };
        Ok(self.models.clone().load(request).await?.into_inner())
    }

    /// Polls Stats until it satisfies `condition`.
    pub async fn wait_stats(&self, what: &str, limit: Duration, condition: impl Fn(&v1::Snapshot) -> bool) -> Result<v1::Snapshot> {
        let end = Instant::now() + limit;
        loop {
            let snapshot = self.stats().await?;
            if condition(&snapshot) {
                return Ok(snapshot);
            }
            if Instant::now() > end {
                bail!("not within {limit:?}: {what}: {snapshot:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Reads a stream to its end.
pub async fn collect(mut stream: Streaming<GenerateEvent>) -> Result<Answer, Status> {
    let mut answer = Answer::default();
    while let Some(event) = stream.message().await? {
        match event.event {
            Some(Event::Accepted(accepted)) => answer.accepted = Some(accepted),
            Some(Event::Text(text)) => answer.text.push_str(&text.text),
            Some(Event::Done(done)) => answer.done = Some(done),
            Some(Event::Failed(failed)) => answer.failed = Some(failed),
            Some(Event::Progress(_) | Event::Prompt(_) | Event::Routing(_) | Event::ToolCall(_)) | None => {}
        }
    }
    Ok(answer)
}

/// Reads a stream to its end: from its first text to there, and how many tokens it had.
pub async fn timed(mut stream: Streaming<GenerateEvent>) -> Result<(Range<Instant>, u32)> {
    let (mut first, mut tokens) = (None, 0);
    while let Some(event) = stream.message().await? {
        match event.event {
            Some(Event::Text(_)) => drop(first.get_or_insert_with(Instant::now)),
            Some(Event::Done(done)) => tokens = done.token_ids.len() as u32,
            _ => {}
        }
    }
    Ok((first.context("some text")?..Instant::now(), tokens))
}

/// Reads until the first text, so that the request is known to be running.
pub async fn first_text(stream: &mut Streaming<GenerateEvent>) -> Result<()> {
    while let Some(event) = stream.message().await? {
        match event.event {
            Some(Event::Text(_)) => return Ok(()),
            Some(Event::Failed(failed)) => bail!("{}", failed.message),
            Some(Event::Done(_)) => bail!("done before the first text"),
            _ => {}
        }
    }
    bail!("the stream ended before the first text")
}

/// `count` greedy tokens after raw text, past any end of turn.
pub fn greedy(model: &str, text: &str, count: u32) -> GenerateRequest {
    GenerateRequest { max_tokens: Some(count), ..endless(model, text) }
}

/// Greedy until the context is full.
pub fn endless(model: &str, text: &str) -> GenerateRequest {
    GenerateRequest {
        model: model.into(),
        prompt: Some(Prompt::Text(text.into())),
        sampling: Some(Sampling { temperature: Some(0.0), repetition_penalty: Some(1.0), ..Default::default() }),
        ignore_eos: true,
        ..Default::default()
    }
}

/// As [`greedy`], after these ids.
pub fn greedy_ids(model: &str, ids: &[u32], count: u32) -> GenerateRequest {
    GenerateRequest { prompt: Some(Prompt::Tokens(TokenIds { ids: ids.to_vec() })), ..greedy(model, "", count) }
}
