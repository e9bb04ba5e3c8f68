//! Many clients at once on every streaming route, every other one of which leaves in the middle: those that stay are told what they are
//! told alone, and when all have gone, so has what was taken for them. The test `soak` does it for seconds, the bench of that name for
//! as long as it is told. Linux.

use std::{
    fmt, fs,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use flash_proto::v1;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    DEADLINE,
    daemon::{Client, Daemon, Gateway, Home, resident_bytes, wait_until},
    http::Stream,
    rng::Rng,
    tiny_model::{Spec, TinyModel},
};

/// Streams that are open while the gateway's memory is read.
const OPEN: usize = 100;
/// Longer than what has been idle keeps what it had for others.
const STILL: Duration = Duration::from_secs(2);
const JSON: (&str, &str) = ("Content-Type", "application/json");

#[derive(Clone, Copy, Debug)]
pub struct Soak {
    pub connections: usize,
    pub time: Duration,
    /// Of that time; after each, all are done and what is held is read.
    pub parts: u32,
}

/// What one process holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    pub descriptors: usize,
    pub bytes: u64,
}

#[derive(Debug, Default)]
pub struct Outcome {
    pub finished: usize,
    pub left: usize,
    /// The gateway and the daemon, before and after each part.
    pub gateway: Vec<Held>,
    pub daemon: Vec<Held>,
    /// Keys and values, with nothing running and nothing kept.
    pub kv_bytes: Vec<u64>,
    /// The gateway's with `OPEN` open streams: what cannot be dropped, and all that is resident.
    pub open_bytes: [u64; 2],
    /// From SIGTERM to the end, with nothing to do.
    pub gateway_end: Duration,
    pub daemon_end: Duration,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} streams were read to their ends as they are alone, {} left before it", self.finished, self.left)?;
        for (name, held) in [("flash-gateway", &self.gateway), ("flashd", &self.daemon)] {
            let of = |get: fn(&Held) -> u64| held.iter().map(|held| get(held).to_string()).collect::<Vec<_>>().join(", ");
            writeln!(f, "{name:<13} descriptors {}; memory, KiB {}", of(|held| held.descriptors as u64), of(|held| held.bytes / 1024))?;
        }
        writeln!(f, "keys and values, bytes {:?}", self.kv_bytes)?;
        let [private, all] = self.open_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20));
        writeln!(f, "flash-gateway with {OPEN} open streams: {private:.1} MiB, with its program's pages {all:.1} MiB")?;
        write!(f, "SIGTERM to the end: flash-gateway {:?}, flashd {:?}", self.gateway_end, self.daemon_end)
    }
}

/// A request and what it is told when nobody else asks.
struct Ask {
    path: &'static str,
    body: String,
    alone: String,
}

/// Both processes and a way to ask the daemon.
struct Served {
    gateway: Gateway,
    daemon: Daemon,
    client: Client,
    runtime: Runtime,
    _home: Home,
}

pub fn soak(soak: Soak) -> Result<Outcome> {
    let mut served = Served::start(soak.connections.max(OPEN))?;
    let asks = asks(&served.gateway.address)?;
    // Once around first: whatever grows once has grown then.
    run(&served.gateway.address, &asks, soak.connections, Duration::ZERO)?;
    let mut outcome = Outcome::default();
    served.hold(&mut outcome)?;
    for _ in 0..soak.parts {
        let (finished, left) = run(&served.gateway.address, &asks, soak.connections, soak.time / soak.parts)?;
        (outcome.finished, outcome.left) = (outcome.finished + finished, outcome.left + left);
        served.hold(&mut outcome)?;
    }
    outcome.open_bytes = served.with_open_streams()?;
    served.quiet()?;
    outcome.gateway_end = ended(&mut served.gateway.process)?;
    outcome.daemon_end = ended(&mut served.daemon.process)?;
    Ok(outcome)
}

