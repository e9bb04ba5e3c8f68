//! Tensor names of each model family: which tensors make a layer, in HF and in MLX spelling.

use std::path::Path;

use super::{
    arch::Arch,
    weights::{MatrixSpec, VectorSpec, Weights},
};
use crate::{Error, ModelInfo};

/// A checked checkpoint: every tensor below exists, has the shape the config asks for and lies inside its file.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) arch: Arch,
    pub(crate) info: ModelInfo,
    pub(crate) weights: Weights,
    /// [vocab, hidden]; also the head if `arch.tied_head`.
    pub(crate) embed: MatrixSpec,
    pub(crate) head: Option<MatrixSpec>,
    pub(crate) norm: VectorSpec,
    pub(crate) layers: Vec<LayerSpec>,
}

#[derive(Debug)]
pub(crate) struct LayerSpec {
    pub(crate) attn_norm: VectorSpec,
    pub(crate) q: MatrixSpec,
    pub(crate) k: MatrixSpec,
    pub(crate) v: MatrixSpec,
    pub(crate) o: MatrixSpec,
    /// Per-head RMSNorm weights of head_dim numbers.
    pub(crate) q_norm: VectorSpec,
    pub(crate) k_norm: VectorSpec,
    pub(crate) ffn_norm: VectorSpec,
    pub(crate) ffn: FfnSpec,
}

#[derive(Debug)]
pub(crate) enum FfnSpec {
    Dense(Ffn),
    Moe {
        /// [experts, hidden]
        router: MatrixSpec,
        /// One per expert. Stacked tensors (MLX `switch_mlp`) are cut into one spec per expert.
        experts: Vec<Ffn>,
    },
}

/// A SwiGLU feed-forward: down(silu(gate·x) ⊙ up·x). gate, up: [width, hidden]; down: [hidden, width].
#[derive(Clone, Debug)]
pub(crate) struct Ffn {
    pub(crate) gate: MatrixSpec,
    pub(crate) up: MatrixSpec,
    pub(crate) down: MatrixSpec,
}

impl Model {
    /// Opens a folder with config.json and safetensors files; reads headers only.
    pub(crate) fn open(_dir: &Path) -> Result<Self, Error> {
        unimplemented!()
    }
}
