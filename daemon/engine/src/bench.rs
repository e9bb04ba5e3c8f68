//! How fast a model runs here, and how fast it could: decode and prefill at several cache sizes, cold and warm, each beside
//! the bounds that memory and disk set, measured in the same run. Opens engines of its own, one at a time; renders nothing.
//! `flashctl bench` is the caller, through the daemon.

use std::{
    path::Path,
    time::{Duration, Instant},
};

#[doc(hidden)]
pub use crate::backend::cpu::{Attention, Decoded, FeedForwards, Multiplied, Products};
use crate::{
    Bytes, CacheBudget, Delivery, Engine, Error, Event, Io, Kernels, Lookahead, Options, PolicyKind, Profile, Report, Request, Sampling,
    Stage, Step,
    backend::cpu::{allowed_cpus, physical_cores},
    machine::{Disk, fetched, memory_bandwidth},
    memory::available,
    model::families::{FfnSpec, Model},
    synth::is_synthetic,
};

/// Parts of a decode whose speeds give a median: one stall shall not decide.
const WINDOWS: usize = 8;
/// What must be left for measuring the memory beside a model.
const ROOM: Bytes = 1 << 30;

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// A cold and a warm row each; the row without a cache is measured in any case.
    pub caches: Vec<CacheBudget>,
    /// Tokens of the prompt, random ids.
    pub prompt: usize,
    /// Tokens to generate; 0 measures the prompt only.
    pub generate: usize,
    /// Recorded routing for [`Engine::force_routing`].
    pub routing: Option<Vec<u16>>,
    /// Settings to compare, interleaved; each multiplies the rows. None: those of the engine's options.
    pub variants: Vec<Variant>,
    /// How often each row is measured; the run of median speed is reported.
    pub repeat: usize,
    /// Of prompt and sampling: equal seeds, equal tokens in every row.
    pub seed: u64,
}

impl Default for BenchOptions {
    fn default() -> Self {
        let caches = [0.25, 0.5, 1.0].map(CacheBudget::Share).into();
        Self { caches, prompt: 512, generate: 64, routing: None, variants: Vec::new(), repeat: 1, seed: 1 }
    }
}

/// One of the settings to compare; `None` = the engine's options'.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Variant {
    pub io: Option<Io>,
    pub policy: Option<PolicyKind>,
    pub lookahead: Option<Lookahead>,
}

/// What a bench says while it runs.
#[derive(Clone, Debug)]
pub enum BenchEvent {
    /// `done` of `total` runs; what the current one is.
    Progress {
        stage: String,
        done: u64,
        total: u64,
    },
    /// Before the rows that are held against it.
    Machine(Machine),
    Row(Box<Row>),
}

/// What bounds are computed from.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    pub memory_bytes_s: f64,
    pub threads: usize,
    /// Whole experts in random order through `io`, by `readers` threads.
    pub disk_bytes_s: f64,
    pub expert_bytes: Bytes,
    pub readers: usize,
    pub io: Io,
    pub kernels: String,
}

/// What was in memory when a row's prompt came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No expert, neither in the cache nor in the page cache.
    Cold,
    /// What the same request left behind.
    Warm,
}

/// One measurement. Figures of decoding are `None` when nothing was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `None`: no cache, every expert comes through the page cache each time.
    pub cache: Option<CacheBudget>,
    /// Of each layer.
    pub slots: usize,
    pub state: State,
    /// The settings that were in force.
    pub variant: Variant,
    pub prompt_tokens: usize,
    pub ttft: Duration,
    pub prefill_tok_s: f64,
    pub prefill_disk_bytes: Bytes,
    pub decode: Option<Decode>,
}

