//! Synthetic models: random weights in a real model's shape, written as a packed checkpoint at the speed of the disk, so that
//! anyone can measure a 17 GB model anywhere. Not a model to talk to: it generates noise. `flashctl bench synth` is the caller.

mod noise;
mod plan;
mod tensors;
mod text;

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use flash_experts::StoreWriter;
use plan::Plan;
use serde_json::{Map, Value, json};
use tensors::GROUP;

use crate::{
    Bytes, Error, Progress, Tell,
    model::{
        packed::{self, LayerMeta, STORE},
        weights::{Float, Format},
    },
};

/// What a synthetic model imitates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub name: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub experts: usize,
    pub top_k: usize,
    pub moe_width: usize,
    pub vocab: usize,
    pub context: usize,
    pub rope_theta: f32,
    pub norm_topk_prob: bool,
}

/// All of them run as Qwen3-MoE: OLMoE and gpt-oss lend their figures, not their arithmetic.
static SHAPES: [Shape; 5] = [
    Shape {
        name: "qwen3-30b-a3b",
        layers: 48,
        hidden: 2048,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        experts: 128,
        top_k: 8,
        moe_width: 768,
        vocab: 151_936,
        context: 40_960,
        rope_theta: 1e6,
        norm_topk_prob: true,
    },
    Shape {
        name: "olmoe",
        layers: 16,
        hidden: 2048,
        heads: 16,
        kv_heads: 16,
        head_dim: 128,
        experts: 64,
        top_k: 8,
        moe_width: 1024,
        vocab: 50_304,
        context: 4_096,
        rope_theta: 1e4,
        norm_topk_prob: false,
    },
    Shape {
        name: "qwen3-235b-a22b",
        layers: 94,
        hidden: 4096,
        heads: 64,
        kv_heads: 4,
        head_dim: 128,
        experts: 128,
        top_k: 8,
        moe_width: 1536,
        vocab: 151_936,
        context: 40_960,
        rope_theta: 1e6,
        norm_topk_prob: true,
    },
    Shape {
        name: "gpt-oss-120b",
        layers: 36,
        hidden: 2880,
        heads: 64,
        kv_heads: 8,
        head_dim: 64,
        experts: 128,
        top_k: 4,
        moe_width: 2880,
        vocab: 201_088,
        context: 131_072,
        rope_theta: 1.5e5,
        norm_topk_prob: true,
    },
    Shape {
        name: "tiny",
        layers: 2,
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        experts: 8,
        top_k: 2,
        moe_width: 64,
        vocab: 512,
        context: 32_768,
        rope_theta: 1e4,
        norm_topk_prob: true,
    },
];

const SHAPE_NAMES: &str = "a shape: qwen3-30b-a3b, olmoe, qwen3-235b-a22b, gpt-oss-120b, tiny";
const LAYERS_MAX: usize = 4_096;
const CONTEXT_MAX: usize = 1 << 20;

/// The shapes that [`write()`] knows.
pub fn shapes() -> &'static [Shape] {
    &SHAPES
}

/// How tokens choose experts; `synth/plan.rs` says how the weights bring it about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// Every expert equally likely, tokens independent: a cache's worst case.
    Uniform,
    /// Popular experts, and topics that last: nearer to a trained model.
    Skewed,
}

/// A model to write.
#[derive(Clone, Debug)]
pub struct Synth {
    /// The name of one of [`shapes`].
    pub shape: String,
    /// `None`: as many as the shape has.
    pub layers: Option<usize>,
    /// `None`: the shape's.
    pub context: Option<usize>,
    pub seed: u64,
    pub routing: Routing,
}

/// What [`write()`] has written.
#[derive(Clone, Debug)]
pub struct Synthesized {
    pub path: PathBuf,
    /// Routed experts.
    pub records: u64,
    /// Of all files.
    pub bytes: Bytes,
    pub time: Duration,
}

