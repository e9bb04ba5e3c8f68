//! The CPU backend: trunk weights and activations in our own memory, experts in slab slots, a pool of pinned workers.
//!
//! A method of [`Crew`] is one block of the decoder over some rows of a pass. Kernels come from [`Isa`]; nothing here depends
//! on how many rows, threads or sequences share a pass, nor on the pieces it is computed in.

mod attention;
mod blocks;
mod crew;
mod experts;
mod linear;
mod pool;
mod speed;

use std::{ops::Range, sync::Mutex};

use attention::Kv;
pub(crate) use crew::Crew;
use crew::Team;
use flash_experts::Slice;
use flash_kernels::{
    Isa,
    matrix::{Matrix, Prepared},
};
pub(crate) use pool::{allowed_cpus, lock, physical_cores, pin};
pub use speed::{Attention, Decoded, FeedForwards, Multiplied, Products};

use crate::{
    Bytes, Error, Kernels,
    backend::{Batch, record::Record},
    kv::{BLOCK, BlockId, Table},
    model::{
        families::{Ffn, FfnSpec, LayerSpec, Model},
        weights::{Arena, Format, MatrixSpec, Part, Span, Weights},
    },
    profile::Profile,
};

/// Rows of attention computed together at most: what a piece keeps between its products stays small.
pub(crate) const PIECE_MAX: usize = 256;
/// Expert rows computed together at most, for the same reason.
pub(crate) const PLACES_MAX: usize = 1024;
/// Rows of a lane at most. More of them share so many experts that threads should, too.
const LANE_ROWS: usize = 8;

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
    decoder: Decoder,
    kv: Kv,
    /// All threads together.
    team: Team,
    /// Each thread by itself: [`Cpu::apart`].
    lanes: Vec<Mutex<Team>>,
}

/// What stays as it was loaded.
#[derive(Debug)]
struct Decoder {
    isa: Isa,
    shape: Shape,
    trunk: Arena,
    embed: Owned,
    head: Option<Owned>,
    norm: Vec<f32>,
    layers: Vec<Layer>,
    inverse_frequencies: Vec<f32>,
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
    /// As [`crate::backend::Backend::load`].
    pub(crate) fn load(model: &Model, kernels: Kernels, threads: usize, progress: &mut dyn FnMut(f64)) -> Result<Self, Error> {
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
        let norm = weights.read_vector(&model.norm)?;
        let kv = Kv::new(kernels, &isa);
        let decoder = Decoder { isa, shape, trunk, embed, head, norm, layers, inverse_frequencies };
        let team = |threads, rows| {
            let failed = |error| Error::Internal(format!("cannot start worker threads: {error}"));
            Team::new(&decoder, threads, rows).map_err(failed)
        };
        let lane = |_| team(1, (LANE_ROWS, LANE_ROWS * decoder.shape.top_k)).map(Mutex::new);
        let (lanes, team) = ((0..threads).map(lane).collect::<Result<_, _>>()?, team(threads, (PIECE_MAX, PLACES_MAX))?);
        Ok(Self { decoder, kv, team, lanes })
    }

