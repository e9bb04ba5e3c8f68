//! Runtime-dispatched kernels: one table of function pointers, filled once at load for the best instruction set this
//! CPU has, and the bodies shared by the sets. An instruction-set file supplies primitives and invokes
//! [`kernels`] and [`attend::attention`]; the loops stand here and there once.
//!
//! Batch invariance: R rows × T tokens are computed in one tile to reuse loads, but each (row, token) has its own
//! accumulators, so its bits do not depend on R or T.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::ops::Range;

use half::f16;

use crate::{
    attention::{Partial, Tile},
    matrix::{Acts, Fixed, FixedRow, Float, Format, Matrix},
    norm, portable,
};

mod attend;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2attend;
#[cfg(target_arch = "x86_64")]
mod avx2fixed;
#[cfg(target_arch = "x86_64")]
mod avx2narrow;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512attend;
#[cfg(target_arch = "x86_64")]
mod avx512narrow;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neonfixed;
mod softmax;

pub use softmax::exponentials;

/// Most tokens one call of [`Isa::rows`] takes.
pub const TOKENS_MAX: usize = 64;

/// Makes a row of activations 16-bit fixed point.
pub type ToFixed = fn(&[f32], FixedRow<'_>);

/// One instruction set's kernels.
#[derive(Clone, Copy, Debug)]
pub struct Isa {
    pub name: &'static str,
    /// What the model says differently, for kernels that round further than they must.
    pub price: Option<&'static str>,
    /// `out[i × rows.len() + row − rows.start] = W[row] · x[tokens[i]]`; falls back to portable for shapes and
    /// formats the set has no kernel for.
    pub rows: fn(&Matrix<'_>, Range<usize>, &Acts<'_>, &[u32], &mut [f32]),
    /// Gives a row of activations as 16-bit fixed point, for products with 4- and 8-bit weights; `None`: they read f32.
    pub fixed: Option<ToFixed>,
    /// gate = silu(gate) · up
    pub swiglu: fn(&mut [f32], &[f32]),
    /// Attention of some query heads over one span; portable where the head's size is not whole vectors.
    pub attend: fn(&Tile<'_, f32>, Partial<'_>),
    pub attend_f16: fn(&Tile<'_, f16>, Partial<'_>),
    /// The same with keys and values in 16-bit fixed point, where that is faster.
    pub attend_fixed: Option<fn(&Tile<'_, i16>, Partial<'_>)>,
}

impl Isa {
    pub const PORTABLE: Self = Self {
        name: "portable",
        price: None,
        rows: portable::rows,
        fixed: None,
        swiglu: norm::swiglu,
        attend: portable::attend,
        attend_f16: portable::attend,
        attend_fixed: None,
    };

    /// That which rounds activations further than it must.
    pub fn fast_math() -> Option<Self> {
        match Self::available()[0].name {
            #[cfg(target_arch = "x86_64")]
            "avx512-vnni" => Some(avx512vnni::FAST_MATH),
            _ => None,
        }
    }

    /// The sets this CPU has, best first; never empty.
    pub fn available() -> Vec<Self> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 =
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
            if avx512 && is_x86_feature_detected!("avx512vnni") {
                sets.push(avx512vnni::ISA);
            }
            if avx512 {
                sets.push(avx2fixed::WITH_AVX512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                sets.push(avx2fixed::ISA);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if std::arch::is_aarch64_feature_detected!("i8mm") {
                sets.push(neonfixed::I8MM);
            }
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                sets.push(neonfixed::DOTPROD);
            }
            sets.push(neonfixed::NEON);
        }
        sets.push(Self::PORTABLE);
        sets
    }
}

/// How plain weights, or a group's scales and biases, are stored: as a type, so that the choice is made once per call.
trait Param {
    const FLOAT: Float;
    const BYTES: usize = if matches!(Self::FLOAT, Float::F32) { 4 } else { 2 };

    /// # Safety
    /// `at + 1` numbers must be readable.
    unsafe fn get(from: *const u8, at: usize) -> f32;
}

struct F32;
struct F16;
struct Bf16;

impl Param for F32 {
    const FLOAT: Float = Float::F32;

