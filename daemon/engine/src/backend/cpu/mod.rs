//! The CPU backend: trunk weights and activations in our own memory, experts in slab slots, a pool of pinned workers.
//!
//! A method is one block of the decoder over some rows of a pass. Kernels come from [`Isa`]; nothing here depends
//! on how many rows, threads or sequences share a pass, nor on the pieces it is computed in.

mod attention;
mod blocks;
mod experts;
mod linear;
mod pool;
mod speed;

use std::{ops::Range, time::Instant};

use attention::{Kv, Queries};
use experts::{Buffers, Work, Works};
use flash_experts::{ExpertId, Slice};
use flash_kernels::{
    Isa,
    matrix::{Matrix, Piece, Prepared, size},
    norm,
};
use linear::{Linear, linear, prepare};
use pool::{Cells, Pool, TASK_ROWS};
pub(crate) use pool::{allowed_cpus, physical_cores, pin};
pub use speed::{Attention, Decoded, FeedForwards, Multiplied, Products};

use crate::{
    Bytes, Error, Kernels,
    backend::{Batch, record::Record},
    kv::BlockId,
    model::{
        arch::Arch,
        families::{Ffn, FfnSpec, LayerSpec, Model},
        weights::{Arena, Format, MatrixSpec, Part, Span, Weights},
    },
    moe::Plan,
    profile::{Profile, Stage},
};

/// Rows of attention computed together at most: what a piece keeps between its products stays small.
pub(crate) const PIECE_MAX: usize = 256;
/// Expert rows computed together at most, for the same reason.
pub(crate) const PLACES_MAX: usize = 1024;

/// The instruction set for a choice of kernels.
fn isa_of(kernels: Kernels) -> Isa {
    match kernels {
        Kernels::Reference => Isa::PORTABLE,
        Kernels::FastMath => Isa::fast_math().unwrap_or(Isa::available()[0]),
        _ => Isa::available()[0],
    }
}

/// The figures that kernels need.
#[derive(Clone, Debug)]
struct Shape {
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    eps: f32,
    top_k: usize,
    experts: usize,
}

/// Weights, activations and KV cache of a loaded model.
#[derive(Debug)]
pub(crate) struct Cpu {
    isa: Isa,
    pool: Pool,
    shape: Shape,
    trunk: Arena,
    embed: Owned,
    head: Option<Owned>,
    norm: Vec<f32>,
    layers: Vec<Layer>,
    inverse_frequencies: Vec<f32>,
    kv: Kv,
    scratch: Scratch,
    pub(crate) profile: Profile,
}

/// A trunk matrix.
#[derive(Debug)]
struct Owned {
    spec: MatrixSpec,
    weight: Part,
    scales: Option<Part>,
    biases: Option<Part>,
}

#[derive(Debug)]
struct Layer {
    attn_norm: Vec<f32>,
    q: Owned,
    k: Owned,
    v: Owned,
    o: Owned,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    ffn_norm: Vec<f32>,
    ffn: LayerFfn,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one a layer, never moved")]
enum LayerFfn {
    /// gate, up, down
    Dense([Owned; 3]),
    Moe {
        router: Owned,
        record: Record,
    },
}

/// What a pass keeps from layer to layer, for all its rows.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    /// Residual stream [rows, hidden].
    hidden: Vec<f32>,
    /// Normalised residual [rows, hidden], as the feed-forward reads it.
    normed: Vec<f32>,
    /// (cos, sin) of each row's position [rows, head_dim / 2].
    turns: Vec<(f32, f32)>,
    /// `normed` as experts' gates read it.
    prepared: Prepared,
    /// Experts' outputs by rank [rows, top_k, hidden].
    out: Vec<f32>,
}

/// What lives no longer than a call; sized once for the largest piece.
#[derive(Debug)]
struct Scratch {
    /// Normalised rows of the piece [rows, hidden].
    normed: Vec<f32>,
    /// Queries, keys and values of a row side by side [rows, (heads + 2·kv_heads) × head_dim].
    qkv: Vec<f32>,
    /// Heads' outputs [rows, heads × head_dim].
    attended: Vec<f32>,
    /// A block's output before it joins the residual [rows, hidden].
    delta: Vec<f32>,
    /// Router logits [rows, experts].
    routed: Vec<f32>,
    attention: attention::Work,
    ffn: Buffers,
    /// [requested rows, vocab].
    logits: Vec<f32>,
    prepared: [Prepared; 3],
}

