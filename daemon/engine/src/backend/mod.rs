//! Where tensors are computed: on the CPU with kernels of our own, or by MLX. A backend's methods are the blocks of a decoder
//! (`begin · attention · route · experts · combine · logits`), never single operations: it owns its activations and decides
//! how a block is fused. An enum, because one of two is chosen once, and only one of them is there without the feature.

pub(crate) mod cpu;
#[cfg(feature = "mlx")]
pub(crate) mod mlx;
mod record;

use std::{ops::Range, time::Instant};

use cpu::Cpu;
use flash_experts::{ExpertId, Experts, Fetch, Slab, Slice};
#[cfg(feature = "mlx")]
use mlx::{Mlx, must};

use crate::{
    Bytes, Error, Kernels, MlxReport,
    kv::{BLOCK, BlockId, Table},
    model::families::{Ffn, Model},
    moe::Plan,
    profile::{Profile, Stage},
    schedule::CHUNK_MIN,
};

/// Which backend computes and why no other does, for `doctor`.
pub fn backend(kernels: Kernels) -> String {
    #[cfg(feature = "mlx")]
    let there = format!("MLX {} is built in, on {}", mlx::version(), mlx::device());
    #[cfg(not(feature = "mlx"))]
    let there = if cfg!(target_os = "macos") {
        "MLX is not built in: run daemon/engine/mlx/setup, then build with --features mlx"
    } else {
        "MLX is not built in; it is for Macs"
    };
    match (kernels.or_default(), kernels) {
        (Kernels::Mlx, Kernels::Auto) => format!("mlx, as on every Mac where it is built in; {there}"),
        (Kernels::Mlx, _) => format!("mlx, as configured; {there}"),
        (_, Kernels::Auto) if cfg!(feature = "mlx") => format!("cpu; {there}, and away from Macs slower than our kernels"),
        (_, Kernels::Auto) => format!("cpu; {there}"),
        _ => format!("cpu, as configured; {there}"),
    }
}

#[derive(Debug)]
pub(crate) enum Backend {
    Cpu(Box<Cpu>),
    #[cfg(feature = "mlx")]
    Mlx(Box<Mlx>),
}

/// One position of one sequence in a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) token: u32,
    pub(crate) position: usize,
    /// Index into [`Batch::tables`].
    pub(crate) sequence: usize,
}

/// What a pass computes. Rows of a sequence are in position order and follow what its KV blocks hold.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) rows: Vec<Row>,
    /// The KV blocks of each sequence.
    pub(crate) tables: Vec<Table>,
}

/// What a pass keeps from layer to layer, for all its rows; its backend's part is in use.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    pub(crate) cpu: cpu::Activations,
    #[cfg(feature = "mlx")]
    pub(crate) mlx: mlx::Activations,
}

/// The same on either backend.
macro_rules! either {
    ($self:ident, $backend:ident => $result:expr) => {
        match $self {
            Self::Cpu($backend) => $result,
            #[cfg(feature = "mlx")]
            Self::Mlx($backend) => $result,
        }
    };
}

impl Backend {
    /// Reads the trunk (everything but routed experts), and starts workers where there are any; `threads` counts the calling one,
    /// `progress` hears the share read so far.
    pub(crate) fn load(model: &Model, kernels: Kernels, threads: usize, progress: &mut dyn FnMut(f64)) -> Result<Self, Error> {
        match kernels.or_default() {
            #[cfg(feature = "mlx")]
            Kernels::Mlx => Ok(Self::Mlx(Box::new(Mlx::load(model, progress)?))),
            #[cfg(not(feature = "mlx"))]
            Kernels::Mlx => Err(Error::Setting { value: "mlx".into(), wants: "a flashd that was built with the feature `mlx`" }),
            kernels => Ok(Self::Cpu(Box::new(Cpu::load(model, kernels, threads, progress)?))),
        }
    }

    /// Slots for up to `places` routed experts in each of `layers` layers.
    pub(crate) fn slab(&self, layers: usize, places: usize) -> Result<Slab, flash_experts::Error> {
        match self {
            Self::Cpu(cpu) => Slab::anonymous(cpu.slot_bytes(), layers * places),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => Ok(Slab::banked(layers, places, mlx.slot_bytes())),
        }
    }

    /// What a slot takes in other places than the slab.
    pub(crate) fn beside_slot_bytes(&self) -> usize {
        match self {
            Self::Cpu(_) => 0,
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => mlx.beside_slot_bytes(),
        }
    }

    /// Sets the slots of every layer, between passes. After an error they are as many as before.
    pub(crate) fn set_slots(&mut self, experts: &mut Experts, per_layer: usize) -> Result<(), Error> {
        match self {
            Self::Cpu(_) => experts.set_slots(per_layer),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => mlx.set_slots(experts, per_layer)?,
        }
        Ok(())
    }