    #[inline(always)]
    unsafe fn get(from: *const u8, at: usize) -> f32 {
        // SAFETY: the caller's promise; unaligned reads are allowed.
        unsafe { from.cast::<f32>().add(at).read_unaligned() }
    }
}

impl Param for F16 {
    const FLOAT: Float = Float::F16;

    #[inline(always)]
    unsafe fn get(from: *const u8, at: usize) -> f32 {
        // SAFETY: the caller's promise.
        f16::from_bits(unsafe { from.cast::<u16>().add(at).read_unaligned() }).to_f32()
    }
}

impl Param for Bf16 {
    const FLOAT: Float = Float::Bf16;

    #[inline(always)]
    unsafe fn get(from: *const u8, at: usize) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(u32::from(unsafe { from.cast::<u16>().add(at).read_unaligned() }) << 16)
    }
}

/// The bits and parameters of weights that fixed point was prepared for, once every access of their products is known to lie inside
/// what is lent.
fn fixed_point(w: &Matrix<'_>, range: &Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &[f32]) -> Option<(u8, Float)> {
    let Format::Affine { bits: bits @ (4 | 8), group: group @ (32 | 64 | 128), params } = w.format else { return None };
    if x.fixed.bytes.is_empty() || x.fixed.bits != bits {
        return None;
    }
    assert!(range.end <= w.rows && w.weight.len() >= w.rows * w.row_bytes() && x.cols == w.cols && x.group == group);
    let (groups, side) = (w.cols / group, if params == Float::F32 { 4 } else { 2 });
    assert!(w.cols.is_multiple_of(group) && w.scales.len() >= w.rows * groups * side && w.biases.len() >= w.rows * groups * side);
    let read = tokens.iter().map(|token| *token as usize + 1).max().unwrap_or(0);
    assert!(read * groups <= x.sums.len().min(x.fixed.scales.len()) && read * Fixed::row_bytes(w.cols, bits) <= x.fixed.bytes.len());
    assert!(out.len() >= range.len() * tokens.len() && tokens.len() <= TOKENS_MAX);
    Some((bits, params))
}

/// Calls `$product` with what [`fixed_point`] found, as constants and types; `$first` are type arguments before those.
macro_rules! by_kind {
    ($kind:expr, $product:ident, $args:tt $(, $first:ty)?) => {
        match $kind {
            (4, Float::F32) => $product::<$($first,)? 4, F32> $args,
            (4, Float::F16) => $product::<$($first,)? 4, F16> $args,
            (4, Float::Bf16) => $product::<$($first,)? 4, Bf16> $args,
            (_, Float::F32) => $product::<$($first,)? 8, F32> $args,
            (_, Float::F16) => $product::<$($first,)? 8, F16> $args,
            (_, Float::Bf16) => $product::<$($first,)? 8, Bf16> $args,
        }
    };
}
use by_kind;

/// Of a group of activations, in steps of its scale: two signed bytes hold it, and two products of it and an 8-bit code fit 32 bits 128
/// times.
const FIXED_MAX: f32 = 32_000.0;

/// A decode step streams rows from memory, several at a time. Four at a time defeat the CPU's own prefetcher, and a third of the
/// bandwidth is left; asked for in the order in which they lie, their lines come as fast as one row's. So far ahead, because fewer than
/// all rows of a tile would be what these ask for themselves.
fn ahead<const R: usize>(row_bytes: usize) -> usize {
    (R * row_bytes).max(4096)
}

/// The same for scales and biases, which are an eighth of the bytes.
#[cfg(target_arch = "x86_64")]
const PREFETCH_ROWS: usize = 16;

/// What is prefetched while a matrix's rows up to `end` are multiplied: further rows of it, then those of [`Matrix::then`].
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Coming<'a> {
    w: &'a Matrix<'a>,
    end: usize,
    /// Of a row's codes, and of its scales or biases.
    bytes: usize,
    side_bytes: usize,
    /// Of codes, scales and biases: where row 0 would be if what comes next came at `end`.
    then: [*const u8; 3],
}