impl Owned {
    fn read(weights: &Weights, spec: &MatrixSpec, trunk: &mut Arena) -> Result<Self, Error> {
        let mut read = |span: Span| weights.read(&spec.name, span, trunk);
        Ok(Self {
            weight: read(spec.weight)?,
            scales: spec.scales.map(&mut read).transpose()?,
            biases: spec.biases.map(&mut read).transpose()?,
            spec: spec.clone(),
        })
    }

    fn view<'a>(&self, trunk: &'a Arena) -> Matrix<'a> {
        let side = |part: Option<Part>| part.map_or(&[][..], |part| trunk.get(part));
        Matrix {
            rows: self.spec.rows,
            cols: self.spec.cols,
            format: self.spec.format,
            weight: trunk.get(self.weight),
            scales: side(self.scales),
            biases: side(self.biases),
            then: None,
        }
    }
}

impl Cpu {
    /// Reads the trunk (everything but routed experts); `progress` hears the share read so far.
    pub(crate) fn load(model: &Model, kernels: Kernels, progress: &mut dyn FnMut(f64)) -> Result<Self, Error> {
        let (arch, weights) = (&model.arch, &model.weights);
        let isa = isa_of(kernels);
        let mut trunk = Arena::default();
        let embed = Owned::read(weights, &model.embed, &mut trunk)?;
        let head = model.head.as_ref().map(|head| Owned::read(weights, head, &mut trunk)).transpose()?;
        let mut layers = Vec::with_capacity(model.layers.len());
        for (index, spec) in model.layers.iter().enumerate() {
            layers.push(Layer::read(weights, spec, &mut trunk)?);
            progress((index + 1) as f64 / model.layers.len() as f64);
        }
        let shape = Shape {
            layers: layers.len(),
            hidden: arch.hidden,
            heads: arch.heads,
            kv_heads: arch.kv_heads,
            head_dim: arch.head_dim,
            vocab: arch.vocab,
            eps: arch.rms_eps,
            top_k: arch.top_k,
            experts: arch.experts,
        };
        let half = arch.head_dim / 2;
        let inverse_frequencies = (0..half).map(|i| arch.rope_theta.powf(-((2 * i) as f32) / arch.head_dim as f32)).collect();
        let scratch = Scratch::new(&shape, &layers, arch);
        let kv = Kv::new(kernels, &isa);
        let pool = Pool::new(1).expect("a pool of the calling thread alone starts nothing");
        let norm = weights.read_vector(&model.norm)?;
        Ok(Self { isa, pool, shape, trunk, embed, head, norm, layers, inverse_frequencies, kv, scratch, profile: Profile::default() })
    }

    /// Starts the workers; `threads` counts the calling one, which is pinned from now on.
    pub(crate) fn start(&mut self, threads: usize) -> Result<(), Error> {
        self.pool = Pool::new(threads).map_err(|error| Error::Internal(format!("cannot start worker threads: {error}")))?;
        self.scratch.attention = attention::Work::new(&self.shape, attention::UNITS * self.pool.threads());
        Ok(())
    }

