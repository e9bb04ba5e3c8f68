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
    hub,
    weights::{Arena, Float, Format},
};

pub(super) fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flash-tiny-moe")
}

/// The bundled model's text files, with some replaced or (`None`) left out.
pub(super) fn changed(files: &[(&str, Option<&str>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"] {
        match files.iter().find(|(changed, _)| *changed == name) {
            Some((_, Some(text))) => fs::write(dir.path().join(name), text).unwrap(),
            Some((_, None)) => {}
            None => drop(fs::copy(bundled().join(name), dir.path().join(name)).unwrap()),
        }
    }
    dir
}

/// A checkpoint to be written: config and tensors by name (dtype, shape); payload bytes count up from 0.
#[derive(Clone)]
pub(crate) struct Checkpoint {
    config: Value,
    tensors: BTreeMap<String, (&'static str, Vec<usize>)>,
}

/// Two layers: the first dense and in bf16, the second with 2 experts, 4-bit and stacked.
pub(crate) fn small() -> Checkpoint {
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
    pub(crate) fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.path().join("model.safetensors"), safetensors(&self.tensors)).unwrap();
        dir
    }

    /// Dealt like cards to two files, but for a third that has experts alone; and an index.
    pub(crate) fn write_sharded(&self) -> TempDir {
        let dir = self.write();
        fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        let mut map = serde_json::Map::new();
        for shard in 0..3 {
            let file = format!("model-{shard}.safetensors");
            let (apart, rest): (BTreeMap<_, _>, BTreeMap<_, _>) =
                self.tensors.clone().into_iter().partition(|(name, _)| name.contains("switch_mlp.gate"));
            let dealt = if shard == 2 { apart } else { rest.into_iter().skip(shard).step_by(2).collect() };
            map.extend(dealt.keys().map(|name| (name.clone(), json!(file))));
            fs::write(dir.path().join(&file), safetensors(&dealt)).unwrap();
        }
        let index = json!({ "metadata": {}, "weight_map": map });
        fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
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
    let mut arena = Arena::default();
    let parts = [(); 3].map(|()| model.weights.read("expert", experts[1].gate.weight, &mut arena).unwrap());
    let file = fs::read(dir.path().join("model.safetensors")).unwrap();
    let begin = experts[1].gate.weight.offset as usize;
    for bytes in parts.map(|part| arena.get(part)) {
        assert_eq!((bytes, bytes.as_ptr().addr() % 64), (&file[begin..begin + 1024], 0));
    }
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

#[test]
fn tensors_are_refused_with_a_reason() {
    let check = |name: &str, change: Option<(&'static str, &[usize])>, expected: &str| {
        let dir = small()
            .with(|c| match change {
                Some((dtype, shape)) => drop(c.tensors.insert(name.into(), (dtype, shape.to_vec()))),
                None => drop(c.tensors.remove(name)),
            })
            .write();
        refused(dir.path(), &["model.safetensors: tensor `", name, expected]);
    };
    check("model.norm.weight", None, "is missing");
    check("lm_head.weight", None, "is missing");
    check("model.norm.weight", Some(("BF16", &[63])), "is Bf16 [63]: expected shape [64]");
    check("model.norm.weight", Some(("U32", &[64])), "expected F32, F16 or BF16");
    check("model.layers.0.self_attn.q_proj.weight", Some(("BF16", &[64, 32])), "expected shape [32, 64]");
    check("model.layers.1.mlp.switch_mlp.up_proj.weight", Some(("U32", &[3, 32, 8])), "expected shape [2, 32, 8]");
    check("model.layers.1.mlp.switch_mlp.up_proj.weight", Some(("F16", &[2, 32, 64])), "expected U32");
    check("model.layers.1.mlp.switch_mlp.up_proj.biases", None, "is missing");
    check("model.layers.1.mlp.switch_mlp.up_proj.scales", Some(("F16", &[2, 32, 1])), "expected shape [2, 32, 2]");
    refused(
        small().with(|c| drop(c.tensors.insert("model.layers.1.mlp.gate.scales".into(), ("F32", vec![2, 1])))).write().path(),
        &["model.layers.1.mlp.gate.weight", "scales of F32 and biases of F16"],
    );
    refused(
        small().with(|c| drop(c.tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), ("F32", vec![32])))).write().path(),
        &["model.layers.0.self_attn.q_proj.weight", ".bias"],
    );
}

