//! The time to the first token of a prompt that came before: computed, found in memory, and found on disk by an engine that was just
//! loaded, with the files out of the page cache. On a synthetic model, because the bundled one's context is too short.
//!
//! Each round has prompts of its own; medians of the rounds. Prints figures beside their bounds and judges none.
//! `cargo bench -p flash-engine --bench prefix` writes 1.1 GB to the temporary folder; `-- SHAPE LAYERS` takes another model. With
//! `--features mlx` and `-- mlx` it is MLX that computes, which has nothing on disk.

use std::{fs, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use flash_engine::{
    CacheBudget, Delivery, DiskCache, Engine, Event, Kernels, Options, Request, Step,
    synth::{Routing, Synth, write},
};

const PROMPTS: [usize; 2] = [4096, 12_288];
/// The question that follows: of another length in each request, so that nothing but the prompt is shared.
const QUESTION: usize = 20;
const ROUNDS: usize = 5;
/// Of the computed prompt's time, in percent.
const BOUNDS: [f64; 3] = [100.0, 5.0, 15.0];

/// Seconds to the first token, and the tokens that were there.
fn ask(engine: &mut Engine, prompt: &[u32]) -> Result<(f64, usize)> {
    let (began, mut first, mut cached, mut failed) = (Instant::now(), None, 0, None);
    engine.admit(Request { max_tokens: Some(1), ignore_eos: true, ..Request::greedy(prompt.to_vec()) })?;
    loop {
        let step = engine.step(&mut |_, event| {
            match event {
                Event::Done(done) => (first, cached) = (Some(first.unwrap_or(began.elapsed())), done.cached_tokens),
                Event::Token { .. } => first = Some(first.unwrap_or(began.elapsed())),
                Event::Failed(error) => failed = Some(error),
                _ => {}
            }
            Delivery::Taken
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        // Until what goes to disk is there.
        if step == Step::Idle {
            return Ok((first.context("a request ended without a token")?.as_secs_f64(), cached));
        }
    }
}

/// Onto the disk, and out of the page cache.
fn forget(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let file = fs::File::open(entry?.path())?;
        file.sync_all()?;
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
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
    let dir = tempfile::tempdir()?;
    let (model, cache) = (dir.path().join("model"), dir.path().join("cache"));
    let synth = Synth { shape: shape.clone(), layers: Some(layers), context: Some(32_768), seed: 1, routing: Routing::Uniform };
    write(&model, &synth, &mut |_| true)?;
    let disk = DiskCache { dir: cache.clone(), budget: Some(8 << 30), daily_writes: u64::MAX };
    let kernels = if mlx { Kernels::Mlx } else { Kernels::Auto };
    let disk_cache = (!mlx).then_some(disk);
    let options = Options { kernels, expert_cache: CacheBudget::Share(1.0), disk_cache, ..Options::default() };
    let load = || Engine::load(&model, &options, &mut |_| {});
    let vocab = load()?.info().vocab_size;
    let mut state = 1u64;
    let mut tokens = |count: usize| -> Vec<u32> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % vocab
        };
        (0..count).map(|_| next() as u32).collect()
    };
    for length in PROMPTS {
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            flash_engine::clear_disk_cache(&cache)?;
            let prompt = tokens(length);
            let question = |tokens: Vec<u32>| [&prompt[..], &tokens].concat();
            let mut engine = load()?;
            // Experts are in memory before the clock runs.
            ask(&mut engine, &tokens(2048))?;
            for (state, expected) in [0, length, length].into_iter().take(if mlx { 2 } else { 3 }).enumerate() {
                if state == 2 {
                    drop(engine);
                    forget(&cache)?;
                    engine = load()?;
                }
                let (time, cached) = ask(&mut engine, &question(tokens(QUESTION + state)))?;
                ensure!(cached == expected, "{cached} tokens were there, not {expected}");
                times[state].push(time);
            }
        }
        let cold = median(times[0].clone());
        println!("{shape}, {layers} layers, {length} tokens and a question of {QUESTION}; medians of {ROUNDS}");
        for ((name, times), bound) in ["computed", "from memory", "from disk, after a restart"]
            .iter()
            .zip(&times)
            .zip(BOUNDS)
            .filter(|((_, times), _)| !times.is_empty())
        {
            let time = median(times.clone());
            let (least, most) = times.iter().fold((f64::MAX, 0.0f64), |(least, most), time| (least.min(*time), most.max(*time)));
            println!(
                "  {name:<28}{:>9.1} ms ({:.1} to {:.1}){:>8.2}% of computed (target: at most {bound}%)",
                time * 1e3,
                least * 1e3,
                most * 1e3,
                100.0 * time / cold
            );
        }
    }
    Ok(())
}