/// The decoding part of a row: what came after the first token.
#[derive(Clone, Debug, PartialEq)]
pub struct Decode {
    pub tokens: usize,
    /// The median of several windows.
    pub tok_s: f64,
    pub mean_tok_s: f64,
    pub hit_rate: f64,
    /// Expert bytes read, whoever gave them.
    pub loaded_bytes_per_token: f64,
    /// Those that a disk gave. The same, but where reads go through the page cache of a system that tells what it had.
    pub disk_bytes_per_token: f64,
    /// The same without what a wrong guess read.
    pub needed_bytes_per_token: f64,
    /// Over the whole time, waiting or not.
    pub disk_bytes_s: f64,
    /// Of the time: the engine had nothing to compute until an expert came.
    pub wait_share: f64,
    /// Where the time went; of all tokens.
    pub profile: Profile,
    pub time: Duration,
    /// Bytes that a token reads from memory.
    pub bytes_per_token: f64,
    pub bounds: Bounds,
    /// Of the experts that layers wanted, those that lookahead had named; `None` = it did not look.
    pub lookahead_recall: Option<f64>,
    pub prefetch_useful: u64,
    pub prefetch_wasted: u64,
}

/// Tokens per second that the hardware allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    pub memory: f64,
    /// `None`: nothing is read from disk.
    pub io: Option<f64>,
    /// Computing while experts load.
    pub overlapped: f64,
    /// One after the other.
    pub serial: f64,
}

impl Bounds {
    /// From the bytes of a token that memory and disk must give, and what they give in a second.
    pub fn new(memory: (f64, f64), disk: (f64, f64)) -> Self {
        let seconds = |(bytes, per_second): (f64, f64)| if bytes > 0.0 { bytes / per_second } else { 0.0 };
        let (compute, read) = (seconds(memory), seconds(disk));
        Self {
            memory: 1.0 / compute,
            io: (read > 0.0).then_some(1.0 / read),
            overlapped: 1.0 / compute.max(read),
            serial: 1.0 / (compute + read),
        }
    }
}

impl Decode {
    /// A disk that gave more during the run than when it was measured can give that.
    fn hold_against(&mut self, memory_bytes_s: f64, disk_bytes_s: f64) {
        let disk_bytes_s = disk_bytes_s.max(self.disk_bytes_s);
        self.bounds = Bounds::new((self.bytes_per_token, memory_bytes_s), (self.needed_bytes_per_token, disk_bytes_s));
    }

    pub fn of_overlapped(&self) -> f64 {
        self.tok_s / self.bounds.overlapped
    }

    /// Seconds of a mean token by stage, then those of no stage.
    pub fn stages(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let named: Duration = Stage::ALL.iter().map(|stage| self.profile.get(*stage)).sum();
        let stages = Stage::ALL.map(|stage| (stage.name(), self.profile.get(stage)));
        let all = stages.into_iter().chain([("unaccounted", self.time.saturating_sub(named))]);
        all.map(|(name, time)| (name, time.as_secs_f64() / self.tokens as f64))
    }

    pub fn of_serial(&self) -> f64 {
        self.tok_s / self.bounds.serial
    }
}

/// Measures row by row and says so through `each`, whose `false` ends it with [`Error::Cancelled`], as does that of
/// `between`, which is called between steps and may set the engine's ceiling.
///
/// A cold row opens the model anew, so that nothing is left of the row before; its warm row follows in the same engine.
/// Loading is not counted.
pub fn run(
    dir: &Path,
    options: &Options,
    bench: &BenchOptions,
    between: &mut dyn FnMut(&mut Engine) -> bool,
    each: &mut dyn FnMut(BenchEvent) -> bool,
) -> Result<(), Error> {
    let mut session = Session::new(dir, options, bench)?;
    let variants = if bench.variants.is_empty() { &[Variant::default()][..] } else { &bench.variants };
    let mut cases: Vec<Case> = Vec::new();
    // Without a cache last: it leaves the page cache full, and a group with a limit short of memory.
    for cache in bench.caches.iter().copied().map(Some).chain([None]) {
        // Without a cache there is nothing to vary.
        let variants = if cache.is_none() { &variants[..1] } else { variants };
        cases.extend(variants.iter().map(|variant| Case { cache, variant: *variant }));
    }
    let (repeat, mut done) = (bench.repeat.max(1), 0);
    let total = (repeat * cases.len()) as u64;
    let mut samples: Vec<Vec<[Row; 2]>> = vec![Vec::new(); cases.len()];
    for round in 0..repeat {
        for (case, samples) in cases.iter().zip(&mut samples) {
            tell(each, BenchEvent::Progress { stage: case.name(), done, total })?;
            samples.push(session.measure(case, between, each)?);
            done += 1;
            if round + 1 == repeat {
                for state in [0, 1] {
                    let rows = samples.iter().map(|pair| pair[state].clone()).collect();
                    tell(each, BenchEvent::Row(Box::new(median_run(rows))))?;
                }
            }
        }
    }
    Ok(())
}

