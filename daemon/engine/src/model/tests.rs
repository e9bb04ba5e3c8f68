//! Opening checkpoints, good and bad: the bundled model as it is, and a small generated one with one thing wrong.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    arch::LayerKind,
    families::{FfnSpec, Model},
    weights::{Aligned, Float, Format},
};

pub(super) fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flash-tiny-moe")
}

/// A checkpoint to be written: config and tensors by name (dtype, shape); payload bytes count up from 0.
#[derive(Clone)]
struct Checkpoint {
    config: Value,
    tensors: BTreeMap<String, (&'static str, Vec<usize>)>,
}

/// Two layers: the first dense and in bf16, the second with 2 experts, 4-bit and stacked.
fn small() -> Checkpoint {
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 10, "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "num_experts": 2, "num_experts_per_tok": 1,
        "mlp_only_layers": [0], "norm_topk_prob": true,
        "quantization": { "group_size": 32, "bits": 4, "model.layers.1.mlp.gate": { "group_size": 64, "bits": 8 } },
    });
    let mut tensors = BTreeMap::new();
    let mut add = |name: &str, dtype, shape: &[usize]| tensors.insert(name.to_owned(), (dtype, shape.to_vec()));
    add("model.embed_tokens.weight", "F16", &[10, 64]);
    add("lm_head.weight", "F32", &[10, 64]);
    add("model.norm.weight", "BF16", &[64]);
    for layer in 0..2 {
        let layer = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(&format!("{layer}.{norm}.weight"), "BF16", &[64]);
        }
        for (part, rows, cols) in [("q", 32, 64), ("k", 16, 64), ("v", 16, 64), ("o", 64, 32)] {
            add(&format!("{layer}.self_attn.{part}_proj.weight"), "BF16", &[rows, cols]);
        }
        for norm in ["q_norm", "k_norm"] {
            add(&format!("{layer}.self_attn.{norm}.weight"), "BF16", &[8]);
        }
    }
    for (part, rows, cols) in [("gate", 96, 64), ("up", 96, 64), ("down", 64, 96)] {
        add(&format!("model.layers.0.mlp.{part}_proj.weight"), "BF16", &[rows, cols]);
    }
    add("model.layers.1.mlp.gate.weight", "U32", &[2, 16]);
    for part in ["scales", "biases"] {
        add(&format!("model.layers.1.mlp.gate.{part}"), "F16", &[2, 1]);
    }
    for (part, rows, cols) in [("gate", 32, 64), ("up", 32, 64), ("down", 64, 32)] {
        let name = format!("model.layers.1.mlp.switch_mlp.{part}_proj");
        add(&format!("{name}.weight"), "U32", &[2, rows, cols / 8]);
        for part in ["scales", "biases"] {
            add(&format!("{name}.{part}"), "F16", &[2, rows, cols / 32]);
        }
    }
    Checkpoint { config, tensors }
}

fn safetensors(tensors: &BTreeMap<String, (&'static str, Vec<usize>)>) -> Vec<u8> {
    let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!({ "format": "mlx" }))]);
    let mut end = 0;
    for (name, (dtype, shape)) in tensors {
        let begin = end;
        let width = if matches!(*dtype, "F32" | "U32") { 4 } else { 2 };
        end += shape.iter().product::<usize>() * width;
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }));
    }
    framed(&Value::Object(header).to_string(), end)
}

fn framed(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..data).map(|index| index as u8));
    file
}

impl Checkpoint {
    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.path().join("model.safetensors"), safetensors(&self.tensors)).unwrap();
        dir
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

/// The error of opening `dir` holds every one of `expected`.
fn refused(dir: &Path, expected: &[&str]) {
    let error = Model::open(dir).expect_err(expected[0]).to_string();
    for part in expected {
        assert!(error.contains(part), "`{error}` lacks `{part}`");
    }
}

