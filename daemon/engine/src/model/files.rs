//! Reading a checkpoint's small files whole: regular files only, with a ceiling, as JSON or UTF-8. Not for weights, which
//! `weights.rs` reads by spans. Called by everything in this folder.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde::de::DeserializeOwned;

use crate::Error;

/// Of config.json, generation_config.json and tokenizer_config.json; real ones stay below 1 MiB.
pub(super) const JSON_MAX: u64 = 16 << 20;

/// Opens a regular file and tells its length; a pipe or device would block or never end.
pub(super) fn open(path: &Path) -> Result<(File, u64), Error> {
    let fail = |source| Error::Read { path: path.into(), source };
    let meta = std::fs::metadata(path).map_err(fail)?;
    if !meta.is_file() {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = File::open(path).map_err(fail)?;
    Ok((file, meta.len()))
}

pub(super) fn bytes(path: &Path, max: u64) -> Result<Vec<u8>, Error> {
    let (file, _) = open(path)?;
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).map_err(|source| Error::Read { path: path.into(), source })?;
    if bytes.len() as u64 > max {
        return Err(Error::File { path: path.into(), reason: format!("is larger than {max} bytes, the limit for this file") });
    }
    Ok(bytes)
}

pub(super) fn text(path: &Path, max: u64) -> Result<String, Error> {
    String::from_utf8(bytes(path, max)?).map_err(|error| Error::File { path: path.into(), reason: error.to_string() })
}

pub(super) fn json<T: DeserializeOwned>(path: &Path, max: u64) -> Result<T, Error> {
    serde_json::from_str(&text(path, max)?).map_err(|error| Error::File { path: path.into(), reason: error.to_string() })
}

/// `None` if there is no such file.
pub(super) fn json_if_any<T: DeserializeOwned>(path: &Path, max: u64) -> Result<Option<T>, Error> {
    match json(path, max) {
        Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}