/// One engine's settings.
#[derive(Clone, Copy, Debug)]
struct Case {
    cache: Option<CacheBudget>,
    variant: Variant,
}

impl Case {
    fn name(&self) -> String {
        match self.cache {
            Some(cache) => format!("cache {cache}"),
            None => "no cache".into(),
        }
    }
}

/// What all rows share.
struct Session<'a> {
    dir: &'a Path,
    options: &'a Options,
    bench: &'a BenchOptions,
    disk: Disk,
    request: Request,
    need: Need,
    top_k_share: f64,
    /// That this thread may run on while no engine pins it.
    cpus: Vec<usize>,
}

/// Bytes that a token reads from memory, apart from where it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Need {
    /// Everything but experts, and of the embedding one row only unless the head reads it all.
    trunk: Bytes,
    experts: Bytes,
    kv_per_position: Bytes,
}

impl Need {
    fn of(model: &Model, kernels: Kernels) -> Self {
        let (arch, info) = (&model.arch, &model.info);
        let unread = if arch.tied_head { 0 } else { model.embed.bytes() - model.embed.bytes() / arch.vocab as Bytes };
        let layers = model.layers.iter().filter(|layer| matches!(layer.ffn, FfnSpec::Moe { .. })).count();
        let float = if kernels == Kernels::Reference { 4 } else { 2 };
        Self {
            trunk: info.trunk_bytes - unread,
            experts: (arch.top_k * layers) as Bytes * info.expert_bytes,
            kv_per_position: (2 * arch.layers.len() * arch.kv_heads * arch.head_dim * float) as Bytes,
        }
    }

    /// At a mean context of `positions`.
    fn bytes(&self, positions: f64) -> f64 {
        (self.trunk + self.experts) as f64 + self.kv_per_position as f64 * positions
    }
}

impl<'a> Session<'a> {
    fn new(dir: &'a Path, options: &'a Options, bench: &'a BenchOptions) -> Result<Self, Error> {
        let model = Model::open(dir)?;
        if bench.prompt == 0 {
            return Err(Error::EmptyPrompt);
        }
        let limit = model.arch.context_max;
        if bench.prompt.saturating_add(bench.generate.max(1)) > limit {
            return Err(Error::ContextLength { prompt: bench.prompt.saturating_add(bench.generate), limit });
        }
        // A random network's greedy walk soon ends in a circle, whose few experts any cache holds.
        let temperature = if is_synthetic(dir) { 1.0 } else { 0.0 };
        let request = Request {
            sampling: Sampling { temperature, seed: Some(bench.seed), ..Sampling::greedy() },
            max_tokens: Some(bench.generate.max(1)),
            ignore_eos: true,
            ..Request::greedy(prompt(bench.prompt, model.arch.vocab, bench.seed))
        };
        Ok(Self {
            dir,
            options,
            bench,
            disk: Disk::new(&model),
            request,
            need: Need::of(&model, options.kernels),
            cpus: allowed_cpus(),
            // Half an expert more: a share is rounded down to slots.
            top_k_share: ((model.arch.top_k as f64 + 0.5) / model.arch.experts as f64).min(1.0),
        })
    }

