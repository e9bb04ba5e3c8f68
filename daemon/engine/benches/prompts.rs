//! What the expert cache makes of text, on the bundled model, with direct reads and without lookahead:
//! - decoding: hit rates of the running engine beside the replay lab's for the very routing it decoded, and Belady's;
//! - a prompt of 512 tokens: how often each expert is read, the time to the first token against the same prompt read token by
//!   token, and the hit rate of what is decoded first against that of what comes later.
//!
//! Prints figures beside their bounds and judges none. Text is sampled, because this model's greedy text soon repeats itself.
//! `cargo bench -p flash-engine --bench prompts`

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    ops::Range,
    path::Path,
    time::Instant,
};

use anyhow::{Context, Result, anyhow, ensure};
use flash_engine::{
    CacheBudget, Delivery, Engine, Event, Io, Lookahead, Options, PolicyKind, Request, Sampling, Step,
    replay::{ReplayPolicy, Tally, Trace, replay},
};
use flash_experts::ExpertId;

const POLICIES: [PolicyKind; 3] = [PolicyKind::Lfru, PolicyKind::Lru, PolicyKind::Lcp];
const SHARES: [f64; 3] = [0.125, 0.25, 0.5];

/// Texts decoded for the comparison with the lab, each from the start of a domain of its own.
const TEXTS: usize = 2;
const TEXT_PROMPT: usize = 40;
/// Less than the engine remembers the routing of.
const TEXT_STEPS: usize = 980;

const PROMPT: usize = 512;
/// Where in each held-out text a prompt begins.
const OFFSETS: [usize; 3] = [0, 256, 512];
/// The same prompt read in both ways in turn.
const ROUNDS: usize = 5;
/// Decoding after a prompt: the first steps, and those that count as steady.
const FIRST: usize = 32;
const STEADY: Range<usize> = 64..160;

type Texts = BTreeMap<String, Vec<u32>>;

/// What one request did to the cache.
struct Run {
    /// Experts read for the prompt.
    loads: u64,
    /// Of prompt and decoding, if the request records it.
    trace: Trace,
    /// Of every step of decoding.
    steps: Vec<Tally>,
}

fn engine(model: &Path, share: f64) -> Result<Engine> {
    let prefix_cache = CacheBudget::Bytes(0);
    let options =
        Options { io: Io::Direct, lookahead: Lookahead::Off, expert_cache: CacheBudget::Share(share), prefix_cache, ..Options::default() };
    Ok(Engine::load(model, &options, &mut |_| {})?)
}

/// `steps` of decoding; the first token comes with the prompt.
fn request(prompt: &[u32], steps: usize, seed: u64) -> Request {
    Request {
        sampling: Sampling { temperature: 1.0, seed: Some(seed), ..Sampling::greedy() },
        max_tokens: Some(steps + 1),
        ignore_eos: true,
        ..Request::greedy(prompt.to_vec())
    }
}

fn run(engine: &mut Engine, request: Request) -> Result<Run> {
    let start = engine.report().experts;
    let (mut routed, mut failed) = (Vec::new(), None);
    // After the prompt and after every step of decoding.
    let mut seen = Vec::new();
    engine.admit(request)?;
    loop {
        let mut said = false;
        let step = engine.step(&mut |_, event| {
            match event {
                Event::Token { .. } | Event::Done(_) => said = true,
                Event::Routing { ids, .. } => routed.extend(ids.into_iter().map(ExpertId)),
                Event::Failed(error) => failed = Some(error),
                _ => {}
            }
            Delivery::Taken
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        if said {
            seen.push(engine.report().experts);
        }
        if step == Step::Idle {
            break;
        }
    }
    let first = seen.first().ok_or_else(|| anyhow!("a request ended without a token"))?;
    let steps = seen.windows(2).map(|pair| Tally { hits: pair[1].hits - pair[0].hits, misses: pair[1].misses - pair[0].misses });
    let mut trace = Trace::new(start.layers.len(), engine.info().experts);
    routed.chunks(engine.info().top_k).try_for_each(|ids| trace.push(ids)).map_err(|reason| anyhow!(reason))?;
    Ok(Run { loads: first.loads - start.loads, trace, steps: steps.collect() })
}

fn sum<'a>(tallies: impl IntoIterator<Item = &'a Tally>) -> Tally {
    tallies.into_iter().fold(Tally::default(), |sum, one| Tally { hits: sum.hits + one.hits, misses: sum.misses + one.misses })
}

/// In percent.
fn rate(tally: Tally) -> f64 {
    100.0 * tally.hits as f64 / (tally.hits + tally.misses).max(1) as f64
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Of the mean.
fn standard_error(values: &[f64]) -> f64 {
    let (mean, count) = (mean(values), values.len() as f64);
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0) / count).sqrt()
}

