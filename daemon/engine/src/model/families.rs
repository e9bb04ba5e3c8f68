//! Tensor names of each model family: which tensors make a layer, in HF and in MLX spelling. A family is a row of
//! [`FAMILIES`]; nothing here reads payload or computes. The engine calls [`Model::open`].

use std::path::Path;

use super::{
    arch::{Arch, LayerKind, Quantization},
    packed::Packed,
    weights::{Format, MatrixSpec, VectorSpec, Weights},
};
use crate::{Error, ModelInfo};

/// A checked checkpoint: every tensor below exists, has the shape the config asks for and lies inside its file.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) arch: Arch,
    pub(crate) info: ModelInfo,
    pub(crate) weights: Weights,
    /// Where the routed experts are, if not in the checkpoint's own files.
    pub(crate) packed: Option<Packed>,
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
#[expect(clippy::large_enum_variant, reason = "one per layer")]
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

/// How one architecture spells its tensors; `{}` is a layer's or an expert's number, `.weight` is implied.
pub(super) struct Family {
    pub(super) architecture: &'static str,
    pub(super) model_type: &'static str,
    embed: &'static str,
    norm: &'static str,
    head: &'static str,
    /// Prefix of the names below.
    layer: &'static str,
    attn_norm: &'static str,
    qkvo: [&'static str; 4],
    q_norm: &'static str,
    k_norm: &'static str,
    ffn_norm: &'static str,
    router: &'static str,
    /// Prefixes of gate_proj, up_proj and down_proj: of a dense layer, of all experts stacked, of one expert.
    dense: &'static str,
    stacked: &'static str,
    expert: &'static str,
}

pub(super) static FAMILIES: &[Family] = &[Family {
    architecture: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    embed: "model.embed_tokens",
    norm: "model.norm",
    head: "lm_head",
    layer: "model.layers.{}",
    attn_norm: "input_layernorm",
    qkvo: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    ffn_norm: "post_attention_layernorm",
    router: "mlp.gate",
    dense: "mlp",
    stacked: "mlp.switch_mlp",
    expert: "mlp.experts.{}",
}];

/// What looking up a layer's tensors needs.
struct Finder<'a> {
    family: &'a Family,
    arch: &'a Arch,
    weights: &'a Weights,
    quantization: &'a Quantization,
    /// With its number among the weight files.
    packed: Option<(&'a Packed, u32)>,
}

impl Model {
    /// Opens a folder with config.json and safetensors files; reads headers only.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let dir = &dir.canonicalize().map_err(|source| Error::Read { path: dir.into(), source })?;
        let (arch, quantization) = Arch::read(dir)?;
        let packed = Packed::open(dir, &arch)?;
        let mut weights = Weights::open(dir)?;
        let numbered = match &packed {
            Some(packed) => Some((packed, weights.append(&packed.path)?)),
            None => None,
        };
        let family = FAMILIES.iter().find(|family| family.model_type == arch.model_type).expect("Arch::read took it from the table");
        let find = Finder { family, arch: &arch, weights: &weights, quantization: &quantization, packed: numbered };

        let embed = find.matrix(family.embed, arch.vocab, arch.hidden)?;
        let head = match arch.tied_head {
            true => None,
            false => Some(find.matrix(family.head, arch.vocab, arch.hidden)?),
        };
        let norm = weights.vector(family.norm, arch.hidden)?;
        let layers = (0..arch.layers.len()).map(|index| find.layer(index)).collect::<Result<Vec<_>, _>>()?;
        let tally = Tally::of(&embed, head.as_ref(), &norm, &layers);
        let size = packed.as_ref().map_or(weights.size(), |packed| tally.trunk_bytes + packed.len);
        let (tools, thinks) = super::text::abilities(dir);
        let info = ModelInfo { size_bytes: size, packed: packed.is_some(), tools, thinks, ..info(dir, &arch, tally) };
        Ok(Self { info, embed, head, norm, layers, arch, weights, packed })
    }
}

