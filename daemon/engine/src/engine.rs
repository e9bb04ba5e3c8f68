//! The engine: admits requests, computes one step at a time, and says what happened.
//!
//! Synchronous and single-threaded at the seam: the caller's thread owns it. A step takes every running request one
//! token (or one chunk of its prompt) further; whatever else happens, happens between steps.

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::Path,
    sync::Arc,
};

use flash_experts::{Experts, Pread, Slab, Source, Storage};

use crate::{
    Bytes, CacheBudget, Delivery, Error, Event, ModelInfo, Options, Report, Request, RequestId, Step, Text,
    backend::cpu::{Batch, Cpu, Row},
    forward::Forward,
    kv::{BLOCK, BlockId, Blocks},
    memory::{SlabShape, available},
    model::families::{FfnSpec, Model},
    moe::Router,
    schedule::{ROWS_MAX, Waiting, Wants, rows},
    sequence::{Counters, Sequence},
};

/// What `auto` divides where neither the caller nor the system says what is available.
const AVAILABLE_UNKNOWN: Bytes = 8 << 30;

/// Default limit of a request, prompt and completion, below the model's own.
const CONTEXT_DEFAULT: usize = 32 * 1024;

/// A loaded model and its requests.
#[derive(Debug)]
pub struct Engine {
    info: ModelInfo,
    text: Arc<Text>,
    cpu: Cpu,
    experts: Experts,
    forward: Forward,
    slab: SlabShape,
    context: usize,
    options: Options,
    /// Slots per layer that the setting asks for; fixed when it is set, because `auto` looks at memory that the slab
    /// itself will take.
    wanted: usize,
    /// Pressure's limit on the slab.
    ceiling: Option<Bytes>,
    blocks: Blocks,
    running: Vec<Sequence>,
    waiting: Waiting<Sequence>,
    next_id: u64,
    scratch: Vec<f32>,
}

impl Engine {
    /// Loads everything but the routed experts from a folder with config.json, safetensors and tokenizer files;
    /// `progress` hears the share done, 0.0..=1.0.
    pub fn load(dir: &Path, options: &Options, progress: &mut dyn FnMut(f64)) -> Result<Self, Error> {
        Self::load_from(dir, options, &|path| Ok(Box::new(Pread::open(path)?)), progress)
    }

    /// As [`Engine::load`], reading experts through the storage that `open` gives for each weight file.
    pub fn load_from(
        dir: &Path,
        options: &Options,
        open: &dyn Fn(&Path) -> io::Result<Box<dyn Storage>>,
        progress: &mut dyn FnMut(f64),
    ) -> Result<Self, Error> {
        let model = Model::open(dir)?;
        let text = Arc::new(Text::open(dir)?);
        let threads = options.threads.unwrap_or_else(crate::backend::cpu::physical_cores).max(1);
        let cpu = Cpu::load(&model, options.kernels, ROWS_MAX.max(options.parallel), progress)?;
        let moe_layers = model.layers.iter().filter(|layer| matches!(layer.ffn, FfnSpec::Moe { .. })).count();
        if moe_layers == 0 {
            return Err(Error::Unsupported {
                path: dir.join("config.json"),
                reason: "the model has no routed experts; flashd serves Mixture-of-Experts models".into(),
            });
        }
        let anonymous = Slab::anonymous(cpu.slot_bytes(), moe_layers * model.arch.experts).map_err(Arc::new)?;
        let slab = SlabShape { layers: moe_layers, experts: model.arch.experts, stride: anonymous.stride_bytes() as Bytes };
        let config = flash_experts::Config { top_k: model.arch.top_k, slots_per_layer: 1, loaders: options.loaders.max(1) };
        let experts = Experts::open(source(&model, &cpu, open)?, anonymous, config).map_err(Arc::new)?;
        let router = Router { experts: model.arch.experts, top_k: model.arch.top_k, normalize: model.arch.norm_topk_prob };
        let context = options.context.unwrap_or(CONTEXT_DEFAULT).clamp(1, model.arch.context_max);
        let mut engine = Self {
            text,
            forward: Forward::new(router, model.layers.iter().map(|layer| matches!(layer.ffn, FfnSpec::Moe { .. }))),
            info: model.info,
            cpu,
            experts,
            slab,
            context,
            options: options.clone(),
            wanted: 1,
            ceiling: None,
            blocks: Blocks::default(),
            running: Vec::new(),
            waiting: Waiting::default(),
            next_id: 0,
            scratch: Vec::new(),
        };
        let least = engine.fixed_bytes() + engine.slab.bytes(1);
        if let Some(cap) = options.memory.filter(|cap| *cap < least) {
            return Err(Error::Memory { what: "weights, scratch and one expert a layer", needed: least, left: cap });
        }
        engine.set_cache(options.expert_cache);
        // Last, because it pins this thread and the loaders' threads inherit that.
        engine.cpu.start(threads)?;
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
        (&info.id, info.size_bytes, &info.quantization, env!("CARGO_PKG_VERSION"), self.cpu.kernels()).hash(&mut hasher);
        format!("fp_{:012x}", hasher.finish() >> 16)
    }

