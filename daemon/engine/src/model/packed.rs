//! A packed checkpoint: `experts.flash` beside config.json, whose meta text says which tensor of an expert lies where in
//! its record. The store's own bytes are for `flash-experts`; here its text is written, read, and held against
//! config.json. Called by `families.rs`, and by what writes stores: conversion and synthetic models.

use std::path::{Path, PathBuf};

use flash_experts::{Entry, Io, StoreReader};
use serde::{Deserialize, Serialize};

use super::{
    arch::{Arch, LayerKind},
    families::Ffn,
    weights::{Float, Format, MatrixSpec, Span, stays_inside},
};
use crate::Error;

pub(crate) const STORE: &str = "experts.flash";
/// Exists while a conversion in place is under way: the checkpoint is then neither packed nor whole.
pub(crate) const JOURNAL: &str = "experts.flash.journal";

/// Alignment of each tensor inside a record and a slot: a cache line.
const ALIGN: usize = 64;

/// The meta text of a store.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct Meta {
    /// Layers with routed experts, in the order of the index.
    pub(crate) layers: Vec<LayerMeta>,
    /// What the records were made of; empty where there was no checkpoint.
    #[serde(default)]
    pub(crate) source: Vec<SourceMeta>,
}

/// How a record of one layer is made up.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct LayerMeta {
    /// As config.json counts.
    pub(crate) layer: usize,
    pub(crate) gate: Tensors,
    pub(crate) up: Tensors,
    pub(crate) down: Tensors,
}

/// One matrix; `[at, length]` are bytes of the record.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct Tensors {
    rows: usize,
    cols: usize,
    format: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bits: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    params: Option<String>,
    pub(crate) weight: [u32; 2],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scales: Option<[u32; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) biases: Option<[u32; 2]>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub(crate) struct SourceMeta {
    pub(crate) file: String,
    pub(crate) bytes: u64,
    /// Of the bytes that went into records, in the records' order; 16 hexadecimal digits.
    pub(crate) xxh3: String,
}

/// What a matrix is, wherever it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) format: Format,
}

/// A store that was opened and fits config.json.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) path: PathBuf,
    /// Of the file.
    pub(crate) len: u64,
    pub(crate) layers: Vec<LayerMeta>,
    /// `[layer][expert]`, layers as in `layers`.
    pub(crate) records: Vec<Vec<Entry>>,
}

/// Where tensors of these lengths lie one after the other in a record, and where it ends.
pub(crate) fn lay_out<const N: usize>(lens: [usize; N]) -> ([usize; N], usize) {
    let mut end = 0;
    let starts = lens.map(|len| {
        let start = end;
        end = (start + len).next_multiple_of(ALIGN);
        start
    });
    (starts, end)
}

impl LayerMeta {
    /// Lays out gate, up and down; `None` if a record would be longer than a store allows or a shape impossible.
    pub(crate) fn new(layer: usize, shapes: [Shape; 3]) -> Option<Self> {
        let [g, u, d] = shapes.map(Shape::lens);
        let (g, u, d) = (g?, u?, d?);
        let (starts, end) = lay_out([g[0], g[1], g[1], u[0], u[1], u[1], d[0], d[1], d[1]]);
        u32::try_from(end).ok()?;
        let tensors = |shape: Shape, lens: [usize; 2], starts: &[usize]| {
            let side = |start: usize| (lens[1] > 0).then_some([start as u32, lens[1] as u32]);
            Tensors::new(shape, [starts[0] as u32, lens[0] as u32], side(starts[1]), side(starts[2]))
        };
        let [gate, up, down] = shapes;
        Some(Self { layer, gate: tensors(gate, g, &starts[..3]), up: tensors(up, u, &starts[3..6]), down: tensors(down, d, &starts[6..]) })
    }

    /// There is one layout for given shapes; is this it?
    pub(crate) fn sound(&self) -> bool {
        let [gate, up, down] = self.matrices().map(Tensors::shape);
        let laid = || Self::new(self.layer, [gate?, up?, down?]);
        laid().is_some_and(|laid| laid == *self)
    }