/// Some tokens of a trace.
fn part(trace: &Trace, tokens: Range<usize>) -> Result<Trace> {
    let mut part = Trace::new(trace.layers, trace.experts);
    for (token, layer) in tokens.flat_map(|token| (0..trace.layers).map(move |layer| (token, layer))) {
        part.push(trace.get(token, layer)).map_err(|reason| anyhow!(reason))?;
    }
    Ok(part)
}

/// (layer, expert) pairs that some token of a prompt was routed to.
fn distinct(prompt: &Trace) -> usize {
    let used = |layer: usize| (0..prompt.tokens()).flat_map(move |token| prompt.get(token, layer)).collect::<HashSet<_>>().len();
    (0..prompt.layers).map(used).sum()
}

/// Of some steps of decoding, what the lab says had the prompt been read token by token into a cold cache.
fn lab(trace: &Trace, steps: Range<usize>, slots: usize) -> Result<Tally> {
    let until = |step: usize| Ok::<_, anyhow::Error>(replay(&part(trace, 0..PROMPT + step)?, ReplayPolicy::Live(PolicyKind::Lfru), slots));
    let (before, after) = (until(steps.start)?, until(steps.end)?);
    Ok(Tally { hits: after.hits - before.hits, misses: after.misses - before.misses })
}

/// The engine's counters beside a replay of what it decoded. The lab starts cold, the engine with what the prompt left.
fn decoding(model: &Path, texts: &Texts) -> Result<()> {
    println!("\nhit rates of {TEXTS} x {TEXT_STEPS} decoded tokens, %");
    println!("{:>7}{:>8}{:>9}{:>9}{:>12}{:>9}", "cache", "policy", "engine", "lab", "difference", "belady");
    let (mut worst, mut recorded) = (0f64, Vec::new());
    let mut ahead = Vec::new();
    for share in SHARES {
        let mut engine = engine(model, share)?;
        let slots = engine.report().experts.slots_per_layer;
        let mut rates = Vec::new();
        for policy in POLICIES {
            engine.set_policy(policy);
            let (mut live, mut lab, mut oracle) = (Tally::default(), Tally::default(), Tally::default());
            for (seed, text) in (0..).zip(texts.values().take(TEXTS)) {
                engine.clear_cache();
                live = sum([&live, &sum(&run(&mut engine, request(&text[..TEXT_PROMPT], TEXT_STEPS, seed))?.steps)]);
                let recent = engine.recent();
                let trace = part(&recent, recent.tokens() - TEXT_STEPS..recent.tokens())?;
                let replayed = |policy| sum(&replay(&trace, policy, slots).per_layer);
                lab = sum([&lab, &replayed(ReplayPolicy::Live(policy))]);
                oracle = sum([&oracle, &replayed(ReplayPolicy::Belady)]);
                // Neither policy nor size changes a token.
                match recorded.get(seed as usize) {
                    None => recorded.push(trace),
                    Some(known) => ensure!(*known == trace, "text {seed} differs with {policy} at {}%", share * 100.0),
                }
            }
            let difference = rate(live) - rate(lab);
            worst = worst.max(difference.abs());
            let (live, lab, oracle) = (rate(live), rate(lab), rate(oracle));
            println!("{:>6}%{policy:>8}{live:>9.2}{lab:>9.2}{difference:>+12.2}{oracle:>9.2}", share * 100.0);
            rates.push((policy, live));
        }
        let of = |wanted| rates.iter().find(|(policy, _)| *policy == wanted).map_or(f64::NAN, |(_, rate)| *rate);
        ahead.push(format!("{:+.2} at {}%", of(PolicyKind::Lfru) - of(PolicyKind::Lru), share * 100.0));
    }
    println!("largest difference {worst:.2} points (target: within 1)");
    println!("LFRU ahead of LRU by {} (target: not below 0)", ahead.join(", "));
    Ok(())
}

/// One way of reading a prompt.
#[derive(Clone, Copy)]
struct Reading {
    time: f64,
    /// Of that, with nothing to compute until an expert came.
    waited: f64,
    loads: u64,
}

/// With a cold expert cache. Token by token nothing is sampled, and logits are computed once: the kinder count.
fn read_prompt(engine: &mut Engine, prompt: &[u32], at_once: bool) -> Result<Reading> {
    engine.clear_cache();
    let before = engine.report().experts;
    let start = Instant::now();
    if at_once {
        run(engine, request(prompt, 0, 0))?;
    } else {
        engine.score_singly(prompt, prompt.len() - 1, &mut |_, _| {})?;
    }
    let (time, after) = (start.elapsed().as_secs_f64(), engine.report().experts);
    Ok(Reading { time, waited: (after.wait_time - before.wait_time).as_secs_f64(), loads: after.loads - before.loads })
}

