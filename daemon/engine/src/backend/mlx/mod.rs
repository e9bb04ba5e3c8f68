//! The MLX backend, by mlx-rs: Metal on a Mac, MLX's CPU library elsewhere. MLX builds a graph and computes it when somebody
//! asks for a value: a layer of a prompt asks once, for its router's logits, a decode step for as many layers as it hopes to
//! find in memory (`ahead.rs`). The engine's thread owns every array: MLX's evaluation has raced across threads
//! (oxiglade/mlx-rs#349). Loader threads write into slots, by address, and nothing else.
//!
//! What MLX computes must not depend on what is resident, down to the bits, so no shape does and no choice between kernels:
//! an expert is computed for the same rows in one product, whenever it arrives.

pub(crate) mod ahead;
mod attention;
mod experts;
mod weights;

use std::ops::Range;

use ahead::Routed;
use attention::{Kv, Run};
use experts::Bank;
use flash_experts::{BankPtr, ExpertId, Experts, Slice, Slot};
use mlx_rs::{
    Array, Device, DeviceType, Dtype,
    error::Exception,
    fast, memory,
    ops::{
        self, concatenate,
        indexing::{Ellipsis, TryIndexOp},
    },
    transforms::{async_eval, eval},
};
use weights::{Matrix, vector};

use crate::{
    Bytes, Error, MlxReport,
    backend::{Batch, record::Record},
    kv::BlockId,
    model::{
        arch::Arch,
        families::{Ffn, FfnSpec, LayerSpec, Model},
        weights::{Format, Weights},
    },
    moe::Plan,
    profile::Profile,
};

type Result<T> = std::result::Result<T, Exception>;

/// Passes of more rows run an expert's rows together; fewer, each row's experts.
const GATHER_ROWS: usize = 16;

/// Of the events that say which products a layer asks MLX for.
const TRACE: &str = "flash_engine::mlx";

/// What MLX may keep of freed memory.
const CACHE: usize = 32 << 20;

/// Weights, KV cache and expert slots of a loaded model.
#[derive(Debug)]
pub(crate) struct Mlx {
    arch: Arch,
    kernels: String,
    dtype: Dtype,
    embed: Matrix,
    head: Option<Matrix>,
    norm: Array,
    layers: Vec<Layer>,
    /// Of all layers, those with routed experts.
    moe_layers: usize,
    stride: usize,
    kv: Kv,
    /// The latest router's or head's result, kept for as long as the engine looks at it.
    read: Array,
    /// The next layer's router on the latest residual, computed with this layer's because somebody asked for the last one.
    foreseen: Option<(usize, Array)>,
    foresees: bool,
    /// Times that the host waited for a result.
    syncs: u64,
    pub(crate) profile: Profile,
}

#[derive(Debug)]
struct Layer {
    attn_norm: Array,
    /// Queries, keys and values.
    qkv: Vec<Matrix>,
    o: Matrix,
    /// Of queries' and keys' heads [heads + kv_heads, head_dim].
    qk_norm: Array,
    ffn_norm: Array,
    ffn: LayerFfn,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one a layer, never moved")]
enum LayerFfn {
    /// gate, up, down
    Dense([Matrix; 3]),
    Moe {
        router: Matrix,
        record: Record,
        bank: Option<Bank>,
    },
}

/// What a pass keeps from layer to layer.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    /// Residual stream [rows, hidden] as the layer found it.
    before: Option<Array>,
    /// The same with what the layer has added so far, in the pieces that it was computed in.
    hidden: Vec<Array>,
    /// `hidden` normalised, as the feed-forward reads it.
    normed: Vec<Array>,
    /// Experts' results [places, hidden], and which places they are.
    outs: Vec<Array>,
    places: Vec<u32>,
    /// Of a decode step, what was computed ahead: layers from `first` on, and logits if it came as far.
    first: usize,
    routed: Vec<Option<Routed>>,
    foreseen: Option<Array>,
    logits: Option<Array>,
    /// The pass before, until MLX has something to do.
    last: Option<Box<Activations>>,
}