    /// Bytes of a slot that holds any routed expert of the model.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.layers.iter().map(|layer| if let LayerFfn::Moe { record, .. } = &layer.ffn { record.bytes } else { 0 }).max().unwrap_or(0)
    }

    /// Which file bytes of a layer's expert go where in a slot.
    pub(crate) fn slices(&self, layer: usize, ffn: &Ffn) -> Option<Vec<Slice>> {
        if let LayerFfn::Moe { record, .. } = &self.layers[layer].ffn { record.slices(ffn) } else { None }
    }

    pub(crate) fn price(&self) -> Option<&'static str> {
        self.isa.price
    }

    pub(crate) fn kernels(&self) -> &'static str {
        self.isa.name
    }

    pub(crate) fn threads(&self) -> usize {
        self.pool.threads()
    }

    pub(crate) fn trunk_bytes(&self) -> Bytes {
        let len = |part: Option<Part>| part.map_or(0, |part| part.len());
        let owned = |m: &Owned| (len(Some(m.weight)) + len(m.scales) + len(m.biases)) as Bytes;
        let layer = |layer: &Layer| {
            let ffn = match &layer.ffn {
                LayerFfn::Dense(ffn) => ffn.iter().map(owned).sum(),
                LayerFfn::Moe { router, .. } => owned(router),
            };
            let norms = layer.attn_norm.len() + layer.q_norm.len() + layer.k_norm.len() + layer.ffn_norm.len();
            owned(&layer.q) + owned(&layer.k) + owned(&layer.v) + owned(&layer.o) + ffn + 4 * norms as Bytes
        };
        owned(&self.embed) + self.head.as_ref().map_or(0, owned) + self.layers.iter().map(layer).sum::<Bytes>()
    }

    /// Of the buffers that every pass uses; [`Cpu::row_bytes`] come on top for each row of a pass.
    pub(crate) fn scratch_bytes(&self) -> Bytes {
        let Scratch { normed, qkv, attended, delta, routed, attention, logits, ffn, .. } = &self.scratch;
        let floats = [normed, qkv, attended, delta, routed, logits, &ffn.mid];
        let Shape { hidden, heads, head_dim, .. } = self.shape;
        let prepared = PIECE_MAX * (2 * Prepared::row_bytes(&self.isa, hidden) + Prepared::row_bytes(&self.isa, heads * head_dim))
            + Prepared::row_bytes(&self.isa, ffn.mid.len());
        attention.bytes() as Bytes + 4 * floats.iter().map(|floats| floats.capacity() as Bytes).sum::<Bytes>() + prepared as Bytes
    }

    /// Of [`Activations`], for one row.
    pub(crate) fn row_bytes(&self) -> Bytes {
        let Shape { hidden, head_dim, top_k, .. } = self.shape;
        (4 * (hidden * (2 + top_k.max(1)) + head_dim) + Prepared::row_bytes(&self.isa, hidden)) as Bytes
    }

    /// Bytes of one KV block of [`crate::kv::BLOCK`] tokens.
    pub(crate) fn kv_block_bytes(&self) -> Bytes {
        self.kv.block_bytes(&self.shape) as Bytes
    }

    pub(crate) fn kv_blocks_used(&self) -> usize {
        self.kv.blocks_used()
    }

    pub(crate) fn free_kv(&mut self, block: BlockId) {
        self.kv.free(block);
    }

    /// Bytes of a KV block that are each layer's.
    pub(crate) fn kv_layers(&self) -> Vec<usize> {
        vec![self.kv.block_bytes(&self.shape) / self.shape.layers; self.shape.layers]
    }

    pub(crate) fn kv_state(&self, block: BlockId, layer: usize) -> &[u8] {
        let bytes = self.kv.block_bytes(&self.shape) / self.shape.layers;
        &self.kv.bytes(block).expect("a computed block")[layer * bytes..][..bytes]
    }

    pub(crate) fn kv_state_mut(&mut self, block: BlockId, layer: usize) -> &mut [u8] {
        let bytes = self.kv.block_bytes(&self.shape) / self.shape.layers;
        &mut self.kv.bytes_mut(&self.shape, block)[layer * bytes..][..bytes]
    }

    /// Sizes `act` for the pass.
    pub(crate) fn begin(&mut self, act: &mut Activations, batch: &Batch) {
        let Shape { hidden, top_k, .. } = self.shape;
        let rows = batch.rows.len();
        size(&mut act.hidden, rows * hidden);
        size(&mut act.normed, rows * hidden);
        size(&mut act.out, rows * top_k.max(1) * hidden);
        act.turns.clear();
    }

    /// Embeds the tokens of the first layer's next piece: of a long prompt all at once would take longer than others can wait.
    fn embed(&self, act: &mut Activations, batch: &Batch, piece: Range<usize>) {
        let hidden = self.shape.hidden;
        let embed = self.embed.view(&self.trunk);
        for (row, out) in batch.rows[piece.clone()].iter().zip(act.hidden[piece.start * hidden..].chunks_exact_mut(hidden)) {
            norm::turns(row.position as u32, &self.inverse_frequencies, &mut act.turns);
            embed.dequantize_row(row.token as usize, out);
        }
    }

    /// Attention of `layer` over a piece of the rows, added to the residual. Rows that are not `alive` take no part: their
    /// KV blocks may belong to others by now.
    pub(crate) fn attention(&mut self, layer: usize, act: &mut Activations, batch: &Batch, alive: &[bool], piece: Range<usize>) {
        let began = Instant::now();
        if layer == 0 {
            self.embed(act, batch, piece.clone());
        }
        let Self { isa, pool, shape, trunk, kv, scratch, profile, .. } = self;
        let l = &self.layers[layer];
        let (rows, d, hidden) = (piece.len(), shape.head_dim, shape.hidden);
        let (q_width, kv_width) = (shape.heads * d, shape.kv_heads * d);
        let width = q_width + 2 * kv_width;
        let (batch_rows, alive) = (&batch.rows[piece.clone()], &alive[piece.clone()]);
        let residual = &mut act.hidden[piece.start * hidden..piece.end * hidden];
        normalize(pool, residual, &l.attn_norm, shape.eps, &mut scratch.normed);
        {
            let x = &scratch.normed[..rows * hidden];
            let out = Cells::new(&mut scratch.qkv);
            let [q, k, v] = &mut scratch.prepared;
            let formats = [&l.q, &l.k, &l.v].map(|owned| owned.spec.format);
            let q_acts = prepare((pool, isa), q, x, hidden, formats[0]);
            // Most models quantise all three alike.
            let other = |prepared, format| if format == formats[0] { q_acts } else { prepare((pool, isa), prepared, x, hidden, format) };
            let jobs = [
                Linear { w: l.q.view(trunk), x: q_acts, out: &out, width, at: 0 },
                Linear { w: l.k.view(trunk), x: other(k, formats[1]), out: &out, width, at: q_width },
                Linear { w: l.v.view(trunk), x: other(v, formats[2]), out: &out, width, at: q_width + kv_width },
            ];
            linear(pool, isa, rows, &jobs);
        }
        let turns = &act.turns[piece.start * d / 2..];
        let of_rows = scratch.qkv[..rows * width].chunks_mut(TASK_ROWS * width).zip(turns.chunks(TASK_ROWS * d / 2));
        pool.each(of_rows, |(qkv, turns)| {
            for (qkv, turns) in qkv.chunks_exact_mut(width).zip(turns.chunks_exact(d / 2)) {
                for (head, x) in qkv[..q_width + kv_width].chunks_exact_mut(d).enumerate() {
                    norm::rms_norm_in_place(x, if head < shape.heads { &l.q_norm } else { &l.k_norm }, shape.eps);
                    norm::rope(x, turns);
                }
            }
        });
        let began = profile.add(Stage::Projections, began);
        for (i, row) in batch_rows.iter().enumerate().filter(|(i, _)| alive[*i]) {
            let (k, v) = scratch.qkv[i * width..][q_width..width].split_at(kv_width);
            kv.write(shape, layer, &batch.tables[row.sequence], row.position, k, v);
        }
        {
            let (kv, qkv) = (&*kv, &scratch.qkv);
            let out = Cells::new(&mut scratch.attended);
            let queries = Queries { shape, layer, heads: qkv, width, rows: batch_rows, alive, tables: &batch.tables };
            kv.attend((pool, isa), &queries, &mut scratch.attention, &out);
        }
        let began = profile.add(Stage::Attention, began);
        let x = prepare((pool, isa), &mut scratch.prepared[0], &scratch.attended[..rows * q_width], q_width, l.o.spec.format);
        let out = Cells::new(&mut scratch.delta);
        linear(pool, isa, rows, &[Linear { w: l.o.view(trunk), x, out: &out, width: hidden, at: 0 }]);
        add(residual, &scratch.delta);
        profile.add(Stage::Projections, began);
    }

    /// Normalises a piece of the rows for the feed-forward and gives its router logits [rows, experts]; `None` for a dense
    /// layer.
    pub(crate) fn route(&mut self, layer: usize, act: &mut Activations, piece: Range<usize>) -> Option<&[f32]> {
        let Self { isa, pool, shape, trunk, scratch, .. } = self;
        let l = &self.layers[layer];
        let hidden = shape.hidden;
        let normed = &mut act.normed[piece.start * hidden..piece.end * hidden];
        normalize(pool, &act.hidden[piece.start * hidden..piece.end * hidden], &l.ffn_norm, shape.eps, normed);
        let format = match &l.ffn {
            LayerFfn::Dense([gate, ..]) => gate.spec.format,
            LayerFfn::Moe { record, .. } => record.gate.format,
        };
        act.prepared.resize(isa, act.hidden.len() / hidden, hidden, format);
        pool.each(act.prepared.pieces(isa, piece.start, normed, TASK_ROWS), Piece::fill);
        let LayerFfn::Moe { router, .. } = &l.ffn else { return None };
        let x = prepare((pool, isa), &mut scratch.prepared[0], normed, hidden, router.spec.format);
        let out = Cells::new(&mut scratch.routed);
        linear(pool, isa, piece.len(), &[Linear { w: router.view(trunk), x, out: &out, width: shape.experts, at: 0 }]);
        Some(&scratch.routed[..piece.len() * shape.experts])
    }

    /// Logits [rows, experts] of a later layer's router on today's residual: what that layer will probably choose
    /// (arXiv 2603.19289). For passes of at most [`PIECE_MAX`] rows; `None` for a dense layer.
    pub(crate) fn foresee(&mut self, layer: usize, act: &Activations) -> Option<&[f32]> {
        let Self { isa, pool, shape, trunk, scratch, .. } = self;
        let l = &self.layers[layer];
        let LayerFfn::Moe { router, .. } = &l.ffn else { return None };
        let rows = act.hidden.len() / shape.hidden;
        normalize(pool, &act.hidden, &l.ffn_norm, shape.eps, &mut scratch.normed);
        let x = prepare((pool, isa), &mut scratch.prepared[0], &scratch.normed[..rows * shape.hidden], shape.hidden, router.spec.format);
        let out = Cells::new(&mut scratch.routed);
        linear(pool, isa, rows, &[Linear { w: router.view(trunk), x, out: &out, width: shape.experts, at: 0 }]);
        Some(&scratch.routed[..rows * shape.experts])
    }

    /// The feed-forward of a dense layer over a piece of the rows, added to the residual.
    pub(crate) fn dense(&mut self, layer: usize, act: &mut Activations, piece: Range<usize>) {
        let Self { isa, pool, shape, trunk, scratch, .. } = self;
        let LayerFfn::Dense([gate, up, down]) = &self.layers[layer].ffn else { return };
        let hidden = shape.hidden;
        let mut rows = [0; PIECE_MAX];
        let rows = &mut rows[..piece.len()];
        rows.iter_mut().zip(piece.clone()).for_each(|(id, row)| *id = row as u32);
        let work = Work { gate: gate.view(trunk), up: up.view(trunk), down: down.view(trunk), tokens: rows, places: rows, first: 0 };
        let x = act.prepared.acts(&act.normed);
        experts::feed_forward(pool, isa, &[work], &x, &mut scratch.ffn, &mut act.out);
        add(&mut act.hidden[piece.start * hidden..piece.end * hidden], &act.out[piece.start * hidden..]);
    }

    /// Runs experts, whose slots' bytes `slot` gives, for all the rows routed to them; results wait for [`Cpu::combine`].
    pub(crate) fn experts<'a>(
        &mut self,
        layer: usize,
        act: &mut Activations,
        plan: &Plan,
        ready: &[ExpertId],
        slot: &dyn Fn(ExpertId) -> &'a [u8],
    ) {
        let Self { isa, pool, scratch, .. } = self;
        let LayerFfn::Moe { record, .. } = &self.layers[layer].ffn else { return };
        let x = act.prepared.acts(&act.normed);
        let mut works = Works::new_const();
        let mut places_taken = 0;
        for expert in ready {
            let bytes = slot(*expert);
            let (gate, up, down) = (record.gate.matrix(bytes), record.up.matrix(bytes), record.down.matrix(bytes));
            let (tokens, places) = plan.rows_of(*expert);
            for (tokens, places) in tokens.chunks(PLACES_MAX).zip(places.chunks(PLACES_MAX)) {
                if places_taken + places.len() > PLACES_MAX || works.is_full() {
                    experts::feed_forward(pool, isa, &works, &x, &mut scratch.ffn, &mut act.out);
                    works.clear();
                    places_taken = 0;
                }
                works.push(Work { gate, up, down, tokens, places, first: places_taken });
                places_taken += places.len();
            }
        }
        if !works.is_empty() {
            experts::feed_forward(pool, isa, &works, &x, &mut scratch.ffn, &mut act.out);
        }
    }

    /// Adds every row's weighted experts to the residual, in rank order; rows the plan left out stay as they are.
    pub(crate) fn combine(&mut self, act: &mut Activations, plan: &Plan) {
        let Shape { hidden, top_k, .. } = self.shape;
        let of_rows = act.hidden.chunks_mut(TASK_ROWS * hidden).zip(act.out.chunks(TASK_ROWS * top_k * hidden)).enumerate();
        self.pool.each(of_rows, |(task, (hidden_of, out_of))| {
            let rows = hidden_of.chunks_exact_mut(hidden).zip(out_of.chunks_exact(top_k * hidden)).enumerate();
            for (row, (sum, out)) in rows.map(|(row, of)| (task * TASK_ROWS + row, of)) {
                for (weight, out) in plan.weights(row).iter().zip(out.chunks_exact(hidden)) {
                    for (sum, value) in sum.iter_mut().zip(out) {
                        *sum += weight * value;
                    }
                }
            }
        });
    }

    /// Logits [rows.len(), vocab] of some rows of a finished pass, at most [`PIECE_MAX`].
    pub(crate) fn logits(&mut self, act: &Activations, rows: Range<usize>) -> &[f32] {
        let began = Instant::now();
        let Self { isa, pool, shape, trunk, scratch, .. } = self;
        let hidden = shape.hidden;
        for (row, out) in rows.clone().zip(scratch.normed.chunks_exact_mut(hidden)) {
            norm::rms_norm(&act.hidden[row * hidden..][..hidden], &self.norm, shape.eps, out);
        }
        scratch.logits.resize(rows.len().max(1) * shape.vocab, 0.0);
        let head = self.head.as_ref().unwrap_or(&self.embed).view(trunk);
        let x = prepare((pool, isa), &mut scratch.prepared[0], &scratch.normed[..rows.len() * hidden], hidden, head.format);
        let out = Cells::new(&mut scratch.logits);
        linear(pool, isa, rows.len(), &[Linear { w: head, x, out: &out, width: shape.vocab, at: 0 }]);
        self.profile.add(Stage::Head, began);
        &scratch.logits[..rows.len() * shape.vocab]
    }
}

