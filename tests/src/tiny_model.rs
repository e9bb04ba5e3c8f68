//! A generated Qwen3-MoE checkpoint of a few hundred kilobytes: random weights in any of the formats that the engine
//! reads, with a byte-level tokenizer and a ChatML template. Not trained, so its text is noise; what it computes is known
//! exactly ([`TinyModel::weights`] holds the numbers that the files mean). Used by the tests of this package.

use std::{collections::BTreeMap, fs, io, ops::Range, path::Path};

use anyhow::{Context, Result};
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::rng::Rng;

pub const END_OF_TEXT: u32 = 256;
pub const IM_START: u32 = 257;
pub const IM_END: u32 = 258;
/// Before what precedes a gap, what follows it, what fills it; and padding. Of models with `infill`.
pub const FIM: [u32; 4] = [259, 260, 261, 262];
/// More rows than the tokenizer has tokens, as real checkpoints pad theirs.
pub const VOCAB: usize = 264;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
/// Deliberately not hidden / heads.
pub const HEAD_DIM: usize = 32;
pub const RMS_EPS: f64 = 1e-6;
pub const ROPE_THETA: f64 = 10_000.0;
pub const CHAT_TEMPLATE: &str = "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Plain(Float),
    /// MLX affine; `params` is the type of scales, biases and norms.
    Affine {
        bits: u8,
        group: usize,
        params: Float,
    },
}

/// How the router differs from the other matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Router {
    AsOthers,
    /// mlx-lm's default for quantised models.
    EightBits,
    Unquantised,
}

/// How routed experts are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// MLX: `mlp.switch_mlp.gate_proj`, one tensor for all experts.
    Stacked,
    /// Hugging Face: `mlp.experts.3.gate_proj`.
    PerExpert,
}

#[derive(Clone, Debug)]
pub struct Spec {
    pub seed: u64,
    pub format: Format,
    pub router: Router,
    /// Of `v_proj`, where it is quantised otherwise than its neighbours.
    pub value_bits: Option<u8>,
    pub naming: Naming,
    /// 1 = a single model.safetensors without an index.
    pub shards: usize,
    pub tied: bool,
    pub layers: usize,
    /// Layers with an ordinary feed-forward (`mlp_only_layers`).
    pub dense: Vec<usize>,
    pub experts: usize,
    pub top_k: usize,
    pub norm_topk_prob: bool,
    pub context: usize,
    /// Rows of the embedding; another number than [`VOCAB`] goes with a tokenizer of the caller's own.
    pub vocab: usize,
    /// The tokenizer has tokens that frame a gap, [`FIM`].
    pub infill: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            seed: 1,
            format: Format::Affine { bits: 4, group: 32, params: Float::Bf16 },
            router: Router::EightBits,
            value_bits: None,
            naming: Naming::Stacked,
            shards: 1,
            tied: false,
            layers: 2,
            dense: Vec::new(),
            experts: 8,
            top_k: 2,
            norm_topk_prob: true,
            context: 32_768,
            vocab: VOCAB,
            infill: false,
        }
    }
}

/// Row-major numbers as the checkpoint means them, after rounding and quantisation.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub values: Vec<f64>,
}

/// One entry of a safetensors file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

#[derive(Debug)]
pub struct TinyModel {
    pub spec: Spec,
    /// By module path, such as `model.layers.0.self_attn.q_proj`; experts always per expert (`…mlp.experts.3.up_proj`).
    pub weights: BTreeMap<String, Matrix>,
    /// What the files hold, by tensor name.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Spec {
    /// Groups run along rows, so every width is a multiple of the group.
    pub fn hidden(&self) -> usize {
        match self.format {
            Format::Affine { group, .. } => group.max(64),
            Format::Plain(_) => 64,
        }
    }

    pub fn moe_width(&self) -> usize {
        self.hidden()
    }

    pub fn dense_width(&self) -> usize {
        2 * self.hidden()
    }

