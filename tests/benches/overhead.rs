//! What gateway and command line add to a token: the same greedy answer of the bundled model read over raw gRPC, through
//! flash-gateway's stream and from flashctl's standard output, in turn. `cargo bench -p flash-tests --bench overhead`; Linux.

use std::{
    fs,
    io::Read,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flash_proto::v1::{Chat, Message, generate_request::Prompt};
use flash_tests::{
    daemon::{Client, Home, bundled_model, greedy, timed},
    http::Stream,
};
use rustix::process::Pid;
use serde_json::json;

const ROUNDS: usize = 15;
const PROMPT: &str = "Tell me a long story about a little dog named Pip, a red balloon and a big storm.";
const TOKENS_MAX: u32 = 1500;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let home = Home::new()?;
    let daemon = home.daemon(&["--expert-cache", "100%", "--keep-alive=-1"])?;
    let gateway = home.gateway(&[])?;
    let client = daemon.client().await?;
    let (_, tokens) = raw(&client).await?;
    let (mut times, mut cpu) = ([const { Vec::new() }; 3], Duration::ZERO);
    for _ in 0..ROUNDS {
        times[0].push(raw(&client).await?.0);
        let before = processor_time(gateway.process.pid())?;
        times[1].push(through_gateway(&gateway.address, tokens)?);
        cpu += processor_time(gateway.process.pid())? - before;
        times[2].push(command_line(&home)?);
    }
    let per_token = |time: Duration| 1e6 * time.as_secs_f64() / f64::from(tokens);
    let [raw, gateway, command] = times.map(|mut times| {
        times.sort_unstable();
        per_token(times[ROUNDS / 2])
    });
    println!("medians of {ROUNDS} rounds, {tokens} tokens: us a token from first text to end, and more than raw gRPC");
    println!("raw gRPC           {raw:>8.1}");
    println!("flash-gateway, SSE {gateway:>8.1} {:>+8.1}   its processor time {:.1}", gateway - raw, per_token(cpu) / ROUNDS as f64);
    println!("flashctl run       {command:>8.1} {:>+8.1}", command - raw);
    Ok(())
}

/// From the first text to the end, and the number of tokens.
async fn raw(client: &Client) -> Result<(Duration, u32)> {
    let mut request = greedy(&bundled_model().display().to_string(), "", TOKENS_MAX);
    let message = Message { role: "user".into(), content: PROMPT.into(), ..Default::default() };
    request.prompt = Some(Prompt::Chat(Chat { messages: vec![message], ..Default::default() }));
    request.ignore_eos = false;
    let (span, tokens) = timed(client.start(request).await?).await?;
    Ok((span.end - span.start, tokens))
}

fn through_gateway(address: &str, tokens: u32) -> Result<Duration> {
    let body = json!({
        "model": bundled_model(), "messages": [{"role": "user", "content": PROMPT}], "stream": true,
        "max_tokens": TOKENS_MAX, "temperature": 0, "repetition_penalty": 1, "stream_options": {"include_usage": true},
    });
    let json = ("Content-Type", "application/json");
    let (span, told) = Stream::open(address, "POST", "/v1/chat/completions", &[json], body.to_string().as_bytes())?.timed()?;
    ensure!(told == tokens, "another answer: of {told} tokens, not {tokens}");
    Ok(span.end - span.start)
}

fn command_line(home: &Home) -> Result<Duration> {
    let mut command = home.command("flashctl");
    command.arg("run").arg(bundled_model()).arg(PROMPT).args(["-t", "0", "-n", &TOKENS_MAX.to_string()]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut stdout = child.stdout.take().context("a pipe")?;
    let (mut first, mut buffer) = (None, [0; 4096]);
    while stdout.read(&mut buffer)? > 0 {
        first.get_or_insert_with(Instant::now);
    }
    let time = first.context("some text")?.elapsed();
    ensure!(child.wait()?.success(), "flashctl failed");
    Ok(time)
}

/// User and system time of a process, in the kernel's hundredths of a second.
fn processor_time(pid: Pid) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let (_, fields) = stat.rsplit_once(") ").context("a process's name")?;
    let ticks: u64 = fields.split(' ').skip(11).take(2).map(|field| field.parse().unwrap_or(0)).sum();
    Ok(Duration::from_millis(10 * ticks))
}