impl Mlx {
    /// Reads the trunk (everything but routed experts); `progress` hears the share read so far.
    pub(crate) fn load(model: &Model, progress: &mut dyn FnMut(f64)) -> std::result::Result<Self, Error> {
        let (arch, weights) = (&model.arch, &model.weights);
        let cpu = on_cpu().map_err(failed)?;
        memory::set_cache_limit(CACHE).map_err(failed)?;
        // MLX's CPU products add up in the type of their operands, which costs 5% in bf16; Metal's do not.
        let dtype = match model.embed.format {
            _ if cpu => Dtype::Float32,
            Format::F32 => Dtype::Float32,
            Format::F16 => Dtype::Float16,
            Format::Bf16 => Dtype::Bfloat16,
            Format::Affine { params, .. } => weights::dtype_of(params),
        };
        let embed = Matrix::read(weights, &model.embed, dtype)?;
        let head = model.head.as_ref().map(|head| Matrix::read(weights, head, dtype)).transpose()?;
        let norm = vector(weights, &model.norm, dtype)?;
        let mut layers = Vec::with_capacity(model.layers.len());
        for (index, spec) in model.layers.iter().enumerate() {
            let layer = Layer::read(arch, weights, spec, dtype)?;
            // Else MLX would keep both what was read and what it is to become.
            eval(layer.arrays()).map_err(failed)?;
            layers.push(layer);
            progress((index + 1) as f64 / model.layers.len() as f64);
        }
        eval(embed.arrays().chain(head.iter().flat_map(Matrix::arrays)).chain([&norm])).map_err(failed)?;
        let trunk = layers.iter().flat_map(Layer::arrays).chain(embed.arrays()).map(Array::nbytes).sum::<usize>();
        // The trunk stays in memory, the cache of experts can go. Older systems cannot be told so.
        if !cpu && let Err(error) = memory::set_wired_limit(trunk) {
            tracing::warn!(%error, trunk, "the trunk is not wired");
        }
        let records = || layers.iter().filter_map(Layer::record);
        let stride = records().map(|record| record.bytes.next_multiple_of(rustix::param::page_size())).max().unwrap_or(0);
        Ok(Self {
            kernels: format!("mlx {} {}", if cpu { "cpu" } else { "metal" }, name_of(dtype)),
            dtype,
            moe_layers: records().count(),
            stride,
            kv: Kv::new(layers.len(), [arch.kv_heads, arch.head_dim], dtype),
            arch: arch.clone(),
            embed,
            head,
            norm,
            layers,
            read: Array::from_int(0),
            foreseen: None,
            foresees: false,
            syncs: 0,
            profile: Profile::default(),
        })
    }