    fn router_format(&self) -> Format {
        match (self.router, self.format) {
            (Router::EightBits, Format::Affine { group, params, .. }) => Format::Affine { bits: 8, group, params },
            (Router::Unquantised, Format::Affine { params, .. }) => Format::Plain(params),
            (_, format) => format,
        }
    }

    fn value_format(&self) -> Format {
        match (self.value_bits, self.format) {
            (Some(bits), Format::Affine { group, params, .. }) => Format::Affine { bits, group, params },
            (_, format) => format,
        }
    }

    /// Of norms, scales and biases.
    fn float(&self) -> Float {
        match self.format {
            Format::Plain(float) => float,
            Format::Affine { params, .. } => params,
        }
    }
}

impl TinyModel {
    pub fn generate(spec: Spec) -> Self {
        let mut model = Self { weights: BTreeMap::new(), tensors: BTreeMap::new(), spec };
        let mut rng = Rng::new(model.spec.seed);
        let (hidden, width) = (model.spec.hidden(), model.spec.moe_width());
        let format = model.spec.format;
        model.matrix(&mut rng, "model.embed_tokens", model.spec.vocab, hidden, 0.5, format);
        if !model.spec.tied {
            model.matrix(&mut rng, "lm_head", model.spec.vocab, hidden, 3.0 / root(hidden), format);
        }
        model.vector(&mut rng, "model.norm", hidden);
        for layer in 0..model.spec.layers {
            let path = |name: &str| format!("model.layers.{layer}.{name}");
            model.vector(&mut rng, &path("input_layernorm"), hidden);
            model.vector(&mut rng, &path("post_attention_layernorm"), hidden);
            model.vector(&mut rng, &path("self_attn.q_norm"), HEAD_DIM);
            model.vector(&mut rng, &path("self_attn.k_norm"), HEAD_DIM);
            let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
            model.matrix(&mut rng, &path("self_attn.q_proj"), q, hidden, 1.0 / root(hidden), format);
            model.matrix(&mut rng, &path("self_attn.k_proj"), kv, hidden, 1.0 / root(hidden), format);
            model.matrix(&mut rng, &path("self_attn.v_proj"), kv, hidden, 1.0 / root(hidden), model.spec.value_format());
            model.matrix(&mut rng, &path("self_attn.o_proj"), hidden, q, 1.0 / root(q), format);
            if model.spec.dense.contains(&layer) {
                model.ffn(&mut rng, &path("mlp"), model.spec.dense_width());
                continue;
            }
            // Wide enough that the choice of experts is rarely a near-tie.
            model.matrix(&mut rng, &path("mlp.gate"), model.spec.experts, hidden, 2.0 / root(hidden), model.spec.router_format());
            for expert in 0..model.spec.experts {
                model.ffn(&mut rng, &path(&format!("mlp.experts.{expert}")), width);
            }
            if model.spec.naming == Naming::Stacked {
                model.stack(layer);
            }
        }
        model
    }

    fn ffn(&mut self, rng: &mut Rng, path: &str, width: usize) {
        let (hidden, format) = (self.spec.hidden(), self.spec.format);
        self.matrix(rng, &format!("{path}.gate_proj"), width, hidden, 2.0 / root(hidden), format);
        self.matrix(rng, &format!("{path}.up_proj"), width, hidden, 2.0 / root(hidden), format);
        self.matrix(rng, &format!("{path}.down_proj"), hidden, width, 2.0 / root(width), format);
    }

    fn vector(&mut self, rng: &mut Rng, path: &str, len: usize) {
        let float = self.spec.float();
        let values: Vec<f32> = (0..len).map(|_| float.round(1.0 + 0.2 * rng.normal())).collect();
        self.tensors.insert(format!("{path}.weight"), float.tensor(vec![len], &values));
        self.weights.insert(path.into(), Matrix { rows: 1, cols: len, values: values.iter().map(|&v| f64::from(v)).collect() });
    }