/// Writes the model into `dir`, which is new, empty, or holds an earlier synthetic model, which goes. What has been written
/// is removed again if the job fails or is cancelled.
pub fn write(dir: &Path, synth: &Synth, tell: Tell<'_>) -> Result<Synthesized, Error> {
    let start = Instant::now();
    let shape = synth.resolve()?;
    let plan = Plan::new(&shape, synth.routing, synth.seed);
    let trunk = plan.trunk();
    let records = (shape.layers * shape.experts) as u64;
    let padded = shape.record(0)?.payload().next_multiple_of(ALIGN);
    let total = trunk.iter().map(tensors::Tensor::bytes).sum::<Bytes>() + records * Bytes::from(padded);
    let folder = Folder::claim(dir, total)?;

    let config = config(&shape, synth);
    for (name, json) in
        [(CONFIG, config), ("tokenizer.json", text::tokenizer(shape.vocab)), ("tokenizer_config.json", text::tokenizer_config())]
    {
        let path = dir.join(name);
        fs::write(&path, format!("{json:#}\n")).map_err(|source| failed("write", &path, source))?;
    }
    write_trunk(&dir.join(TRUNK), &trunk, tell)?;
    write_experts(dir, &plan, tell)?;
    let bytes = folder.finish();
    Ok(Synthesized { path: dir.into(), records, bytes, time: start.elapsed() })
}

const CONFIG: &str = "config.json";
const TRUNK: &str = "model.safetensors";
/// In config.json: says that a folder is ours to overwrite.
const MARK: &str = "flash_synth";
/// Everything that a synthetic model consists of, a store that was not finished included.
const FILES: [&str; 6] = [TRUNK, STORE, "experts.flash.part", "tokenizer.json", "tokenizer_config.json", CONFIG];
/// Of config.json and both tokenizer files, at most.
const TEXT_BYTES: Bytes = 1 << 20;
/// What a store aligns its records to.
const ALIGN: u32 = 4096;

impl Synth {
    /// The shape with this model's own layers and context.
    fn resolve(&self) -> Result<Shape, Error> {
        let unknown = || Error::Setting { value: self.shape.clone(), wants: SHAPE_NAMES };
        let shape = SHAPES.iter().find(|shape| shape.name == self.shape).ok_or_else(unknown)?;
        let within = |value: Option<usize>, default: usize, max: usize, wants: &'static str| match value.unwrap_or(default) {
            value if (1..=max).contains(&value) => Ok(value),
            value => Err(Error::Setting { value: value.to_string(), wants }),
        };
        Ok(Shape {
            layers: within(self.layers, shape.layers, LAYERS_MAX, "a number of layers from 1 to 4096")?,
            context: within(self.context, shape.context, CONTEXT_MAX, "a context from 1 to 1048576 tokens")?,
            ..*shape
        })
    }
}

impl Shape {
    /// How a record of a layer is made up, for the store's meta text.
    fn record(&self, layer: usize) -> Result<LayerMeta, Error> {
        let format = Format::Affine { bits: 4, group: GROUP, params: Float::Bf16 };
        let matrix = |rows, cols| packed::Shape { rows, cols, format };
        let (read, back) = (matrix(self.moe_width, self.hidden), matrix(self.hidden, self.moe_width));
        LayerMeta::new(layer, [read, read, back]).ok_or_else(|| Error::Internal(format!("shape {} makes no record", self.name)))
    }
}

fn config(shape: &Shape, synth: &Synth) -> Value {
    let mut quantization =
        Map::from_iter([("group_size".into(), GROUP.into()), ("bits".into(), 4.into()), ("mode".into(), "affine".into())]);
    for layer in 0..shape.layers {
        let router = json!({ "group_size": GROUP, "bits": plan::ROUTER_BITS });
        quantization.insert(format!("model.layers.{layer}.{}", plan::ROUTER), router);
    }
    json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        MARK: { "shape": shape.name, "layers": shape.layers, "seed": synth.seed, "routing": synth.routing.to_string() },
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.moe_width,
        "norm_topk_prob": shape.norm_topk_prob,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
        "eos_token_id": text::END_ID,
        "quantization": quantization,
    })
}

/// Is the model in `dir` one of ours? Its greedy walk soon ends in a circle, so that measurements sample instead.
pub fn is_synthetic(dir: &Path) -> bool {
    let json = fs::read(dir.join(CONFIG)).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    json.is_some_and(|config| config.get(MARK).is_some())
}

fn write_trunk(path: &Path, trunk: &[tensors::Tensor], tell: Tell<'_>) -> Result<(), Error> {
    let mut file = File::create(path).map_err(|source| failed("create", path, source))?;
    let (mut done, total): (Bytes, Bytes) = (0, trunk.iter().map(tensors::Tensor::bytes).sum());
    tensors::write(trunk, &mut |bytes| {
        file.write_all(bytes).map_err(|source| failed("write", path, source))?;
        done = total.min(done + bytes.len() as u64);
        told(tell, "writing the trunk", done, total)
    })?;
    file.sync_all().map_err(|source| failed("sync", path, source))
}