#[cfg(target_arch = "x86_64")]
impl<'a> Coming<'a> {
    fn new(w: &'a Matrix<'a>, end: usize) -> Self {
        let (bytes, side_bytes) = (w.row_bytes(), w.scales.len() / w.rows);
        let [codes, scales, biases] = w.then.unwrap_or_else(|| w.from(end)).map(|part| part.as_ptr());
        let then = [codes.wrapping_sub(end * bytes), scales.wrapping_sub(end * side_bytes), biases.wrapping_sub(end * side_bytes)];
        Self { w, end, bytes, side_bytes, then }
    }

    /// The codes that R rows from `row` on ask for, line by line.
    fn codes<const R: usize>(&self, row: usize) -> *const u8 {
        let far = ahead::<R>(self.bytes);
        let from = if (self.end - row) * self.bytes > far { self.w.weight.as_ptr() } else { self.then[0] };
        from.wrapping_add(row * self.bytes + far)
    }

    /// Asks for scales and biases, as many rows of them as `rows`, which are at `row`.
    #[inline(always)]
    fn sides(&self, row: usize, rows: usize) {
        let here = row + PREFETCH_ROWS < self.end;
        for (side, then) in [(self.w.scales, self.then[1]), (self.w.biases, self.then[2])] {
            let from = if here { side.as_ptr() } else { then }.wrapping_add((row + PREFETCH_ROWS) * self.side_bytes);
            for line in (0..rows * self.side_bytes).step_by(64) {
                // SAFETY: a prefetch reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line).cast()) };
            }
        }
    }
}