/// The first token of a prompt read at once, against the same prompt read token by token.
fn first_token(model: &Path, prompts: &[&[u32]]) -> Result<()> {
    let mut engine = engine(model, 0.25)?;
    let mut readings = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (at_once, readings) in [false, true].into_iter().zip(&mut readings) {
            readings.push(read_prompt(&mut engine, prompts[0], at_once)?);
        }
    }
    println!("\na prompt of {PROMPT} tokens, cache 25%, cold; the run of median time of {ROUNDS}");
    println!("{:>16}{:>15}{:>8}{:>15}{:>15}", "", "first token", "tok/s", "waited", "experts read");
    let [singly, at_once] = readings.map(|mut readings| {
        readings.sort_by(|a, b| a.time.total_cmp(&b.time));
        readings[readings.len() / 2]
    });
    for (name, Reading { time, waited, loads }) in [("token by token", singly), ("at once", at_once)] {
        println!("{name:>16}{:>12.0} ms{:>8.0}{:>12.0} ms{loads:>15}", time * 1e3, PROMPT as f64 / time, waited * 1e3);
    }
    println!("{:.1} times as fast (target: 10)", singly.time / at_once.time);
    Ok(())
}

/// How often a prompt reads each expert, and the hit rate of what is decoded after it.
fn after_prompts(model: &Path, prompts: &[&[u32]]) -> Result<()> {
    let mut engine = engine(model, 0.25)?;
    let mut samples = Vec::new();
    for (name, cold) in [("of the last text", false), ("cold", true)] {
        let mut runs = Vec::new();
        for (seed, prompt) in (0..).zip(prompts) {
            if cold || runs.is_empty() {
                engine.clear_cache();
            }
            runs.push(run(&mut engine, Request { record_routing: true, ..request(prompt, STEADY.end, seed) })?);
        }
        samples.push((name, runs));
    }
    print_reads(&samples, &engine)?;
    print_rates(&samples, &engine)
}

fn print_reads(samples: &[(&str, Vec<Run>)], engine: &Engine) -> Result<()> {
    println!("\nexperts read for a prompt of {PROMPT} tokens, cache 25%; means of {} prompts", samples[0].1.len());
    println!("{:>20}{:>9}{:>9}{:>16}", "cache before", "read", "routed", "read - routed");
    for (name, runs) in samples {
        let read: Vec<f64> = runs.iter().map(|run| run.loads as f64).collect();
        let routed = runs.iter().map(|run| Ok(distinct(&part(&run.trace, 0..PROMPT)?) as f64)).collect::<Result<Vec<_>>>()?;
        let over = read.iter().zip(&routed).map(|(read, routed)| read - routed).fold(f64::NEG_INFINITY, f64::max);
        println!("{name:>20}{:>9.1}{:>9.1}{:>16}", mean(&read), mean(&routed), format!("{over} at most"));
    }
    let all = engine.report().experts.layers.len() * engine.info().experts;
    println!("each expert once: read - routed at most 0 (target); the model has {all}");
    Ok(())
}

fn print_rates(samples: &[(&str, Vec<Run>)], engine: &Engine) -> Result<()> {
    let slots = engine.report().experts.slots_per_layer;
    println!("\nhit rates of decoding after these prompts, %");
    println!("{:>20}{:>13}{:>13}{:>16}", "cache before", format!("first {FIRST}"), format!("{STEADY:?}"), "difference");
    let print = |name: &str, pairs: &[(Tally, Tally)]| {
        let first: Vec<f64> = pairs.iter().map(|(first, _)| rate(*first)).collect();
        let steady: Vec<f64> = pairs.iter().map(|(_, steady)| rate(*steady)).collect();
        let difference: Vec<f64> = first.iter().zip(&steady).map(|(first, steady)| first - steady).collect();
        let error = standard_error(&difference);
        println!("{name:>20}{:>13.2}{:>13.2}{:>+9.2} +-{error:>5.2}", mean(&first), mean(&steady), mean(&difference));
    };
    for (name, runs) in samples {
        print(name, &runs.iter().map(|run| (sum(&run.steps[..FIRST]), sum(&run.steps[STEADY]))).collect::<Vec<_>>());
    }
    let singly = |run: &Run| Ok((lab(&run.trace, 0..FIRST, slots)?, lab(&run.trace, STEADY, slots)?));
    print("lab, token by token", &samples[0].1.iter().map(singly).collect::<Result<Vec<_>>>()?);
    println!("not below -2 points (target); +- is the standard error. The lab: as if prompts were not read at once");
    Ok(())
}

fn main() -> Result<()> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flash-tiny-moe");
    let path = model.join("golden/heldout_tokens.json");
    let texts: Texts = serde_json::from_str(&fs::read_to_string(&path).with_context(|| path.display().to_string())?)?;
    let prompts: Vec<&[u32]> = texts.values().flat_map(|text| OFFSETS.map(|offset| &text[offset..offset + PROMPT])).collect();
    let machine = engine(&model, 0.25)?.report();
    println!("{} kernels, {} threads, {} reads", machine.kernels, machine.threads, machine.io);
    decoding(&model, &texts)?;
    first_token(&model, &prompts)?;
    after_prompts(&model, &prompts)
}