impl Layer {
    fn read(weights: &Weights, spec: &LayerSpec, trunk: &mut Arena) -> Result<Self, Error> {
        let mut matrix = |spec: &MatrixSpec| Owned::read(weights, spec, trunk);
        let ffn = match &spec.ffn {
            FfnSpec::Dense(ffn) => {
                shared_groups(weights, ffn)?;
                LayerFfn::Dense([matrix(&ffn.gate)?, matrix(&ffn.up)?, matrix(&ffn.down)?])
            }
            FfnSpec::Moe { router, experts } => {
                shared_groups(weights, &experts[0])?;
                LayerFfn::Moe { router: matrix(router)?, record: Record::new(&experts[0]) }
            }
        };
        Ok(Self {
            attn_norm: weights.read_vector(&spec.attn_norm)?,
            q: matrix(&spec.q)?,
            k: matrix(&spec.k)?,
            v: matrix(&spec.v)?,
            o: matrix(&spec.o)?,
            q_norm: weights.read_vector(&spec.q_norm)?,
            k_norm: weights.read_vector(&spec.k_norm)?,
            ffn_norm: weights.read_vector(&spec.ffn_norm)?,
            ffn,
        })
    }
}

/// gate and up read the same activations, with one set of group sums.
fn shared_groups(weights: &Weights, ffn: &Ffn) -> Result<(), Error> {
    let group = |spec: &MatrixSpec| if let Format::Affine { group, .. } = spec.format { group } else { 0 };
    if group(&ffn.gate) == group(&ffn.up) {
        return Ok(());
    }
    let path = weights.files()[ffn.up.weight.file as usize].clone();
    Err(Error::Tensor { path, tensor: ffn.up.name.clone(), reason: "its quantisation group differs from gate_proj's".into() })
}