    /// Bytes of a slot that holds any routed expert of the model: whole pages, so that reads can go past the page cache.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.stride
    }

    /// What a slot takes in other places: scales and biases that had to be widened.
    pub(crate) fn beside_slot_bytes(&self) -> usize {
        let widened = |record: &Record| [&record.gate, &record.up, &record.down].map(|place| place.widened_bytes(self.dtype)).iter().sum();
        self.layers.iter().filter_map(Layer::record).map(widened).max().unwrap_or(0)
    }

    /// Which file bytes of a layer's expert go where in a slot.
    pub(crate) fn slices(&self, layer: usize, ffn: &Ffn) -> Option<Vec<Slice>> {
        self.layers[layer].record()?.slices(ffn)
    }

    /// Gives every layer memory for that many experts; what stays is copied to it, a layer at a time. If there is not as much,
    /// all keep the number that they had, with nothing in memory.
    pub(crate) fn set_slots(&mut self, experts: &mut Experts, per_layer: usize) -> std::result::Result<(), Error> {
        let before = experts.slots();
        let Err(refused) = self.set_banks(experts, per_layer) else { return Ok(()) };
        if self.banks().any(|bank| bank.is_some()) {
            self.banks().for_each(|bank| *bank = None);
            experts.clear();
            must(memory::clear_cache().and_then(|()| self.set_banks(experts, before)));
        }
        let bytes = (per_layer * self.moe_layers * self.stride) as u64;
        let source =
            std::io::Error::other(format!("MLX has no memory for {per_layer} experts a layer ({refused}); ask for a smaller cache"));
        Err(std::sync::Arc::new(flash_experts::Error::Slab { bytes, source }).into())
    }

    fn set_banks(&mut self, experts: &mut Experts, per_layer: usize) -> Result<()> {
        let (stride, dtype) = (self.stride, self.dtype);
        let ffns = self.layers.iter_mut().map(|layer| &mut layer.ffn);
        let mut moe = ffns.filter_map(|ffn| if let LayerFfn::Moe { record, bank, .. } = ffn { Some((&*record, bank)) } else { None });
        experts.set_banks(per_layer, |_, slots, copy| {
            let (record, bank) = moe.next().expect("as many banks as layers with experts");
            let (new, first) = Bank::new(record, slots, stride, dtype)?;
            // SAFETY: zeroed slots, which stay until they are replaced below another time; the engine drops its experts before
            // its backend. MLX writes no array that has been evaluated, and reads a bank when it computes `Mlx::experts`,
            // which says how long that can be. A bank that `set_slots` drops is replaced before anything is fetched.
            copy(unsafe { BankPtr::new(first) });
            *bank = Some(new);
            Ok(())
        })
    }

    fn banks(&mut self) -> impl Iterator<Item = &mut Option<Bank>> {
        self.layers.iter_mut().filter_map(|layer| if let LayerFfn::Moe { bank, .. } = &mut layer.ffn { Some(bank) } else { None })
    }

    pub(crate) fn kernels(&self) -> &str {
        &self.kernels
    }

    /// That compute for us: MLX's own are not ours to count.
    pub(crate) fn threads(&self) -> usize {
        1
    }

    pub(crate) fn report(&self) -> MlxReport {
        let bytes = |found: Result<usize>| found.unwrap_or(0) as Bytes;
        MlxReport {
            host_syncs: self.syncs,
            active_bytes: bytes(memory::active_memory()),
            peak_bytes: bytes(memory::peak_memory()),
            cached_bytes: bytes(memory::cache_memory()),
        }
    }

    pub(crate) fn relieve(&self) -> Result<()> {
        memory::clear_cache()
    }

    pub(crate) fn trunk_bytes(&self) -> Bytes {
        let head = self.head.as_ref().map_or(0, Matrix::bytes);
        self.embed.bytes() + head + self.layers.iter().flat_map(Layer::arrays).map(|array| array.nbytes() as Bytes).sum::<Bytes>()
    }

    /// What MLX keeps to use again.
    pub(crate) fn scratch_bytes(&self) -> Bytes {
        CACHE as Bytes
    }

    /// Of intermediate results, for one row: the widest of a layer's blocks and what stays from layer to layer.
    pub(crate) fn row_bytes(&self) -> Bytes {
        let Arch { hidden, heads, kv_heads, head_dim, top_k, moe_width, experts, .. } = &self.arch;
        let attention = 3 * (heads + 2 * kv_heads) * head_dim;
        let ffn = top_k * (3 * moe_width + 2 * hidden);
        (size_of(self.dtype) * (3 * hidden + attention.max(ffn)) + 4 * experts) as Bytes
    }

    pub(crate) fn kv_block_bytes(&self) -> Bytes {
        self.kv.block_bytes() as Bytes
    }

    pub(crate) fn kv_blocks_used(&self) -> usize {
        self.kv.blocks_used()
    }

    pub(crate) fn free_kv(&mut self, block: BlockId) {
        self.kv.free(block);
    }

    /// As [`crate::backend::Backend::end_kv`].
    pub(crate) fn end_kv(&mut self, own: BlockId, lasts: &[BlockId]) -> Result<()> {
        self.kv.end(own, lasts)
    }

    /// Embeds the tokens of a pass.
    pub(crate) fn begin(&self, act: &mut Activations, batch: &Batch) -> Result<()> {
        act.last = None; // if the pass before came to nothing
        *act = Activations { last: Some(Box::new(std::mem::take(act))), ..Activations::default() };
        if !batch.rows.is_empty() {
            let ids = indices(batch.rows.iter().map(|row| row.token));
            act.hidden.push(self.embed.rows(&ids)?);
        }
        Ok(())
    }

    /// Attention of `layer` over a piece of the rows, added to the residual. Rows that are not `alive` take no part.
    pub(crate) fn attention(
        &mut self,
        layer: usize,
        act: &mut Activations,
        batch: &Batch,
        alive: &[bool],
        piece: Range<usize>,
    ) -> Result<()> {
        tracing::trace!(target: TRACE, layer, "attention");
        let l = &self.layers[layer];
        let (rows, d, eps) = (piece.len() as i32, self.arch.head_dim as i32, self.arch.rms_eps);
        if piece.start == 0 {
            act.before = Some(whole(&mut act.hidden)?);
            act.hidden.clear();
            act.normed.clear();
        }
        let before = act.before.as_ref().expect("a pass begins with its first piece");
        let x = if rows == before.dim(0) { before.clone() } else { before.try_index(piece.start as i32..piece.end as i32)? };
        let normed = fast::rms_norm(&x, Some(&l.attn_norm), eps)?;
        // Fewer operations: queries and keys stay together for as long as both want the same.
        let qkv = l.qkv.iter().map(|w| w.product(&normed)).collect::<Result<Vec<_>>>()?;
        let qkv = concatenate(&qkv, -1)?.reshape(&[1, rows, -1, d])?;
        let (heads, turned) = (self.arch.heads as i32, (self.arch.heads + self.arch.kv_heads) as i32);
        let qk = fast::rms_norm(qkv.try_index((Ellipsis, 0..turned, ..))?, None, eps)?.multiply(&l.qk_norm)?;
        let [qk, v] = [qk, qkv.try_index((Ellipsis, turned.., ..))?].map(|array| array.transpose_axes(&[0, 2, 1, 3]));
        let (qk, v) = (qk?, v?);
        if layer == 0 {
            // MLX has had nothing to do so far: the rest of the layer, and to drop the pass before, can wait.
            async_eval([&qk, &v])?;
            act.last = None;
        }
        let mut attended = Vec::new();
        for run in runs(batch, piece) {
            let of_run = |array: &Array| array.try_index((Ellipsis, run.rows.clone(), ..));
            let qk = of_run(&qk)?;
            if !alive[run.first] {
                attended.push(qk.try_index((.., 0..heads))?);
                continue;
            }
            let qk = fast::rope(qk, d, false, self.arch.rope_theta, 1.0, run.position as i32, None)?;
            let (q, k) = (qk.try_index((.., 0..heads))?, qk.try_index((.., heads..))?);
            attended.push(self.kv.attend(layer, &run, &q, k, of_run(&v)?)?);
        }
        let attended = concatenate(&attended, 2)?.transpose_axes(&[0, 2, 1, 3])?.reshape(&[rows, -1])?;
        act.hidden.push(x.add(l.o.product(&attended)?)?);
        Ok(())
    }

    /// Normalises the latest piece of the rows for the feed-forward and gives its router logits [rows, experts]; `None` for
    /// a dense layer. Waits for everything up to here.
    pub(crate) fn route(&mut self, layer: usize, act: &mut Activations) -> Result<Option<&[f32]>> {
        let l = &self.layers[layer];
        let hidden = act.hidden.last().expect("attention came before");
        act.normed.push(fast::rms_norm(hidden, Some(&l.ffn_norm), self.arch.rms_eps)?);
        let Some(logits) = self.router(layer, hidden)? else { return Ok(None) };
        let next = if std::mem::take(&mut self.foresees) && act.hidden.len() == 1 { self.router(layer + 1, hidden)? } else { None };
        self.foreseen = next.map(|next| (layer + 1, next));
        self.read(logits).map(Some)
    }

    /// Logits [rows, experts] of a later layer's router on today's residual; `None` for a dense layer.
    pub(crate) fn foresee(&mut self, layer: usize, act: &mut Activations) -> Result<Option<&[f32]>> {
        self.foresees = true;
        match self.foreseen.take() {
            Some((foreseen, logits)) if foreseen == layer => {
                self.read = logits;
                self.read.try_as_slice().map(Some).map_err(|error| exception(&error))
            }
            _ => {
                let logits = self.router(layer, &whole(&mut act.hidden)?)?;
                logits.map(|logits| self.read(logits)).transpose()
            }
        }
    }

    /// A layer's router on a residual; `None` for a dense layer, or none.
    fn router(&self, layer: usize, hidden: &Array) -> Result<Option<Array>> {
        let Some(Layer { ffn_norm, ffn: LayerFfn::Moe { router, .. }, .. }) = self.layers.get(layer) else { return Ok(None) };
        router.product(&fast::rms_norm(hidden, Some(ffn_norm), self.arch.rms_eps)?)?.as_dtype(Dtype::Float32).map(Some)
    }

    /// The feed-forward of a dense layer over the latest piece of the rows, added to the residual.
    pub(crate) fn dense(&mut self, layer: usize, act: &mut Activations) -> Result<()> {
        let LayerFfn::Dense([gate, up, down]) = &self.layers[layer].ffn else { return Ok(()) };
        let (Some(x), Some(hidden)) = (act.normed.last(), act.hidden.last_mut()) else { return Ok(()) };
        let gate = gate.product(x)?;
        let mid = gate.multiply(ops::sigmoid(&gate)?)?.multiply(up.product(x)?)?;
        *hidden = hidden.add(down.product(&mid)?)?;
        Ok(())
    }

    /// Starts experts, whose slots `slot` gives, for all the rows routed to them; results wait for [`Mlx::combine`]. The slots
    /// may not change before a later result of the pass has been read, or [`Mlx::settle`] was called.
    pub(crate) fn experts(
        &mut self,
        layer: usize,
        act: &mut Activations,
        plan: &Plan,
        ready: &[ExpertId],
        slot: &dyn Fn(ExpertId) -> Slot,
    ) -> Result<()> {
        let LayerFfn::Moe { bank: Some(bank), .. } = &mut self.layers[layer].ffn else { return Ok(()) };
        let x = whole(&mut act.normed)?;
        let (rows, hidden) = (x.dim(0), x.dim(1));
        let first = act.outs.len();
        let slot_of = |expert: ExpertId| slot(expert).0 / self.moe_layers as u32;
        ready.iter().try_for_each(|expert| bank.widen(*expert, slot_of(*expert)))?;
        if rows as usize <= GATHER_ROWS {
            let (mut lhs, mut rhs) = (Vec::new(), Vec::new());
            for expert in ready {
                let (tokens, places) = plan.rows_of(*expert);
                lhs.extend_from_slice(tokens);
                rhs.resize(lhs.len(), slot_of(*expert));
                act.places.extend_from_slice(places);
            }
            let out = bank.feed_forward(&x.reshape(&[rows, 1, hidden])?, Some(&indices(lhs)), &indices(rhs))?;
            act.outs.push(out.reshape(&[-1, hidden])?);
        } else {
            for expert in ready {
                let (tokens, places) = plan.rows_of(*expert);
                let of_expert = x.take_axis(indices(tokens.iter().copied()), 0)?.reshape(&[1, -1, hidden])?;
                let out = bank.feed_forward(&of_expert, None, &indices([slot_of(*expert)]))?;
                act.outs.push(out.reshape(&[-1, hidden])?);
                act.places.extend_from_slice(places);
            }
        }
        async_eval(&act.outs[first..])
    }

    /// Waits for the experts that were started: nothing reads their slots from here on.
    pub(crate) fn settle(&mut self, act: &mut Activations) -> Result<()> {
        self.syncs += 1;
        eval(act.outs.iter().chain(&act.hidden))
    }

    /// Adds every row's weighted experts to the residual, in rank order.
    pub(crate) fn combine(&mut self, act: &mut Activations, plan: &Plan) -> Result<()> {
        let hidden = whole(&mut act.hidden)?;
        let (rows, top_k) = (hidden.dim(0), plan.top_k());
        let outs = std::mem::take(&mut act.outs);
        let places = std::mem::take(&mut act.places);
        if outs.is_empty() {
            return Ok(()); // every row was lost
        }
        // A row that was lost has results of others here, which nobody looks at.
        let mut at = vec![0; rows as usize * top_k];
        places.iter().zip(0..).for_each(|(place, out)| at[*place as usize] = out);
        let weights: Vec<f32> =
            (0..rows as usize).flat_map(|row| plan.weights(row).iter().copied().chain(std::iter::repeat(0.0)).take(top_k)).collect();
        let weights = Array::from_slice(&weights, &[rows, top_k as i32, 1]).as_dtype(self.dtype)?;
        let outs = concatenate(&outs, 0)?.take_axis(indices(at), 0)?.reshape(&[rows, top_k as i32, -1])?;
        act.hidden[0] = hidden.add(outs.multiply(weights)?.sum_axis(1, false)?)?;
        Ok(())
    }

    /// Logits [rows.len(), vocab] of some rows of a finished pass.
    pub(crate) fn logits(&mut self, act: &mut Activations, rows: Range<usize>) -> Result<&[f32]> {
        if let Some(logits) = &act.logits {
            self.read = logits.clone();
            let (all, vocab) = (self.read.try_as_slice().map_err(|error| exception(&error))?, self.read.dim(1) as usize);
            return Ok(&all[rows.start * vocab..rows.end * vocab]);
        }
        let hidden = whole(&mut act.hidden)?.take_axis(indices(rows.map(|row| row as u32)), 0)?;
        let logits = self.head(&hidden)?;
        self.read(logits)
    }

    fn head(&self, hidden: &Array) -> Result<Array> {
        tracing::trace!(target: TRACE, "head");
        let normed = fast::rms_norm(hidden, Some(&self.norm), self.arch.rms_eps)?;
        self.head.as_ref().unwrap_or(&self.embed).product(&normed)?.as_dtype(Dtype::Float32)
    }

    /// Waits for a result, and with it for what was foreseen.
    fn read(&mut self, array: Array) -> Result<&[f32]> {
        self.syncs += 1;
        eval([&array].into_iter().chain(self.foreseen.as_ref().map(|(_, foreseen)| foreseen)))?;
        self.read = array;
        self.read.try_as_slice().map_err(|error| exception(&error))
    }
}