    /// The blocks of the decoder, by all threads together.
    pub(crate) fn crew(&mut self) -> Crew<'_> {
        Crew::new(&self.decoder, &self.kv, &mut self.team)
    }

    /// As [`crate::backend::Backend::lanes`].
    pub(crate) fn lanes(&self, rows: usize) -> usize {
        if rows <= LANE_ROWS * self.lanes.len() { rows.min(self.lanes.len()).max(1) } else { 1 }
    }

    /// Runs `f` for each of some lanes, with the blocks of the decoder by one thread alone. No KV block that one lane writes is another's.
    pub(crate) fn apart(&mut self, lanes: usize, f: &(dyn Fn(usize, Crew<'_>) + Sync)) {
        let Self { decoder, kv, team, lanes: teams } = self;
        team.pool.run(lanes, &|lane| f(lane, Crew::new(decoder, kv, &mut lock(&teams[lane]))));
        let profiles = teams[..lanes].iter().map(|team| std::mem::take(&mut lock(team).profile));
        team.profile.mean(profiles);
    }

    pub(crate) fn profile(&self) -> Profile {
        self.team.profile
    }

    /// Bytes of a slot that holds any routed expert of the model.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.decoder
            .layers
            .iter()
            .map(|layer| if let LayerFfn::Moe { record, .. } = &layer.ffn { record.bytes } else { 0 })
            .max()
            .unwrap_or(0)
    }

    /// Which file bytes of a layer's expert go where in a slot.
    pub(crate) fn slices(&self, layer: usize, ffn: &Ffn) -> Option<Vec<Slice>> {
        if let LayerFfn::Moe { record, .. } = &self.decoder.layers[layer].ffn { record.slices(ffn) } else { None }
    }

    pub(crate) fn price(&self) -> Option<&'static str> {
        self.decoder.isa.price
    }

    pub(crate) fn kernels(&self) -> &'static str {
        self.decoder.isa.name
    }

    pub(crate) fn threads(&self) -> usize {
        self.team.pool.threads()
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
        owned(&self.decoder.embed) + self.decoder.head.as_ref().map_or(0, owned) + self.decoder.layers.iter().map(layer).sum::<Bytes>()
    }

    /// Of the buffers that every pass uses; [`Cpu::row_bytes`] come on top for each row of a pass.
    pub(crate) fn scratch_bytes(&self) -> Bytes {
        let lanes = self.lanes.iter().map(|team| lock(team).bytes(&self.decoder, LANE_ROWS));
        self.team.bytes(&self.decoder, PIECE_MAX) + lanes.sum::<Bytes>()
    }

    /// Of [`Activations`], for one row.
    pub(crate) fn row_bytes(&self) -> Bytes {
        let Shape { hidden, head_dim, top_k, .. } = self.decoder.shape;
        (4 * (hidden * (2 + top_k.max(1)) + head_dim) + Prepared::row_bytes(&self.decoder.isa, hidden)) as Bytes
    }

    /// Bytes of one KV block of [`crate::kv::BLOCK`] tokens.
    pub(crate) fn kv_block_bytes(&self) -> Bytes {
        self.kv.block_bytes(&self.decoder.shape) as Bytes
    }

    pub(crate) fn kv_blocks_used(&self) -> usize {
        self.kv.blocks_used()
    }

    pub(crate) fn free_kv(&mut self, block: BlockId) {
        self.kv.free(block);
    }

    /// Bytes of a KV block that are each layer's.
    pub(crate) fn kv_layers(&self) -> Vec<usize> {
        vec![self.kv.block_bytes(&self.decoder.shape) / self.decoder.shape.layers; self.decoder.shape.layers]
    }

    pub(crate) fn kv_state(&self, block: BlockId, layer: usize) -> &[u8] {
        let bytes = self.kv.block_bytes(&self.decoder.shape) / self.decoder.shape.layers;
        &self.kv.bytes(block).expect("a computed block")[layer * bytes..][..bytes]
    }

    pub(crate) fn kv_state_mut(&mut self, block: BlockId, layer: usize) -> &mut [u8] {
        let bytes = self.kv.block_bytes(&self.decoder.shape) / self.decoder.shape.layers;
        &mut self.kv.bytes_mut(&self.decoder.shape, block)[layer * bytes..][..bytes]
    }

    /// Sizes `act` for the pass, and takes the memory for its keys and values.
    pub(crate) fn begin(&mut self, act: &mut Activations, batch: &Batch) {
        self.crew().size(act, batch.rows.len());
        for row in &batch.rows {
            self.reserve(&batch.tables[row.sequence], row.position..row.position + 1);
        }
    }

    /// Takes the memory for keys and values of some positions.
    pub(crate) fn reserve(&mut self, table: &Table, positions: Range<usize>) {
        for block in &table[positions.start / BLOCK..positions.end.div_ceil(BLOCK)] {
            self.kv.reserve(&self.decoder.shape, *block);
        }
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