fn write_experts(dir: &Path, plan: &Plan<'_>, tell: Tell<'_>) -> Result<(), Error> {
    let (layers, experts) = (plan.shape.layers, plan.shape.experts);
    let metas = (0..layers).map(|layer| plan.shape.record(layer)).collect::<Result<Vec<_>, _>>()?;
    let records = metas.iter().map(|meta| vec![meta.payload(); experts]).collect();
    let meta = packed::Meta { layers: metas, source: Vec::new() }.to_bytes();
    let writer = StoreWriter::create(&dir.join(STORE), flash_experts::Plan { records, align: ALIGN, meta }).map_err(packed::error)?;
    let mut record = Vec::new();
    let mut done = 0;
    for layer in 0..layers {
        let mut of_layer = plan.experts(layer);
        for expert in 0..experts {
            let made = of_layer.record(expert);
            record.resize(made.bytes(), 0);
            made.fill(&mut record);
            writer.record(layer, expert, &record).map_err(packed::error)?;
            done += record.len() as Bytes;
            told(tell, "writing experts", done, (layers * experts * record.len()) as Bytes)?;
        }
    }
    writer.finish().map_err(packed::error)
}

fn told(tell: Tell<'_>, stage: &'static str, done: Bytes, total: Bytes) -> Result<(), Error> {
    if tell(Progress { stage, done, total }) { Ok(()) } else { Err(Error::Cancelled) }
}

fn failed(attempt: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Experts(Arc::new(flash_experts::Error::File { attempt, file: path.display().to_string(), source }))
}

/// The folder being written; dropped before [`Folder::finish`], it takes what was written with it.
struct Folder<'a> {
    path: &'a Path,
    /// It was not there before.
    new: bool,
    finished: bool,
}

impl<'a> Folder<'a> {
    /// Makes `path` an empty folder with room for `needed` bytes; what an earlier synthetic model takes counts as free.
    fn claim(path: &'a Path, needed: Bytes) -> Result<Self, Error> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => Some(entries.count()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(failed("look into", path, source)),
        };
        let new = entries.is_none();
        if entries > Some(0) && !is_synthetic(path) {
            let wants = "a folder for a synthetic model: new, empty, or with an earlier one, which is then replaced";
            return Err(Error::Setting { value: path.display().to_string(), wants });
        }
        fs::create_dir_all(path).map_err(|source| failed("create", path, source))?;
        // Until there is room for the new model, the earlier one stays.
        let mut folder = Self { path, new, finished: !new };
        let free = flash_experts::free_space(path).map_err(|source| failed("look for space in", path, source))?;
        let (free, needed) = (free + folder.bytes(), needed + TEXT_BYTES);
        if free < needed {
            let file = path.display().to_string();
            return Err(Error::Experts(Arc::new(flash_experts::Error::Space { file, needed, free })));
        }
        folder.finished = false;
        for path in folder.files() {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &path, source)),
                _ => {}
            }
        }
        Ok(folder)
    }

    fn files(&self) -> impl Iterator<Item = PathBuf> {
        FILES.iter().map(|name| self.path.join(name))
    }

    fn bytes(&self) -> Bytes {
        self.files().filter_map(|path| fs::metadata(path).ok()).map(|meta| meta.len()).sum()
    }

    /// Keeps everything; returns the bytes of all files.
    fn finish(mut self) -> Bytes {
        self.finished = true;
        self.bytes()
    }
}

impl Drop for Folder<'_> {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // What cannot be removed stays; the error that led here says more than this one would.
        self.files().for_each(|path| drop(fs::remove_file(path)));
        if self.new {
            drop(fs::remove_dir(self.path));
        }
    }
}

impl FromStr for Routing {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "uniform" => Ok(Self::Uniform),
            "skewed" => Ok(Self::Skewed),
            _ => Err(Error::Setting { value: text.into(), wants: "a routing: uniform or skewed" }),
        }
    }
}

impl fmt::Display for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Uniform { "uniform" } else { "skewed" })
    }
}

#[cfg(test)]
mod tests;
