//! Packing a checkpoint's routed experts into an expert store, beside the checkpoint or in its place, and checking a store.
//! Long jobs on a thread of the caller's, with progress. The store's bytes are written by `flash-experts`; nothing is
//! computed here. Called by the daemon's jobs.

mod in_place;
mod strip;

use std::{
    hash::Hasher,
    path::{Path, PathBuf},
    time::Instant,
};

use flash_experts::{Plan, Read, Storage, StoreReader, StoreWriter};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::{
    Bytes, Error, Io, Progress, Tell,
    model::{
        families::{Ffn, FfnSpec, Model},
        packed::{self, JOURNAL, LayerMeta, Meta, STORE, Shape, SourceMeta},
        weights::Span,
    },
};

/// Of records; direct reads of Linux and of nearly every disk. Files for Macs are written there.
const ALIGN: u32 = if cfg!(target_os = "macos") { 16384 } else { 4096 };
const WRITING: &str = "writing experts";

/// What a conversion has made.
#[derive(Clone, Debug)]
pub struct Converted {
    pub path: PathBuf,
    pub records: usize,
    /// Of the store.
    pub bytes: Bytes,
    pub seconds: f64,
}

/// What a store's check has found.
#[derive(Clone, Debug)]
pub struct Verified {
    pub records: usize,
    /// Of the store.
    pub bytes: Bytes,
    /// One sentence for each record that is not what was written.
    pub bad: Vec<String>,
}

/// Bytes of a weight file that are a part of a record: layer (of those with experts), expert, where in the record, where
/// in the file, how many. A tuple, because a journal lists a hundred thousand.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
struct Piece(usize, usize, u32, u64, u32);

/// What goes where.
#[derive(Debug)]
struct Layout {
    layers: Vec<LayerMeta>,
    experts: usize,
    /// Of each weight file, in the order of the records.
    pieces: Vec<Vec<Piece>>,
}

/// Writes `experts.flash` beside config.json; with `in_place` the weight files lose their experts one file at a time, so
/// that no more space is needed than the largest takes. If it is stopped, nothing is left of it; in place only until the
/// first file has been changed, and then running it again finishes the work.
pub fn convert(dir: &Path, in_place: bool, tell: Tell<'_>) -> Result<Converted, Error> {
    let start = Instant::now();
    let dir = &dir.canonicalize().map_err(|source| Error::Read { path: dir.into(), source })?;
    let path = dir.join(STORE);
    if !dir.join(JOURNAL).exists() && path.exists() {
        let reason = "the model is packed already; `flashctl verify` checks it".into();
        return Err(Error::Unsupported { path, reason });
    }
    if in_place {
        in_place::run(dir, tell)?;
    } else {
        beside(dir, &path, tell)?;
    }
    let store = StoreReader::open(&path, Io::Buffered).map_err(experts)?;
    let records = store.records().map(<[_]>::len).sum();
    Ok(Converted { records, bytes: store.len(), seconds: start.elapsed().as_secs_f64(), path })
}

/// Reads every record of a packed model and holds it against its checksum.
pub fn verify(dir: &Path, tell: Tell<'_>) -> Result<Verified, Error> {
    let path = dir.join(STORE);
    if !path.exists() {
        let reason = format!("has no {STORE} to verify; `flashctl convert` makes one");
        return Err(Error::Unsupported { path: dir.into(), reason });
    }
    // What is wrong with the model besides shall be said first.
    Model::open(dir)?;
    let store = StoreReader::open(&path, Io::Auto).map_err(experts)?;
    let mut stopped = false;
    let bad = store.verify(&mut |done, total| {
        stopped = !tell(Progress { stage: "verifying experts", done, total });
        !stopped
    });
    if stopped {
        return Err(Error::Cancelled);
    }
    let records = store.records().map(<[_]>::len).sum();
    Ok(Verified { records, bytes: store.len(), bad: bad.iter().map(ToString::to_string).collect() })
}

/// The whole store at once, the checkpoint staying as it is.
fn beside(dir: &Path, path: &Path, tell: Tell<'_>) -> Result<(), Error> {
    let model = Model::open(dir)?;
    let layout = Layout::of(&model)?;
    let sources = model.weights.files().iter().map(|path| Source::open(path)).collect::<Result<Vec<_>, _>>()?;
    let writer = StoreWriter::create(path, layout.plan(&layout.meta(&sources))).map_err(|error| match error {
        flash_experts::Error::Space { needed, free, .. } => {
            let reason = format!(
                "needs {needed} bytes and its disk has {free} free; make room first, or run `flashctl convert --in-place`, which \
                 needs room for the largest weight file only"
            );
            Error::File { path: path.into(), reason }
        }
        error => experts(error),
    })?;
    let written = layout.copy(sources, &writer, tell);
    let sources = match written {
        Ok(sources) => sources,
        Err(error) => {
            writer.discard().map_err(experts)?;
            return Err(error);
        }
    };
    let mut writer = writer;
    writer.set_meta(layout.meta(&sources).to_bytes()).map_err(experts)?;
    writer.finish().map_err(experts)
}

