//! Finding checkpoints on disk. Nothing is downloaded and nothing but config.json and safetensors headers is read; the
//! daemon passes the roots in and lists what comes back.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::families::Model;
use crate::{Error, ModelInfo};

/// A root holds models, or publishers with models, or `models--x--y/snapshots/rev`: three levels below it.
const DEPTH: usize = 3;
/// Looked into under one root; a home directory given by mistake must not take minutes.
const FOLDERS_MAX: usize = 10_000;

/// A checkpoint found under one of the model roots.
#[derive(Debug)]
pub struct Installed {
    pub id: String,
    pub path: PathBuf,
    pub modified: SystemTime,
    /// Why it cannot be served, if it cannot.
    pub info: Result<ModelInfo, Error>,
}

/// Every checkpoint under `roots`: a root itself, its children, `publisher/name` (LM Studio) and
/// `models--publisher--name/snapshots/<revision>` (Hugging Face cache). Sorted by id; the first of equal paths wins.
pub fn installed(roots: &[PathBuf]) -> Vec<Installed> {
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for root in roots {
        let mut budget = FOLDERS_MAX;
        collect(root, DEPTH, &mut budget, &mut |dir| {
            let Ok(path) = dir.canonicalize() else { return };
            if !seen.insert(path.clone()) {
                return;
            }
            let modified = std::fs::metadata(path.join("config.json")).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            found.push(Installed { id: id_of(&path), modified, info: describe(&path), path });
        });
    }
    found.sort_by(|a, b| a.id.cmp(&b.id).then_with(|| a.path.cmp(&b.path)));
    found
}

/// Reads config.json and the safetensors headers only.
pub fn describe(dir: &Path) -> Result<ModelInfo, Error> {
    Ok(Model::open(dir)?.info)
}

/// The folder's name, or `publisher/name` of a Hugging Face cache entry.
pub(super) fn id_of(dir: &Path) -> String {
    let name = |path: Option<&Path>| path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let snapshots = dir.parent();
    if name(snapshots) == "snapshots"
        && let Some((publisher, model)) =
            name(snapshots.and_then(Path::parent)).strip_prefix("models--").and_then(|entry| entry.split_once("--"))
    {
        return format!("{publisher}/{model}");
    }
    name(Some(dir))
}

/// Calls `visit` for `dir` if it is a checkpoint, else for those below it; what cannot be read is passed over.
fn collect(dir: &Path, depth: usize, budget: &mut usize, visit: &mut dyn FnMut(&Path)) {
    if *budget == 0 {
        return;
    }
    *budget -= 1;
    if is_checkpoint(dir) {
        return visit(dir);
    }
    let Ok(entries) = std::fs::read_dir(dir).map(|entries| entries.flatten()) else { return };
    if depth == 0 {
        return;
    }
    for entry in entries {
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if !hidden && entry.path().is_dir() {
            collect(&entry.path(), depth - 1, budget, visit);
        }
    }
}

fn is_checkpoint(dir: &Path) -> bool {
    dir.join("config.json").is_file() && (dir.join("model.safetensors.index.json").exists() || dir.join("model.safetensors").exists())
}