/// The loops over primitives that the invoking module defines:
/// `V` (vector of `LANES` f32), `splat`, `load`, `fma`, `total` (sum of lanes), `load_f16`, `load_bf16` and `prefetch`. `ROWS` says how
/// many rows × four tokens its registers are good for, and `ROWS_OF_FEW` × fewer. `$features` are the module's target features.
/// Packed codes are left to the files that multiply them in fixed point.
macro_rules! kernels {
    ($features:literal, $name:literal) => {
        use std::ops::Range;

        use super::{Bf16, F16, F32, Isa, Param, ahead};
        use crate::{
            matrix::{Acts, Float, Format, Matrix},
            portable,
        };

        pub(super) const ISA: Isa =
            Isa { name: $name, price: None, rows, fixed: None, swiglu, attend, attend_f16: attend, attend_fixed: None };

        fn rows(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
            assert!(range.end <= w.rows && w.weight.len() >= w.rows * w.row_bytes() && x.cols == w.cols);
            assert!(tokens.iter().all(|&token| (token as usize + 1) * x.cols <= x.x.len()));
            assert!(out.len() >= range.len() * tokens.len());
            // SAFETY: the features were detected (see ISA) and every access of the tiles lies inside what was asserted.
            unsafe {
                match w.format {
                    Format::F32 if w.cols % LANES == 0 => plain::<F32>(w, range, x, tokens, out),
                    Format::F16 if w.cols % LANES == 0 => plain::<F16>(w, range, x, tokens, out),
                    Format::Bf16 if w.cols % LANES == 0 => plain::<Bf16>(w, range, x, tokens, out),
                    _ => portable::rows(w, range, x, tokens, out),
                }
            }
        }

        fn swiglu(gate: &mut [f32], up: &[f32]) {
            let (gates, rest) = gate.as_chunks_mut::<LANES>();
            let (ups, rest_up) = up[..gates.len() * LANES + rest.len()].as_chunks::<LANES>();
            for (gate, up) in gates.iter_mut().zip(ups) {
                // SAFETY: the features were detected (see ISA).
                unsafe { swiglu_vector(gate, up) }
            }
            // Where vectors begin is chance, so the rest must come out as if inside of one.
            let (mut gate, mut up) = ([0.0; LANES], [0.0; LANES]);
            gate[..rest.len()].copy_from_slice(rest);
            up[..rest.len()].copy_from_slice(rest_up);
            // SAFETY: as above.
            unsafe { swiglu_vector(&mut gate, &up) }
            rest.copy_from_slice(&gate[..rest.len()]);
        }

        /// With sigmoid(x) = e^min(x, 0) / (1 + e^−|x|), whose exponents never overflow.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn swiglu_vector(gate: &mut [f32; LANES], up: &[f32; LANES]) {
            // SAFETY: LANES floats each.
            unsafe {
                let (x, zero) = (load(gate.as_ptr()), splat(0.0));
                let negative = sub(zero, x);
                let sigmoid = div(exp(sub(zero, max(negative, zero))), sub(exp(sub(zero, max(negative, x))), splat(-1.0)));
                store(gate.as_mut_ptr(), mul(mul(x, sigmoid), load(up.as_ptr())));
            }
        }

        /// LANES numbers, widened.
        ///
        /// # Safety
        /// As many must be readable.
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn wide<P: Param>(from: *const u8) -> V {
            // SAFETY: the caller promises as many.
            unsafe {
                match P::FLOAT {
                    Float::F32 => load(from.cast()),
                    Float::F16 => load_f16(from),
                    Float::Bf16 => load_bf16(from),
                }
            }
        }

        /// Token tiles outside, rows inside: a tile's activations stay in a near cache for all rows.
        #[target_feature(enable = $features)]
        unsafe fn plain<P: Param>(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
            for (index, tile) in tokens.chunks(4).enumerate() {
                let out = &mut out[4 * index * range.len()..];
                // SAFETY: `rows` checked the lengths.
                unsafe {
                    match *tile {
                        [a] => plain_column::<P, ROWS_OF_FEW, 1>(w, range.clone(), x, [a], out),
                        [a, b] => plain_column::<P, ROWS_OF_FEW, 2>(w, range.clone(), x, [a, b], out),
                        [a, b, c] => plain_column::<P, ROWS_OF_FEW, 3>(w, range.clone(), x, [a, b, c], out),
                        [a, b, c, d, ..] => plain_column::<P, ROWS, 4>(w, range.clone(), x, [a, b, c, d], out),
                        [] => {}
                    }
                }
            }
        }

        /// All rows for one tile of tokens, R at a time.
        #[target_feature(enable = $features)]
        unsafe fn plain_column<P: Param, const R: usize, const T: usize>(
            w: &Matrix<'_>,
            range: Range<usize>,
            x: &Acts<'_>,
            tokens: [u32; T],
            out: &mut [f32],
        ) {
            let (mut row, height) = (range.start, range.len());
            while row < range.end {
                let out = &mut out[row - range.start..];
                // SAFETY: `rows` checked the lengths.
                unsafe {
                    if row + R <= range.end {
                        plain_tile::<P, R, T>(w, row, x, tokens, out, height);
                        row += R;
                    } else {
                        plain_tile::<P, 1, T>(w, row, x, tokens, out, height);
                        row += 1;
                    }
                }
            }
        }

        /// R rows × T tokens; out[t × height + r].
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn plain_tile<P: Param, const R: usize, const T: usize>(
            w: &Matrix<'_>,
            row: usize,
            x: &Acts<'_>,
            tokens: [u32; T],
            out: &mut [f32],
            height: usize,
        ) {
            // SAFETY: `rows` checked every length that these pointers are moved within.
            unsafe {
                let from: [*const u8; R] = std::array::from_fn(|r| w.weight.as_ptr().add((row + r) * w.row_bytes()));
                let xs: [*const f32; T] = std::array::from_fn(|t| x.x.as_ptr().add(tokens[t] as usize * x.cols));
                let mut ahead = from[0].wrapping_add(ahead::<R>(w.row_bytes()));
                let mut sums = [[splat(0.0); T]; R];
                for col in (0..x.cols).step_by(LANES) {
                    // One row comes in order by itself.
                    for _ in 0..if R > 1 && col * P::BYTES % 64 == 0 { R } else { 0 } {
                        prefetch(ahead);
                        ahead = ahead.wrapping_add(64);
                    }
                    for r in 0..R {
                        let w = wide::<P>(from[r].add(col * P::BYTES));
                        for t in 0..T {
                            sums[r][t] = fma(w, load(xs[t].add(col)), sums[r][t]);
                        }
                    }
                }
                for r in 0..R {
                    for t in 0..T {
                        out[t * height + r] = total(sums[r][t]);
                    }
                }
            }
        }
    };
}
use kernels;