impl Served {
    fn start(connections: usize) -> Result<Self> {
        let home = Home::new()?;
        TinyModel::generate(Spec::default()).write(&home.models().join("tiny"))?;
        let queue = (2 * connections).to_string();
        let daemon = home.daemon(&["--parallel", "8", "--queue", &queue, "--keep-alive=-1"])?;
        let gateway = home.gateway(&[])?;
        let runtime = Runtime::new()?;
        let client = runtime.block_on(daemon.client())?;
        Ok(Self { gateway, daemon, client, runtime, _home: home })
    }

    /// Until nothing runs, no connection is open and no keys and values are kept for later; the bytes of keys and values then.
    fn quiet(&self) -> Result<u64> {
        let idle = |snapshot: &v1::Snapshot| {
            snapshot.requests.is_some_and(|requests| requests.running + requests.waiting == 0)
                && snapshot.memory.is_some_and(|memory| memory.kv_reserved_bytes == 0)
        };
        // The last ones that left may not have been noticed, and begin now.
        wait_until("the gateway closes its connections", || connections(&self.gateway.address).is_ok_and(|count| count == 0))?;
        let snapshot = self.runtime.block_on(async {
            self.client.wait_stats("every request has ended", DEADLINE, idle).await?;
            self.client.admin.clone().clear_cache(v1::ClearCacheRequest {}).await?;
            self.client.stats().await
        })?;
        Ok(snapshot.memory.context("memory")?.kv_bytes)
    }

    /// Adds what gateway and daemon hold when all is quiet.
    fn hold(&self, outcome: &mut Outcome) -> Result<()> {
        outcome.kv_bytes.push(self.quiet()?);
        outcome.gateway.push(settled(self.gateway.process.pid())?);
        outcome.daemon.push(settled(self.daemon.process.pid())?);
        Ok(())
    }

    fn with_open_streams(&self) -> Result<[u64; 2]> {
        let messages = json!([{"role": "user", "content": "Once"}]);
        let body = json!({"model": "tiny", "messages": messages, "stream": true, "temperature": 0}).to_string();
        let open = || -> Result<Stream> {
            let mut stream = Stream::open(&self.gateway.address, "POST", "/v1/chat/completions", &[JSON], body.as_bytes())?;
            ensure!(stream.status == 200, "status {}", stream.status);
            stream.event()?.context("the first event")?;
            Ok(stream)
        };
        let streams: Result<Vec<_>> = (0..OPEN).map(|_| open()).collect();
        let streams = streams?;
        let pid = self.gateway.process.pid();
        let bytes = [resident_bytes(pid)?, all_resident_bytes(pid)?];
        drop(streams);
        Ok(bytes)
    }
}

/// Requests on every route, drawn and greedy, some of which begin alike.
fn asks(address: &str) -> Result<Vec<Ask>> {
    let mut asks = Vec::new();
    for number in 0..6_u32 {
        let said = format!("{} and {number}", "Tell me once more of the dog. ".repeat(1 + number as usize % 3));
        let common = json!({"model": "tiny", "stream": true, "temperature": f64::from(number % 2), "seed": number});
        let with = |more: Value| {
            let mut body = common.clone();
            body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            body.to_string()
        };
        let messages = json!([{"role": "user", "content": said}]);
        asks.push(("/v1/chat/completions", with(json!({"messages": messages, "max_tokens": 40}))));
        asks.push(("/v1/completions", with(json!({"prompt": said, "max_tokens": 24}))));
        asks.push(("/v1/messages", with(json!({"messages": messages, "max_tokens": 32}))));
        asks.push(("/v1/responses", with(json!({"input": said, "max_output_tokens": 36, "store": number == 0}))));
    }
    let alone = |(path, body): (&'static str, String)| {
        let alone = read(address, path, &body, None)?.with_context(|| format!("{path} is not answered to its end"))?;
        Ok(Ask { path, body, alone })
    };
    asks.into_iter().map(alone).collect()
}

