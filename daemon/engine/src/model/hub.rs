//! Finding checkpoints on disk.

use std::path::{Path, PathBuf};

use crate::{Error, ModelInfo};

/// A checkpoint found under one of the model roots.
#[derive(Debug)]
pub struct Installed {
    pub id: String,
    pub path: PathBuf,
    pub modified: std::time::SystemTime,
    /// Why it cannot be served, if it cannot.
    pub info: Result<ModelInfo, Error>,
}

/// Every checkpoint under `roots`: a root itself, its children, `publisher/name` (LM Studio) and
/// `models--publisher--name/snapshots/<revision>` (Hugging Face cache). Sorted by id; the first of equal paths wins.
pub fn installed(_roots: &[PathBuf]) -> Vec<Installed> {
    unimplemented!()
}

/// Reads config.json and the safetensors headers only.
pub fn describe(_dir: &Path) -> Result<ModelInfo, Error> {
    unimplemented!()
}