#[test]
fn the_bundled_model_opens() {
    let model = Model::open(&bundled()).unwrap();
    let info = &model.info;
    assert_eq!((info.id.as_str(), info.arch.as_str(), info.quantization.as_str()), ("flash-tiny-moe", "qwen3_moe", "4-bit g64"));
    assert_eq!((info.params, info.active_params), (81_993_088, 15_932_800));
    assert_eq!((info.layers, info.experts, info.top_k, info.vocab_size, info.context_max), (8, 64, 8, 8192, 2048));
    assert_eq!((info.expert_bytes, info.size_bytes), (82_944, 46_255_467));
    // All payload is either trunk or expert: nothing is left over, nothing counted twice.
    assert_eq!(info.trunk_bytes + 8 * 64 * info.expert_bytes, 46_230_272);

    assert!(model.head.is_none() && model.arch.layers.iter().all(|kind| *kind == LayerKind::Moe));
    assert_eq!(model.embed.format, Format::Affine { bits: 4, group: 64, params: Float::Bf16 });
    let FfnSpec::Moe { router, experts } = &model.layers[7].ffn else { panic!("layer 7 is dense") };
    assert_eq!(router.format, Format::Affine { bits: 8, group: 64, params: Float::Bf16 });
    let (first, second) = (&experts[0].down, &experts[1].down);
    // data_offsets of layer 7's stacked down_proj.weight: [99072, 1671936], behind 8 + 25187 bytes of header.
    assert_eq!((first.weight.offset, first.weight.len), (8 + 25_187 + 99_072, 24_576));
    assert_eq!(second.weight.offset, first.weight.offset + first.weight.len);
    assert_eq!((second.rows, second.cols), (384, 128));

    let norm = model.weights.read_vector(&model.norm).unwrap();
    assert_eq!(norm.len(), 384);
    assert!(norm.iter().all(|weight| weight.is_finite() && weight.abs() < 100.0));
}