    fn matrix(&mut self, rng: &mut Rng, path: &str, rows: usize, cols: usize, scale: f32, format: Format) {
        let mut raw: Vec<f32> = (0..rows * cols).map(|_| scale * rng.normal()).collect();
        if path == "lm_head" {
            // Scores of zero against others far above: the model practically never ends its turn by itself.
            raw[END_OF_TEXT as usize * cols..(IM_END as usize + 1) * cols].fill(0.0);
        }
        let values = match format {
            Format::Plain(float) => {
                let rounded: Vec<f32> = raw.iter().map(|&v| float.round(v)).collect();
                self.tensors.insert(format!("{path}.weight"), float.tensor(vec![rows, cols], &rounded));
                rounded.iter().map(|&v| f64::from(v)).collect()
            }
            Format::Affine { bits, group, params } => {
                let affine = quantise(&raw, cols, bits, group, params);
                let words = cols * usize::from(bits) / 32;
                self.tensors.insert(format!("{path}.weight"), Tensor { dtype: "U32", shape: vec![rows, words], bytes: affine.packed });
                self.tensors.insert(format!("{path}.scales"), params.tensor(vec![rows, cols / group], &affine.scales));
                self.tensors.insert(format!("{path}.biases"), params.tensor(vec![rows, cols / group], &affine.biases));
                affine.values
            }
        };
        self.weights.insert(path.into(), Matrix { rows, cols, values });
    }

    /// Moves a layer's per-expert tensors into MLX's stacked ones.
    fn stack(&mut self, layer: usize) {
        for projection in ["gate_proj", "up_proj", "down_proj"] {
            for part in ["weight", "scales", "biases"] {
                let name = |expert: usize| format!("model.layers.{layer}.mlp.experts.{expert}.{projection}.{part}");
                let parts: Vec<Tensor> = (0..self.spec.experts).map_while(|expert| self.tensors.remove(&name(expert))).collect();
                let Some(first) = parts.first() else { continue };
                let mut shape = vec![parts.len()];
                shape.extend(&first.shape);
                let stacked = Tensor { dtype: first.dtype, shape, bytes: parts.iter().flat_map(|part| part.bytes.clone()).collect() };
                self.tensors.insert(format!("model.layers.{layer}.mlp.switch_mlp.{projection}.{part}"), stacked);
            }
        }
    }

    pub fn config(&self) -> Value {
        let spec = &self.spec;
        let mut config = json!({
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": false,
            "decoder_sparse_step": 1,
            "eos_token_id": IM_END,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "hidden_size": spec.hidden(),
            "intermediate_size": spec.dense_width(),
            "max_position_embeddings": spec.context,
            "mlp_only_layers": spec.dense,
            "model_type": "qwen3_moe",
            "moe_intermediate_size": spec.moe_width(),
            "norm_topk_prob": spec.norm_topk_prob,
            "num_attention_heads": HEADS,
            "num_experts": spec.experts,
            "num_experts_per_tok": spec.top_k,
            "num_hidden_layers": spec.layers,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": RMS_EPS,
            "rope_scaling": null,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": spec.tied,
            "torch_dtype": match spec.float() { Float::F32 => "float32", Float::F16 => "float16", Float::Bf16 => "bfloat16" },
            "vocab_size": spec.vocab,
        });
        if let Format::Affine { bits, group, .. } = spec.format {
            let mut quantization = json!({"group_size": group, "bits": bits, "mode": "affine"});
            for layer in (0..spec.layers).filter(|layer| !spec.dense.contains(layer)) {
                let path = format!("model.layers.{layer}.mlp.gate");
                match spec.router {
                    Router::AsOthers => {}
                    Router::EightBits => quantization[path] = json!({"group_size": group, "bits": 8}),
                    Router::Unquantised => quantization[path] = json!(false),
                }
            }
            for (bits, layer) in spec.value_bits.iter().flat_map(|bits| (0..spec.layers).map(move |layer| (bits, layer))) {
                quantization[format!("model.layers.{layer}.self_attn.v_proj")] = json!({"group_size": group, "bits": bits});
            }
            config["quantization"] = quantization.clone();
            config["quantization_config"] = quantization;
        }
        config
    }

