//! Where tensors lie, and reading them into aligned memory. Headers are checked once, when the checkpoint is opened; bytes
//! are then read by position, never mapped: a file truncated under us is an error and not a SIGBUS. `families.rs` asks for
//! tensors by name, the backend reads the spans.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Component, Path, PathBuf},
};

use flash_experts::Pages;
pub(crate) use flash_kernels::matrix::{Float, Format};
use half::{bf16, f16};
use serde::Deserialize;

use super::{
    arch::Quantization,
    files,
    safetensors::{self, Dtype, Tensor},
};
use crate::{Bytes, Error};

/// Of model.safetensors.index.json.
const INDEX_MAX: u64 = 100 << 20;
/// Each is an open file.
const SHARDS_MAX: usize = 512;
const ALIGN: usize = 64;

/// A row-major matrix [rows, cols] as it lies in a file; `scales` and `biases` exist for [`Format::Affine`] only.
#[derive(Clone, Debug)]
pub(crate) struct MatrixSpec {
    /// The tensor's name without `.weight`, for errors.
    pub(crate) name: String,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) format: Format,
    pub(crate) weight: Span,
    pub(crate) scales: Option<Span>,
    pub(crate) biases: Option<Span>,
}

/// Bytes in a weight file; checked to lie inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Index into [`Weights::files`].
    pub(crate) file: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A vector of `len` numbers (norm weights, biases).
#[derive(Clone, Debug)]
pub(crate) struct VectorSpec {
    pub(crate) name: String,
    pub(crate) len: usize,
    pub(crate) float: Float,
    pub(crate) span: Span,
}

/// Memory for weights: every matrix begins at 64 bytes, and all of them share large mappings, so that small ones lie in huge pages
/// too. Many matrices of a token's step would need a page table's entry for every four rows otherwise: a tenth of its time.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    chunks: Vec<Pages>,
    /// Of the last chunk.
    used: usize,
}

/// Bytes in an [`Arena`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    chunk: usize,
    at: usize,
    len: usize,
}

/// A chunk's size, unless one matrix is larger. Memory that is never touched is none.
const CHUNK: usize = 256 << 20;

impl Arena {
    /// Zeroed.
    fn take(&mut self, len: usize) -> io::Result<Part> {
        let at = self.used.next_multiple_of(ALIGN);
        let fits = self.chunks.last().is_some_and(|chunk| at + len <= chunk.as_slice().len());
        if !fits {
            self.chunks.push(Pages::new(len.max(CHUNK))?);
        }
        let at = if fits { at } else { 0 };
        self.used = at + len;
        Ok(Part { chunk: self.chunks.len() - 1, at, len })
    }

    pub(crate) fn get(&self, part: Part) -> &[u8] {
        &self.chunks[part.chunk].as_slice()[part.at..part.at + part.len]
    }

    fn get_mut(&mut self, part: Part) -> &mut [u8] {
        &mut self.chunks[part.chunk].as_mut_slice()[part.at..part.at + part.len]
    }
}

impl Part {
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl MatrixSpec {
    pub(crate) fn bytes(&self) -> Bytes {
        [Some(self.weight), self.scales, self.biases].into_iter().flatten().map(|span| span.len).sum()
    }
}

/// The checkpoint's weight files and the table of their tensors.
#[derive(Debug)]
pub(crate) struct Weights {
    /// What names the tensors: the index or the only file; for errors about tensors that are nowhere.
    source: PathBuf,
    files: Vec<PathBuf>,
    handles: Vec<File>,
    size: Bytes,
    tensors: HashMap<String, Tensor>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens `dir`'s shards, as its index lists them, else its model.safetensors; reads headers only.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let index_path = dir.join("model.safetensors.index.json");
        let index: Option<Index> = files::json_if_any(&index_path, INDEX_MAX)?;
        let (source, names) = match &index {
            Some(index) => (index_path, index.weight_map.values().map(String::as_str).collect::<HashSet<_>>()),
            None => (dir.join("model.safetensors"), HashSet::from(["model.safetensors"])),
        };
        if names.len() > SHARDS_MAX {
            return Err(Error::File { path: source, reason: format!("{} shards, the limit is {SHARDS_MAX}", names.len()) });
        }
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_unstable();

