//! Matrices as the kernels see them: borrowed bytes with a format, and activations with their group sums.

use half::{bf16, f16};

use crate::model::weights::{Float, Format};

/// A row-major matrix [rows, cols] in checkpoint bytes (little-endian); no alignment is assumed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) format: Format,
    pub(crate) weight: &'a [u8],
    /// One per group, empty unless affine.
    pub(crate) scales: &'a [u8],
    pub(crate) biases: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// Bytes of one row of codes or numbers.
    pub(crate) fn row_bytes(&self) -> usize {
        match self.format {
            Format::F32 => self.cols * 4,
            Format::F16 | Format::Bf16 => self.cols * 2,
            Format::Affine { bits, .. } => self.cols * usize::from(bits) / 8,
        }
    }

    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        &self.weight[row * self.row_bytes()..][..self.row_bytes()]
    }

    /// Group width, 0 for plain formats.
    pub(crate) fn group(&self) -> usize {
        if let Format::Affine { group, .. } = self.format { group } else { 0 }
    }

    /// Row `row` widened to f32: w = scale·q + bias.
    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.row(row);
        match self.format {
            Format::Affine { bits, group, params } => {
                let groups = self.cols / group;
                for (g, out) in out.chunks_exact_mut(group).enumerate() {
                    let scale = float(self.scales, row * groups + g, params);
                    let bias = float(self.biases, row * groups + g, params);
                    let widen = |code: u8| scale * f32::from(code) + bias;
                    if bits == 4 {
                        // The common width, without the arithmetic of a general bit stream: two codes a byte.
                        for (pair, byte) in out.chunks_exact_mut(2).zip(&bytes[g * group / 2..]) {
                            (pair[0], pair[1]) = (widen(byte & 15), widen(byte >> 4));
                        }
                    } else {
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = widen(code(bytes, g * group + i, bits));
                        }
                    }
                }
            }
            Format::F32 => widen(bytes, Float::F32, out),
            Format::F16 => widen(bytes, Float::F16, out),
            Format::Bf16 => widen(bytes, Float::Bf16, out),
        }
    }
}

fn widen(bytes: &[u8], kind: Float, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = float(bytes, i, kind);
    }
}

/// The `index`-th number of `bytes`.
#[inline]
pub(crate) fn float(bytes: &[u8], index: usize, kind: Float) -> f32 {
    match kind {
        Float::F32 => f32::from_le_bytes([bytes[4 * index], bytes[4 * index + 1], bytes[4 * index + 2], bytes[4 * index + 3]]),
        Float::F16 => f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
        Float::Bf16 => bf16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
    }
}

/// The `index`-th code of a row packed as MLX does: a little-endian bit stream.
#[inline]
pub(crate) fn code(row: &[u8], index: usize, bits: u8) -> u8 {
    let bit = index * usize::from(bits);
    let low = u16::from(row[bit / 8]);
    let high = row.get(bit / 8 + 1).map_or(0, |&byte| u16::from(byte));
    let mask = (1u16 << bits) - 1;
    (((low | high << 8) >> (bit % 8)) & mask) as u8
}

/// Activations [tokens, cols] with the sums that affine biases multiply.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acts<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) cols: usize,
    /// [tokens, cols / group]: sum of x over each group; empty if no matrix needs them.
    pub(crate) sums: &'a [f32],
    pub(crate) group: usize,
}

impl<'a> Acts<'a> {
    /// Without sums: for plain formats.
    pub(crate) fn plain(x: &'a [f32], cols: usize) -> Self {
        Self { x, cols, sums: &[], group: 0 }
    }

    /// Fills `sums` for groups of `group` columns (0: none).
    pub(crate) fn grouped(x: &'a [f32], cols: usize, group: usize, sums: &'a mut Vec<f32>) -> Self {
        if group == 0 {
            return Self::plain(x, cols);
        }
        sums.clear();
        sums.extend(x.chunks_exact(group).map(sum));
        Self { x, cols, sums, group }
    }

    pub(crate) fn token(&self, token: usize) -> &'a [f32] {
        &self.x[token * self.cols..][..self.cols]
    }
}

/// Sum in eight fixed lanes: one order whatever the caller.
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for chunk in x.chunks(8) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    fold(lanes)
}

pub(crate) fn fold(l: [f32; 8]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}
