//! config.json (Hugging Face and MLX spelling) as plain, checked numbers. No file but that one, and no tensor is looked at
//! here: whether the weights agree is for `families.rs`, its caller.

use std::{collections::HashMap, path::Path};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{families, files};
use crate::Error;

/// Far above any real model, low enough that no product of two overflows and no table of them exhausts memory.
const LAYERS_MAX: usize = 4_096;
const EXPERTS_MAX: usize = 65_535;
/// Over all layers.
const EXPERTS_TOTAL_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 16 << 20;
const WIDTH_MAX: usize = 1 << 22;
const HEADS_MAX: usize = 1 << 16;
const CONTEXT_MAX: usize = 1 << 30;

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

/// MLX affine quantisation of one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Affine {
    pub(crate) bits: u8,
    pub(crate) group: usize,
}

/// What config.json says about quantisation: a default and exceptions by tensor path (`None` = not quantised).
#[derive(Clone, Debug, Default)]
pub(crate) struct Quantization {
    pub(crate) default: Option<Affine>,
    pub(crate) overrides: HashMap<String, Option<Affine>>,
}

#[derive(Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    moe_intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    rms_norm_eps: Option<f32>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    /// The spelling of transformers 5: rope_theta and rope_type in one object.
    rope_parameters: Option<Map<String, Value>>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    hidden_act: Option<String>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    decoder_sparse_step: Option<usize>,
    mlp_only_layers: Option<Vec<usize>>,
    num_experts: Option<usize>,
    /// Another spelling of num_experts.
    num_local_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    norm_topk_prob: Option<bool>,
    quantization: Option<Map<String, Value>>,
    quantization_config: Option<Map<String, Value>>,
}

impl Arch {
    /// Reads `dir`/config.json.
    pub(crate) fn read(dir: &Path) -> Result<(Self, Quantization), Error> {
        let path = dir.join("config.json");
        let raw: Raw = files::json(&path, files::JSON_MAX)?;
        Ok((raw.arch(&path)?, raw.quantization(&path)?))
    }
}

