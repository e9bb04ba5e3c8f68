//! What several requests at once cost and gain.
//! - Decoding, on the bundled model with all experts in memory and with a quarter of them: tokens per second of four streams together
//!   against one alone, beside what the bytes allow (a step reads every expert that some stream needs once), and bytes from disk a token;
//!   for those also what the same routing would have read a token of each stream in turn, and with a cache that knows the future.
//! - A prompt of 2,048 tokens that arrives while another request decodes, on a synthetic model: the times between that one's tokens, before
//!   and meanwhile, and the prompt's time to its first token, alone and so.
//!
//! Rounds in turn, medians of them. Prints figures beside their bounds and judges none.
//! `cargo bench -p flash-engine --bench streams`; `-- together [TOKENS]` is the first part alone, `-- SHAPE LAYERS` the second, on another model.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Instant,
};

use anyhow::{Result, anyhow, ensure};
use flash_engine::{
    CacheBudget, Delivery, Engine, Event, Io, Lookahead, Options, Report, Request, RequestId, Sampling, Split, Stage, Step,
    replay::{ReplayPolicy, Trace, replay},
    synth::{Routing, Synth, write},
};
use flash_experts::{ExpertId, PolicyKind};

const ROUNDS: u64 = 9;
/// With everything in memory, where they are short.
const ROUNDS_RESIDENT: u64 = 25;
const STREAMS: usize = 4;
/// Of a stream; tokens unless it is told how many.
const PROMPT: usize = 32;
const TOKENS: usize = 160;
/// Of the request that arrives.
const ARRIVES: usize = 2048;
/// Tokens of the other one before that, the first of which still show how it began.
const BEFORE: usize = 300;

/// What an engine says, with the time it was said.
#[derive(Default)]
struct Heard {
    tokens: BTreeMap<RequestId, Vec<Instant>>,
    done: Vec<RequestId>,
    failed: Option<flash_engine::Error>,
    /// Of each request, [positions, layers, top_k].
    routed: BTreeMap<RequestId, Vec<u16>>,
}

impl Heard {
    fn step(&mut self, engine: &mut Engine) -> Result<Step> {
        let step = engine.step(&mut |id, event| {
            match event {
                Event::Token { .. } => self.tokens.entry(id).or_default().push(Instant::now()),
                Event::Done(_) => self.done.push(id),
                Event::Failed(error) => self.failed = Some(error),
                Event::Routing { ids, .. } => self.routed.entry(id).or_default().extend(ids),
                Event::Prefill { .. } | Event::Prompt(_) => {}
            }
            Delivery::Taken
        });
        self.failed.take().map_or(Ok(step), |error| Err(error.into()))
    }

    fn said(&self, id: RequestId) -> &[Instant] {
        self.tokens.get(&id).map_or(&[], |times| times)
    }
}

fn request(prompt: &[u32], tokens: usize, seed: u64) -> Request {
    Request {
        sampling: Sampling { temperature: 1.0, seed: Some(seed), ..Sampling::greedy() },
        max_tokens: Some(tokens),
        ignore_eos: true,
        ..Request::greedy(prompt.to_vec())
    }
}

fn median<T: PartialOrd + Copy>(values: &[T]) -> T {
    quantile(values, 0.5)
}

fn quantile<T: PartialOrd + Copy>(values: &[T], share: f64) -> T {
    let mut values = values.to_vec();
    values.sort_unstable_by(|a, b| a.partial_cmp(b).expect("numbers"));
    values[((values.len() - 1) as f64 * share).round() as usize]
}

/// Of the time in which every stream decodes.
#[derive(Clone, Copy)]
struct Speed {
    tok_s: f64,
    /// A token's share of what its step read from memory: trunk and experts.
    memory_bytes: f64,
    disk_bytes: f64,
    /// As `disk_bytes`, of a cold cache: the streams together and by turns, with our policy and with Belady's.
    replayed: [[f64; 2]; 2],
    /// Microseconds of a token.
    stages: [f64; Stage::ALL.len()],
}