/// Everybody asks and asks again until the time is over; how many streams came to their ends and how many were left.
fn run(address: &str, asks: &[Ask], connections: usize, time: Duration) -> Result<(usize, usize)> {
    let end = Instant::now() + time;
    let counts = Mutex::new((0, 0));
    let client = |number: usize| -> Result<()> {
        let mut rng = Rng::new(number as u64);
        for round in number.. {
            let ask = &asks[rng.below(asks.len())];
            let leave = round % 2 == 0;
            let events = leave.then(|| rng.below(5));
            let said = read(address, ask.path, &ask.body, events)?;
            if let Some(said) = &said {
                ensure!(*said == ask.alone, "{} told {said:?}, and alone {:?}", ask.path, ask.alone);
            }
            let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            *(if said.is_some() { &mut counts.0 } else { &mut counts.1 }) += 1;
            if Instant::now() >= end && round > number + 2 {
                break;
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..connections).map(|number| scope.spawn(move || client(number))).collect();
        clients.into_iter().try_for_each(|client| client.join().expect("a client does not panic"))
    })?;
    let counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(*counts)
}

/// What a stream says, and how it ends; nothing if the connection was closed after so many events.
fn read(address: &str, path: &str, body: &str, leave_after: Option<usize>) -> Result<Option<String>> {
    let mut stream = Stream::open(address, "POST", path, &[JSON], body.as_bytes())?;
    ensure!(stream.status == 200, "{path}: status {}", stream.status);
    let mut said = String::new();
    for count in 0.. {
        if leave_after == Some(count) {
            return Ok(None);
        }
        let Some(data) = stream.event().with_context(|| format!("{path} after {said:?}"))? else { bail!("{path} ends after {said:?}") };
        if data == "[DONE]" {
            return Ok(Some(said));
        }
        let event: Value = serde_json::from_str(&data)?;
        let choice = &event["choices"][0];
        let delta = &event["delta"];
        let texts = [&choice["delta"]["content"], &choice["text"], &delta["text"], delta];
        said.extend(texts.into_iter().find_map(Value::as_str));
        said.extend([&choice["finish_reason"], &delta["stop_reason"]].into_iter().find_map(Value::as_str));
        match event["type"].as_str() {
            Some("message_stop" | "response.completed" | "response.incomplete") => return Ok(Some(said)),
            Some("error" | "response.failed") => bail!("{path}: {data}"),
            _ if !event["error"].is_null() => bail!("{path}: {data}"),
            _ => {}
        }
    }
    unreachable!("the count has no end")
}

fn proc(pid: Pid, what: &str) -> String {
    format!("/proc/{}/{what}", pid.as_raw_nonzero())
}

fn held(pid: Pid) -> Result<Held> {
    Ok(Held { descriptors: fs::read_dir(proc(pid, "fd"))?.count(), bytes: resident_bytes(pid)? })
}

/// What it holds when that no longer changes: idle, it gives back what it had for others.
fn settled(pid: Pid) -> Result<Held> {
    let (mut last, mut since) = (held(pid)?, Instant::now());
    wait_until("what a process holds stays the same", || {
        let Ok(now) = held(pid) else { return false };
        if now.bytes != last.bytes {
            since = Instant::now();
        }
        // The monitor opens files to look at the machine.
        last = Held { descriptors: last.descriptors.min(now.descriptors), bytes: now.bytes };
        since.elapsed() >= STILL
    })?;
    Ok(last)
}

/// Connections to this port that a process still has open.
fn connections(address: &str) -> Result<usize> {
    let port = address.rsplit(':').next().context("a port")?.parse::<u16>()?;
    let local = format!(":{port:04X}");
    let table = fs::read_to_string("/proc/net/tcp")?;
    let rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
    // Listening, and what the kernel alone remembers.
    Ok(rows.filter(|row| row.len() > 3 && row[1].ends_with(&local) && !["0A", "06"].contains(&row[3])).count())
}

fn all_resident_bytes(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(proc(pid, "status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

fn ended(process: &mut crate::daemon::Process) -> Result<Duration> {
    let start = Instant::now();
    process.signal(Signal::TERM)?;
    let code = process.code()?;
    ensure!(code == Some(0), "ended with {code:?}");
    Ok(start.elapsed())
}