    /// What the user should know about the settings, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let (slots, top_k) = (self.experts.slots(), self.info.top_k);
        let mut warnings = Vec::new();
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
        let sequence = Sequence::new(RequestId(self.next_id), request, max_tokens);
        if let Some(cap) = self.options.memory {
            let needed = kv_bytes(self.cpu.kv_block_bytes(), sequence.positions());
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
    }

    /// Takes every running request one step further and hands its events to `deliver`.
    pub fn step(&mut self, deliver: &mut dyn FnMut(RequestId, Event) -> Delivery) -> Step {
        self.start_waiting();
        let wants: Vec<Wants> = self.running.iter().map(wants).collect();
        let counts = rows(&wants);
        if counts.iter().all(|count| *count == 0) {
            return Step::Idle;
        }
        let mut batch_rows = Vec::with_capacity(counts.iter().sum());
        for (sequence, (running, count)) in self.running.iter().zip(&counts).enumerate() {
            let positions = running.cached..running.cached + count;
            batch_rows.extend(positions.map(|position| Row { token: running.tokens[position], position, sequence }));
        }
        let tables: Vec<&[BlockId]> = self.running.iter().map(|sequence| &sequence.blocks[..]).collect();
        let lost = self.forward.run(&mut self.cpu, &mut self.experts, &Batch { rows: &batch_rows, tables: &tables });
        let mut gone = HashSet::new();
        for lost in lost {
            let id = self.running[lost.sequence].id;
            deliver(id, Event::Failed(Error::Experts(lost.error)));
            gone.insert(id);
        }
        self.emit(&counts, &mut gone, deliver);
        self.retire(&gone);
        Step::Worked
    }

    /// After a forward pass: draws tokens where a row was the last known one, and delivers.
    fn emit(&mut self, counts: &[usize], gone: &mut HashSet<RequestId>, deliver: &mut dyn FnMut(RequestId, Event) -> Delivery) {
        let mut end = 0;
        let (mut rows, mut drawing) = (Vec::new(), Vec::new());
        for (sequence, count) in self.running.iter_mut().zip(counts) {
            end += count;
            sequence.cached += count;
            let draws = *count > 0 && sequence.cached == sequence.tokens.len() && !gone.contains(&sequence.id);
            if draws {
                rows.push(end - 1);
            }
            drawing.push(draws);
        }
        let now = counters(&self.experts);
        let mut logits = self.cpu.logits(&rows).chunks_exact(self.info.vocab_size);
        for ((sequence, count), draws) in self.running.iter_mut().zip(counts).zip(drawing) {
            let id = sequence.id;
            if *count == 0 || gone.contains(&id) {
                continue;
            }
            let delivery = if !draws {
                deliver(id, Event::Prefill { done: sequence.cached, total: sequence.prompt })
            } else {
                let logits = logits.next().expect("one row of logits for each that draws");
                match sequence.advance(&self.text, logits, &mut self.scratch) {
                    None => {
                        deliver(id, Event::Failed(Error::Internal("the model's logits are not finite".into())));
                        Delivery::Gone
                    }
                    Some(said) => {
                        let mut delivery = Delivery::Taken;
                        if said.finish.is_none() || !said.text.is_empty() || !said.logprobs.is_empty() {
                            delivery = deliver(id, Event::Token { text: said.text, logprobs: said.logprobs });
                        }
                        if let (Some(finish), true) = (said.finish, delivery != Delivery::Gone) {
                            deliver(id, Event::Done(sequence.done(finish, now)));
                            delivery = Delivery::Gone;
                        }
                        delivery
                    }
                }
            };
            match delivery {
                Delivery::Taken => {}
                Delivery::Full => sequence.paused = true,
                Delivery::Gone => drop(gone.insert(id)),
            }
        }
    }