fn decode(engine: &mut Engine, prompts: &[&[u32]], tokens: usize, seed: u64, replays: bool) -> Result<Speed> {
    let mut heard = Heard::default();
    for (prompt, stream) in prompts.iter().zip(0..) {
        engine.admit(Request { record_routing: replays, ..request(prompt, tokens, seed * 10 + stream) })?;
    }
    while heard.tokens.len() < prompts.len() {
        heard.step(engine)?;
    }
    let count = |heard: &Heard| heard.tokens.values().map(Vec::len).sum::<usize>();
    let (before, said, began) = (engine.report(), count(&heard), Instant::now());
    let mut steps = 0;
    while heard.done.is_empty() {
        heard.step(engine)?;
        steps += 1;
    }
    let (time, heard_tokens) = (began.elapsed().as_secs_f64(), (count(&heard) - said) as f64);
    let report = engine.report();
    let used = |report: &Report| report.experts.hits + report.experts.misses + report.experts.joined;
    let experts = (used(&report) - used(&before)) * engine.info().expert_bytes;
    while heard.step(engine)? == Step::Worked {}
    Ok(Speed {
        tok_s: heard_tokens / time,
        memory_bytes: (steps * report.trunk_bytes + experts) as f64 / heard_tokens,
        stages: Stage::ALL.map(|stage| report.profile.since(&before.profile).get(stage).as_secs_f64() * 1e6 / heard_tokens),
        disk_bytes: (report.experts.bytes_read - before.experts.bytes_read) as f64 / heard_tokens,
        replayed: if replays { replayed(engine, &heard.routed, tokens)? } else { Default::default() },
    })
}

fn replayed(engine: &Engine, routed: &BTreeMap<RequestId, Vec<u16>>, tokens: usize) -> Result<[[f64; 2]; 2]> {
    let (info, slots) = (engine.info(), engine.report().experts.slots_per_layer);
    let token = info.layers * info.top_k;
    // The last token's position is not computed.
    let decoded: Vec<&[u16]> = routed.values().map(|ids| &ids[ids.len() - (tokens - 1) * token..]).collect();
    let mut traces = [(); 2].map(|()| Trace::new(info.layers, info.experts));
    let [together, turns] = &mut traces;
    for at in (0..tokens - 1).map(|token_of| token_of * token) {
        for layer in (at..at + token).step_by(info.top_k) {
            let union: BTreeSet<u16> = decoded.iter().flat_map(|ids| &ids[layer..][..info.top_k]).copied().collect();
            together.push(&union.into_iter().map(ExpertId).collect::<Vec<_>>()).map_err(|error| anyhow!(error))?;
        }
        for ids in decoded.iter().flat_map(|ids| ids[at..][..token].chunks_exact(info.top_k)) {
            turns.push(&ids.iter().copied().map(ExpertId).collect::<Vec<_>>()).map_err(|error| anyhow!(error))?;
        }
    }
    let decoded_tokens = ((tokens - 1) * decoded.len()) as f64;
    let bytes = |trace: &Trace, policy| replay(trace, policy, slots).misses as f64 * info.expert_bytes as f64 / decoded_tokens;
    Ok(traces.map(|trace| [ReplayPolicy::Live(PolicyKind::default()), ReplayPolicy::Belady].map(|policy| bytes(&trace, policy))))
}

