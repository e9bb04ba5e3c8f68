//! The CPU backend: trunk weights and activations in our own memory, experts in slab slots, a pool of pinned workers.
//!
//! A method is one block of the decoder over the rows of a step. Kernels come from [`simd::Isa`]; nothing here depends
//! on how many rows, threads or sequences share a step.

mod attention;
mod experts;
mod linear;
mod matrix;
mod norm;
mod pool;
mod portable;
mod simd;

use attention::{Kv, Query};
use experts::{Buffers, Record, Work};
use flash_experts::{ExpertId, Slice};
use linear::{Linear, linear};
use matrix::{Acts, Matrix};
pub(crate) use pool::physical_cores;
use pool::{Cells, Pool};
use simd::Isa;

use crate::{
    Bytes, Error, Kernels,
    kv::BlockId,
    model::{
        arch::Arch,
        families::{Ffn, FfnSpec, LayerSpec, Model},
        weights::{Aligned, Format, MatrixSpec, Span, Weights},
    },
    moe::Plan,
};

/// One position of one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) token: u32,
    pub(crate) position: usize,
    /// Index into [`Batch::tables`].
    pub(crate) sequence: usize,
}

/// What a step computes. Rows of a sequence are in position order and follow what its KV blocks hold.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) rows: &'a [Row],
    /// The KV blocks of each sequence.
    pub(crate) tables: &'a [&'a [BlockId]],
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
    embed: Owned,
    head: Option<Owned>,
    norm: Vec<f32>,
    layers: Vec<Layer>,
    inverse_frequencies: Vec<f32>,
    kv: Kv,
    act: Activations,
}

/// A trunk matrix.
#[derive(Debug)]
struct Owned {
    spec: MatrixSpec,
    weight: Aligned,
    scales: Option<Aligned>,
    biases: Option<Aligned>,
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

/// Activations of a step, sized once for the largest step.
#[derive(Debug, Default)]
struct Activations {
    rows: usize,
    /// Residual stream [rows, hidden].
    hidden: Vec<f32>,
    /// Normalised residual [rows, hidden].
    normed: Vec<f32>,
    /// Queries, keys and values of a row side by side [rows, (heads + 2·kv_heads) × head_dim].
    qkv: Vec<f32>,
    /// Heads' outputs [rows, heads × head_dim].
    attended: Vec<f32>,
    /// A block's output before it joins the residual [rows, hidden].
    delta: Vec<f32>,
    /// (cos, sin) of each row's position [rows, head_dim / 2].
    turns: Vec<(f32, f32)>,
    /// Router logits [rows, experts].
    routed: Vec<f32>,
    ffn: Buffers,
    /// [requested rows, vocab].
    logits: Vec<f32>,
    sums: [Vec<f32>; 3],
}

impl Owned {
    fn read(weights: &Weights, spec: &MatrixSpec) -> Result<Self, Error> {
        let read = |span: Span| weights.read(&spec.name, span);
        Ok(Self {
            weight: read(spec.weight)?,
            scales: spec.scales.map(read).transpose()?,
            biases: spec.biases.map(read).transpose()?,
            spec: spec.clone(),
        })
    }

    fn view(&self) -> Matrix<'_> {
        Matrix {
            rows: self.spec.rows,
            cols: self.spec.cols,
            format: self.spec.format,
            weight: self.weight.as_slice(),
            scales: side_of(&self.scales),
            biases: side_of(&self.biases),
        }
    }
}

fn side_of(bytes: &Option<Aligned>) -> &[u8] {
    bytes.as_ref().map_or(&[], Aligned::as_slice)
}