    /// Counters and gauges; cheap enough to take after every step.
    pub fn report(&self) -> Report {
        let block_bytes = self.cpu.kv_block_bytes();
        Report {
            running: self.running.len(),
            waiting: self.waiting.len(),
            context_used: self.running.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0),
            trunk_bytes: self.cpu.trunk_bytes(),
            kv_bytes: self.cpu.kv_blocks_used() as Bytes * block_bytes,
            kv_reserved_bytes: self.blocks.reserved() as Bytes * block_bytes,
            scratch_bytes: self.cpu.scratch_bytes(),
            kernels: self.cpu.kernels().into(),
            threads: self.cpu.threads(),
            experts: self.experts.stats(),
        }
    }

    /// Reads `tokens` from an empty context and hands `each` the logits after every position ≥ `from`. For accuracy
    /// measurements; running requests wait.
    pub fn score(&mut self, tokens: &[u32], from: usize, each: &mut dyn FnMut(usize, &[f32])) -> Result<(), Error> {
        self.check_ids(tokens)?;
        let blocks = self.blocks.take(tokens.len());
        let mut result = Ok(());
        for (chunk, part) in tokens.chunks(ROWS_MAX).enumerate() {
            let first = chunk * ROWS_MAX;
            let rows: Vec<Row> =
                part.iter().enumerate().map(|(i, token)| Row { token: *token, position: first + i, sequence: 0 }).collect();
            let batch = Batch { rows: &rows, tables: &[&blocks] };
            if let Some(lost) = self.forward.run(&mut self.cpu, &mut self.experts, &batch).pop() {
                result = Err(Error::Experts(lost.error));
                break;
            }
            for row in (0..rows.len()).filter(|row| first + row >= from) {
                each(first + row, self.cpu.logits(&[row]));
            }
        }
        self.free(&blocks);
        result
    }

    /// Starts waiting requests while there is room for them.
    fn start_waiting(&mut self) {
        while self.running.len() < self.options.parallel.max(1) {
            let (cap, slab, block) = (self.options.memory, self.slab.bytes(self.least_slots()), self.cpu.kv_block_bytes());
            let taken = self.fixed_bytes() + slab + self.blocks.reserved() as Bytes * block;
            let fits = |sequence: &Sequence| cap.is_none_or(|cap| taken + kv_bytes(block, sequence.positions()) <= cap);
            let Some(mut sequence) = self.waiting.pop_if(fits) else { return };
            sequence.blocks = self.blocks.take(sequence.positions());
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
            self.free(&sequence.blocks);
        }
        self.settle();
    }

    fn free(&mut self, blocks: &[BlockId]) {
        for block in blocks {
            self.cpu.free_kv(*block);
        }
        self.blocks.give_back(blocks);
    }

    /// Makes the slab as large as setting, cap and pressure allow together.
    fn settle(&mut self) {
        let wanted = self.wanted;
        let kv = self.blocks.reserved() as Bytes * self.cpu.kv_block_bytes();
        let left = self.options.memory.map(|cap| cap.saturating_sub(self.fixed_bytes() + kv));
        let limit = left.into_iter().chain(self.ceiling).min();
        let slots = limit.map_or(wanted, |bytes| wanted.min(self.slab.slots_in(bytes))).max(1);
        self.experts.set_wanted(wanted);
        if slots != self.experts.slots() {
            self.experts.set_slots(slots);
        }
    }

    /// What a full cache may shrink to so that another request fits: one token's working set.
    fn least_slots(&self) -> usize {
        self.info.top_k.min(self.wanted)
    }

    /// Resident whatever happens: weights and scratch.
    fn fixed_bytes(&self) -> Bytes {
        self.cpu.trunk_bytes() + self.cpu.scratch_bytes()
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), Error> {
        let vocab = self.info.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::TokenId { id: *id, vocab }),
            None => Ok(()),
        }
    }
}

fn kv_bytes(block_bytes: Bytes, positions: usize) -> Bytes {
    positions.div_ceil(BLOCK) as Bytes * block_bytes
}

fn wants(sequence: &Sequence) -> Wants {
    if sequence.paused {
        Wants::Nothing
    } else if sequence.prefilling() {
        Wants::Prefill(sequence.prompt - sequence.cached)
    } else {
        Wants::Decode
    }
}

fn counters(experts: &Experts) -> Counters {
    let stats = experts.stats();
    Counters { hits: stats.hits, misses: stats.misses, bytes: stats.bytes_read }
}

/// Where every routed expert's bytes lie, for the slots of this backend.
fn source(model: &Model, cpu: &Cpu, open: &dyn Fn(&Path) -> io::Result<Box<dyn Storage>>) -> Result<Source, Error> {
    let read = |path: &Path| open(path).map_err(|source| Error::Read { path: path.into(), source });
    let files = model.weights.files().iter().map(|path| read(path)).collect::<Result<_, _>>()?;
    let mut layers = Vec::new();
    for (index, layer) in model.layers.iter().enumerate() {
        let FfnSpec::Moe { experts, .. } = &layer.ffn else { continue };
        let mut records = Vec::with_capacity(experts.len());
        for ffn in experts {
            records.push(cpu.slices(index, ffn).ok_or_else(|| Error::Tensor {
                path: model.info.path.clone(),
                tensor: ffn.gate.name.clone(),
                reason: "its shape or quantisation differs from the layer's first expert".into(),
            })?);
        }
        layers.push(records);
    }
    Ok(Source { files, layers })
}

fn mib(bytes: Bytes) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}