impl Layer {
    fn read(arch: &Arch, weights: &Weights, spec: &LayerSpec, dtype: Dtype) -> std::result::Result<Self, Error> {
        let matrix = |spec| Matrix::read(weights, spec, dtype);
        let ffn = match &spec.ffn {
            FfnSpec::Dense(ffn) => LayerFfn::Dense([matrix(&ffn.gate)?, matrix(&ffn.up)?, matrix(&ffn.down)?]),
            FfnSpec::Moe { router, experts } => LayerFfn::Moe { router: matrix(router)?, record: Record::new(&experts[0]), bank: None },
        };
        let head_norm = |norm, heads: usize| {
            let norm = vector(weights, norm, dtype)?;
            ops::broadcast_to(&norm, &[heads as i32, norm.dim(0)]).map_err(failed)
        };
        let qk_norm = [head_norm(&spec.q_norm, arch.heads)?, head_norm(&spec.k_norm, arch.kv_heads)?];
        Ok(Self {
            attn_norm: vector(weights, &spec.attn_norm, dtype)?,
            qkv: Matrix::stacked(weights, &[&spec.q, &spec.k, &spec.v], dtype)?,
            o: matrix(&spec.o)?,
            qk_norm: concatenate(&qk_norm, 0).map_err(failed)?,
            ffn_norm: vector(weights, &spec.ffn_norm, dtype)?,
            ffn,
        })
    }

