//! What a decode step costs on MLX: the time of a token, how often the host waits for a result, and in how many layers an
//! expert was missing, at several sizes of the cache. Figures only; `mlx_lm.generate` on the same machine is what to put beside
//! them. `cargo bench -p flash-engine --features mlx --bench mlx [-- TOKENS SHARE…]`

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use flash_engine::{CacheBudget, Delivery, Engine, Event, Kernels, Options, Request, Step};

/// Tokens before the first that is timed: the prompt, and a cache that fills.
const WARM_UP: usize = 64;

fn main() -> Result<()> {
    let numbers: Vec<f64> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let (tokens, shares) = match &numbers[..] {
        [] => (128, &[1.0, 0.5, 0.25][..]),
        [tokens] => (*tokens as usize, &[1.0, 0.5, 0.25][..]),
        [tokens, shares @ ..] => (*tokens as usize, shares),
    };
    println!("{:>6}{:>10}{:>12}{:>14}{:>10}{:>12}", "cache", "tok/s", "median", "host syncs", "misses", "hit rate");
    for share in shares {
        decode(*share, tokens)?;
    }
    Ok(())
}

fn decode(share: f64, tokens: usize) -> Result<()> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flash-tiny-moe");
    let options = Options { kernels: Kernels::Mlx, expert_cache: CacheBudget::Share(share), ..Options::default() };
    let mut engine = Engine::load(&model, &options, &mut |_| {})?;
    let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(model.join("golden/mlx_4bit_f32.json"))?)?;
    let prompt = serde_json::from_value(golden["prompts"][0]["token_ids"].clone())?;
    engine.admit(Request { max_tokens: Some(WARM_UP + tokens), ignore_eos: true, ..Request::greedy(prompt) })?;
    let (mut times, mut said) = (Vec::new(), 0);
    let counted = |engine: &Engine| {
        let report = engine.report();
        (report.mlx.map_or(0, |mlx| mlx.host_syncs), report.experts.hits, report.experts.misses)
    };
    let (mut last, mut from) = (Instant::now(), counted(&engine));
    while engine.step(&mut |_, event| {
        said += usize::from(matches!(event, Event::Token { .. } | Event::Done(_)));
        Delivery::Taken
    }) == Step::Worked
    {
        if said == WARM_UP && times.is_empty() {
            from = counted(&engine);
        }
        if said > WARM_UP && times.len() < tokens {
            times.push(last.elapsed());
        }
        last = Instant::now();
    }
    ensure!(times.len() == tokens, "{} of {tokens} tokens", times.len());
    let to = counted(&engine);
    let (syncs, hits, misses) = (to.0 - from.0, to.1 - from.1, to.2 - from.2);
    let per_second = tokens as f64 / times.iter().sum::<Duration>().as_secs_f64();
    times.sort();
    println!(
        "{:>5.1}%{per_second:>10.1}{:>9.2} ms{:>14.2}{:>10.2}{:>11.1}%",
        100.0 * share,
        times[tokens / 2].as_secs_f64() * 1e3,
        syncs as f64 / tokens as f64,
        misses as f64 / tokens as f64,
        100.0 * hits as f64 / (hits + misses) as f64,
    );
    Ok(())
}