    pub(crate) fn matrices(&self) -> [&Tensors; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// Length of a record, if the layout is sound.
    pub(crate) fn payload(&self) -> u32 {
        let ends = self.matrices().into_iter().flat_map(Tensors::spans).map(|[at, len]| at + len);
        (ends.max().unwrap_or(0) as usize).next_multiple_of(ALIGN) as u32
    }

    /// The matrices of the expert whose record begins at `offset` of `file`.
    fn ffn(&self, layer: &str, expert: usize, file: u32, offset: u64) -> Option<Ffn> {
        let one = |name: &str, tensors: &Tensors| {
            let Shape { rows, cols, format } = tensors.shape()?;
            let span = |[at, len]: [u32; 2]| Span { file, offset: offset + u64::from(at), len: len.into() };
            let (weight, scales, biases) = (span(tensors.weight), tensors.scales.map(span), tensors.biases.map(span));
            Some(MatrixSpec { name: format!("{layer}.{name}[{expert}]"), rows, cols, format, weight, scales, biases })
        };
        Some(Ffn { gate: one("gate_proj", &self.gate)?, up: one("up_proj", &self.up)?, down: one("down_proj", &self.down)? })
    }
}

impl Shape {
    pub(crate) fn of(spec: &MatrixSpec) -> Self {
        Self { rows: spec.rows, cols: spec.cols, format: spec.format }
    }

    /// Bytes of the weight, and of scales and of biases each; `None` if no such matrix can be.
    pub(crate) fn lens(self) -> Option<[usize; 2]> {
        let cells = self.rows.checked_mul(self.cols)?;
        let lens = match self.format {
            Format::F32 => [cells.checked_mul(4)?, 0],
            Format::F16 | Format::Bf16 => [cells.checked_mul(2)?, 0],
            Format::Affine { bits: bits @ (2 | 3 | 4 | 6 | 8), group: group @ (32 | 64 | 128), params }
                if self.cols.is_multiple_of(group) =>
            {
                let float = if params == Float::F32 { 4 } else { 2 };
                [cells.checked_mul(bits.into())? / 8, cells / group * float]
            }
            Format::Affine { .. } => return None,
        };
        lens.iter().all(|len| u32::try_from(*len).is_ok()).then_some(lens)
    }
}

impl Tensors {
    fn new(Shape { rows, cols, format }: Shape, weight: [u32; 2], scales: Option<[u32; 2]>, biases: Option<[u32; 2]>) -> Self {
        let (format, bits, group, params) = match format {
            Format::F32 => ("f32", None, None, None),
            Format::F16 => ("f16", None, None, None),
            Format::Bf16 => ("bf16", None, None, None),
            Format::Affine { bits, group, params } => ("affine", Some(bits), Some(group), Some(float_name(params).into())),
        };
        Self { rows, cols, format: format.into(), bits, group, params, weight, scales, biases }
    }

    pub(crate) fn shape(&self) -> Option<Shape> {
        let format = match (self.format.as_str(), self.bits, self.group, &self.params) {
            ("affine", Some(bits), Some(group), Some(params)) => Format::Affine { bits, group, params: float_named(params)? },
            (plain, None, None, None) => float_named(plain)?.into(),
            _ => return None,
        };
        Some(Shape { rows: self.rows, cols: self.cols, format })
    }

    fn spans(&self) -> impl Iterator<Item = [u32; 2]> {
        [Some(self.weight), self.scales, self.biases].into_iter().flatten()
    }
}

fn float_name(float: Float) -> &'static str {
    match float {
        Float::F32 => "f32",
        Float::F16 => "f16",
        Float::Bf16 => "bf16",
    }
}

fn float_named(name: &str) -> Option<Float> {
    [Float::F32, Float::F16, Float::Bf16].into_iter().find(|float| float_name(*float) == name)
}

impl Meta {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data with string keys")
    }
}

impl Packed {
    /// The folder's store if it has one; an interrupted conversion is an error.
    pub(crate) fn open(dir: &Path, arch: &Arch) -> Result<Option<Self>, Error> {
        let (path, journal) = (dir.join(STORE), dir.join(JOURNAL));
        if journal.exists() {
            let reason = format!("conversion was interrupted; run `flashctl convert --in-place {}` again", dir.display());
            return Err(Error::File { path: journal, reason });
        }
        if !path.exists() {
            return Ok(None);
        }
        if !stays_inside(dir, &path)? {
            return Err(Error::File { path, reason: "is a link that leads outside the model's folder".into() });
        }
        let store = StoreReader::open(&path, Io::Buffered).map_err(self::error)?;
        let bad = |reason: String| Error::File { path: path.clone(), reason: format!("meta: {reason}; run `flashctl convert` again") };
        let meta: Meta = serde_json::from_slice(store.meta()).map_err(|error| bad(error.to_string()))?;
        let records: Vec<Vec<Entry>> = store.records().map(<[Entry]>::to_vec).collect();
        check(&meta.layers, &records, arch).map_err(bad)?;
        Ok(Some(Self { len: store.len(), layers: meta.layers, records, path }))
    }