    fn record(&self) -> Option<&Record> {
        if let LayerFfn::Moe { record, .. } = &self.ffn { Some(record) } else { None }
    }

    fn arrays(&self) -> impl Iterator<Item = &Array> {
        let ffn: &[Matrix] = match &self.ffn {
            LayerFfn::Dense(ffn) => ffn,
            LayerFfn::Moe { router, .. } => std::slice::from_ref(router),
        };
        let matrices = self.qkv.iter().chain([&self.o]).chain(ffn);
        matrices.flat_map(Matrix::arrays).chain([&self.attn_norm, &self.qk_norm, &self.ffn_norm])
    }
}

/// Consecutive rows of one sequence, within a piece.
fn runs(batch: &Batch, piece: Range<usize>) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut first = piece.start;
    for rows in batch.rows[piece.clone()].chunk_by(|a, b| a.sequence == b.sequence) {
        let at = (first - piece.start) as i32;
        let table = batch.tables[rows[0].sequence].clone();
        runs.push(Run { first, rows: at..at + rows.len() as i32, position: rows[0].position, table });
        first += rows.len();
    }
    runs
}

/// All pieces as one, which takes their place.
fn whole(pieces: &mut Vec<Array>) -> Result<Array> {
    if pieces.len() > 1 {
        *pieces = vec![concatenate(pieces, 0)?];
    }
    pieces.first().cloned().ok_or_else(|| Exception::custom("a pass without rows"))
}

