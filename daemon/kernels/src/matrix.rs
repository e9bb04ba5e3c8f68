//! Matrices as the kernels see them: borrowed bytes with a format, and activations with their group sums.

use half::{bf16, f16};

use crate::simd::{Isa, ToFixed};

/// How a matrix's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    F32,
    F16,
    Bf16,
    /// MLX affine: little-endian u32 words of packed `bits`-wide codes along a row; per `group` columns one scale and one
    /// bias (both of dtype `params`): w = scale·q + bias. 3- and 6-bit codes cross word boundaries as MLX packs them.
    Affine {
        bits: u8,
        group: usize,
        params: Float,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    F32,
    F16,
    Bf16,
}

impl From<Float> for Format {
    fn from(float: Float) -> Self {
        match float {
            Float::F32 => Self::F32,
            Float::F16 => Self::F16,
            Float::Bf16 => Self::Bf16,
        }
    }
}

/// A row-major matrix [rows, cols] in checkpoint bytes (little-endian); no alignment is assumed.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub rows: usize,
    pub cols: usize,
    pub format: Format,
    pub weight: &'a [u8],
    /// One per group, empty unless affine.
    pub scales: &'a [u8],
    pub biases: &'a [u8],
    /// Codes, scales and biases of the rows that are multiplied next, if those are not the ones that follow in memory: kernels that
    /// prefetch ask for them meanwhile.
    pub then: Option<[&'a [u8]; 3]>,
}

impl<'a> Matrix<'a> {
    /// Bytes of one row of codes or numbers.
    pub fn row_bytes(&self) -> usize {
        match self.format {
            Format::F32 => self.cols * 4,
            Format::F16 | Format::Bf16 => self.cols * 2,
            Format::Affine { bits, .. } => self.cols * usize::from(bits) / 8,
        }
    }

    /// What [`Matrix::then`] of the matrix before is, if rows from `row` on come next.
    pub fn from(&self, row: usize) -> [&'a [u8]; 3] {
        [self.weight, self.scales, self.biases].map(|part| &part[part.len() / self.rows * row..])
    }

    fn row(&self, row: usize) -> &'a [u8] {
        &self.weight[row * self.row_bytes()..][..self.row_bytes()]
    }

    /// Row `row` widened to f32: w = scale·q + bias.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
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

/// Activations [tokens, cols] as products read them.
#[derive(Clone, Copy, Debug)]
pub struct Acts<'a> {
    pub x: &'a [f32],
    pub cols: usize,
    /// [tokens, cols / group]: sum of x over each group, which affine biases multiply; empty if no matrix needs them.
    pub sums: &'a [f32],
    pub group: usize,
    pub fixed: Fixed<'a>,
}

/// Activations as 16-bit fixed point, for an instruction set that has [`Isa::fixed`]: x ≈ scale·(256·high + low). Empty otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Fixed<'a> {
    /// Of the codes that they are laid out for.
    pub bits: u8,
    /// [tokens, cols / group]
    pub scales: &'a [f32],
    /// [tokens, row_bytes], aligned to 64 bytes; the instruction set's own order.
    pub bytes: &'a [i8],
}

impl Fixed<'_> {
    /// Bytes of a row: two for each column, of whole blocks of 64 bytes of codes.
    pub fn row_bytes(cols: usize, bits: u8) -> usize {
        2 * cols.next_multiple_of(512 / usize::from(bits))
    }
}

/// A row of [`Fixed`] to be filled in.
#[derive(Debug)]
pub struct FixedRow<'a> {
    pub bits: u8,
    pub group: usize,
    pub scales: &'a mut [f32],
    pub bytes: &'a mut [i8],
}

impl FixedRow<'_> {
    /// Asserts that there is room for `x`.
    pub(crate) fn check(&self, x: &[f32]) {
        let Self { bits, group, scales, bytes } = self;
        assert!(x.len().is_multiple_of(*group) && group.is_multiple_of(32));
        assert!(scales.len() >= x.len() / group && bytes.len() >= Fixed::row_bytes(x.len(), *bits));
    }
}

impl<'a> Acts<'a> {
    pub fn token(&self, token: usize) -> &'a [f32] {
        &self.x[token * self.cols..][..self.cols]
    }
}

/// What [`Acts`] has beside the activations themselves, for matrices of one format.
#[derive(Debug, Default)]
pub struct Prepared {
    cols: usize,
    group: usize,
    sums: Vec<f32>,
    /// 0: nobody reads fixed point.
    bits: u8,
    scales: Vec<f32>,
    /// Aligned from [`aligned`] on.
    bytes: Vec<i8>,
}

/// Some rows of [`Prepared`] to be filled in.
#[derive(Debug)]
pub struct Piece<'a> {
    x: &'a [f32],
    cols: usize,
    group: usize,
    bits: u8,
    sums: &'a mut [f32],
    fixed: Option<(ToFixed, &'a mut [f32], &'a mut [i8])>,
}

