//! Random tensors as bytes of a checkpoint: 4- and 8-bit MLX affine matrices, bf16 vectors, and the safetensors file that the
//! trunk goes into. It knows neither layers nor what the numbers mean: `synth.rs` says which tensors there are.

use std::ops::Range;

use half::bf16;

use super::noise::Noise;
use crate::Error;

/// Columns that share a scale and a bias, everywhere.
pub(super) const GROUP: usize = 64;
/// Bytes made at a time: enough for a sequential write, little enough to stay in the cache that made them.
pub(super) const PIECE: usize = 4 << 20;

/// The weights' standard deviation, row by row.
#[derive(Clone, Debug)]
pub(super) enum Deviation {
    All(f32),
    Each(Vec<f32>),
}

/// Rows of one kind begin alike: the first `bytes` of row r are those of kind r mod `kinds`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kinds {
    pub(super) noise: Noise,
    pub(super) kinds: usize,
    pub(super) bytes: usize,
}

/// A matrix [rows, cols] of uniformly random codes around zero: w = scale · (q − middle).
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) bits: u8,
    pub(super) noise: Noise,
    pub(super) deviation: Deviation,
    pub(super) kinds: Option<Kinds>,
}

/// The three tensors of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Weight,
    Scales,
    Biases,
}

impl Part {
    pub(super) const ALL: [Self; 3] = [Self::Weight, Self::Scales, Self::Biases];
}

impl Matrix {
    pub(super) fn row_bytes(&self, part: Part) -> usize {
        match part {
            Part::Weight => self.cols * usize::from(self.bits) / 8,
            Part::Scales | Part::Biases => self.cols / GROUP * 2,
        }
    }

    pub(super) fn bytes(&self, part: Part) -> usize {
        self.rows * self.row_bytes(part)
    }

    /// Fills `out` with whole rows of a part, from row `first` on.
    pub(super) fn fill(&self, part: Part, first: usize, out: &mut [u8]) {
        let row_bytes = self.row_bytes(part);
        if part == Part::Weight {
            self.noise.fill((first * row_bytes) as u64, out);
            if let Some(Kinds { noise, kinds, bytes }) = self.kinds {
                for (row, out) in (first..).zip(out.chunks_exact_mut(row_bytes)) {
                    noise.of((row % kinds) as u64).fill(0, &mut out[..bytes]);
                }
            }
            return;
        }
        for (row, out) in (first..).zip(out.chunks_exact_mut(row_bytes)) {
            let bytes = bf16::from_f32(self.number(part, row)).to_le_bytes();
            out.chunks_exact_mut(2).for_each(|out| out.copy_from_slice(&bytes));
        }
    }

    /// The scale or bias of a row. Codes 0..2^bits are uniform, with a variance of (4^bits − 1) / 12.
    fn number(&self, part: Part, row: usize) -> f32 {
        let deviation = match &self.deviation {
            Deviation::All(deviation) => *deviation,
            Deviation::Each(rows) => rows[row],
        };
        let levels = (1u32 << self.bits) as f32;
        let scale = bf16::from_f32(deviation / ((levels * levels - 1.0) / 12.0).sqrt()).to_f32();
        if part == Part::Scales { scale } else { 0.0 - scale * (levels - 1.0) / 2.0 }
    }
}

/// A tensor of the trunk.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) data: Data,
}

#[derive(Debug)]
pub(super) enum Data {
    Matrix(Matrix, Part),
    /// Written as bf16.
    Vector(Vec<f32>),
}

impl Tensor {
    pub(super) fn bytes(&self) -> u64 {
        match &self.data {
            Data::Matrix(matrix, part) => matrix.bytes(*part) as u64,
            Data::Vector(values) => 2 * values.len() as u64,
        }
    }

    fn describe(&self) -> (&'static str, Vec<usize>) {
        match &self.data {
            Data::Matrix(matrix, Part::Weight) => ("U32", vec![matrix.rows, matrix.row_bytes(Part::Weight) / 4]),
            Data::Matrix(matrix, _) => ("BF16", vec![matrix.rows, matrix.cols / GROUP]),
            Data::Vector(values) => ("BF16", vec![values.len()]),
        }
    }

    /// Hands the tensor's bytes to `write`, a piece at a time.
    fn write(&self, write: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
        match &self.data {
            Data::Vector(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
                write(&bytes)
            }
            Data::Matrix(matrix, part) => {
                let row_bytes = matrix.row_bytes(*part);
                let step = (PIECE / row_bytes).max(1);
                let mut piece = Vec::new();
                for first in (0..matrix.rows).step_by(step) {
                    piece.resize(step.min(matrix.rows - first) * row_bytes, 0);
                    matrix.fill(*part, first, &mut piece);
                    write(&piece)?;
                }
                Ok(())
            }
        }
    }
}