fn together(tokens: usize) -> Result<()> {
    ensure!(tokens > 1, "a stream has two tokens at least");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flash-tiny-moe");
    let texts: BTreeMap<String, Vec<u32>> = serde_json::from_slice(&fs::read(model.join("golden/heldout_tokens.json"))?)?;
    let texts: Vec<_> = texts.into_values().collect();
    for (what, share, alike, rounds) in
        [("", 1.0, false, ROUNDS_RESIDENT), ("", 0.25, false, ROUNDS), (", one prompt for all", 0.25, true, ROUNDS)]
    {
        let options = Options {
            io: Io::Direct,
            lookahead: Lookahead::Off,
            expert_cache: CacheBudget::Share(share),
            prefix_cache: CacheBudget::Bytes(0),
            parallel: STREAMS,
            ..Options::default()
        };
        let mut engine = Engine::load(&model, &options, &mut |_| {})?;
        let mut found = [const { Vec::new() }; 4];
        for round in 0..rounds {
            // Of other domains each, or all the same.
            let text = |stream: u64| {
                let apart = if alike { 0 } else { 3 * stream };
                &texts[(round + apart) as usize % texts.len()][(32 * round) as usize..][..PROMPT]
            };
            let prompts: Vec<_> = (0..STREAMS as u64).map(text).collect();
            // Each of the four in turn is the one alone.
            let one = &prompts[round as usize % STREAMS..][..1];
            let all = &prompts[..];
            let ways = [(one, Split::Auto), (all, Split::Auto), (all, Split::Matrices), (all, Split::Rows)];
            // With a part of the experts there is but one.
            let mut turn: Vec<_> = ways.into_iter().zip(&mut found).take(if share < 1.0 { 2 } else { 4 }).collect();
            let first = round as usize % turn.len();
            turn.rotate_left(first);
            for ((prompts, split), found) in turn {
                engine.set_split(split);
                found.push(decode(&mut engine, prompts, tokens, round, share < 1.0)?);
            }
        }
        let [one, four, matrices, rows] = &found;
        // Of steps that are computed together.
        let once = if share < 1.0 { four } else { matrices };
        let of = |speeds: &[Speed], get: fn(&Speed) -> f64| median(&speeds.iter().map(get).collect::<Vec<_>>());
        let ratios: Vec<_> = one.iter().zip(four).map(|(one, four)| four.tok_s / one.tok_s).collect();
        println!("flash-tiny-moe, expert cache {:.0}%{what}; {tokens} tokens a stream, medians of {rounds}", share * 100.0);
        println!(
            "    {STREAMS} streams {:.0} tok/s, one {:.0}: x{:.2} (pairs {:.2} to {:.2}); by the bytes x{:.2} ({:.2} and {:.2} MB a token)",
            of(four, |s| s.tok_s),
            of(one, |s| s.tok_s),
            median(&ratios),
            quantile(&ratios, 0.0),
            quantile(&ratios, 1.0),
            of(one, |s| s.memory_bytes) / of(once, |s| s.memory_bytes),
            of(once, |s| s.memory_bytes) / 1e6,
            of(one, |s| s.memory_bytes) / 1e6,
        );
        if share == 1.0 {
            let [matrices, rows] = [matrices, rows].map(|speeds| of(speeds, |s| s.tok_s));
            println!("    threads share every matrix: four streams {matrices:.0} tok/s; each decodes two streams: {rows:.0}");
        }
        println!("    from disk {:.2} and {:.2} MB a token", of(four, |s| s.disk_bytes) / 1e6, of(one, |s| s.disk_bytes) / 1e6);
        if share < 1.0 {
            let replayed = |speeds: &[Speed], turns: usize| {
                let [ours, best] = [0, 1].map(|policy| median(&speeds.iter().map(|s| s.replayed[turns][policy] / 1e6).collect::<Vec<_>>()));
                format!("{ours:.2} ({best:.2})")
            };
            let [together, turns, alone] = [replayed(four, 0), replayed(four, 1), replayed(one, 0)];
            println!(
                "    a cold cache, and one that knows the future: together {together}, the same tokens by turns {turns}, one {alone} MB"
            );
        }
        let stage = |speeds: &[Speed], stage: Stage| median(&speeds.iter().map(|speed| speed.stages[stage as usize]).collect::<Vec<_>>());
        let stages = Stage::ALL.map(|at| format!("{} {:.0} and {:.0}", at.name(), stage(four, at), stage(one, at)));
        println!("    us a token: {}", stages.join(", "));
    }
    Ok(())
}

/// Times between tokens, and of the prompt to its first.
struct Gaps {
    before: Vec<f64>,
    meanwhile: Vec<f64>,
    ttft: f64,
}