impl Piece<'_> {
    pub fn fill(self) {
        let Self { x, cols, group, bits, sums, fixed } = self;
        sums.iter_mut().zip(x.chunks_exact(group)).for_each(|(sum_of, x)| *sum_of = sum(x));
        let Some((make, scales, bytes)) = fixed else { return };
        let rows = scales.chunks_exact_mut(cols / group).zip(bytes.chunks_exact_mut(Fixed::row_bytes(cols, bits)));
        for (x, (scales, bytes)) in x.chunks_exact(cols).zip(rows) {
            make(x, FixedRow { bits, group, scales, bytes });
        }
    }
}

/// So that no vector lies in two cache lines.
const ALIGN: usize = 64;

/// Where `bytes` are aligned first, if they are not empty.
fn aligned(bytes: &[i8]) -> usize {
    bytes.as_ptr().align_offset(ALIGN).min(bytes.len())
}

/// As `resize` with zeros; new memory is touched only when it is used, so that a long prompt's is not cleared at once while others
/// wait.
pub fn size<T: Clone + Default>(of: &mut Vec<T>, len: usize) {
    if of.capacity() == 0 {
        *of = vec![T::default(); len];
    } else {
        of.resize(len, T::default());
    }
}

impl Prepared {
    /// Makes room for `rows` rows of `cols`. What is there is of no use any more, unless all is as it was.
    pub fn resize(&mut self, isa: &Isa, rows: usize, cols: usize, format: Format) {
        let Format::Affine { bits, group, .. } = format else { return *self = Self { cols, ..Self::default() } };
        let fixed = isa.fixed.is_some() && matches!(bits, 4 | 8) && group.is_power_of_two() && group >= 32;
        (self.cols, self.group, self.bits) = (cols, group, if fixed { bits } else { 0 });
        size(&mut self.sums, rows * cols / group);
        size(&mut self.scales, if fixed { rows * cols / group } else { 0 });
        size(&mut self.bytes, if fixed { ALIGN + rows * Fixed::row_bytes(cols, bits) } else { 0 });
    }

    /// What fills in the rows from `first` on, which are those of `x` [rows, cols]: so many at a time, that threads may share.
    pub fn pieces<'a>(&'a mut self, isa: &Isa, first: usize, x: &'a [f32], rows: usize) -> impl Iterator<Item = Piece<'a>> {
        let Self { cols, group, bits, .. } = *self;
        let (make, groups) = (isa.fixed, cols.checked_div(group).unwrap_or(0));
        let row_bytes = Fixed::row_bytes(cols, bits.max(4));
        let start = (aligned(&self.bytes) + first * row_bytes).min(self.bytes.len());
        let of_fixed = self.scales.get_mut(first * groups..).unwrap_or_default().chunks_mut((rows * groups).max(1));
        let of_fixed = of_fixed.zip(self.bytes[start..].chunks_mut(rows * row_bytes));
        let sums = self.sums.get_mut(first * groups..).unwrap_or_default().chunks_mut((rows * groups).max(1));
        let of_fixed = of_fixed.map(Some).chain(std::iter::repeat_with(|| None));
        x.chunks(rows * cols).zip(sums).zip(of_fixed).map(move |((x, sums), of_fixed)| {
            let fixed = make.zip(of_fixed).map(|(make, (scales, bytes))| (make, scales, bytes));
            Piece { x, cols, group, bits, sums, fixed }
        })
    }

    /// For `x`, whose rows were filled in.
    pub fn acts<'a>(&'a self, x: &'a [f32]) -> Acts<'a> {
        let fixed = Fixed { bits: self.bits, scales: &self.scales, bytes: &self.bytes[aligned(&self.bytes)..] };
        Acts { x, cols: self.cols, sums: &self.sums, group: self.group, fixed }
    }

    /// Of a row of `cols`, at most: groups have at least 32 columns.
    pub fn row_bytes(isa: &Isa, cols: usize) -> usize {
        cols / 32 * 4 + if isa.fixed.is_some() { cols / 32 * 4 + Fixed::row_bytes(cols, 4) } else { 0 }
    }
}

pub(crate) fn sum(x: &[f32]) -> f32 {
    sum_of(x, |value| value)
}

/// Sum of `f` in eight fixed lanes: one order whatever the caller.
#[inline(always)]
pub(crate) fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (eights, rest) = x.as_chunks::<8>();
    let mut lanes = [0.0f32; 8];
    for eight in eights {
        lanes.iter_mut().zip(eight).for_each(|(lane, value)| *lane += f(*value));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, value)| *lane += f(*value));
    fold(lanes)
}

pub(crate) fn fold(l: [f32; 8]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}