#[test]
fn headers_are_refused_with_a_reason() {
    let check = |file: Vec<u8>, expected: &[&str]| {
        let dir = small().write();
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        refused(dir.path(), &[&["model.safetensors"], expected].concat());
    };
    let with_len = |len: u64| [&len.to_le_bytes()[..], b"{}"].concat();
    check(vec![], &["too short"]);
    check(vec![0; 7], &["too short"]);
    check(with_len(1 << 63), &["the header claims 9223372036854775808 bytes"]);
    check(with_len(u64::MAX), &["the header claims"]);
    check(with_len(3), &["the header claims 3 bytes; the file has 2"]);
    check(framed("[]", 0), &["the header is malformed"]);
    check(framed(&"[".repeat(100_000), 0), &["the header is malformed"]);
    check([&5_u64.to_le_bytes()[..], b"{\"\xff\":"].concat(), &["not UTF-8"]);
    check(framed("{}", 0), &["is missing"]);
    let one = |dtype: &str, shape: &str, offsets: &str| {
        framed(&format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), 16)
    };
    check(one("F33", "[4]", "[0,16]"), &["tensor `x`: unknown dtype `F33`"]);
    check(one("F32", "[4]", "[0,17]"), &["tensor `x`: bytes 0 to 17 are outside the file's 16 data bytes"]);
    check(one("F32", "[4]", "[16,0]"), &["tensor `x`: bytes 16 to 0"]);
    check(one("F32", "[4]", "[0,18446744073709551615]"), &["tensor `x`: bytes 0 to"]);
    check(one("F32", "[5]", "[0,16]"), &["tensor `x`: shape [5] of F32 does not fill 16 bytes"]);
    check(one("F32", "[4294967296,4294967296,4]", "[0,16]"), &["tensor `x`: shape"]);
    check(one("F32", "[1,1,1,1,1,1,1,1,4]", "[0,16]"), &["tensor `x`: 9 dimensions"]);
    check(one("F32", "[-4]", "[0,16]"), &["tensor `x`: invalid value"]);
    check(one("F32", "[4]", "[0]"), &["tensor `x`: invalid length"]);
    let entry = |offsets: &str| format!(r#"{{"dtype":"U8","shape":[8],"data_offsets":{offsets}}}"#);
    check(framed(&format!(r#"{{"x":{},"y":{}}}"#, entry("[0,8]"), entry("[7,15]")), 16), &["tensor `y`: overlaps tensor `x`"]);
    check(framed(&format!(r#"{{"x":{},"x":{}}}"#, entry("[0,8]"), entry("[8,16]")), 16), &["tensor `x`: is described twice"]);
}

#[test]
fn truncated_and_flipped_files_never_panic() {
    let dir = small().write();
    let path = dir.path().join("model.safetensors");
    let good = fs::read(&path).unwrap();
    for len in (0..good.len()).step_by(41).chain([good.len() - 1]) {
        fs::write(&path, &good[..len]).unwrap();
        refused(dir.path(), &["model.safetensors"]);
    }
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    let places: Vec<_> = (0..header).step_by(11).chain(0..8).collect();
    for &at in &places {
        for mask in [1, 0x10, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= mask;
            fs::write(&path, bad).unwrap();
            refused += usize::from(Model::open(dir.path()).is_err());
        }
    }
    // Flips inside __metadata__ change nothing that is read.
    assert!(refused > 3 * (places.len() - 6), "{refused} of {}", 3 * places.len());
}

#[test]
fn a_file_that_shrinks_later_is_a_short_read() {
    let dir = small().write();
    let model = Model::open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(model.norm.span.offset + 1).unwrap();
    let error = model.weights.read_vector(&model.norm).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: tensor `model.norm`: reading 128 bytes"), "{error}");
}

/// The tensors in two shards and an index; `name` is what the index calls the second one.
fn sharded(dir: &Path, name: &str) {
    let Checkpoint { config, tensors } = small();
    let (first, second): (BTreeMap<_, _>, BTreeMap<_, _>) = tensors.into_iter().partition(|(tensor, _)| tensor.contains("layers.0"));
    let shards = first.keys().map(|tensor| (tensor, "a.safetensors")).chain(second.keys().map(|tensor| (tensor, name)));
    let map: BTreeMap<_, _> = shards.collect();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("model.safetensors.index.json"), json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    fs::write(dir.join("a.safetensors"), safetensors(&first)).unwrap();
    fs::write(dir.join("b.safetensors"), safetensors(&second)).unwrap();
}

#[test]
fn shards_are_read_by_their_index() {
    let dir = tempfile::tempdir().unwrap();
    sharded(dir.path(), "b.safetensors");
    let model = Model::open(dir.path()).unwrap();
    assert_eq!(model.weights.files().len(), 2);
    assert_eq!((model.layers[0].q.weight.file, model.layers[1].q.weight.file), (0, 1));

    fs::write(dir.path().join("a.safetensors"), framed("{}", 0)).unwrap();
    refused(dir.path(), &["a.safetensors: tensor `model.layers.0", "lists it, but it is not in this file"]);
    fs::remove_file(dir.path().join("a.safetensors")).unwrap();
    refused(dir.path(), &["a.safetensors"]);
    for bad in [&b"{"[..], b"{}", b"{\"weight_map\": {\"x\": 5}}", b"{\"weight_map\": {\"\xff\": \"a\"}}"] {
        fs::write(dir.path().join("model.safetensors.index.json"), bad).unwrap();
        refused(dir.path(), &["model.safetensors.index.json"]);
    }
}

#[test]
fn shards_stay_in_their_folder() {
    let root = tempfile::tempdir().unwrap();
    let outside = root.path().join("outside.safetensors");
    for name in [
        "../outside.safetensors",
        outside.to_str().unwrap(),
        "./b.safetensors",
        "x/b.safetensors",
        "..",
        "",
        "b.safetensors/",
        "b",
        "x\\b.safetensors",
        "b\0.safetensors",
    ] {
        let dir = root.path().join("model");
        fs::create_dir_all(&dir).unwrap();
        sharded(&dir, name);
        fs::copy(dir.join("b.safetensors"), &outside).unwrap();
        refused(&dir, &["model.safetensors.index.json", "is not the plain name"]);
    }

    // A link out of the folder is refused, a link within it and one into the cache entry's blobs are followed.
    let check = |dir: &str, target: &str, good: bool| {
        let dir = root.path().join(dir);
        fs::create_dir_all(&dir).unwrap();
        sharded(&dir, "b.safetensors");
        let target = dir.join(target);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::rename(dir.join("b.safetensors"), &target).unwrap();
        std::os::unix::fs::symlink(&target, dir.join("b.safetensors")).unwrap();
        match good {
            true => drop(Model::open(&dir).unwrap()),
            false => refused(&dir, &["`b.safetensors` is a link that leads outside the model's folder"]),
        }
    };
    check("linked", "../stolen", false);
    check("inner", "blobs/hash", true);
    check("models--x--y/snapshots/rev", "../../blobs/hash", true);
    check("models--x--z/snapshots/rev", "../../../models--x--y/blobs/other", false);
    check("plain/snapshots/rev", "../../blobs/hash", false);
    let info = hub::describe(&root.path().join("models--x--y/snapshots/rev")).unwrap();
    assert_eq!(info.id, "x/y");
}

#[test]
fn only_regular_files_are_read() {
    let dir = small().write();
    let path = dir.path().join("config.json");
    fs::remove_file(&path).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    refused(dir.path(), &["config.json: not a regular file"]);
}

#[test]
fn every_checkpoint_is_found_and_bad_ones_say_why() {
    let root = tempfile::tempdir().unwrap();
    let put = |dir: &str, config: &str| {
        let dir = root.path().join(dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.json"), config).unwrap();
        fs::write(dir.join("model.safetensors"), safetensors(&small().tensors)).unwrap();
    };
    let good = small().config.to_string();
    put("flat", &good);
    put("publisher/nested", &good);
    put("models--org--name/snapshots/abc", &good);
    put("broken", "{");
    put("too/deep/to/be", &good);
    put(".hidden", &good);
    fs::create_dir_all(root.path().join("empty")).unwrap();
    std::os::unix::fs::symlink(root.path().join("flat"), root.path().join("again")).unwrap();
    std::os::unix::fs::symlink(root.path(), root.path().join("loop")).unwrap();

    let roots = [root.path().to_owned(), root.path().join("nowhere"), root.path().join("flat")];
    let found: Vec<_> = hub::installed(&roots)
        .into_iter()
        .map(|model| (model.id, model.info.map(|info| info.experts).map_err(|error| error.to_string())))
        .collect();
    let ids: Vec<_> = found.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(ids, ["broken", "flat", "nested", "org/name"]);
    assert!(found[0].1.as_ref().is_err_and(|error| error.contains("config.json")), "{found:?}");
    assert!(found[1..].iter().all(|(_, info)| *info == Ok(2)), "{found:?}");
}
