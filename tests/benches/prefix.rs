//! The time to a request's first token where its prompt came before, as a client of the daemon sees it: computed, found in memory, and
//! found on disk by a daemon that was just started, with the files out of the page cache. On a synthetic model, because the bundled
//! one's context is too short.
//!
//! Each round has prompts of its own; medians of the rounds. Prints figures beside their bounds and judges none. `cargo bench -p
//! flash-tests --bench prefix` writes 1.1 GB to the temporary folder; `-- SHAPE LAYERS` takes another model. With `--features
//! flash-tests/mlx,flashd/mlx` and `-- mlx` it is MLX that computes, which has nothing on disk.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flash_engine::synth::{Routing, Synth, write};
use flash_proto::v1::{ClearCacheRequest, Snapshot};
use flash_tests::{
    daemon::{Client, Daemon, Home, greedy_ids},
    rng::Rng,
};
use rustix::process::Signal;

const PROMPTS: [usize; 2] = [4096, 12_288];
/// The question that follows: of another length in each request, so that nothing but the prompt is shared.
const QUESTION: usize = 20;
/// Before the clock runs, so that experts are in memory.
const WARM_UP: usize = 2048;
const ROUNDS: usize = 5;
/// With the share of the computed prompt's time that is aimed at, in percent.
const STATES: [(&str, f64); 3] = [("computed", 100.0), ("from memory", 5.0), ("from disk, after a restart", 15.0)];
/// Tokens that are kept together.
const BLOCK: usize = 32;
/// Of the smallest shape.
const VOCABULARY: usize = 512;
const WRITTEN_WITHIN: Duration = Duration::from_secs(60);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let (mlx, args) = match &args[..] {
        [mlx, args @ ..] if mlx == "mlx" => (true, args),
        args => (false, args),
    };
    let (shape, layers) = match args {
        [] => ("qwen3-30b-a3b".into(), 2),
        [shape, layers] => (shape.clone(), layers.parse()?),
        _ => anyhow::bail!("takes SHAPE and LAYERS, or nothing"),
    };
    let states = &STATES[..if mlx { 2 } else { 3 }];
    let home = Home::new()?;
    let synth = Synth { shape: shape.clone(), layers: Some(layers), context: Some(32_768), seed: 1, routing: Routing::Uniform };
    write(&home.models().join("synth"), &synth, &mut |_| true)?;
    let mut rng = Rng::new(1);
    let mut tokens = |count: usize| -> Vec<u32> { (0..count).map(|_| rng.below(VOCABULARY) as u32).collect() };
    for length in PROMPTS {
        let mut times = [const { Vec::new() }; STATES.len()];
        for _ in 0..ROUNDS {
            let prompt = tokens(length);
            let (mut daemon, mut client) = start(&home, mlx).await?;
            client.admin.clone().clear_cache(ClearCacheRequest {}).await?;
            ask(&client, &tokens(WARM_UP)).await?;
            for (state, times) in times.iter_mut().enumerate().take(states.len()) {
                if state == 2 {
                    let whole = (length / BLOCK) as u64;
                    let written = |snapshot: &Snapshot| {
                        snapshot.prefix.as_ref().is_some_and(|prefix| prefix.disk.is_some_and(|disk| disk.written == whole))
                    };
                    client.wait_stats("the prompt is on disk", WRITTEN_WITHIN, written).await?;
                    stop(&mut daemon)?;
                    forget(&home.path().join("cache"))?;
                    (daemon, client) = start(&home, mlx).await?;
                }
                let question = tokens(QUESTION + state);
                let (time, cached) = ask(&client, &[&prompt[..], &question].concat()).await?;
                let expected = if state == 0 { 0 } else { length };
                ensure!(cached == expected, "{cached} tokens were there, not {expected}");
                times.push(time);
            }
            stop(&mut daemon)?;
        }
        println!("{shape}, {layers} layers, {length} tokens and a question of {QUESTION}; medians of {ROUNDS}");
        times.iter_mut().for_each(|times| times.sort_unstable_by(f64::total_cmp));
        let computed = times[0][ROUNDS / 2];
        for ((name, aim), times) in states.iter().zip(&times) {
            let [least, median, most] = [0, ROUNDS / 2, ROUNDS - 1].map(|at| times[at]);
            let share = 100.0 * median / computed;
            println!("  {name:<28}{median:>9.1} ms ({least:.1} to {most:.1}){share:>8.2}% of computed (target: at most {aim}%)");
        }
    }
    Ok(())
}

/// With the model loaded.
async fn start(home: &Home, mlx: bool) -> Result<(Daemon, Client)> {
    let daemon = home.daemon(&["--kernels", if mlx { "mlx" } else { "auto" }, "--ctx", "32768", "--keep-alive=-1"])?;
    let client = daemon.client().await?;
    client.load("synth", Some("100%")).await?;
    Ok((daemon, client))
}

fn stop(daemon: &mut Daemon) -> Result<()> {
    daemon.process.signal(Signal::TERM)?;
    ensure!(daemon.process.code()? == Some(0), "{}", daemon.process.errors());
    Ok(())
}

/// Milliseconds to the end of an answer of one token, and the prompt's tokens that were there.
async fn ask(client: &Client, prompt: &[u32]) -> Result<(f64, usize)> {
    let began = Instant::now();
    let answer = client.ask(greedy_ids("synth", prompt, 1)).await?;
    let time = began.elapsed().as_secs_f64() * 1e3;
    let usage = answer.done.and_then(|done| done.usage).with_context(|| format!("no answer: {:?}", answer.failed))?;
    Ok((time, usage.cached_tokens as usize))
}

/// Onto the disk, and out of the page cache.
fn forget(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            forget(&path)?;
            continue;
        }
        let file = fs::File::open(path)?;
        file.sync_all()?;
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}