impl Scratch {
    fn new(shape: &Shape, layers: &[Layer], arch: &Arch) -> Self {
        let dense = layers.iter().map(|layer| if let LayerFfn::Dense(ffn) = &layer.ffn { ffn[0].spec.rows } else { 0 }).max().unwrap_or(0);
        let mid = (PIECE_MAX * dense).max(PLACES_MAX * arch.moe_width);
        let floats = |count: usize| vec![0.0f32; count];
        Self {
            normed: floats(PIECE_MAX * shape.hidden),
            qkv: floats(PIECE_MAX * (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
            attended: floats(PIECE_MAX * shape.heads * shape.head_dim),
            delta: floats(PIECE_MAX * shape.hidden),
            routed: floats(PIECE_MAX * shape.experts),
            attention: attention::Work::new(shape, attention::UNITS),
            ffn: Buffers { mid: floats(mid), prepared: Prepared::default() },
            logits: Vec::new(),
            prepared: Default::default(),
        }
    }
}

/// RMSNorm of every row of `x`.
fn normalize(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let hidden = weight.len();
    pool.each(x.chunks(TASK_ROWS * hidden).zip(out.chunks_mut(TASK_ROWS * hidden)), |(x, out)| {
        for (x, out) in x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden)) {
            norm::rms_norm(x, weight, eps, out);
        }
    });
}

/// As many as `to` has.
fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}