    /// Writes the whole checkpoint; `dir` is created.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        write_json(&dir.join("config.json"), &self.config())?;
        write_json(&dir.join("tokenizer.json"), &tokenizer(self.spec.infill))?;
        write_json(
            &dir.join("tokenizer_config.json"),
            &json!({
                "bos_token": null, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": null,
                "chat_template": CHAT_TEMPLATE, "tokenizer_class": "Qwen2Tokenizer", "model_max_length": self.spec.context,
            }),
        )?;
        write_json(&dir.join("generation_config.json"), &json!({"do_sample": false, "eos_token_id": [IM_END, END_OF_TEXT]}))?;
        if self.spec.shards == 1 {
            return Ok(write_safetensors(&dir.join("model.safetensors"), self.tensors.iter())?);
        }
        // Dealt like cards, so that neighbours lie in different files.
        let mut map = Map::new();
        for shard in 0..self.spec.shards {
            let file = format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.spec.shards);
            let dealt = || self.tensors.iter().skip(shard).step_by(self.spec.shards);
            map.extend(dealt().map(|(name, _)| (name.clone(), json!(file))));
            write_safetensors(&dir.join(&file), dealt())?;
        }
        let total: usize = self.tensors.values().map(|tensor| tensor.bytes.len()).sum();
        write_json(&dir.join("model.safetensors.index.json"), &json!({"metadata": {"total_size": total}, "weight_map": map}))
    }
}

pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, serde_json::to_string_pretty(value)?).with_context(|| format!("writing {}", path.display()))
}

/// Header length, header, tensors one after the other.
pub fn write_safetensors<'a>(path: &Path, tensors: impl Iterator<Item = (&'a String, &'a Tensor)>) -> io::Result<()> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let from = data.len();
        data.extend(&tensor.bytes);
        header.insert(name.clone(), json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [from, data.len()]}));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Odd on purpose: tensors of real checkpoints lie at any offset.
    if header.len().is_multiple_of(2) {
        header.push(b' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    bytes.append(&mut data);
    fs::write(path, bytes)
}

/// A safetensors file's header and where its data begins.
pub fn read_header(path: &Path) -> Result<(Value, u64)> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let length = bytes.first_chunk().map(|length| u64::from_le_bytes(*length)).context("a header length")?;
    let header = bytes.get(8..8 + usize::try_from(length)?).context("a header")?;
    Ok((serde_json::from_slice(header)?, 8 + length))
}

/// Which bytes of model.safetensors are one expert's codes of `projection`, in a model with stacked experts.
pub fn expert_bytes(dir: &Path, layer: usize, expert: usize, projection: &str) -> Result<(String, Range<u64>)> {
    let (header, data) = read_header(&dir.join("model.safetensors"))?;
    let tensor = &header[format!("model.layers.{layer}.mlp.switch_mlp.{projection}.weight")];
    let number = |value: &Value| value.as_u64().with_context(|| format!("a number in {tensor}"));
    let (from, to) = (number(&tensor["data_offsets"][0])?, number(&tensor["data_offsets"][1])?);
    let len = (to - from) / number(&tensor["shape"][0])?;
    let start = data + from + len * expert as u64;
    Ok(("model.safetensors".into(), start..start + len))
}

