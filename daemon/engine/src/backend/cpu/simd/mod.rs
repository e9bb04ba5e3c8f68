//! Runtime-dispatched kernels: one table of function pointers, filled once at load for the best instruction set this
//! CPU has, and the bodies shared by the sets. An instruction-set file supplies primitives and invokes
//! [`kernels`] and [`attend::attention`]; the loops stand here and there once.
//!
//! Batch invariance: R rows × T tokens are computed in one tile to reuse loads, but each (row, token) has its own
//! accumulators, so its bits do not depend on R or T.

use std::ops::Range;

use half::f16;

use super::{
    attention::{Partial, Tile},
    matrix::{Acts, FixedRow, Matrix},
    norm, portable,
};

mod attend;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "aarch64")]
mod neon;

/// Most tokens one call of [`Isa::rows`] takes.
pub(crate) const TOKENS_MAX: usize = 64;

/// One instruction set's kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Isa {
    pub(crate) name: &'static str,
    /// out[(row − rows.start) × tokens.len() + i] = W[row] · x[tokens[i]]; falls back to portable for shapes and
    /// formats the set has no kernel for.
    pub(crate) rows: fn(&Matrix<'_>, Range<usize>, &Acts<'_>, &[u32], &mut [f32]),
    /// Gives a row of activations as 16-bit fixed point, for products with 4- and 8-bit weights; `None`: they read f32.
    pub(crate) fixed: Option<fn(&[f32], FixedRow<'_>)>,
    /// gate = silu(gate) · up
    pub(crate) swiglu: fn(&mut [f32], &[f32]),
    /// Attention of some query heads over one span; portable where the head's size is not whole vectors.
    pub(crate) attend: fn(&Tile<'_, f32>, Partial<'_>),
    pub(crate) attend_f16: fn(&Tile<'_, f16>, Partial<'_>),
}

impl Isa {
    pub(crate) const PORTABLE: Self = Self {
        name: "portable",
        rows: portable::rows,
        fixed: None,
        swiglu: norm::swiglu,
        attend: portable::attend,
        attend_f16: portable::attend,
    };

    /// The sets this CPU has, best first; never empty.
    pub(crate) fn available() -> Vec<Self> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 =
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
            if avx512 && is_x86_feature_detected!("avx512vnni") {
                sets.push(avx512vnni::ISA);
            }
            if avx512 {
                sets.push(avx512::ISA);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                sets.push(avx2::ISA);
            }
        }
        #[cfg(target_arch = "aarch64")]
        sets.push(neon::ISA);
        sets.push(Self::PORTABLE);
        sets
    }
}

/// How a group's scales and biases are stored, as a type, so that the choice is made once per call.
trait Param {
    /// # Safety
    /// `at + 1` numbers must be readable.
    unsafe fn get(from: *const u8, at: usize) -> f32;
}

struct F32;
struct F16;
struct Bf16;

impl Param for F32 {
    #[inline(always)]
    unsafe fn get(from: *const u8, at: usize) -> f32 {
        // SAFETY: the caller's promise; unaligned reads are allowed.
        unsafe { from.cast::<f32>().add(at).read_unaligned() }
    }
}

impl Param for F16 {
    #[inline(always)]
    unsafe fn get(from: *const u8, at: usize) -> f32 {
        // SAFETY: the caller's promise.
        f16::from_bits(unsafe { from.cast::<u16>().add(at).read_unaligned() }).to_f32()
    }
}

impl Param for Bf16 {
    #[inline(always)]
    unsafe fn get(from: *const u8, at: usize) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(u32::from(unsafe { from.cast::<u16>().add(at).read_unaligned() }) << 16)
    }
}

/// Plain formats, as a type.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plain {
    F32,
    F16,
    Bf16,
}