impl Cpu {
    /// Reads the trunk (everything but routed experts) and sizes the activations for steps of `rows_max` rows.
    /// `progress` hears the share read so far.
    pub(crate) fn load(model: &Model, kernels: Kernels, rows_max: usize, progress: &mut dyn FnMut(f64)) -> Result<Self, Error> {
        let (arch, weights) = (&model.arch, &model.weights);
        let isa = if kernels == Kernels::Reference { Isa::PORTABLE } else { Isa::available()[0] };
        let embed = Owned::read(weights, &model.embed)?;
        let head = model.head.as_ref().map(|head| Owned::read(weights, head)).transpose()?;
        let mut layers = Vec::with_capacity(model.layers.len());
        for (index, spec) in model.layers.iter().enumerate() {
            layers.push(Layer::read(weights, spec)?);
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
        let act = Activations::new(&shape, &layers, arch, rows_max);
        let kv = if kernels == Kernels::Reference { Kv::F32(Vec::new()) } else { Kv::F16(Vec::new()) };
        let pool = Pool::new(1).expect("a pool of the calling thread alone starts nothing");
        let norm = weights.read_vector(&model.norm)?;
        Ok(Self { isa, pool, shape, embed, head, norm, layers, inverse_frequencies, kv, act })
    }

    /// Starts the workers; `threads` counts the calling one, which is pinned from now on.
    pub(crate) fn start(&mut self, threads: usize) -> Result<(), Error> {
        self.pool = Pool::new(threads).map_err(|error| Error::Internal(format!("cannot start worker threads: {error}")))?;
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

    pub(crate) fn kernels(&self) -> &'static str {
        self.isa.name
    }

    pub(crate) fn threads(&self) -> usize {
        self.pool.threads()
    }

    pub(crate) fn trunk_bytes(&self) -> Bytes {
        let owned = |m: &Owned| (m.weight.as_slice().len() + side_of(&m.scales).len() + side_of(&m.biases).len()) as Bytes;
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

    pub(crate) fn scratch_bytes(&self) -> Bytes {
        let act = &self.act;
        let floats = [
            &act.hidden,
            &act.normed,
            &act.qkv,
            &act.attended,
            &act.delta,
            &act.routed,
            &act.logits,
            &act.ffn.mid,
            &act.ffn.mid_sums,
            &act.ffn.out,
        ];
        4 * floats.iter().map(|floats| floats.capacity() as Bytes).sum::<Bytes>()
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

    /// Embeds the step's tokens.
    pub(crate) fn begin(&mut self, batch: &Batch<'_>) {
        let (act, hidden) = (&mut self.act, self.shape.hidden);
        act.rows = batch.rows.len();
        act.turns.clear();
        let embed = self.embed.view();
        for (row, out) in batch.rows.iter().zip(act.hidden.chunks_exact_mut(hidden)) {
            embed.dequantize_row(row.token as usize, out);
            norm::turns(row.position as u32, &self.inverse_frequencies, &mut act.turns);
        }
    }

    /// Attention of `layer`, added to the residual.
    pub(crate) fn attention(&mut self, layer: usize, batch: &Batch<'_>) {
        let Self { isa, pool, shape, kv, act, .. } = self;
        let l = &self.layers[layer];
        let (rows, d) = (act.rows, shape.head_dim);
        let (q_width, kv_width) = (shape.heads * d, shape.kv_heads * d);
        let width = q_width + 2 * kv_width;
        normalize(&act.hidden, &l.attn_norm, shape.eps, rows, &mut act.normed);
        {
            let [q_sums, k_sums, v_sums] = &mut act.sums;
            let x = &act.normed[..rows * shape.hidden];
            let out = Cells::new(&mut act.qkv);
            let acts = |owned: &Owned, sums| Acts::grouped(x, shape.hidden, owned.view().group(), sums);
            let jobs = [
                Linear { w: l.q.view(), x: acts(&l.q, q_sums), out: &out, width, at: 0 },
                Linear { w: l.k.view(), x: acts(&l.k, k_sums), out: &out, width, at: q_width },
                Linear { w: l.v.view(), x: acts(&l.v, v_sums), out: &out, width, at: q_width + kv_width },
            ];
            linear(pool, isa, rows, &jobs);
        }
        for (i, row) in batch.rows.iter().enumerate() {
            let (qk, v) = act.qkv[i * width..][..width].split_at_mut(q_width + kv_width);
            let turn = &act.turns[i * (d / 2)..][..d / 2];
            for (head, x) in qk.chunks_exact_mut(d).enumerate() {
                norm::rms_norm_in_place(x, if head < shape.heads { &l.q_norm } else { &l.k_norm }, shape.eps);
                norm::rope(x, turn);
            }
            kv.write(shape, layer, batch.tables[row.sequence], row.position, &qk[q_width..], v);
        }
        {
            let (kv, qkv) = (&*kv, &act.qkv);
            let out = Cells::new(&mut act.attended);
            pool.run(rows * shape.kv_heads, &|task| {
                let (i, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
                let row = &batch.rows[i];
                let q = Query { heads: &qkv[i * width..][..q_width], position: row.position, table: batch.tables[row.sequence] };
                kv.attend(isa, shape, layer, kv_head, &q, (&out, i * q_width));
            });
        }
        let x = Acts::grouped(&act.attended[..rows * q_width], q_width, l.o.view().group(), &mut act.sums[0]);
        let out = Cells::new(&mut act.delta);
        linear(pool, isa, rows, &[Linear { w: l.o.view(), x, out: &out, width: shape.hidden, at: 0 }]);
        add(&mut act.hidden, &act.delta, rows * shape.hidden);
    }

    /// Router logits [rows, experts] of an MoE layer; `None` for a dense one.
    pub(crate) fn route(&mut self, layer: usize) -> Option<&[f32]> {
        let Self { isa, pool, shape, act, .. } = self;
        let l = &self.layers[layer];
        normalize(&act.hidden, &l.ffn_norm, shape.eps, act.rows, &mut act.normed);
        let LayerFfn::Moe { router, .. } = &l.ffn else { return None };
        let x = Acts::grouped(&act.normed[..act.rows * shape.hidden], shape.hidden, router.view().group(), &mut act.sums[0]);
        let out = Cells::new(&mut act.routed);
        linear(pool, isa, act.rows, &[Linear { w: router.view(), x, out: &out, width: shape.experts, at: 0 }]);
        Some(&act.routed[..act.rows * shape.experts])
    }

    /// The feed-forward of a dense layer, added to the residual.
    pub(crate) fn dense(&mut self, layer: usize) {
        let Self { isa, pool, shape, act, .. } = self;
        let LayerFfn::Dense(ffn) = &self.layers[layer].ffn else { return };
        let [gate, up, down] = ffn;
        let rows: Vec<u32> = (0..act.rows as u32).collect();
        let work = Work { gate: gate.view(), up: up.view(), down: down.view(), tokens: &rows, places: &rows };
        let x = Acts::grouped(&act.normed[..act.rows * shape.hidden], shape.hidden, gate.view().group(), &mut act.sums[0]);
        experts::feed_forward(pool, isa, &[work], &x, &mut act.ffn);
        add(&mut act.hidden, &act.ffn.out, act.rows * shape.hidden);
    }

    /// Runs the experts whose slots are given, for all the rows routed to them; results wait for [`Cpu::combine`].
    pub(crate) fn experts(&mut self, layer: usize, plan: &Plan, ready: &[(ExpertId, &[u8])]) {
        let Self { isa, pool, shape, act, .. } = self;
        let LayerFfn::Moe { record, .. } = &self.layers[layer].ffn else { return };
        let works: Vec<Work<'_>> = ready
            .iter()
            .map(|(expert, slot)| {
                let (tokens, places) = plan.rows_of(*expert);
                Work { gate: record.gate.matrix(slot), up: record.up.matrix(slot), down: record.down.matrix(slot), tokens, places }
            })
            .collect();
        if works.is_empty() {
            return;
        }
        let x = Acts::grouped(&act.normed[..act.rows * shape.hidden], shape.hidden, works[0].gate.group(), &mut act.sums[0]);
        experts::feed_forward(pool, isa, &works, &x, &mut act.ffn);
    }

    /// Adds every row's weighted experts to the residual, in rank order; rows the plan left out stay as they are.
    pub(crate) fn combine(&mut self, plan: &Plan) {
        let (hidden, top_k) = (self.shape.hidden, self.shape.top_k);
        for (row, out) in self.act.hidden.chunks_exact_mut(hidden).take(self.act.rows).enumerate() {
            for (rank, weight) in plan.weights(row).iter().enumerate() {
                let from = &self.act.ffn.out[(row * top_k + rank) * hidden..][..hidden];
                for (out, value) in out.iter_mut().zip(from) {
                    *out += weight * value;
                }
            }
        }
    }

    /// Logits [rows.len(), vocab] of the given rows of the step.
    pub(crate) fn logits(&mut self, rows: &[usize]) -> &[f32] {
        let Self { isa, pool, shape, act, .. } = self;
        for (i, &row) in rows.iter().enumerate() {
            norm::rms_norm(
                &act.hidden[row * shape.hidden..][..shape.hidden],
                &self.norm,
                shape.eps,
                &mut act.normed[i * shape.hidden..][..shape.hidden],
            );
        }
        act.logits.resize(rows.len().max(1) * shape.vocab, 0.0);
        let head = self.head.as_ref().unwrap_or(&self.embed).view();
        let x = Acts::grouped(&act.normed[..rows.len() * shape.hidden], shape.hidden, head.group(), &mut act.sums[0]);
        let out = Cells::new(&mut act.logits);
        linear(pool, isa, rows.len(), &[Linear { w: head, x, out: &out, width: shape.vocab, at: 0 }]);
        &act.logits[..rows.len() * shape.vocab]
    }
}

impl Layer {
    fn read(weights: &Weights, spec: &LayerSpec) -> Result<Self, Error> {
        let matrix = |spec: &MatrixSpec| Owned::read(weights, spec);
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

impl Activations {
    fn new(shape: &Shape, layers: &[Layer], arch: &Arch, rows: usize) -> Self {
        let dense = layers.iter().map(|layer| if let LayerFfn::Dense(ffn) = &layer.ffn { ffn[0].spec.rows } else { 0 }).max().unwrap_or(0);
        let mid = rows * dense.max(shape.top_k * arch.moe_width);
        let floats = |count: usize| vec![0.0f32; count];
        Self {
            rows: 0,
            hidden: floats(rows * shape.hidden),
            normed: floats(rows * shape.hidden),
            qkv: floats(rows * (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
            attended: floats(rows * shape.heads * shape.head_dim),
            delta: floats(rows * shape.hidden),
            turns: Vec::new(),
            routed: floats(rows * shape.experts),
            // Groups have at least 32 columns.
            ffn: Buffers { mid: floats(mid), mid_sums: floats(mid.div_ceil(32)), out: floats(rows * shape.top_k.max(1) * shape.hidden) },
            logits: Vec::new(),
            sums: Default::default(),
        }
    }
}

/// RMSNorm of every row.
fn normalize(x: &[f32], weight: &[f32], eps: f32, rows: usize, out: &mut [f32]) {
    let hidden = weight.len();
    for (x, out) in x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden)).take(rows) {
        norm::rms_norm(x, weight, eps, out);
    }
}

fn add(to: &mut [f32], from: &[f32], count: usize) {
    for (to, from) in to[..count].iter_mut().zip(from) {
        *to += from;
    }
}