    /// A cold and a warm row.
    fn measure(
        &mut self,
        case: &Case,
        between: &mut dyn FnMut(&mut Engine) -> bool,
        each: &mut dyn FnMut(BenchEvent) -> bool,
    ) -> Result<[Row; 2], Error> {
        let Options { io, policy, lookahead, .. } = *self.options;
        let lookahead = case.variant.lookahead.unwrap_or(lookahead);
        let (io, policy, cache) = match case.cache {
            Some(cache) => (case.variant.io.unwrap_or(io), case.variant.policy.unwrap_or(policy), cache),
            None => (Io::Buffered, PolicyKind::None, CacheBudget::Share(self.top_k_share)),
        };
        let context = Some(self.bench.prompt + self.bench.generate.max(1));
        // The warm row reads the same prompt again.
        let prefix_cache = CacheBudget::Bytes(0);
        let options = Options { io, policy, lookahead, expert_cache: cache, context, parallel: 1, prefix_cache, ..self.options.clone() };
        let threads = options.threads.unwrap_or_else(physical_cores);
        let unloaded = memory_bandwidth(threads, &self.cpus, options.available);
        // The neighbours of a virtual machine come and go: again before and after each row, where the model leaves room for that, and
        // unless the row lives off the page cache, which would make room for it.
        let room = || case.cache.is_some() && available().is_some_and(|left| left >= ROOM);
        let memory = || if room() { memory_bandwidth(threads, &self.cpus, options.available) } else { unloaded };
        self.disk.forget();
        let mut engine = Engine::load(self.dir, &options, &mut |_| ())?;
        let disk_before = self.disk_bandwidth(&engine, each)?;
        engine.force_routing(self.bench.routing.as_deref())?;
        self.disk.forget();
        let mut row = |state| self.row(&mut engine, case, state, between);
        let first = memory();
        let cold = row(State::Cold)?;
        let second = memory();
        let mut rows = [cold, row(State::Warm)?];
        let memory = [(first + second) / 2.0, (second + memory()) / 2.0];
        // A device drifts; what it could give is the better of before and after.
        let disk_bytes_s = disk_before.max(self.disk_bandwidth(&engine, each)?);
        let report = engine.report();
        let machine = Machine {
            memory_bytes_s: memory.iter().sum::<f64>() / 2.0,
            threads: report.threads,
            disk_bytes_s,
            expert_bytes: engine.info().expert_bytes,
            readers: self.options.loaders.max(1),
            io: report.io,
            kernels: report.kernels,
        };
        for (row, memory_bytes_s) in rows.iter_mut().zip(memory) {
            row.decode.iter_mut().for_each(|decode| decode.hold_against(memory_bytes_s, disk_bytes_s));
        }
        tell(each, BenchEvent::Machine(machine))?;
        Ok(rows)
    }

    /// Of the engine's kind of I/O.
    fn disk_bandwidth(&self, engine: &Engine, each: &mut dyn FnMut(BenchEvent) -> bool) -> Result<f64, Error> {
        let io = engine.report().io;
        tell(each, BenchEvent::Progress { stage: format!("measuring the disk ({io})"), done: 0, total: 0 })?;
        self.disk.bandwidth(io, self.options.loaders.max(1))
    }

    fn row(&self, engine: &mut Engine, case: &Case, state: State, between: &mut dyn FnMut(&mut Engine) -> bool) -> Result<Row, Error> {
        let start = Counted::of(engine);
        let (began, mut times, mut failed) = (Instant::now(), Vec::new(), None);
        let mut first = None;
        engine.admit(self.request.clone())?;
        loop {
            let step = engine.step(&mut |_, event| {
                match event {
                    // The last token comes with the end, or just before it if it has a text.
                    Event::Token { .. } if times.len() < self.bench.generate.max(1) => times.push(began.elapsed()),
                    Event::Done(_) if times.len() < self.bench.generate.max(1) => times.push(began.elapsed()),
                    Event::Failed(error) => failed = Some(error),
                    _ => {}
                }
                Delivery::Taken
            });
            if let Some(error) = failed {
                return Err(error);
            }
            if first.is_none() && !times.is_empty() {
                first = Some(Counted::of(engine));
            }
            if step == Step::Idle {
                break;
            }
            if !between(engine) {
                return Err(Error::Cancelled);
            }
        }
        let (first, end) = (first.ok_or_else(|| Error::Internal("a request ended without a token".into()))?, Counted::of(engine));
        let decode = (times.len() > 1).then(|| self.decode(&times, &first, &end, engine));
        Ok(Row {
            cache: case.cache,
            slots: end.report.experts.slots_per_layer,
            state,
            variant: engine.settings(),
            prompt_tokens: self.bench.prompt,
            ttft: times[0],
            prefill_tok_s: self.bench.prompt as f64 / times[0].as_secs_f64(),
            prefill_disk_bytes: first.disk_bytes(&start, engine.report().io),
            decode,
        })
    }