        let mut weights = Self { source, files: Vec::new(), handles: Vec::new(), size: 0, tensors: HashMap::new() };
        let mut shards = Vec::with_capacity(names.len());
        for name in &names {
            let path = shard_path(dir, name, &weights.source)?;
            let (file, len) = files::open(&path)?;
            shards.push(safetensors::header(&path, &file, len, weights.files.len() as u32)?);
            weights.files.push(path);
            weights.handles.push(file);
            weights.size = weights.size.saturating_add(len);
        }
        // The index decides where a tensor is: a shard may hold others, and two shards the same.
        for (shard, name) in shards.into_iter().zip(&names) {
            let listed =
                |tensor: &String| index.as_ref().is_none_or(|index| index.weight_map.get(tensor).map(String::as_str) == Some(*name));
            weights.tensors.extend(shard.into_iter().filter(|(tensor, _)| listed(tensor)));
        }
        if let Some((tensor, shard)) =
            index.iter().flat_map(|index| &index.weight_map).find(|(tensor, _)| !weights.tensors.contains_key(*tensor))
        {
            let reason = format!("{} lists it, but it is not in this file", weights.source.display());
            return Err(Error::Tensor { path: dir.join(shard), tensor: tensor.clone(), reason });
        }
        Ok(weights)
    }

    /// Paths in the order [`Span::file`] counts.
    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Adds a file that holds no tensors by name; returns its number.
    pub(crate) fn append(&mut self, path: &Path) -> Result<u32, Error> {
        let (file, _) = files::open(path)?;
        self.files.push(path.into());
        self.handles.push(file);
        Ok(self.files.len() as u32 - 1)
    }

    /// Of the checkpoint's own weight files.
    pub(crate) fn size(&self) -> Bytes {
        self.size
    }

    pub(crate) fn contains(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// The matrix `name`.weight [rows, cols], quantised if its tensors are and config.json agrees.
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize, quantization: &Quantization) -> Result<MatrixSpec, Error> {
        self.locate(name, &[rows], cols, quantization)
    }

    /// `count` matrices stacked in one tensor [count, rows, cols], one spec each.
    pub(crate) fn stacked(
        &self,
        name: &str,
        [count, rows, cols]: [usize; 3],
        quantization: &Quantization,
    ) -> Result<Vec<MatrixSpec>, Error> {
        let whole = self.locate(name, &[count, rows], cols, quantization)?;
        let cut = |span: Span, index: usize| {
            let len = span.len / count as u64;
            Span { offset: span.offset + index as u64 * len, len, ..span }
        };
        let one = |index| MatrixSpec {
            name: format!("{name}[{index}]"),
            rows,
            weight: cut(whole.weight, index),
            scales: whole.scales.map(|span| cut(span, index)),
            biases: whole.biases.map(|span| cut(span, index)),
            ..whole
        };
        Ok((0..count).map(one).collect())
    }

    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<VectorSpec, Error> {
        let tensor_name = format!("{name}.weight");
        let tensor = self.shaped(&tensor_name, &[len])?;
        let float = float(tensor.dtype).ok_or_else(|| self.wrong(&tensor_name, tensor, "expected F32, F16 or BF16".into()))?;
        Ok(VectorSpec { name: name.into(), len, float, span: tensor.span })
    }

    fn locate(&self, name: &str, rows: &[usize], cols: usize, quantization: &Quantization) -> Result<MatrixSpec, Error> {
        let weight_name = format!("{name}.weight");
        let tensor = self.find(&weight_name)?;
        let wrong = |reason: String| self.wrong(&weight_name, tensor, reason);
        let shape = |last: usize| [rows, &[last]].concat();
        if self.contains(&format!("{name}.bias")) {
            return Err(wrong("has a .bias beside it, which is not supported".into()));
        }
        let quantised = self.contains(&format!("{name}.scales"));
        let spec =
            |format, weight| MatrixSpec { name: name.into(), rows: rows[rows.len() - 1], cols, format, weight, scales: None, biases: None };
        let affine = match (quantised, quantization.overrides.get(name)) {
            (true, Some(None)) => return Err(wrong("has .scales, but config.json says that it is not quantised".into())),
            (false, Some(Some(_))) => return Err(wrong("has no .scales, but config.json says that it is quantised".into())),
            (true, Some(&Some(affine))) => affine,
            (true, None) => quantization.default.ok_or_else(|| wrong("has .scales, but config.json has no quantization".into()))?,
            (false, _) => {
                self.shaped(&weight_name, &shape(cols))?;
                let float = float(tensor.dtype).ok_or_else(|| wrong("expected F32, F16 or BF16, as there are no .scales".into()))?;
                return Ok(spec(float.into(), tensor.span));
            }
        };
        if tensor.dtype != Dtype::U32 {
            return Err(wrong("expected U32, as there are .scales".into()));
        }
        if !cols.is_multiple_of(affine.group) {
            return Err(wrong(format!("{cols} columns are not a multiple of the quantisation group, {}", affine.group)));
        }
        self.shaped(&weight_name, &shape(cols * usize::from(affine.bits) / 32))?;
        let scales = self.shaped(&format!("{name}.scales"), &shape(cols / affine.group))?;
        let biases = self.shaped(&format!("{name}.biases"), &shape(cols / affine.group))?;
        match (float(scales.dtype), scales.dtype == biases.dtype) {
            (Some(params), true) => {
                let format = Format::Affine { bits: affine.bits, group: affine.group, params };
                Ok(MatrixSpec { scales: Some(scales.span), biases: Some(biases.span), ..spec(format, tensor.span) })
            }
            _ => Err(wrong(format!(
                "scales of {:?} and biases of {:?}, expected one of F32, F16, BF16 for both",
                scales.dtype, biases.dtype
            ))),
        }
    }

