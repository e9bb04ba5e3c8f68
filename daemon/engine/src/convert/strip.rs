//! A safetensors file without some of its tensors: its new header, and writing it. Nothing is replaced here; the caller
//! renames. For the conversion in place.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::Error;

const CHUNK: usize = 4 << 20;

/// What stays of a file.
#[derive(Debug)]
pub(super) struct Rest {
    /// With its length before it.
    header: Vec<u8>,
    /// The tensors' bytes in the old file, in the order of the new one.
    spans: Vec<Range<u64>>,
    /// Names of what stays.
    pub(super) tensors: Vec<String>,
}

impl Rest {
    /// `gone` says whether a tensor that begins at this byte of the file goes. The file's header has been checked when the
    /// model was opened.
    pub(super) fn of(path: &Path, gone: impl Fn(u64) -> bool) -> Result<Self, Error> {
        let bad = |reason: &str| Error::File { path: path.into(), reason: reason.into() };
        let read = || -> io::Result<Vec<u8>> {
            let file = File::open(path)?;
            let mut size = [0; 8];
            file.read_exact_at(&mut size, 0)?;
            let size = u64::from_le_bytes(size);
            if size > file.metadata()?.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut json = vec![0; size as usize];
            file.read_exact_at(&mut json, 8)?;
            Ok(json)
        };
        let json = read().map_err(|source| Error::Read { path: path.into(), source })?;
        let header: Map<String, Value> = serde_json::from_slice(&json).map_err(|error| bad(&error.to_string()))?;
        let data = 8 + json.len() as u64;
        let mut kept = Vec::new();
        let mut stays = Map::new();
        for (name, tensor) in header {
            if name == "__metadata__" {
                stays.insert(name, tensor);
                continue;
            }
            let offset = |at: usize| tensor["data_offsets"][at].as_u64().ok_or_else(|| bad("a tensor without data_offsets"));
            let (begin, end) = (data + offset(0)?, data + offset(1)?);
            if !gone(begin) {
                kept.push((begin..end, name, tensor));
            }
        }
        kept.sort_by_key(|(span, ..)| span.start);
        let (mut end, mut spans, mut tensors) = (0, Vec::new(), Vec::new());
        for (span, name, mut tensor) in kept {
            let begin = end;
            end += span.end - span.start;
            tensor["data_offsets"] = json!([begin, end]);
            tensors.push(name.clone());
            stays.insert(name, tensor);
            spans.push(span);
        }
        let mut json = Value::Object(stays).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let header = [&(json.len() as u64).to_le_bytes()[..], &json].concat();
        Ok(Self { header, spans, tensors })
    }

    /// Of the new file.
    pub(super) fn len(&self) -> u64 {
        self.header.len() as u64 + self.spans.iter().map(|span| span.end - span.start).sum::<u64>()
    }

    /// Writes it to `to`, which does not exist, and syncs; `to` gets the permissions of `from`.
    pub(super) fn write(&self, from: &Path, to: &Path) -> io::Result<()> {
        let source = File::open(from)?;
        let mut file = BufWriter::new(File::create_new(to)?);
        file.write_all(&self.header)?;
        let mut chunk = vec![0; CHUNK];
        for span in &self.spans {
            for at in span.clone().step_by(CHUNK) {
                let part = &mut chunk[..(span.end - at).min(CHUNK as u64) as usize];
                source.read_exact_at(part, at)?;
                file.write_all(part)?;
            }
        }
        let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        fs::set_permissions(to, source.metadata()?.permissions())?;
        file.sync_all()
    }
}