#[test]
fn aligned_memory_is_aligned_and_zeroed() {
    for len in [0, 1, 63, 64, 65, 4097] {
        let mut bytes = Aligned::new(len);
        assert_eq!((bytes.as_slice().len(), bytes.as_slice().as_ptr().addr() % 64), (len, 0));
        assert!(bytes.as_mut_slice().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_mixed_checkpoint_opens() {
    let dir = small().write();
    let model = Model::open(dir.path()).unwrap();
    assert_eq!(model.arch.layers, [LayerKind::Dense { width: 96 }, LayerKind::Moe]);
    assert_eq!((model.embed.format, model.head.as_ref().map(|head| head.format)), (Format::F16, Some(Format::F32)));
    assert_eq!(model.info.quantization, "4-bit g32");
    let FfnSpec::Moe { router, experts } = &model.layers[1].ffn else { panic!("layer 1 is dense") };
    assert_eq!(router.format, Format::Affine { bits: 8, group: 64, params: Float::F16 });
    let spans = experts.iter().flat_map(|expert| expert.matrices()).map(|matrix| (matrix.weight.len, matrix.scales.unwrap().len));
    assert_eq!(spans.collect::<Vec<_>>(), [(1024, 128); 6]);
    let bytes = model.weights.read("expert", experts[1].gate.weight).unwrap();
    let file = fs::read(dir.path().join("model.safetensors")).unwrap();
    let begin = experts[1].gate.weight.offset as usize;
    assert_eq!(bytes.as_slice(), &file[begin..begin + 1024]);
}

#[test]
fn a_hugging_face_checkpoint_opens() {
    let checkpoint = small().with(|c| {
        c.config["quantization"] = Value::Null;
        c.tensors.retain(|name, _| !name.contains("layers.1.mlp"));
        c.tensors.insert("model.layers.1.mlp.gate.weight".into(), ("BF16", vec![2, 64]));
        for expert in 0..2 {
            for (part, shape) in [("gate", [32, 64]), ("up", [32, 64]), ("down", [64, 32])] {
                c.tensors.insert(format!("model.layers.1.mlp.experts.{expert}.{part}_proj.weight"), ("BF16", shape.to_vec()));
            }
        }
    });
    let model = Model::open(checkpoint.write().path()).unwrap();
    assert_eq!((model.info.quantization.as_str(), model.info.expert_bytes), ("bf16", 3 * 32 * 64 * 2));
    assert_eq!(model.info.params - model.info.active_params, 3 * 32 * 64);

    let without_one = checkpoint.with(|c| drop(c.tensors.remove("model.layers.1.mlp.experts.1.up_proj.weight")));
    refused(without_one.write().path(), &["model.safetensors: tensor `model.layers.1.mlp.experts.1.up_proj.weight`: is missing"]);
}

#[test]
fn configs_are_refused_with_a_reason() {
    let check = |key: &str, value: Value, expected: &str| {
        refused(small().with(|c| c.config[key] = value).write().path(), &["config.json", expected]);
    };
    check("architectures", json!(["LlamaForCausalLM"]), "LlamaForCausalLM is not supported; supported: Qwen3MoeForCausalLM");
    check("num_experts", json!(1_000_000_000), "num_experts is 1000000000, expected 1 to 65535");
    check("num_experts", json!(1e9), "invalid type: floating point");
    check("num_experts_per_tok", json!(3), "num_experts_per_tok is 3, expected 1 to 2");
    check("num_hidden_layers", json!(1u64 << 40), "num_hidden_layers");
    check("vocab_size", json!(-1), "invalid value: integer `-1`");
    check("hidden_size", Value::Null, "hidden_size is missing");
    check("num_key_value_heads", json!(3), "not a multiple");
    check("head_dim", json!(7), "odd");
    check("rms_norm_eps", json!(0), "rms_norm_eps");
    check("rope_theta", json!(1e300), "rope_theta");
    check("decoder_sparse_step", json!(0), "decoder_sparse_step");
    check("mlp_only_layers", json!([0, 1]), "no layer has experts");
    check("intermediate_size", Value::Null, "layer 0 is dense");
    check("attention_bias", json!(true), "attention_bias");
    check("hidden_act", json!("gelu"), "gelu");
    check("rope_scaling", json!({ "rope_type": "yarn", "factor": 4.0 }), "yarn");
    check("rope_scaling", json!({ "factor": 4.0 }), "without a type");
    check("rope_parameters", json!({ "rope_type": "linear", "rope_theta": 1e4 }), "linear");
    check("layer_types", json!(["full_attention", "sliding_attention"]), "sliding_attention");
    check("quantization", json!({ "bits": 5, "group_size": 64 }), "bits 5 and group_size 64");
    check("quantization", json!({ "bits": 4, "group_size": 16 }), "group_size 16");
    check("quantization", json!({ "bits": 4, "group_size": 32, "mode": "mxfp4" }), "mxfp4");
    check("quantization", json!({ "quant_method": "gptq", "bits": 4 }), "gptq");
    check("quantization", json!({ "bits": 4, "group_size": 32, "model.layers.1.mlp.gate": false }), "not quantised");
    check(
        "quantization",
        json!({ "bits": 4, "group_size": 32, "lm_head": { "bits": 4 } }),
        "lm_head.weight`: is F32 [10, 64]: has no .scales",
    );
    check("quantization", Value::Null, "has no quantization");
}

/// As [`small`], with the figures that transformers 5 and older configs spell differently.
#[test]
fn configs_are_read_in_every_spelling() {
    let check = |key: &str, value: Value, theta: f32| {
        let dir = small().with(|c| c.config[key] = value).write();
        assert_eq!(Model::open(dir.path()).unwrap().arch.rope_theta, theta, "{key}");
    };
    check("rope_scaling", Value::Null, 1e4);
    check("rope_theta", json!(1_000_000), 1e6);
    check("rope_parameters", json!({ "rope_theta": 5e6, "rope_type": "default" }), 5e6);
    check("rope_scaling", json!({ "type": "default" }), 1e4);
    check("use_sliding_window", json!(false), 1e4);
    check("architectures", Value::Null, 1e4);
    check("num_local_experts", Value::Null, 1e4);
}
