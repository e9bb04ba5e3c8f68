//! The engine: admits requests, computes one step at a time, and says what happened.
//!
//! Synchronous and single-threaded at the seam: the caller's thread owns it. A step takes every running request one
//! token (or one chunk of its prompt, or the tokens of 25 ms, see `apart.rs`) further; whatever else happens, happens between steps.

mod apart;
mod decode;
mod reuse;
mod room;
mod said;
mod score;
mod source;

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use flash_experts::{ExpertId, Experts, Hot, Io, PolicyKind, Storage, replay::Trace};

use crate::{
    Bytes, CacheBudget, Delivery, Error, Event, Lookahead, ModelInfo, Options, Report, Request, RequestId, Split, Step, Text, TokenLogprob,
    backend::{
        Backend, Row,
        cpu::{PIECE_MAX, physical_cores},
    },
    bench::Variant,
    forward::{Cut, Forward, Pass},
    kv::BLOCK,
    memory::{SlabShape, available},
    model::families::{FfnSpec, Model},
    moe::{Forced, Router},
    profile::Stage,
    schedule::{CHUNK_MIN, Pace, Trials, Waiting, Worth, chunk, slice},
    sequence::{Counters, Sequence},
    storage,
};
use apart::Own;
use reuse::Reuse;
use room::kv_bytes;
use said::{note, say};
use source::source;

/// What `auto` divides where neither the caller nor the system says what is available.
const AVAILABLE_UNKNOWN: Bytes = 8 << 30;

/// Share of the slab that the activations of long prompts may take besides.
const CHUNK_SHARE: Bytes = 4;

/// Positions of a prompt whose logits are computed together: a vocabulary is long.
const SCORED: usize = 16;

/// Default limit of a request, prompt and completion, below the model's own.
const CONTEXT_DEFAULT: usize = 32 * 1024;

/// A loaded model and its requests.
#[derive(Debug)]
pub struct Engine {
    info: ModelInfo,
    text: Arc<Text>,
    /// Before the backend, which may own its slots: fields go in this order.
    experts: Experts,
    backend: Backend,
    /// How they are read.
    io: Io,
    forward: Forward,
    slab: SlabShape,
    context: usize,
    options: Options,
    /// Slots per layer that the setting asks for; fixed when it is set, because `auto` looks at memory that the slab
    /// itself will take.
    wanted: usize,
    /// Why there are fewer: the backend had no memory for them when they were asked for.
    refused: Option<Error>,
    /// Pressure's limit on the slab.
    ceiling: Option<Bytes>,
    /// Whose KV blocks are, and which prefixes they hold.
    reuse: Reuse,
    running: Vec<Sequence>,
    /// Every decoding sequence's next position, computed together.
    decoding: Pass,
    /// What threads use that decode apart.
    owns: Vec<Mutex<Own>>,
    /// How often they have met.
    meetings: usize,
    /// An expert was not in memory when they met last.
    missed: bool,
    /// Tokens that were decoded so.
    apart: u64,
    trials: Trials,
    /// Which of the running sequences reads its prompt next: they take turns.
    turn: usize,
    /// How prompts are cut up while others decode.
    pace: Pace,
    worth: Worth,
    waiting: Waiting<Sequence>,
    next_id: u64,
    scratch: Vec<f32>,
}

impl Engine {
    /// Loads everything but the routed experts from a folder with config.json, safetensors and tokenizer files;
    /// `progress` hears the share done, 0.0..=1.0.
    pub fn load(dir: &Path, options: &Options, progress: &mut dyn FnMut(f64)) -> Result<Self, Error> {
        let model = Model::open(dir)?;
        let io = storage::choose(&model, options);
        Self::load_model(model, options, &|path| flash_experts::open(path, io), progress)
    }

    /// As [`Engine::load`], reading experts through the storage that `open` gives for each weight file.
    pub fn load_from(
        dir: &Path,
        options: &Options,
        open: &dyn Fn(&Path) -> io::Result<Box<dyn Storage>>,
        progress: &mut dyn FnMut(f64),
    ) -> Result<Self, Error> {
        Self::load_model(Model::open(dir)?, options, open, progress)
    }