    fn find(&self, tensor: &str) -> Result<&Tensor, Error> {
        self.tensors.get(tensor).ok_or_else(|| Error::Tensor {
            path: self.source.clone(),
            tensor: tensor.into(),
            reason: "is missing".into(),
        })
    }

    fn shaped(&self, name: &str, expected: &[usize]) -> Result<&Tensor, Error> {
        let tensor = self.find(name)?;
        match tensor.shape == expected {
            true => Ok(tensor),
            false => Err(self.wrong(name, tensor, format!("expected shape {expected:?}"))),
        }
    }

    fn wrong(&self, name: &str, tensor: &Tensor, reason: String) -> Error {
        let path = self.files[tensor.span.file as usize].clone();
        Error::Tensor { path, tensor: name.into(), reason: format!("is {:?} {:?}: {reason}", tensor.dtype, tensor.shape) }
    }

    /// Reads a span by positional reads; a short read is an error.
    pub(crate) fn read(&self, name: &str, span: Span, arena: &mut Arena) -> Result<Part, Error> {
        let len = usize::try_from(span.len).map_err(|error| self.failed(name, span, error))?;
        let part = arena.take(len).map_err(|error| self.failed(name, span, format!("no memory for {len} bytes: {error}")))?;
        self.fill(name, span, arena.get_mut(part))?;
        Ok(part)
    }

    fn fill(&self, name: &str, span: Span, bytes: &mut [u8]) -> Result<(), Error> {
        let read = self.handles[span.file as usize].read_exact_at(bytes, span.offset);
        read.map_err(|error| self.failed(name, span, format!("reading {} bytes at {}: {error}", span.len, span.offset)))
    }

    fn failed(&self, name: &str, span: Span, reason: impl ToString) -> Error {
        Error::Tensor { path: self.files[span.file as usize].clone(), tensor: name.into(), reason: reason.to_string() }
    }

    /// As [`Weights::read`], for who keeps them elsewhere.
    pub(crate) fn bytes(&self, name: &str, span: Span) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; span.len as usize];
        self.fill(name, span, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads and widens to f32.
    pub(crate) fn read_vector(&self, spec: &VectorSpec) -> Result<Vec<f32>, Error> {
        let bytes = self.bytes(&spec.name, spec.span)?;
        Ok(match spec.float {
            Float::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Float::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Float::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        })
    }
}

/// A shard is a file of the folder itself. A symlink is followed inside the folder and into `blobs` of the same Hugging
/// Face cache entry (`models--x--y/snapshots/rev/file -> ../../blobs/hash`), nowhere else: a downloaded index must not make
/// the daemon open files of its choice.
fn shard_path(dir: &Path, name: &str, source: &Path) -> Result<PathBuf, Error> {
    let refuse = |reason: &str| Err(Error::File { path: source.into(), reason: format!("shard name `{}` {reason}", name.escape_debug()) });
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name);
    if !plain || name.contains(['\\', '\0']) || !name.ends_with(".safetensors") {
        return refuse("is not the plain name of a .safetensors file");
    }
    let path = dir.join(name);
    match stays_inside(dir, &path)? {
        true => Ok(path),
        false => refuse("is a link that leads outside the model's folder"),
    }
}

/// The file, links followed, lies in the folder or its cache entry's `blobs`.
pub(super) fn stays_inside(dir: &Path, path: &Path) -> Result<bool, Error> {
    let real = |path: &Path| path.canonicalize().map_err(|source| Error::Read { path: path.into(), source });
    let (target, folder) = (real(path)?, real(dir)?);
    Ok(target.starts_with(&folder) || blobs(&folder).is_some_and(|blobs| target.starts_with(blobs)))
}

/// `models--x--y/blobs` of a folder `models--x--y/snapshots/rev`.
fn blobs(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.parent().filter(|path| path.file_name().is_some_and(|name| name == "snapshots"))?;
    let entry = snapshots.parent()?;
    entry.file_name()?.to_str()?.starts_with("models--").then(|| entry.join("blobs"))
}

fn float(dtype: Dtype) -> Option<Float> {
    match dtype {
        Dtype::F32 => Some(Float::F32),
        Dtype::F16 => Some(Float::F16),
        Dtype::Bf16 => Some(Float::Bf16),
        Dtype::U32 | Dtype::Other { .. } => None,
    }
}
