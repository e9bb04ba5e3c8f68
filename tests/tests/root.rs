//! What only root can show: a daemon in a memory cgroup (v1) whose limit falls while it streams gives its expert cache
//! back instead of being killed, and its tokens stay the same. Run by `.ci/run`; needs `--features root`.
#![cfg(target_os = "linux")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use flash_proto::v1::{GenerateRequest, Snapshot};
use flash_tests::{
    DEADLINE,
    daemon::{Client, Home, Process, bundled_model, greedy_ids, wait_until},
    golden,
};

const ROOT: &str = "/sys/fs/cgroup/memory";

/// Between two steps of the limit: part of the scenario, not a wait for anything. A limit that falls by half within one
/// sample of the monitor leaves no time to give way.
const DWELL: Duration = Duration::from_millis(250);

/// A memory cgroup of our own. Dropping it removes it; its processes must have ended.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Result<Self> {
        ensure!(Path::new(ROOT).join("memory.limit_in_bytes").exists(), "no v1 memory cgroup is mounted at {ROOT}");
        let path = Path::new(ROOT).join(format!("flashd-test-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("creating {}: are you root?", path.display()))?;
        Ok(Self(path))
    }

    fn read(&self, file: &str) -> Result<String> {
        fs::read_to_string(self.0.join(file)).with_context(|| file.to_owned())
    }

    fn stat(&self, file: &str, key: &str) -> Result<u64> {
        let text = self.read(file)?;
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
        value.with_context(|| format!("{key} in {text}"))
    }

    /// The kernel says EBUSY while it cannot push the usage below the limit; then again, until it can.
    fn set_limit(&self, bytes: u64) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        loop {
            match fs::write(self.0.join("memory.limit_in_bytes"), bytes.to_string()) {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                    if Instant::now() > end {
                        let (used, stat) = (self.read("memory.usage_in_bytes")?, self.read("memory.stat")?);
                        bail!("the limit of {bytes} bytes is refused for {DEADLINE:?}; used: {used}{stat}");
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(error).context("memory.limit_in_bytes"),
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The kernel takes a moment to forget a process that has ended.
        let removed = wait_until("the cgroup is empty", || fs::remove_dir(&self.0).is_ok());
        if let Err(error) = removed {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

fn slots(stats: &Snapshot) -> u32 {
    stats.experts.as_ref().and_then(|experts| experts.cache).map_or(0, |cache| cache.slots_per_layer)
}

/// Asks again and again until told to stop; every answer must be `expected`. The number of answers.
async fn stream(client: Client, request: GenerateRequest, expected: Vec<u32>, stop: tokio::sync::watch::Receiver<bool>) -> Result<usize> {
    let mut answers = 0;
    while !*stop.borrow() {
        ensure!(client.ids(request.clone()).await? == expected, "answer {answers} has other tokens than the undisturbed run");
        answers += 1;
    }
    Ok(answers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_falling_limit_shrinks_the_cache_and_changes_no_token() -> Result<()> {
    let cgroup = Cgroup::new()?;
    let home = Home::new()?;
    let flashd = home.command("flashd");
    // Pages of a file are charged to whoever touched them first: forgotten now, the daemon's own text is charged to it.
    let program = fs::File::open(flashd.get_program())?;
    program.sync_all()?;
    rustix::fs::fadvise(&program, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut command = Command::new("sh");
    // The shell joins the cgroup and becomes flashd.
    command
        .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$1\" --expert-cache 100% --keep-alive=-1"])
        .arg(&cgroup.0)
        .arg(flashd.get_program());
    command.env_clear().envs(flashd.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let mut process = Process::spawn(command, &home.path().join("flashd.stderr"))?;
    wait_until("flashd listens", || std::os::unix::net::UnixStream::connect(home.socket()).is_ok()).with_context(|| process.errors())?;
    let client = Client::connect(&home.socket()).await?;

    let prompt = &golden::read("mlx_4bit_f32")?[1].prompt;
    let model = bundled_model().display().to_string();
    let request = greedy_ids(&model, prompt, 500);
    let expected = client.ids(request.clone()).await?;
    let before = client.stats().await?;
    let slab = before.experts.as_ref().and_then(|experts| experts.cache).context("a cache")?.budget_bytes;
    wait_until("the slab is populated", || flash_tests::daemon::resident_bytes(process.pid()).is_ok_and(|bytes| bytes > slab))?;
    let (rss, mapped) = (cgroup.stat("memory.stat", "rss ")?, cgroup.stat("memory.stat", "mapped_file ")?);
    ensure!(mapped > 1 << 20, "only {mapped} mapped bytes are charged to the daemon: does another process run {:?}?", flashd.get_program());
    let steady = rss + mapped;

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let streaming = tokio::spawn(stream(client.clone(), request, expected, stopped));
    for percent in (60..=100).rev().step_by(2) {
        cgroup.set_limit(steady * percent / 100).with_context(|| format!("{percent}% of {steady} bytes; {}", process.errors()))?;
        tokio::time::sleep(DWELL).await;
        ensure!(process.exited()?.is_none(), "flashd died at {percent}%: {}", process.errors());
    }
    let shrunk = client.stats().await.with_context(|| process.errors())?;
    stop.send(true)?;
    let answers = streaming.await??;
    assert!(answers > 0, "it streamed meanwhile");
    assert!(slots(&shrunk) < slots(&before), "the cache keeps {} slots per layer", slots(&shrunk));
    assert_eq!(cgroup.stat("memory.oom_control", "oom_kill ")?, 0);
    assert!(process.exited()?.is_none());
    println!("steady {steady} bytes; {} → {} slots per layer at 60%; {answers} answers, all equal", slots(&before), slots(&shrunk));

    // With the limit gone, the cache grows again.
    cgroup.set_limit(4 * steady)?;
    client.wait_stats("the cache grows back", DEADLINE, |stats| slots(stats) > slots(&shrunk)).await?;
    drop(process);
    Ok(())
}