impl Float {
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    fn tensor(self, shape: Vec<usize>, values: &[f32]) -> Tensor {
        let (dtype, bytes) = match self {
            Self::F32 => ("F32", values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            Self::F16 => ("F16", values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()),
            Self::Bf16 => ("BF16", values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()),
        };
        Tensor { dtype, shape, bytes }
    }
}

struct Affine {
    packed: Vec<u8>,
    scales: Vec<f32>,
    biases: Vec<f32>,
    values: Vec<f64>,
}

/// MLX's affine scheme: w = scale · code + bias per group, codes packed as one little-endian bit stream along a row.
fn quantise(raw: &[f32], cols: usize, bits: u8, group: usize, params: Float) -> Affine {
    let levels = ((1u32 << bits) - 1) as f32;
    let mut affine = Affine { packed: Vec::new(), scales: Vec::new(), biases: Vec::new(), values: Vec::new() };
    for row in raw.chunks_exact(cols) {
        let (mut stream, mut pending) = (0u64, 0u32);
        for weights in row.chunks_exact(group) {
            let low = weights.iter().copied().fold(f32::INFINITY, f32::min);
            let high = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let scale = if high > low { params.round((high - low) / levels) } else { 1.0 };
            let bias = params.round(low);
            affine.scales.push(scale);
            affine.biases.push(bias);
            for &weight in weights {
                let code = ((weight - bias) / scale).round().clamp(0.0, levels);
                affine.values.push(f64::from(scale) * f64::from(code) + f64::from(bias));
                stream |= (code as u64) << pending;
                pending += u32::from(bits);
                while pending >= 8 {
                    affine.packed.push((stream & 0xff) as u8);
                    stream >>= 8;
                    pending -= 8;
                }
            }
        }
        assert_eq!(pending, 0, "a row is a whole number of bytes");
    }
    affine
}

/// Byte-level BPE without merges: token n is byte n; the three specials follow.
fn tokenizer(infill: bool) -> Value {
    let vocab: Map<String, Value> = (0..=255u8).map(|byte| (byte_char(byte).to_string(), json!(byte))).collect();
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let mut added = vec![special(END_OF_TEXT, "<|endoftext|>"), special(IM_START, "<|im_start|>"), special(IM_END, "<|im_end|>")];
    if infill {
        let names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"];
        added.extend(FIM.into_iter().zip(names).map(|(id, name)| special(id, name)));
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}| ?\\p{L}+|\\s+|[^\\s\\p{L}\\p{N}]+"}, "behavior": "Isolated", "invert": false},
            byte_level,
        ]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    })
}

/// GPT-2's printable stand-in for a byte: itself where printable in Latin-1, else the next free character from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let index = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(0x100 + u32::try_from(index).expect("fewer than 256")).expect("below the surrogates")
}

fn root(n: usize) -> f32 {
    (n as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes read back word by word, the way MLX documents them, give the values that the generator noted.
    #[test]
    fn packed_codes_mean_what_the_generator_says() {
        for bits in [2, 3, 4, 6, 8] {
            let mut rng = Rng::new(u64::from(bits));
            let raw: Vec<f32> = (0..4 * 128).map(|_| rng.normal()).collect();
            let affine = quantise(&raw, 128, bits, 64, Float::F16);
            let bits = usize::from(bits);
            let row_bytes = 128 * bits / 8;
            for (index, expected) in affine.values.iter().enumerate() {
                let (row, col) = (index / 128, index % 128);
                let row_words: Vec<u32> = affine.packed[row * row_bytes..][..row_bytes]
                    .chunks_exact(4)
                    .map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
                    .collect();
                let (word, shift) = (col * bits / 32, col * bits % 32);
                let next = row_words.get(word + 1).copied().unwrap_or(0);
                let code = (u64::from(row_words[word]) | u64::from(next) << 32) >> shift & ((1 << bits) - 1);
                let group = index / 64;
                let value = f64::from(affine.scales[group]) * code as f64 + f64::from(affine.biases[group]);
                assert_eq!(value, *expected, "{bits} bits, row {row}, column {col}");
                let step = f64::from(affine.scales[group]);
                assert!((value - f64::from(raw[index])).abs() <= 0.52 * step + 4e-3, "{bits} bits: {value} for {}", raw[index]);
            }
        }
    }

    #[test]
    fn every_byte_has_its_own_character() {
        let mut seen = std::collections::HashSet::new();
        assert!((0..=255).all(|byte| seen.insert(byte_char(byte))));
        assert_eq!(byte_char(b' '), 'Ġ');
        assert_eq!(byte_char(b'\n'), 'Ċ');
    }
}