    fn load_model(
        model: Model,
        options: &Options,
        open: &dyn Fn(&Path) -> io::Result<Box<dyn Storage>>,
        progress: &mut dyn FnMut(f64),
    ) -> Result<Self, Error> {
        let text = Arc::new(Text::open(&model.info.path)?);
        let threads = options.threads.unwrap_or_else(physical_cores).max(1);
        let backend = Backend::load(&model, options.kernels, threads, progress)?;
        let moe_layers = model.layers.iter().filter(|layer| matches!(layer.ffn, FfnSpec::Moe { .. })).count();
        if moe_layers == 0 {
            return Err(Error::Unsupported {
                path: model.info.path.join("config.json"),
                reason: "the model has no routed experts; flashd serves Mixture-of-Experts models".into(),
            });
        }
        let slots = backend.slab(moe_layers, model.arch.experts).map_err(Arc::new)?;
        let slab = SlabShape {
            layers: moe_layers,
            experts: model.arch.experts,
            stride: (slots.stride_bytes() + backend.beside_slot_bytes()) as Bytes,
        };
        let config =
            flash_experts::Config { top_k: model.arch.top_k, slots_per_layer: 1, loaders: options.loaders.max(1), policy: options.policy };
        let source = source(&model, &backend, open)?;
        let io = source.files.first().map_or(Io::Auto, |file| file.kind());
        let experts = Experts::open(source, slots, config).map_err(Arc::new)?;
        let router = Router { experts: model.arch.experts, top_k: model.arch.top_k, normalize: model.arch.norm_topk_prob };
        let available = options.available.or_else(available).unwrap_or(AVAILABLE_UNKNOWN);
        let reuse = Reuse::new(&backend, &model, options, available);
        let context = options.context.unwrap_or(CONTEXT_DEFAULT).clamp(1, model.arch.context_max);
        let mut engine = Self {
            text,
            forward: Forward::new(router, model.layers.iter().map(|layer| matches!(layer.ffn, FfnSpec::Moe { .. }))),
            info: model.info,
            backend,
            experts,
            io,
            slab,
            context,
            options: options.clone(),
            wanted: 1,
            refused: None,
            ceiling: None,
            reuse,
            running: Vec::new(),
            decoding: Pass::default(),
            owns: Vec::new(),
            meetings: 0,
            missed: false,
            apart: 0,
            trials: Trials::default(),
            turn: 0,
            pace: Pace::SHORT,
            worth: Worth::default(),
            waiting: Waiting::default(),
            next_id: 0,
            scratch: Vec::new(),
        };
        engine.fits(options.memory)?;
        engine.backend.set_slots(&mut engine.experts, 1)?;
        engine.set_cache(options.expert_cache);
        if let Some(refused) = engine.refused.take() {
            return Err(refused);
        }
        Ok(engine)
    }