impl Finder<'_> {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<MatrixSpec, Error> {
        self.weights.matrix(name, rows, cols, self.quantization)
    }

    fn layer(&self, index: usize) -> Result<LayerSpec, Error> {
        let Self { family, arch, weights, .. } = self;
        let prefix = family.layer.replace("{}", &index.to_string());
        let name = |part: &str| format!("{prefix}.{part}");
        let (queries, keys) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
        let [q, k, v, o] = family.qkvo.map(name);
        Ok(LayerSpec {
            attn_norm: weights.vector(&name(family.attn_norm), arch.hidden)?,
            q: self.matrix(&q, queries, arch.hidden)?,
            k: self.matrix(&k, keys, arch.hidden)?,
            v: self.matrix(&v, keys, arch.hidden)?,
            o: self.matrix(&o, arch.hidden, queries)?,
            q_norm: weights.vector(&name(family.q_norm), arch.head_dim)?,
            k_norm: weights.vector(&name(family.k_norm), arch.head_dim)?,
            ffn_norm: weights.vector(&name(family.ffn_norm), arch.hidden)?,
            ffn: match arch.layers[index] {
                LayerKind::Dense { width } => FfnSpec::Dense(self.ffn(&name(family.dense), width)?),
                LayerKind::Moe => {
                    let router = self.matrix(&name(family.router), arch.experts, arch.hidden)?;
                    FfnSpec::Moe { router, experts: self.experts(index, &prefix)? }
                }
            },
        })
    }

    fn ffn(&self, prefix: &str, width: usize) -> Result<Ffn, Error> {
        let hidden = self.arch.hidden;
        Ok(Ffn {
            gate: self.matrix(&format!("{prefix}.gate_proj"), width, hidden)?,
            up: self.matrix(&format!("{prefix}.up_proj"), width, hidden)?,
            down: self.matrix(&format!("{prefix}.down_proj"), hidden, width)?,
        })
    }

    /// From the store if there is one; else stacked if the layer has stacked tensors, else one by one.
    fn experts(&self, index: usize, layer: &str) -> Result<Vec<Ffn>, Error> {
        if let Some(experts) = self.packed.and_then(|(packed, file)| packed.experts(index, layer, file)) {
            return Ok(experts);
        }
        let Arch { experts, hidden, moe_width: width, .. } = *self.arch;
        let stacked = format!("{layer}.{}", self.family.stacked);
        if !self.weights.contains(&format!("{stacked}.gate_proj.weight")) {
            let one = |index: usize| self.ffn(&format!("{layer}.{}", self.family.expert.replace("{}", &index.to_string())), width);
            return (0..experts).map(one).collect();
        }
        let all = |part: &str, rows, cols| self.weights.stacked(&format!("{stacked}.{part}"), [experts, rows, cols], self.quantization);
        let gate = all("gate_proj", width, hidden)?;
        let up = all("up_proj", width, hidden)?;
        let down = all("down_proj", hidden, width)?;
        Ok(gate.into_iter().zip(up).zip(down).map(|((gate, up), down)| Ffn { gate, up, down }).collect())
    }
}

impl Ffn {
    pub(crate) fn matrices(&self) -> [&MatrixSpec; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

/// Sums over a checkpoint's tensors.
#[derive(Default)]
struct Tally<'a> {
    trunk_params: u64,
    trunk_bytes: u64,
    expert_params: u64,
    /// Parameters of one expert of each MoE layer.
    one_expert_params: u64,
    /// Of the largest expert: overrides may give layers different widths of code.
    expert_bytes: u64,
    expert: Option<&'a MatrixSpec>,
}

impl<'a> Tally<'a> {
    fn of(embed: &'a MatrixSpec, head: Option<&'a MatrixSpec>, norm: &'a VectorSpec, layers: &'a [LayerSpec]) -> Self {
        let mut tally = Self::default();
        tally.matrices([embed].into_iter().chain(head));
        tally.vectors([norm]);
        for layer in layers {
            tally.matrices([&layer.q, &layer.k, &layer.v, &layer.o]);
            tally.vectors([&layer.attn_norm, &layer.q_norm, &layer.k_norm, &layer.ffn_norm]);
            match &layer.ffn {
                FfnSpec::Dense(ffn) => tally.matrices(ffn.matrices()),
                FfnSpec::Moe { router, experts } => {
                    tally.matrices([router]);
                    tally.experts(experts);
                }
            }
        }
        tally
    }

    fn matrices(&mut self, matrices: impl IntoIterator<Item = &'a MatrixSpec>) {
        for matrix in matrices {
            self.trunk_params += params(matrix);
            self.trunk_bytes += matrix.bytes();
        }
    }

    fn vectors<const N: usize>(&mut self, vectors: [&VectorSpec; N]) {
        for vector in vectors {
            self.trunk_params += vector.len as u64;
            self.trunk_bytes += vector.span.len;
        }
    }

    fn experts(&mut self, experts: &'a [Ffn]) {
        self.one_expert_params += experts[0].matrices().map(params).iter().sum::<u64>();
        for expert in experts {
            self.expert_params += expert.matrices().map(params).iter().sum::<u64>();
            self.expert_bytes = self.expert_bytes.max(expert.matrices().map(MatrixSpec::bytes).iter().sum());
        }
        self.expert.get_or_insert(&experts[0].gate);
    }
}

fn params(matrix: &MatrixSpec) -> u64 {
    (matrix.rows * matrix.cols) as u64
}

fn info(dir: &Path, arch: &Arch, tally: Tally<'_>) -> ModelInfo {
    let quantization = match tally.expert.map(|matrix| matrix.format) {
        Some(Format::Affine { bits, group, .. }) => format!("{bits}-bit g{group}"),
        Some(Format::F32) => "f32".into(),
        Some(Format::F16) => "f16".into(),
        Some(Format::Bf16) | None => "bf16".into(),
    };
    ModelInfo {
        id: super::hub::id_of(dir),
        path: dir.into(),
        arch: arch.model_type.clone(),
        params: tally.trunk_params + tally.expert_params,
        active_params: tally.trunk_params + arch.top_k as u64 * tally.one_expert_params,
        quantization,
        size_bytes: 0,
        packed: false,
        context_max: arch.context_max,
        layers: arch.layers.len(),
        experts: arch.experts,
        top_k: arch.top_k,
        vocab_size: arch.vocab,
        expert_bytes: tally.expert_bytes,
        trunk_bytes: tally.trunk_bytes,
        tools: false,
        thinks: false,
    }
}