/// Length and header of a safetensors file that holds the tensors one after the other.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut at = 0;
    let mut map = serde_json::Map::new();
    for tensor in tensors {
        let (dtype, shape) = tensor.describe();
        let end = at + tensor.bytes();
        map.insert(tensor.name.clone(), serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut json = serde_json::Value::Object(map).to_string().into_bytes();
    // The format lets spaces follow; data that begins at a multiple of 8 is what its readers expect.
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}

/// Writes a safetensors file piece by piece.
pub(super) fn write(tensors: &[Tensor], write: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
    write(&header(tensors))?;
    tensors.iter().try_for_each(|tensor| tensor.write(write))
}

/// A routed expert's record as it lies in a slab slot: gate, up and down, each with its scales and biases, every tensor at a
/// multiple of 64 bytes.
#[derive(Debug)]
pub(super) struct Expert {
    pub(super) matrices: [Matrix; 3],
}

impl Expert {
    const ALIGN: usize = 64;

    /// The nine tensors and the bytes of each.
    fn places(&self) -> impl Iterator<Item = (&Matrix, Part, Range<usize>)> {
        let mut at = 0usize;
        self.matrices.iter().flat_map(|matrix| Part::ALL.map(|part| (matrix, part))).map(move |(matrix, part)| {
            let start = at.next_multiple_of(Self::ALIGN);
            at = start + matrix.bytes(part);
            (matrix, part, start..at)
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.places().last().map_or(0, |(.., range)| range.end.next_multiple_of(Self::ALIGN))
    }

    /// Writes the record; `out` has [`Expert::bytes`] bytes, and what lies between tensors is zero.
    pub(super) fn fill(&self, out: &mut [u8]) {
        let mut last = 0;
        for (matrix, part, range) in self.places() {
            out[last..range.start].fill(0);
            last = range.end;
            matrix.fill(part, 0, &mut out[range]);
        }
        out[last..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(bits: u8, deviation: Deviation) -> Matrix {
        Matrix { rows: 96, cols: 128, bits, noise: Noise::new(9), deviation, kinds: None }
    }

    fn part(matrix: &Matrix, part: Part) -> Vec<u8> {
        let mut bytes = vec![0; matrix.bytes(part)];
        matrix.fill(part, 0, &mut bytes);
        bytes
    }

    fn numbers(bytes: &[u8]) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
    }

    #[test]
    fn weights_are_zero_mean_with_the_deviation_asked_for() {
        let check = |bits: u8, deviation: f32| {
            let matrix = matrix(bits, Deviation::All(deviation));
            let [codes, scales, biases] = Part::ALL.map(|it| part(&matrix, it));
            let codes: Vec<u8> = if bits == 8 { codes } else { codes.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect() };
            let (scale, bias) = (numbers(&scales)[0], numbers(&biases)[0]);
            let weights: Vec<f32> = codes.iter().map(|code| scale * f32::from(*code) + bias).collect();
            let mean = weights.iter().sum::<f32>() / weights.len() as f32;
            let square = weights.iter().map(|weight| weight * weight).sum::<f32>() / weights.len() as f32;
            assert!(mean.abs() < 0.03 * deviation, "{bits} bits: mean {mean}");
            assert!((square.sqrt() / deviation - 1.0).abs() < 0.03, "{bits} bits: deviation {}", square.sqrt());
        };
        check(4, 1.0);
        check(4, 0.02);
        check(8, 3.0);
    }

    #[test]
    fn rows_may_be_silent_and_kinds_begin_alike() {
        let mut rows = vec![1.0; 96];
        rows[5] = 0.0;
        let mut matrix = matrix(4, Deviation::Each(rows));
        matrix.kinds = Some(Kinds { noise: Noise::new(1), kinds: 7, bytes: 16 });
        let scales = numbers(&part(&matrix, Part::Scales));
        assert_eq!((scales[5 * 2], scales[5 * 2 + 1], scales[6 * 2] > 0.0), (0.0, 0.0, true));
        let codes = part(&matrix, Part::Weight);
        let row = |row: usize| &codes[row * 64..][..64];
        assert_eq!(row(3)[..16], row(10)[..16]);
        assert_ne!(row(3)[..16], row(4)[..16]);
        assert_ne!(row(3)[16..], row(10)[16..]);
        let mut later = vec![0; 2 * 64];
        matrix.fill(Part::Weight, 10, &mut later);
        assert_eq!(later, [row(10), row(11)].concat());
    }
}
