//! The golden files beside the bundled model: prompts, greedy tokens and logits that another implementation computed,
//! and held-out text. Reading only.

use std::{collections::BTreeMap, fs, io::BufReader, path::Path};

use anyhow::{Context, Result};
use npyz::NpyFile;
use serde_json::Value;
use zip::ZipArchive;

use crate::daemon::bundled_model;

/// One prompt and what must follow.
#[derive(Debug)]
pub struct Golden {
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
    /// Of the prompt's last position.
    pub logits: Vec<f32>,
}

/// `name` is the files' stem, such as `mlx_4bit_f32`.
pub fn read(name: &str) -> Result<Vec<Golden>> {
    let folder = bundled_model().join("golden");
    let json: Value = read_json(&folder.join(format!("{name}.json")))?;
    let prompts = json["prompts"].as_array().context("prompts")?;
    let path = folder.join(format!("{name}_logits.npz"));
    let mut archive = ZipArchive::new(BufReader::new(fs::File::open(&path).with_context(|| path.display().to_string())?))?;
    let mut goldens = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let array = archive.by_name(&format!("prompt{index}.npy")).with_context(|| format!("prompt{index} in {}", path.display()))?;
        let logits = NpyFile::new(array)?.into_vec::<f32>()?;
        goldens.push(Golden { prompt: ids(&prompt["token_ids"])?, greedy: ids(&prompt["greedy"])?, logits });
    }
    Ok(goldens)
}

/// Held-out token sequences by domain.
pub fn held_out() -> Result<BTreeMap<String, Vec<u32>>> {
    let json = read_json(&bundled_model().join("golden/heldout_tokens.json"))?;
    json.as_object().context("an object")?.iter().map(|(domain, tokens)| Ok((domain.clone(), ids(tokens)?))).collect()
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

fn ids(value: &Value) -> Result<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).context("a token id");
    value.as_array().context("a list of token ids")?.iter().map(id).collect()
}