    /// Whether results are computed when they are asked for: what an expert's slot holds is then read after
    /// [`Backend::experts`], until [`Backend::settle`] or something that builds on the result.
    pub(crate) fn lazy(&self) -> bool {
        !matches!(self, Self::Cpu(_))
    }

    /// Into how many lanes a step of so many rows can be cut, each for a thread of its own; 1: it cannot.
    pub(crate) fn lanes(&self, rows: usize) -> usize {
        match self {
            Self::Cpu(cpu) => cpu.lanes(rows),
            #[cfg(feature = "mlx")]
            Self::Mlx(_) => 1,
        }
    }

    /// Whether a pass of so many rows may be computed before the host knows its routing.
    #[cfg(feature = "mlx")]
    pub(crate) fn runs_ahead(&self, rows: usize) -> bool {
        matches!(self, Self::Mlx(_)) && Mlx::runs_ahead(rows)
    }

    /// Waits for the experts that were started: from here on nothing reads their slots.
    pub(crate) fn settle(&mut self, act: &mut Activations) {
        match self {
            Self::Cpu(_) => _ = act,
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.settle(&mut act.mlx)),
        }
    }

    /// Which file bytes of a layer's expert go where in a slot; `None` if it is not like the layer's first.
    pub(crate) fn slices(&self, layer: usize, ffn: &Ffn) -> Option<Vec<Slice>> {
        either!(self, backend => backend.slices(layer, ffn))
    }

    pub(crate) fn price(&self) -> Option<&'static str> {
        match self {
            Self::Cpu(cpu) => cpu.price(),
            #[cfg(feature = "mlx")]
            Self::Mlx(_) => None,
        }
    }

    pub(crate) fn kernels(&self) -> &str {
        either!(self, backend => backend.kernels())
    }

    pub(crate) fn threads(&self) -> usize {
        either!(self, backend => backend.threads())
    }

    pub(crate) fn mlx(&self) -> Option<MlxReport> {
        match self {
            Self::Cpu(_) => None,
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => Some(mlx.report()),
        }
    }

    /// Where the time went. MLX computes when it is asked for a value, so that most of it is the router's and the head's.
    pub(crate) fn profile(&self) -> Profile {
        match self {
            Self::Cpu(cpu) => cpu.profile(),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => mlx.profile,
        }
    }

    /// As [`Profile::add`].
    pub(crate) fn spent(&mut self, stage: Stage, since: Instant) -> Instant {
        match self {
            Self::Cpu(cpu) => cpu.crew().spent(stage, since),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => mlx.profile.add(stage, since),
        }
    }

    /// Gives back what is kept for speed alone.
    pub(crate) fn relieve(&mut self) {
        match self {
            Self::Cpu(_) => {}
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.relieve()),
        }
    }

    pub(crate) fn trunk_bytes(&self) -> Bytes {
        either!(self, backend => backend.trunk_bytes())
    }

    /// Of the buffers that every pass uses; [`Backend::row_bytes`] come on top for each row of a pass.
    pub(crate) fn scratch_bytes(&self) -> Bytes {
        either!(self, backend => backend.scratch_bytes())
    }

    /// Of [`Activations`], for one row.
    pub(crate) fn row_bytes(&self) -> Bytes {
        either!(self, backend => backend.row_bytes())
    }

    /// Bytes of one KV block of [`crate::kv::BLOCK`] tokens.
    pub(crate) fn kv_block_bytes(&self) -> Bytes {
        either!(self, backend => backend.kv_block_bytes())
    }

    pub(crate) fn kv_blocks_used(&self) -> usize {
        either!(self, backend => backend.kv_blocks_used())
    }

    pub(crate) fn free_kv(&mut self, block: BlockId) {
        either!(self, backend => backend.free_kv(block));
    }

    /// Tokens of a prompt that others can begin with, or as many again. More than a block: a row's bits depend on the chunk that it was
    /// computed in, and what is shared is copied, by [`Backend::end_kv`] and by whoever goes on from it.
    pub(crate) fn kv_grain(&self) -> usize {
        if self.lazy() { CHUNK_MIN } else { BLOCK }
    }

    /// A sequence ends, whose last block is `own`: of its prompt stay the chunks that end with `lasts`, one after the other. False: there
    /// is no memory for them.
    #[cfg_attr(not(feature = "mlx"), expect(unused_variables, reason = "blocks are shared as they are"))]
    pub(crate) fn end_kv(&mut self, own: BlockId, lasts: &[BlockId]) -> bool {
        match self {
            Self::Cpu(_) => true,
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => mlx.end_kv(own, lasts).inspect_err(|error| tracing::warn!(%error, "a prefix is not kept")).is_ok(),
        }
    }

    /// Bytes of a KV block that are each layer's; `None`: there are no blocks, and none can be written to disk.
    pub(crate) fn kv_layers(&self) -> Option<Vec<usize>> {
        match self {
            Self::Cpu(cpu) => Some(cpu.kv_layers()),
            #[cfg(feature = "mlx")]
            Self::Mlx(_) => None,
        }
    }

    /// A layer's part of a block that was computed.
    pub(crate) fn kv_state(&self, block: BlockId, layer: usize) -> &[u8] {
        match self {
            Self::Cpu(cpu) => cpu.kv_state(block, layer),
            #[cfg(feature = "mlx")]
            Self::Mlx(_) => unreachable!("MLX has no blocks"),
        }
    }

    /// As [`Backend::kv_state`], of any block, to be filled with what that gave.
    pub(crate) fn kv_state_mut(&mut self, block: BlockId, layer: usize) -> &mut [u8] {
        match self {
            Self::Cpu(cpu) => cpu.kv_state_mut(block, layer),
            #[cfg(feature = "mlx")]
            Self::Mlx(_) => unreachable!("MLX has no blocks"),
        }
    }

    /// Sizes `act` for the pass.
    pub(crate) fn begin(&mut self, act: &mut Activations, batch: &Batch) {
        match self {
            Self::Cpu(cpu) => cpu.begin(&mut act.cpu, batch),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.begin(&mut act.mlx, batch)),
        }
    }

    /// Attention of `layer` over a piece of the rows, added to the residual. Pieces of a layer come in order. Rows that are
    /// not `alive` take no part: their KV blocks may belong to others by now.
    pub(crate) fn attention(&mut self, layer: usize, act: &mut Activations, batch: &Batch, alive: &[bool], piece: Range<usize>) {
        match self {
            Self::Cpu(cpu) => cpu.crew().attention(layer, &mut act.cpu, batch, alive, piece),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.attention(layer, &mut act.mlx, batch, alive, piece)),
        }
    }

    /// Normalises that piece of the rows for the feed-forward and gives its router logits [rows, experts]; `None` for a dense
    /// layer.
    pub(crate) fn route(&mut self, layer: usize, act: &mut Activations, piece: Range<usize>) -> Option<&[f32]> {
        match self {
            Self::Cpu(cpu) => cpu.crew().route(layer, &mut act.cpu, piece),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.route(layer, &mut act.mlx)),
        }
    }

    /// Logits [rows, experts] of a later layer's router on today's residual: what that layer will probably choose
    /// (arXiv 2603.19289). `None` for a dense layer.
    pub(crate) fn foresee(&mut self, layer: usize, act: &mut Activations) -> Option<&[f32]> {
        match self {
            Self::Cpu(cpu) => cpu.crew().foresee(layer, &act.cpu),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.foresee(layer, &mut act.mlx)),
        }
    }

    /// The feed-forward of a dense layer over that piece of the rows, added to the residual.
    pub(crate) fn dense(&mut self, layer: usize, act: &mut Activations, piece: Range<usize>) {
        match self {
            Self::Cpu(cpu) => cpu.crew().dense(layer, &mut act.cpu, piece),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.dense(layer, &mut act.mlx)),
        }
    }

    /// Runs experts that `fetch` has delivered, for all the rows routed to them; results wait for [`Backend::combine`].
    pub(crate) fn experts(&mut self, layer: usize, act: &mut Activations, plan: &Plan, ready: &[ExpertId], fetch: &Fetch<'_>) {
        match self {
            Self::Cpu(cpu) => cpu.crew().experts(layer, &mut act.cpu, plan, ready, &|expert| fetch.bytes(expert)),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.experts(layer, &mut act.mlx, plan, ready, &|expert| fetch.slot(expert))),
        }
    }

    /// Adds every row's weighted experts to the residual, in rank order.
    pub(crate) fn combine(&mut self, act: &mut Activations, plan: &Plan) {
        match self {
            Self::Cpu(cpu) => cpu.crew().combine(&mut act.cpu, plan),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.combine(&mut act.mlx, plan)),
        }
    }

    /// Logits [rows.len(), vocab] of some rows of a finished pass, at most [`cpu::PIECE_MAX`].
    pub(crate) fn logits(&mut self, act: &mut Activations, rows: Range<usize>) -> &[f32] {
        match self {
            Self::Cpu(cpu) => cpu.crew().logits(&act.cpu, rows),
            #[cfg(feature = "mlx")]
            Self::Mlx(mlx) => must(mlx.logits(&mut act.mlx, rows)),
        }
    }
}