    /// Tokenizer, template and defaults; usable from any thread.
    pub fn text(&self) -> Arc<Text> {
        self.text.clone()
    }

    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Tokens of a request at most, prompt and completion.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Equal fingerprints, seeds and requests give equal tokens.
    pub fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        let info = &self.info;
        (&info.id, info.size_bytes, &info.quantization, flash_kernels::RESULTS, self.backend.kernels()).hash(&mut hasher);
        format!("fp_{:012x}", hasher.finish() >> 16)
    }

    /// What the user should know about the settings, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let (slots, top_k) = (self.experts.slots(), self.info.top_k);
        let mut warnings: Vec<String> = self.refused.iter().map(|refused| format!("{refused}; {slots} stay")).collect();
        if slots < top_k {
            warnings.push(format!(
                "the expert cache holds {slots} experts a layer, fewer than the {top_k} a token needs ({} for one token's working set): every layer runs in several waves",
                mib(self.slab.bytes(top_k))
            ));
        }
        warnings
    }

    /// Queues a request; with its name comes the number of requests ahead of it. What can be refused is refused here.
    pub fn admit(&mut self, request: Request) -> Result<(RequestId, usize), Error> {
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err(Error::EmptyPrompt);
        }
        self.check_ids(&request.prompt)?;
        if prompt >= self.context {
            return Err(Error::ContextLength { prompt, limit: self.context });
        }
        let ahead = self.waiting.len();
        // Free places count: a burst on an idle engine is admitted before the first step takes anyone up.
        if ahead >= self.options.queue + self.options.parallel.saturating_sub(self.running.len()) {
            return Err(Error::QueueFull { waiting: ahead });
        }
        let max_tokens = request.max_tokens.unwrap_or(usize::MAX).clamp(1, self.context - prompt);
        let client = request.client.clone();
        let mut sequence = Sequence::new(RequestId(self.next_id), request, max_tokens, self.options.script.clone());
        sequence.price = self.backend.price();
        if let Some(cap) = self.options.memory {
            let needed = kv_bytes(self.backend.kv_block_bytes(), sequence.positions());
            let left = cap.saturating_sub(self.fixed_bytes() + self.slab.bytes(self.least_slots()));
            if needed > left {
                return Err(Error::Memory { what: "KV cache of this request", needed, left });
            }
        }
        let id = sequence.id;
        self.next_id += 1;
        self.waiting.push(client, sequence);
        Ok((id, ahead + self.running.len()))
    }

    /// Forgets a request and frees what it held.
    pub fn cancel(&mut self, id: RequestId) {
        if self.waiting.remove(|sequence| sequence.id == id).is_none() {
            self.retire(&HashSet::from([id]));
        }
    }

    /// The receiver of a request that answered [`Delivery::Full`] has room again.
    pub fn resume(&mut self, id: RequestId) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.paused = false;
        }
    }

    /// The configured size of the expert cache, from the next step on.
    pub fn set_cache(&mut self, budget: CacheBudget) {
        let available = self.options.available.or_else(available).unwrap_or(AVAILABLE_UNKNOWN);
        self.wanted = self.slab.wanted(budget, available);
        self.refused = None;
        self.settle();
    }

    /// The cap on trunk + slab + KV + scratch, from the next step on.
    pub fn set_memory(&mut self, cap: Option<Bytes>) {
        self.options.memory = cap;
        self.settle();
    }

    /// Pressure's limit on the slab, whatever is configured; `None` = none.
    pub fn set_ceiling(&mut self, bytes: Option<Bytes>) {
        self.ceiling = bytes;
        self.settle();
        self.backend.relieve();
    }

    /// Evicts every expert and forgets what was learned about them: a cold cache.
    pub fn clear_cache(&mut self) {
        self.experts.clear();
    }

    pub fn set_lookahead(&mut self, lookahead: Lookahead) {
        self.options.lookahead = lookahead;
    }

    pub fn set_split(&mut self, split: Split) {
        self.trials.split = split;
    }

    pub fn set_policy(&mut self, policy: PolicyKind) {
        self.experts.set_policy(policy);
    }

    /// What the cache knows and holds, to be kept for the next time.
    pub fn hot(&self) -> Hot {
        self.experts.hot()
    }

    /// Takes over what [`Engine::hot`] kept, and has it read back while the disk idles.
    pub fn warm(&mut self, hot: Hot) {
        self.experts.warm(&hot);
    }

    /// The routing of the latest decoded tokens.
    pub fn recent(&self) -> Trace {
        self.experts.recent()
    }

    /// Replaces the routers' choices by a recording, ids [tokens, MoE layers, top_k], which starts over at its end; `None` =
    /// the model's own routing. For measurements: what the model says is nonsense then.
    pub fn force_routing(&mut self, ids: Option<&[u16]>) -> Result<(), Error> {
        let (layers, top_k, experts) = (self.slab.layers, self.info.top_k, self.info.experts);
        self.distrust();
        let Some(ids) = ids else {
            self.forward.forced = None;
            return Ok(());
        };
        let fits = |choice: &[u16]| {
            let once = |(i, id): (usize, &u16)| usize::from(*id) < experts && !choice[..i].contains(id);
            choice.iter().enumerate().all(once)
        };
        if ids.is_empty() || !ids.len().is_multiple_of(layers * top_k) || !ids.chunks(top_k).all(fits) {
            let wants = "a recording of this model's shape: as many MoE layers, top_k distinct experts in each, none beyond the last";
            return Err(Error::Setting { value: format!("routing of {} choices", ids.len()), wants });
        }
        let chosen = ids.iter().map(|id| ExpertId(*id)).collect();
        self.forward.forced = Some(Arc::new(Forced::new(chosen, layers, top_k)));
        Ok(())
    }

    /// What a bench names beside its figures.
    pub(crate) fn settings(&self) -> Variant {
        let Options { policy, lookahead, .. } = self.options;
        Variant { io: Some(self.io), policy: Some(policy), lookahead: Some(lookahead) }
    }

    /// Takes every decoding request a token further, or some, prompts a little, and hands the events to `deliver`, from whatever thread.
    pub fn step(&mut self, deliver: &mut (dyn FnMut(RequestId, Event) -> Delivery + Send)) -> Step {
        self.start_waiting();
        let mut gone = HashSet::new();
        let start = Instant::now();
        let decoded = self.decode(&mut gone, deliver).then(|| start.elapsed());
        let read = self.prefill(decoded, &mut gone, deliver);
        self.retire(&gone);
        let worked = decoded.is_some() || read;
        if self.write_back(!worked) || worked { Step::Worked } else { Step::Idle }
    }

    /// Reads on in one prompt, for a slice of time; false if there is none to read.
    fn prefill(
        &mut self,
        decoded: Option<Duration>,
        gone: &mut HashSet<RequestId>,
        deliver: &mut dyn FnMut(RequestId, Event) -> Delivery,
    ) -> bool {
        let reads = |sequence: &Sequence| sequence.prefilling() && !sequence.paused;
        let count = self.running.len();
        let turns = (self.turn..self.turn + count).map(|i| i % count);
        let Some(index) = turns.filter(|&i| reads(&self.running[i])).find(|&i| !self.waits(i)) else { return false };
        self.turn = index + 1;
        let slice = slice(decoded);
        let end = Instant::now() + slice;
        if !self.backend.lazy() {
            self.pace.aim(slice);
        }
        let begun = self.running[index].pass.take();
        if begun.is_none() && !self.reuse(index, end) {
            let Sequence { id, cached, prompt, .. } = self.running[index];
            let delivery = deliver(id, Event::Prefill { done: cached, total: prompt });
            note(&mut self.running[index], delivery, gone);
            return true;
        }
        let mut pass = begun.unwrap_or_else(|| self.begin_chunk(index, decoded.is_some()));
        let mut long = Pace::LONG;
        let pace = if decoded.is_some() { &mut self.pace } else { &mut long };
        let mut cut = Cut { pace, end: Some(end) };
        let done = self.forward.advance(&mut self.backend, &mut self.experts, &mut pass, &mut cut);
        let sequence = &mut self.running[index];
        sequence.hurried |= decoded.is_some();
        let id = sequence.id;
        if let Some(lost) = pass.lost.pop() {
            self.backend.settle(&mut pass.act);
            self.experts.release();
            deliver(id, Event::Failed(Error::Experts(lost.error)));
            gone.insert(id);
            return true;
        }
        let rows = pass.batch.rows.len();
        if done {
            sequence.cached += rows;
            if !sequence.hurried && rows == CHUNK_MIN {
                sequence.on_grid = sequence.cached;
            }
            self.publish(index);
        }
        let sequence = &mut self.running[index];
        if done {
            if sequence.record {
                deliver(id, pass.routing(0..rows));
            }
            if sequence.scored {
                let logprobs = score(&mut self.backend, sequence, &mut pass, self.info.vocab_size);
                deliver(id, Event::Prompt(logprobs));
            }
            if !sequence.prefilling() {
                let now = counters(&self.experts);
                let logits = self.backend.logits(&mut pass.act, rows - 1..rows);
                self.experts.release();
                let began = Instant::now();
                say(sequence, &self.text, logits, now, &mut self.scratch, gone, deliver);
                self.backend.spent(Stage::Sampling, began);
                drop(pass);
                self.settle();
                return true;
            }
            self.backend.settle(&mut pass.act);
            self.experts.release();
        }
        let read = sequence.cached + if done { 0 } else { (rows as f64 * pass.progress(self.forward.layers())) as usize };
        if !done {
            sequence.pass = Some(pass);
        }
        let delivery = deliver(id, Event::Prefill { done: read, total: sequence.prompt });
        note(sequence, delivery, gone);
        true
    }

    /// The next chunk of a prompt, as long as the memory allows. While others decode it is no longer than lets an expert's rows fit into
    /// a piece: a piece is one expert at least.
    fn begin_chunk(&mut self, index: usize, shared: bool) -> Box<Pass> {
        let row_bytes = self.backend.row_bytes();
        // Idle blocks make room.
        let spare =
            self.options.memory.map(|cap| cap.saturating_sub(self.fixed_bytes() + self.busy_bytes() + self.slab.bytes(self.least_slots())));
        let share = (self.slab.bytes(self.experts.slots()) / CHUNK_SHARE).saturating_sub(self.passes_bytes());
        let sequence = &self.running[index];
        let (from, table, record, scored) = (sequence.cached, sequence.blocks.clone(), sequence.record, sequence.scored);
        let left = sequence.prompt - from;
        // MLX chooses kernels by shape: what the cache may take must not decide on the bits.
        let rows = if self.backend.lazy() {
            left.min(CHUNK_MIN)
        } else {
            let rows = chunk(left, row_bytes, spare.map_or(share, |spare| spare.min(share)));
            let most = self.pace.chunk(self.info.experts, self.info.top_k);
            // Where experts are read from disk, a chunk of some length is worth others' waiting.
            let least = if self.experts.slots() < self.info.experts { CHUNK_MIN } else { 2 * BLOCK };
            // And all logits of a chunk are computed at once.
            let most = if scored { 2 * BLOCK } else { most.max(least) };
            let rows = if shared { rows.min(most) } else { rows };
            // At the end of a block: what others compute can be taken up there.
            if rows < left { rows - (from + rows) % BLOCK } else { rows }
        };
        let mut pass = Box::<Pass>::default();
        // The slab makes room before the memory is taken: `settle` counts what a sequence's pass says.
        pass.batch.rows = (from..from + rows).map(|position| Row { token: sequence.tokens[position], position, sequence: 0 }).collect();
        self.running[index].pass = Some(pass);
        self.settle();
        let mut pass = self.running[index].pass.take().expect("put there above");
        let rows = std::mem::take(&mut pass.batch.rows);
        pass.start(&mut self.backend, record, |batch| {
            batch.rows = rows;
            batch.tables.push(table);
        });
        pass
    }

    /// Counters and gauges; cheap enough to take after every step.
    pub fn report(&self) -> Report {
        let kv_blocks = self.backend.kv_blocks_used();
        Report {
            running: self.running.len(),
            waiting: self.waiting.len(),
            context_used: self.running.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0),
            trunk_bytes: self.backend.trunk_bytes(),
            kv_bytes: kv_blocks as Bytes * self.backend.kv_block_bytes(),
            kv_reserved_bytes: self.busy_bytes(),
            kv_blocks,
            kv_busy_blocks: kv_blocks.saturating_sub(self.reuse.blocks.idle()),
            scratch_bytes: self.fixed_bytes() - self.backend.trunk_bytes() + self.passes_bytes(),
            kernels: self.backend.kernels().into(),
            threads: self.backend.threads(),
            mlx: self.backend.mlx(),
            io: self.io,
            lookahead_wanted: self.forward.foresight.wanted,
            lookahead_foreseen: self.forward.foresight.foreseen,
            decoded_apart: self.apart,
            profile: self.backend.profile(),
            experts: self.experts.stats(),
            prefix: self.prefix_report(),
        }
    }

    /// Starts waiting requests while there is room for them.
    fn start_waiting(&mut self) {
        while self.running.len() < self.options.parallel.clamp(1, PIECE_MAX) {
            let (cap, slab, block) = (self.options.memory, self.slab.bytes(self.least_slots()), self.backend.kv_block_bytes());
            let taken = self.fixed_bytes() + slab + self.busy_bytes();
            let Self { waiting, reuse, .. } = self;
            let fits = |sequence: &Sequence| cap.is_none_or(|cap| taken + reuse.needed(sequence) as Bytes * block <= cap);
            let Some(mut sequence) = waiting.pop_if(fits) else { return };
            reuse.start(&mut sequence);
            self.settle();
            sequence.start(counters(&self.experts));
            self.running.push(sequence);
        }
    }

    fn retire(&mut self, gone: &HashSet<RequestId>) {
        if gone.is_empty() {
            return;
        }
        let (out, stay) = std::mem::take(&mut self.running).into_iter().partition(|sequence| gone.contains(&sequence.id));
        self.running = stay;
        let out: Vec<Sequence> = out;
        for sequence in out {
            self.end(sequence);
        }
        self.settle();
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), Error> {
        let vocab = self.info.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::TokenId { id: *id, vocab }),
            None => Ok(()),
        }
    }
}

/// Log-probabilities of the tokens after a finished chunk's positions, as far as they are the prompt's, and before the first one's NaN.
fn score(backend: &mut Backend, sequence: &Sequence, pass: &mut Pass, vocab: usize) -> Vec<TokenLogprob> {
    let rows = pass.batch.rows.len();
    let from = sequence.cached - rows;
    // What follows the last one is drawn.
    let rows = rows.min(sequence.prompt - 1 - from);
    let first = (from == 0).then(|| TokenLogprob { id: sequence.tokens[0], logprob: f32::NAN, top: Vec::new() });
    let mut logprobs: Vec<_> = first.into_iter().collect();
    for at in (0..rows).step_by(SCORED) {
        let logits = backend.logits(&mut pass.act, at..(at + SCORED).min(rows));
        logprobs.extend(sequence.score(from + at, logits, vocab));
    }
    logprobs
}

fn counters(experts: &Experts) -> Counters {
    let (hits, misses, bytes) = experts.counters();
    Counters { hits, misses, bytes }
}

fn mib(bytes: Bytes) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}