/// The loops over primitives that the invoking module defines:
/// `V` (vector of `LANES` f32), `splat`, `load`, `fma`, `total` (sum of lanes), `load_f16`, `load_bf16`, and
/// `codes::<BITS>` (the LANES codes that start at a column, as floats). `$features` are the module's target features.
macro_rules! kernels {
    ($features:literal, $name:literal) => {
        use std::ops::Range;

        use super::{Bf16, F16, F32, Isa, Param, Plain};
        use crate::backend::cpu::{
            matrix::{Acts, Matrix},
            portable,
        };
        use crate::model::weights::{Float, Format};

        pub(super) const ISA: Isa = Isa { name: $name, rows, fixed: None, swiglu, attend, attend_f16: attend };

        fn rows(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
            assert!(range.end <= w.rows && w.weight.len() >= w.rows * w.row_bytes() && x.cols == w.cols);
            assert!(tokens.iter().all(|&token| (token as usize + 1) * x.cols <= x.x.len()));
            assert!(out.len() >= range.len() * tokens.len());
            if let Format::Affine { group, params, .. } = w.format {
                let bytes = w.rows * (w.cols / group) * if params == Float::F32 { 4 } else { 2 };
                assert!(x.group == group && w.scales.len() >= bytes && w.biases.len() >= bytes && w.cols % group == 0);
                assert!(tokens.iter().all(|&token| (token as usize + 1) * (x.cols / group) <= x.sums.len()));
            }
            // SAFETY: the features were detected (see ISA) and every access of the tiles lies inside what was asserted.
            unsafe {
                match w.format {
                    Format::Affine { bits: 4, params: Float::Bf16, .. } => affine::<4, Bf16>(w, range, x, tokens, out),
                    Format::Affine { bits: 4, params: Float::F16, .. } => affine::<4, F16>(w, range, x, tokens, out),
                    Format::Affine { bits: 4, params: Float::F32, .. } => affine::<4, F32>(w, range, x, tokens, out),
                    Format::Affine { bits: 8, params: Float::Bf16, .. } => affine::<8, Bf16>(w, range, x, tokens, out),
                    Format::Affine { bits: 8, params: Float::F16, .. } => affine::<8, F16>(w, range, x, tokens, out),
                    Format::Affine { bits: 8, params: Float::F32, .. } => affine::<8, F32>(w, range, x, tokens, out),
                    Format::F32 if w.cols % LANES == 0 => plain(Plain::F32, w, range, x, tokens, out),
                    Format::F16 if w.cols % LANES == 0 => plain(Plain::F16, w, range, x, tokens, out),
                    Format::Bf16 if w.cols % LANES == 0 => plain(Plain::Bf16, w, range, x, tokens, out),
                    _ => portable::rows(w, range, x, tokens, out),
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn affine<const BITS: usize, P: Param>(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
            let (mut row, width) = (range.start, tokens.len());
            // SAFETY: `rows` checked every length.
            unsafe {
                while row < range.end {
                    let out = &mut out[(row - range.start) * width..];
                    if width == 1 && row + 4 <= range.end {
                        affine_tile::<BITS, P, 4, 1>(w, row, x, tokens, out, width);
                        row += 4;
                        continue;
                    }
                    let mut at = 0;
                    while at + 4 <= width {
                        affine_tile::<BITS, P, 1, 4>(w, row, x, &tokens[at..], &mut out[at..], width);
                        at += 4;
                    }
                    for at in at..width {
                        affine_tile::<BITS, P, 1, 1>(w, row, x, &tokens[at..], &mut out[at..], width);
                    }
                    row += 1;
                }
            }
        }

        /// R rows × T tokens: Σ_groups scale·(Σ q·x) + Σ_groups bias·(Σ x).
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn affine_tile<const BITS: usize, P: Param, const R: usize, const T: usize>(
            w: &Matrix<'_>,
            row: usize,
            x: &Acts<'_>,
            tokens: &[u32],
            out: &mut [f32],
            width: usize,
        ) {
            let (group, groups, bytes) = (x.group, w.cols / x.group, w.row_bytes());
            // SAFETY: `rows` checked every length that these pointers are moved within.
            unsafe {
                let codes_at: [*const u8; R] = std::array::from_fn(|r| w.weight.as_ptr().add((row + r) * bytes));
                let scales: [*const u8; R] = [w.scales.as_ptr(); R];
                let biases: [*const u8; R] = [w.biases.as_ptr(); R];
                let xs: [*const f32; T] = std::array::from_fn(|t| x.x.as_ptr().add(tokens[t] as usize * x.cols));
                let sums: [*const f32; T] = std::array::from_fn(|t| x.sums.as_ptr().add(tokens[t] as usize * groups));
                let mut total_of = [[splat(0.0); T]; R];
                let mut offset = [[0.0f32; T]; R];
                for g in 0..groups {
                    let mut part = [[splat(0.0); T]; R];
                    let mut col = g * group;
                    while col < (g + 1) * group {
                        for r in 0..R {
                            let q = codes::<BITS>(codes_at[r].add(col * BITS / 8));
                            for t in 0..T {
                                part[r][t] = fma(q, load(xs[t].add(col)), part[r][t]);
                            }
                        }
                        col += LANES;
                    }
                    for r in 0..R {
                        let index = (row + r) * groups + g;
                        let (scale, bias) = (splat(P::get(scales[r], index)), P::get(biases[r], index));
                        for t in 0..T {
                            total_of[r][t] = fma(scale, part[r][t], total_of[r][t]);
                            offset[r][t] = bias.mul_add(*sums[t].add(g), offset[r][t]);
                        }
                    }
                }
                for r in 0..R {
                    for t in 0..T {
                        out[r * width + t] = total(total_of[r][t]) + offset[r][t];
                    }
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

        #[target_feature(enable = $features)]
        unsafe fn plain(kind: Plain, w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
            let bytes = w.row_bytes();
            for (i, row) in range.enumerate() {
                let out = &mut out[i * tokens.len()..][..tokens.len()];
                for (out, tokens) in out.chunks_mut(4).zip(tokens.chunks(4)) {
                    // SAFETY: `rows` checked the lengths.
                    unsafe {
                        let from = w.weight.as_ptr().add(row * bytes);
                        if let Ok(tokens) = <&[u32; 4]>::try_from(tokens) {
                            plain_tile(kind, from, x, tokens, out);
                        } else {
                            for (out, token) in out.iter_mut().zip(tokens) {
                                plain_tile(kind, from, x, &[*token], std::slice::from_mut(out));
                            }
                        }
                    }
                }
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn plain_tile<const T: usize>(kind: Plain, from: *const u8, x: &Acts<'_>, tokens: &[u32; T], out: &mut [f32]) {
            // SAFETY: `rows` checked the lengths; `from` starts a row of x.cols numbers.
            unsafe {
                let xs: [*const f32; T] = std::array::from_fn(|t| x.x.as_ptr().add(tokens[t] as usize * x.cols));
                let mut sums = [splat(0.0); T];
                for col in (0..x.cols).step_by(LANES) {
                    let w = match kind {
                        Plain::F32 => load(from.cast::<f32>().add(col)),
                        Plain::F16 => load_f16(from.add(2 * col)),
                        Plain::Bf16 => load_bf16(from.add(2 * col)),
                    };
                    for t in 0..T {
                        sums[t] = fma(w, load(xs[t].add(col)), sums[t]);
                    }
                }
                for t in 0..T {
                    out[t] = total(sums[t]);
                }
            }
        }
    };
}
use kernels;

#[cfg(test)]
mod tests;