fn indices(ids: impl IntoIterator<Item = u32>) -> Array {
    let ids: Vec<u32> = ids.into_iter().collect();
    Array::from_slice(&ids, &[ids.len() as i32])
}

/// MLX counts in i32.
fn shape(dims: &[usize]) -> Result<Vec<i32>> {
    dims.iter().map(|n| i32::try_from(*n).map_err(|_| Exception::custom(format!("an array of {dims:?} is too large for MLX")))).collect()
}

fn size_of(dtype: Dtype) -> usize {
    if matches!(dtype, Dtype::Float16 | Dtype::Bfloat16) { 2 } else { 4 }
}

fn on_cpu() -> Result<bool> {
    Ok(matches!(Device::try_default()?.get_type()?, DeviceType::Cpu))
}

/// Where MLX would compute, in words.
pub(super) fn device() -> String {
    match on_cpu() {
        Ok(true) => "the CPU".into(),
        Ok(false) => "Metal".into(),
        Err(error) => format!("no device: {error}"),
    }
}

pub(super) fn version() -> String {
    // SAFETY: the string is made, filled in, read and freed here; it is NUL-terminated UTF-8.
    unsafe {
        let mut text = mlx_sys::mlx_string_new();
        let version = match mlx_sys::mlx_version(&mut text) {
            0 => std::ffi::CStr::from_ptr(mlx_sys::mlx_string_data(text)).to_string_lossy().into_owned(),
            _ => "of an unknown version".into(),
        };
        mlx_sys::mlx_string_free(text);
        version
    }
}

fn name_of(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Float16 => "f16",
        Dtype::Bfloat16 => "bf16",
        _ => "f32",
    }
}

/// MLX's errors are ours: shapes that do not fit, or memory that was not there. A step that panics fails its requests.
pub(crate) fn must<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|exception| panic!("MLX: {exception}"))
}

fn exception(error: &dyn std::fmt::Display) -> Exception {
    Exception::custom(error.to_string())
}

fn failed(exception: Exception) -> Error {
    Error::Internal(format!("MLX: {exception}"))
}