    /// `times`: when each token came; `first`, `end`: counters after the first and after the last one.
    fn decode(&self, times: &[Duration], first: &Counted, end: &Counted, engine: &Engine) -> Decode {
        let from_disk = end.disk_bytes(first, end.report.io) as f64;
        let (first, end) = (&first.report, &end.report);
        let looked = end.lookahead_wanted - first.lookahead_wanted;
        let foreseen = end.lookahead_foreseen - first.lookahead_foreseen;
        let profile = end.profile.since(&first.profile);
        let (first, end) = (&first.experts, &end.experts);
        let tokens = times.len() - 1;
        let time = times[tokens] - times[0];
        let seconds = time.as_secs_f64();
        let (hits, misses) = (end.hits - first.hits, end.misses - first.misses + end.joined - first.joined);
        let wasted = end.prefetch_wasted - first.prefetch_wasted;
        // What a wrong guess read was not needed.
        let needed = (from_disk - (wasted * engine.info().expert_bytes) as f64).max(0.0);
        let bytes_per_token = self.need.bytes(self.bench.prompt as f64 + tokens as f64 / 2.0);
        Decode {
            tokens,
            tok_s: median_speed(times),
            mean_tok_s: tokens as f64 / seconds,
            hit_rate: hits as f64 / (hits + misses).max(1) as f64,
            loaded_bytes_per_token: (end.bytes_read - first.bytes_read) as f64 / tokens as f64,
            disk_bytes_per_token: from_disk / tokens as f64,
            disk_bytes_s: from_disk / seconds,
            wait_share: (end.wait_time - first.wait_time).as_secs_f64() / seconds,
            profile,
            time,
            bytes_per_token,
            needed_bytes_per_token: needed / tokens as f64,
            bounds: Bounds::new((bytes_per_token, f64::INFINITY), (0.0, f64::INFINITY)),
            lookahead_recall: (looked > 0).then(|| foreseen as f64 / looked as f64),
            prefetch_useful: end.prefetch_useful - first.prefetch_useful,
            prefetch_wasted: wasted,
        }
    }
}

/// Counters at one moment.
struct Counted {
    report: Report,
    fetched: Option<Bytes>,
}

impl Counted {
    fn of(engine: &Engine) -> Self {
        Self { report: engine.report(), fetched: fetched() }
    }

    /// What disks gave since `before`. Past the page cache that is what the loaders read; through it, what they read may
    /// have been in memory, and only the system knows.
    fn disk_bytes(&self, before: &Self, io: Io) -> Bytes {
        let known = || Some(self.fetched? - before.fetched?);
        let through = matches!(io, Io::Buffered | Io::Mmap);
        through.then(known).flatten().unwrap_or(self.report.experts.bytes_read - before.report.experts.bytes_read)
    }
}

fn tell(each: &mut dyn FnMut(BenchEvent) -> bool, event: BenchEvent) -> Result<(), Error> {
    if each(event) { Ok(()) } else { Err(Error::Cancelled) }
}

/// Random ids; the same for a seed.
fn prompt(tokens: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    (0..tokens).map(|_| (next() % vocab) as u32).collect()
}

/// Tokens per second of the median of equal windows; `times` has two entries at least.
fn median_speed(times: &[Duration]) -> f64 {
    let size = (times.len() - 1).div_ceil(WINDOWS);
    let speed = |end: usize| size as f64 / (times[end] - times[end - size]).as_secs_f64().max(1e-9);
    // A remainder at the beginning belongs to no window: there the first token still shows.
    let mut speeds: Vec<f64> = (1..times.len()).rev().step_by(size).filter(|end| *end >= size).map(speed).collect();
    speeds.sort_unstable_by(f64::total_cmp);
    speeds[speeds.len() / 2]
}

/// The run whose speed is the median: figures that belong together.
fn median_run(mut rows: Vec<Row>) -> Row {
    let speed = |row: &Row| row.decode.as_ref().map_or(row.prefill_tok_s, |decode| decode.tok_s);
    rows.sort_by(|a, b| speed(a).total_cmp(&speed(b)));
    rows.swap_remove((rows.len() - 1) / 2)
}

#[cfg(test)]
mod tests;
