//! config.json as plain numbers, checked.

/// Shape of a decoder; every figure is checked to be non-zero, consistent and below a sane limit.
#[derive(Clone, Debug)]
pub(crate) struct Arch {
    pub(crate) model_type: String,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab: usize,
    pub(crate) rms_eps: f32,
    pub(crate) rope_theta: f32,
    pub(crate) context_max: usize,
    pub(crate) tied_head: bool,
    /// One per layer.
    pub(crate) layers: Vec<LayerKind>,
    /// Routed experts of every MoE layer.
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) norm_topk_prob: bool,
    /// Width of one expert's FFN.
    pub(crate) moe_width: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerKind {
    Dense { width: usize },
    Moe,
}