/// A weight file, and the checksum of what was read of it so far.
struct Source {
    name: String,
    storage: Box<dyn Storage>,
    hasher: XxHash3_64,
    bytes: Bytes,
}

impl Source {
    fn open(path: &Path) -> Result<Self, Error> {
        let storage = flash_experts::open(path, Io::Auto).map_err(|source| Error::Read { path: path.into(), source })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, storage, hasher: XxHash3_64::new(), bytes: 0 })
    }

    /// One after the other as far as the checksum is concerned.
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Error> {
        self.storage.read(reads).map_err(|source| Error::Read { path: self.storage.name().into(), source })?;
        for read in reads {
            self.hasher.write(read.into);
            self.bytes += read.into.len() as Bytes;
        }
        Ok(())
    }

    fn meta(&self) -> SourceMeta {
        SourceMeta { file: self.name.clone(), bytes: self.bytes, xxh3: format!("{:016x}", self.hasher.clone().finish()) }
    }
}

impl Layout {
    /// One layout per layer, which every expert of it shares.
    fn of(model: &Model) -> Result<Self, Error> {
        let mut layout = Self { layers: Vec::new(), experts: model.arch.experts, pieces: vec![Vec::new(); model.weights.files().len()] };
        for (number, layer) in model.layers.iter().enumerate() {
            let FfnSpec::Moe { experts, .. } = &layer.ffn else { continue };
            let shapes = |ffn: &Ffn| ffn.matrices().map(Shape::of);
            let refuse =
                |name: &str, reason: &str| Err(Error::Tensor { path: model.info.path.clone(), tensor: name.into(), reason: reason.into() });
            let Some(meta) = LayerMeta::new(number, shapes(&experts[0])) else {
                return refuse(&experts[0].gate.name, "an expert of this shape is too large for a record");
            };
            for (expert, ffn) in experts.iter().enumerate() {
                if shapes(ffn) != shapes(&experts[0]) {
                    return refuse(&ffn.gate.name, "its shape or quantisation differs from the layer's first expert");
                }
                layout.add(layout.layers.len(), expert, ffn, &meta);
            }
            layout.layers.push(meta);
        }
        Ok(layout)
    }

    fn add(&mut self, layer: usize, expert: usize, ffn: &Ffn, meta: &LayerMeta) {
        for (spec, tensors) in ffn.matrices().into_iter().zip(meta.matrices()) {
            let sides = [(spec.scales, tensors.scales), (spec.biases, tensors.biases)];
            let parts = [(spec.weight, tensors.weight)].into_iter().chain(sides.into_iter().filter_map(|(span, at)| Some((span?, at?))));
            for (Span { file, offset, .. }, [at, len]) in parts {
                self.pieces[file as usize].push(Piece(layer, expert, at, offset, len));
            }
        }
    }

    fn meta(&self, sources: &[Source]) -> Meta {
        Meta { layers: self.layers.clone(), source: sources.iter().filter(|source| source.bytes > 0).map(Source::meta).collect() }
    }

    fn plan(&self, meta: &Meta) -> Plan {
        let records = self.layers.iter().map(|layer| vec![layer.payload(); self.experts]).collect();
        Plan { records, align: ALIGN, meta: meta.to_bytes() }
    }

    /// Record by record, each from whichever files hold it.
    fn copy(&self, mut sources: Vec<Source>, writer: &StoreWriter, tell: Tell<'_>) -> Result<Vec<Source>, Error> {
        let total = self.layers.iter().map(|layer| Bytes::from(layer.payload()) * self.experts as Bytes).sum();
        let (mut done, mut record) = (0, Vec::new());
        let mut pieces: Vec<_> = self.pieces.iter().map(|pieces| pieces.iter().peekable()).collect();
        for (layer, meta) in self.layers.iter().enumerate() {
            for expert in 0..self.experts {
                record.clear();
                record.resize(meta.payload() as usize, 0);
                for (source, pieces) in sources.iter_mut().zip(&mut pieces) {
                    // In the record's order, so that what is left of it can be cut from the front.
                    let (mut reads, mut rest, mut end) = (Vec::with_capacity(9), &mut record[..], 0);
                    while let Some(&Piece(_, _, at, offset, len)) = pieces.next_if(|piece| (piece.0, piece.1) == (layer, expert)) {
                        let (into, after) = rest[(at - end) as usize..].split_at_mut(len as usize);
                        reads.push(Read { offset, into });
                        (rest, end) = (after, at + len);
                    }
                    source.read(&mut reads)?;
                }
                writer.record(layer, expert, &record).map_err(experts)?;
                done += record.len() as Bytes;
                if !tell(Progress { stage: WRITING, done, total }) {
                    return Err(Error::Cancelled);
                }
            }
        }
        Ok(sources)
    }
}

fn experts(error: flash_experts::Error) -> Error {
    packed::error(error)
}

#[cfg(test)]
mod tests;