impl Raw {
    fn arch(&self, path: &Path) -> Result<Arch, Error> {
        let file = |reason: String| Error::File { path: path.into(), reason };
        let number = |value: Option<usize>, name: &str, max: usize| match value {
            Some(value) if (1..=max).contains(&value) => Ok(value),
            Some(value) => Err(file(format!("{name} is {value}, expected 1 to {max}"))),
            None => Err(file(format!("{name} is missing"))),
        };
        let positive = |value: f32, name: &str| match value.is_finite() && value > 0.0 {
            true => Ok(value),
            false => Err(file(format!("{name} is {value}, expected a positive number"))),
        };
        let model_type = self.family(path)?;
        self.refuse_what_is_not_computed(path)?;

        let hidden = number(self.hidden_size, "hidden_size", WIDTH_MAX)?;
        let heads = number(self.num_attention_heads, "num_attention_heads", HEADS_MAX)?;
        let kv_heads = number(self.num_key_value_heads.or(Some(heads)), "num_key_value_heads", heads)?;
        if heads % kv_heads != 0 {
            return Err(file(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")));
        }
        let head_dim = number(self.head_dim.or(Some(hidden / heads)), "head_dim", HEADS_MAX)?;
        if head_dim % 2 != 0 {
            return Err(file(format!("head_dim {head_dim} is odd; rotary embedding needs pairs")));
        }
        let layer_count = number(self.num_hidden_layers, "num_hidden_layers", LAYERS_MAX)?;
        let experts = number(self.num_experts.or(self.num_local_experts), "num_experts", EXPERTS_MAX)?;
        if experts * layer_count > EXPERTS_TOTAL_MAX {
            return Err(file(format!("{layer_count} layers of {experts} experts exceed the limit of {EXPERTS_TOTAL_MAX} experts")));
        }
        let theta = self.rope_parameters.as_ref().and_then(|rope| rope.get("rope_theta")).and_then(Value::as_f64);
        Ok(Arch {
            model_type,
            hidden,
            heads,
            kv_heads,
            head_dim,
            vocab: number(self.vocab_size, "vocab_size", VOCAB_MAX)?,
            rms_eps: positive(self.rms_norm_eps.unwrap_or(1e-6), "rms_norm_eps")?,
            rope_theta: positive(theta.or(self.rope_theta).unwrap_or(10_000.0) as f32, "rope_theta")?,
            context_max: number(self.max_position_embeddings, "max_position_embeddings", CONTEXT_MAX)?,
            tied_head: self.tie_word_embeddings.unwrap_or(false),
            layers: self.layers(path, layer_count)?,
            experts,
            top_k: number(self.num_experts_per_tok, "num_experts_per_tok", experts)?,
            norm_topk_prob: self.norm_topk_prob.unwrap_or(false),
            moe_width: number(self.moe_intermediate_size, "moe_intermediate_size", WIDTH_MAX)?,
        })
    }

    /// The model_type, if the architecture is one of [`families`].
    fn family(&self, path: &Path) -> Result<String, Error> {
        let named = self.architectures.as_ref().and_then(|names| names.first());
        let family = match (named, &self.model_type) {
            (Some(name), _) => families::FAMILIES.iter().find(|family| family.architecture == name),
            (None, Some(model_type)) => families::FAMILIES.iter().find(|family| family.model_type == model_type),
            (None, None) => None,
        };
        let found = named.or(self.model_type.as_ref()).map_or("no architecture", String::as_str);
        match family {
            Some(family) => Ok(family.model_type.into()),
            None => {
                let supported: Vec<_> = families::FAMILIES.iter().map(|family| family.architecture).collect();
                Err(Error::Unsupported {
                    path: path.into(),
                    reason: format!("{found} is not supported; supported: {}", supported.join(", ")),
                })
            }
        }
    }

    /// Settings that change the arithmetic in a way the decoder does not follow.
    fn refuse_what_is_not_computed(&self, path: &Path) -> Result<(), Error> {
        let refuse = |reason: String| Err(Error::Unsupported { path: path.into(), reason });
        if self.attention_bias == Some(true) {
            return refuse("attention_bias: true is not supported".into());
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return refuse(format!("hidden_act `{act}` is not supported; only silu is"));
        }
        if self.use_sliding_window == Some(true) && self.sliding_window.is_some() {
            return refuse("use_sliding_window: true is not supported".into());
        }
        if let Some(kind) = self.layer_types.iter().flatten().find(|kind| *kind != "full_attention") {
            return refuse(format!("layer type `{kind}` is not supported; only full_attention is"));
        }
        for rope in [&self.rope_scaling, &self.rope_parameters].into_iter().flatten() {
            let kind = rope.get("rope_type").or(rope.get("type"));
            if let Some(kind) = kind.filter(|kind| kind.as_str() != Some("default")) {
                return refuse(format!("rope scaling of type {kind} is not supported; only \"default\" (none) is"));
            }
            if kind.is_none() && rope.keys().any(|key| key != "rope_theta") {
                return refuse("rope scaling without a type is not supported".into());
            }
        }
        Ok(())
    }

    fn layers(&self, path: &Path, count: usize) -> Result<Vec<LayerKind>, Error> {
        let file = |reason: String| Error::File { path: path.into(), reason };
        let step = self.decoder_sparse_step.unwrap_or(1);
        if step == 0 {
            return Err(file("decoder_sparse_step is 0".into()));
        }
        let mut layers = vec![LayerKind::Moe; count];
        let dense_only = self.mlp_only_layers.as_deref().unwrap_or_default();
        for (index, layer) in layers.iter_mut().enumerate() {
            if (index + 1) % step == 0 && !dense_only.contains(&index) {
                continue;
            }
            let width = self.intermediate_size.filter(|width| (1..=WIDTH_MAX).contains(width));
            let width =
                width.ok_or_else(|| file(format!("layer {index} is dense and intermediate_size is not within 1 to {WIDTH_MAX}")))?;
            *layer = LayerKind::Dense { width };
        }
        match layers.contains(&LayerKind::Moe) {
            true => Ok(layers),
            false => Err(Error::Unsupported {
                path: path.into(),
                reason: "no layer has experts; only Mixture-of-Experts models are supported".into(),
            }),
        }
    }

    /// MLX writes the same object under both keys; other tools only use `quantization_config`.
    fn quantization(&self, path: &Path) -> Result<Quantization, Error> {
        let refuse = |reason: String| Err(Error::Unsupported { path: path.into(), reason });
        let Some(map) = self.quantization.as_ref().or(self.quantization_config.as_ref()) else {
            return Ok(Quantization::default());
        };
        if let Some(method) = map.get("quant_method") {
            return refuse(format!(
                "quantization method {method} is not supported; MLX affine (2, 3, 4, 6, 8 bits) and unquantised weights are"
            ));
        }
        let mut overrides = HashMap::new();
        for (tensor, value) in map {
            match value {
                Value::Object(map) => overrides.insert(tensor.clone(), Some(affine(map, path)?)),
                Value::Bool(false) => overrides.insert(tensor.clone(), None),
                // `true` means the default; anything else is one of the default's own settings.
                _ => None,
            };
        }
        Ok(Quantization { default: Some(affine(map, path)?), overrides })
    }
}

/// Absent settings are MLX's own defaults.
fn affine(map: &Map<String, Value>, path: &Path) -> Result<Affine, Error> {
    let refuse = |reason: String| Err(Error::Unsupported { path: path.into(), reason });
    if let Some(mode) = map.get("mode").filter(|mode| mode.as_str() != Some("affine")) {
        return refuse(format!("quantization mode {mode} is not supported; only \"affine\" is"));
    }
    let setting = |key: &str, default: u64| map.get(key).map_or(Some(default), Value::as_u64);
    let (bits, group) = (setting("bits", 4), setting("group_size", 64));
    match (bits, group) {
        (Some(bits @ (2 | 3 | 4 | 6 | 8)), Some(group @ (32 | 64 | 128))) => Ok(Affine { bits: bits as u8, group: group as usize }),
        _ => refuse(format!(
            "quantization with bits {} and group_size {} is not supported; bits 2, 3, 4, 6, 8 and groups of 32, 64, 128 are",
            map.get("bits").unwrap_or(&Value::Null),
            map.get("group_size").unwrap_or(&Value::Null)
        )),
    }
}