    /// The experts of the layer that config.json numbers so, the store being number `file` of the checkpoint.
    pub(crate) fn experts(&self, layer: usize, prefix: &str, file: u32) -> Option<Vec<Ffn>> {
        let index = self.layers.iter().position(|meta| meta.layer == layer)?;
        let records = self.records[index].iter().enumerate();
        records.map(|(expert, entry)| self.layers[index].ffn(prefix, expert, file, entry.offset)).collect()
    }
}

/// A store that is no store is a bad file of the model; anything else stays what it is.
pub(crate) fn error(error: flash_experts::Error) -> Error {
    let text = error.to_string();
    match error {
        flash_experts::Error::Store { file, .. } => {
            let reason = text.strip_prefix(&format!("{file}: ")).unwrap_or(&text).into();
            Error::File { path: file.into(), reason }
        }
        error => Error::Experts(error.into()),
    }
}

/// Every MoE layer of config.json is there with its shapes, and every record is as long as its tensors ask for.
fn check(layers: &[LayerMeta], records: &[Vec<Entry>], arch: &Arch) -> Result<(), String> {
    let moe: Vec<usize> = (0..arch.layers.len()).filter(|layer| arch.layers[*layer] == LayerKind::Moe).collect();
    let named: Vec<usize> = layers.iter().map(|meta| meta.layer).collect();
    if named != moe || records.len() != moe.len() {
        return Err(format!(
            "{} layers of records for layers {named:?}, but the layers of config.json with experts are {moe:?}",
            records.len()
        ));
    }
    for (meta, records) in layers.iter().zip(records) {
        let at = |what: &str| format!("layer {}: {what}", meta.layer);
        if records.len() != arch.experts {
            return Err(at(&format!("{} experts, but config.json has {}", records.len(), arch.experts)));
        }
        let (wide, back) = ([arch.moe_width, arch.hidden], [arch.hidden, arch.moe_width]);
        for (name, tensors, expected) in [("gate", &meta.gate, wide), ("up", &meta.up, wide), ("down", &meta.down, back)] {
            if [tensors.rows, tensors.cols] != expected {
                return Err(at(&format!("{name} is [{}, {}], but config.json asks for {expected:?}", tensors.rows, tensors.cols)));
            }
            if tensors.shape().is_none() {
                return Err(at(&format!("{name} has a format that is not known")));
            }
        }
        if !meta.sound() {
            return Err(at("its tensors do not lie where the format puts them"));
        }
        if let Some(entry) = records.iter().find(|entry| entry.payload != meta.payload()) {
            return Err(at(&format!("a record of {} bytes, but its tensors take {}", entry.payload, meta.payload())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFFINE: Format = Format::Affine { bits: 4, group: 64, params: Float::Bf16 };

    fn layer(format: Format) -> LayerMeta {
        let shape = |rows, cols| Shape { rows, cols, format };
        LayerMeta::new(3, [shape(64, 128), shape(64, 128), shape(128, 64)]).unwrap()
    }

    #[test]
    fn tensors_lie_at_cache_lines_and_the_text_comes_back() {
        assert_eq!(lay_out([100, 0, 64, 1]), ([0, 128, 128, 192], 256));
        for (format, payload, scales) in [(AFFINE, 3 * (4096 + 256 + 256), Some([4096, 256])), (Format::F32, 3 * 32768, None)] {
            let meta = Meta { layers: vec![layer(format)], source: Vec::new() };
            assert_eq!((meta.layers[0].payload(), meta.layers[0].gate.scales), (payload, scales));
            assert_eq!(serde_json::from_slice::<Meta>(&meta.to_bytes()).unwrap(), meta);
            assert_eq!(meta.layers[0].down.shape(), Some(Shape { rows: 128, cols: 64, format }));
        }
        assert_eq!(Shape { rows: 1, cols: 65, format: AFFINE }.lens(), None);
        assert_eq!(Shape { rows: usize::MAX, cols: 2, format: Format::F32 }.lens(), None);
        assert_eq!(Shape { rows: 1 << 16, cols: 1 << 14, format: Format::F32 }.lens(), None);
    }
}