fn arrive(engine: &mut Engine, others: usize, prompt: &[u32], seed: u64) -> Result<Gaps> {
    let mut heard = Heard::default();
    let mut streams = Vec::new();
    for stream in 0..others {
        let from = stream * PROMPT;
        streams.push(engine.admit(request(&prompt[from..from + PROMPT], 1 << 14, seed))?.0);
    }
    while streams.first().is_some_and(|stream| heard.said(*stream).len() < BEFORE) {
        heard.step(engine)?;
    }
    let began = Instant::now();
    let (id, _) = engine.admit(request(prompt, 1, seed))?;
    while !heard.done.contains(&id) {
        ensure!(heard.step(engine)? == Step::Worked, "nothing to do, and a prompt unread");
    }
    let first = began.elapsed().as_secs_f64();
    // The gap in which the prompt ended is one of those.
    if others > 0 {
        heard.step(engine)?;
    }
    streams.iter().for_each(|stream| engine.cancel(*stream));
    let gaps = |until: &dyn Fn(Instant) -> bool| -> Vec<f64> {
        let of = |stream: &RequestId| {
            let times = heard.said(*stream);
            times
                .windows(2)
                .skip(BEFORE / 3)
                .filter(|pair| until(pair[1]))
                .map(|pair| (pair[1] - pair[0]).as_secs_f64())
                .collect::<Vec<_>>()
        };
        streams.iter().flat_map(of).collect()
    };
    Ok(Gaps { before: gaps(&|at| at <= began), meanwhile: gaps(&|at| at > began), ttft: first })
}

fn arrives(shape: &str, layers: Option<usize>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let synth = Synth { shape: shape.into(), layers, context: Some(32_768), seed: 1, routing: Routing::Uniform };
    write(dir.path(), &synth, &mut |_| true)?;
    let options =
        Options { expert_cache: CacheBudget::Share(1.0), prefix_cache: CacheBudget::Bytes(0), parallel: STREAMS, ..Options::default() };
    let mut engine = Engine::load(dir.path(), &options, &mut |_| {})?;
    let vocab = engine.info().vocab_size;
    let layers = engine.info().layers;
    let mut state = 1u64;
    let mut tokens = || -> Vec<u32> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % vocab
        };
        (0..ARRIVES).map(|_| next() as u32).collect()
    };
    // Experts come into memory.
    arrive(&mut engine, 0, &tokens(), 0)?;
    println!("{shape}, {layers} layers, a prompt of {ARRIVES} tokens arrives; medians of {ROUNDS}");
    let mut alone = Vec::new();
    let mut found = [1, STREAMS - 1].map(|others| (others, Vec::new()));
    for round in 1..=ROUNDS {
        alone.push(arrive(&mut engine, 0, &tokens(), round)?.ttft);
        for (others, found) in &mut found {
            found.push(arrive(&mut engine, *others, &tokens(), round)?);
        }
    }
    for (others, found) in &found {
        let of = |get: &dyn Fn(&Gaps) -> f64| median(&found.iter().map(get).collect::<Vec<_>>());
        let (before, meanwhile) = (of(&|gaps| median(&gaps.before)), of(&|gaps| median(&gaps.meanwhile)));
        let p99 = of(&|gaps| quantile(&gaps.meanwhile, 0.99));
        let ms = 1e3;
        println!(
            "  {others} decoding: {:.3} ms between tokens (99%: {:.3}); meanwhile {:.3}, 99%: {:.3}, longest {:.3}, of {} gaps",
            before * ms,
            of(&|gaps| quantile(&gaps.before, 0.99)) * ms,
            meanwhile * ms,
            p99 * ms,
            of(&|gaps| quantile(&gaps.meanwhile, 1.0)) * ms,
            of(&|gaps| gaps.meanwhile.len() as f64),
        );
        println!(
            "    99% over the median before x{:.2}, over the median meanwhile x{:.2} (target: at most 3); first token after {:.0} ms, alone {:.0}",
            p99 / before,
            p99 / meanwhile,
            of(&|gaps| gaps.ttft) * ms,
            median(&alone) * ms,
        );
    }
    Ok(())
}

fn main() -> Result<()> {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    match &args[..] {
        [] => {
            together(TOKENS)?;
            arrives("tiny", None)
        }
        [part, tokens] if part == "together" => together(tokens.parse()?),
        [shape, layers] => arrives(shape, Some(layers.parse()?)),
        [part] if part == "together" => together(TOKENS),
        _ => Err(anyhow!("takes SHAPE and LAYERS, `together` and perhaps TOKENS, or nothing")),
    }
}
