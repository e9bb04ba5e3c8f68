//! Products with 4- and 8-bit weights as dots of signed bytes on Arm, by the widest instruction that a CPU has; everything else is
//! `neon.rs`. Never run on Arm hardware: qemu says that it is right, nothing says how fast it is.
//!
//! Activations are the 16-bit fixed point of `avx512vnni.rs`, x ≈ scale·(256·high + low), two signed bytes. So must codes be: those of 8
//! bits are taken 128 lower, for which the group's bias makes up. Within a group, sums are exact.
//!
//! A block is 32 columns, two vectors of codes: even and odd columns of 4 bits, the first and the last 16 of 8 bits. To each of them
//! belong two vectors of activations.

use std::{
    arch::{aarch64::*, asm},
    array::from_fn,
    ops::Range,
};

use super::{Bf16, F16, F32, FIXED_MAX, Isa, Param, ahead, by_kind, fixed_point, neon};
use crate::matrix::{Acts, Fixed, FixedRow, Float, Matrix};

pub(super) const NEON: Isa = isa::<Multiply>("neon");
pub(super) const DOTPROD: Isa = isa::<Sdot>("neon-dotprod");
pub(super) const I8MM: Isa = isa::<Smmla>("neon-i8mm");

const fn isa<D: Dot>(name: &'static str) -> Isa {
    let fixed: fn(&[f32], FixedRow<'_>) = |x, fixed| {
        // SAFETY: every aarch64 has NEON.
        unsafe { to_fixed::<D>(x, fixed) }
    };
    Isa { name, rows: rows::<D>, fixed: Some(fixed), ..neon::ISA }
}

/// One instruction's way to multiply bytes.
trait Dot {
    /// Whether it takes eight columns of two rows, and their high and low bytes of x together: sums are then [a·high, a·low, b·high,
    /// b·low]. Else it takes 16 columns of one row, high or low, and sums are of one kind.
    const PAIRS: bool;
    const ROWS: usize = if Self::PAIRS { 2 } else { 1 };

    /// # Safety
    /// The CPU must have the instruction.
    unsafe fn dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;
}

/// What every CPU has: for a token, a row and 32 columns of 4 bits 19 instructions by hand count, where codes widened to f32 took 36.
/// Neither was timed.
struct Multiply;
/// The dotprod extension. The intrinsics of both extensions are not stable, hence assembly.
struct Sdot;
/// The i8mm extension.
struct Smmla;

impl Dot for Multiply {
    const PAIRS: bool = false;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        vpadalq_s16(vpadalq_s16(sums, vmull_s8(vget_low_s8(w), vget_low_s8(x))), vmull_high_s8(w, x))
    }
}

impl Dot for Sdot {
    const PAIRS: bool = false;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: registers only; the caller promises the instruction.
        unsafe {
            asm!(".arch_extension dotprod", "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) w, in(vreg) x,
                options(pure, nomem, nostack, preserves_flags));
        }
        sums
    }
}

impl Dot for Smmla {
    const PAIRS: bool = true;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn dot(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: as above.
        unsafe {
            asm!(".arch_extension i8mm", "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) w, in(vreg) x,
                options(pure, nomem, nostack, preserves_flags));
        }
        sums
    }
}

fn rows<D: Dot>(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
    let Some(kind) = fixed_point(w, &range, x, tokens, out) else { return (neon::ISA.rows)(w, range, x, tokens, out) };
    // SAFETY: `Isa::available` hands a table out only where its instruction was detected, and every access of the tiles lies inside
    // what `fixed_point` asserted.
    unsafe { by_kind!(kind, product, (w, range, x, tokens, out), D) }
}

/// Token tiles outside, rows inside: a tile's activations stay in a near cache for all rows.
#[target_feature(enable = "neon")]
unsafe fn product<D: Dot, const BITS: usize, P: Param>(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
    for (index, tile) in tokens.chunks(4).enumerate() {
        let out = &mut out[4 * index * range.len()..];
        // SAFETY: `fixed_point` checked the lengths.
        unsafe {
            match *tile {
                // Four rows either way.
                [a] if D::PAIRS => column::<D, BITS, P, 2, 1>(w, range.clone(), x, [a], out),
                [a] => column::<D, BITS, P, 4, 1>(w, range.clone(), x, [a], out),
                [a, b] => column::<D, BITS, P, 2, 2>(w, range.clone(), x, [a, b], out),
                [a, b, c] => column::<D, BITS, P, 2, 3>(w, range.clone(), x, [a, b, c], out),
                [a, b, c, d, ..] => column::<D, BITS, P, 2, 4>(w, range.clone(), x, [a, b, c, d], out),
                [] => {}
            }
        }
    }
}

/// All rows for one tile of tokens, U times [`Dot::ROWS`] at a time.
#[target_feature(enable = "neon")]
unsafe fn column<D: Dot, const BITS: usize, P: Param, const U: usize, const T: usize>(
    w: &Matrix<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: [u32; T],
    out: &mut [f32],
) {
    let (mut row, height) = (range.start, range.len());
    while row < range.end {
        let out = &mut out[row - range.start..];
        // SAFETY: `fixed_point` checked the lengths.
        unsafe {
            if row + U * D::ROWS <= range.end {
                tile::<D, BITS, P, U, T>(w, row..row + U * D::ROWS, x, tokens, out, height);
                row += U * D::ROWS;
            } else {
                let end = range.end.min(row + D::ROWS);
                tile::<D, BITS, P, 1, T>(w, row..end, x, tokens, out, height);
                row = end;
            }
        }
    }
}

/// U units of one or two rows × T tokens; out[t × height + r]. Where a pair lacks its second row, the first stands in.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn tile<D: Dot, const BITS: usize, P: Param, const U: usize, const T: usize>(
    w: &Matrix<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: [u32; T],
    out: &mut [f32],
    height: usize,
) {
    let (group, groups, bytes) = (x.group, w.cols / x.group, w.row_bytes());
    let stride = Fixed::row_bytes(w.cols, BITS as u8);
    let units: [[usize; 2]; U] = from_fn(|u| [0, D::ROWS - 1].map(|second| (range.start + u * D::ROWS + second).min(range.end - 1)));
    // SAFETY: `fixed_point` checked every length that these pointers are moved within.
    unsafe {
        let mut codes_at = units.map(|unit| unit.map(|row| w.weight.as_ptr().add(row * bytes)));
        let mut xs: [*const i8; T] = from_fn(|t| x.fixed.bytes.as_ptr().add(tokens[t] as usize * stride));
        let mut ahead = codes_at[0][0].wrapping_add(ahead::<U>(D::ROWS * bytes));
        let mut total = [[vdupq_n_f32(0.0); T]; U];
        for g in 0..groups {
            // Of the two instructions for a vector of codes.
            let mut dots = [[[vdupq_n_s32(0); 2]; T]; U];
            for _ in 0..group / 32 {
                let mut w_of = [[[vdupq_n_s8(0); 2]; 2]; U];
                for u in 0..U {
                    let [a, b] = codes_at[u].map(|from| codes::<BITS>(from));
                    for v in 0..2 {
                        w_of[u][v] = if D::PAIRS { halves(a[v], b[v]) } else { [a[v]; 2] };
                    }
                    codes_at[u] = codes_at[u].map(|from| from.add(4 * BITS));
                }
                for _ in 0..(U * D::ROWS * 4 * BITS).div_ceil(64) {
                    neon::prefetch(ahead);
                    ahead = ahead.wrapping_add(64);
                }
                for v in 0..2 {
                    for t in 0..T {
                        for i in 0..2 {
                            let x = vld1q_s8(xs[t].add(32 * v + 16 * i));
                            for u in 0..U {
                                dots[u][t][i] = D::dot(dots[u][t][i], w_of[u][v][i], x);
                            }
                        }
                    }
                }
                xs = xs.map(|x| x.add(64));
            }
            for u in 0..U {
                let (scale, bias) = sides::<D, BITS, P>(w, units[u].map(|row| row * groups + g));
                for t in 0..T {
                    let at = tokens[t] as usize * groups + g;
                    let [first, second] = dots[u][t];
                    let dots = vaddq_s32(if D::PAIRS { first } else { vshlq_n_s32::<8>(first) }, second);
                    let scale = vmulq_n_f32(scale, *x.fixed.scales.get_unchecked(at));
                    total[u][t] = vfmaq_f32(total[u][t], vcvtq_f32_s32(dots), scale);
                    total[u][t] = vfmaq_n_f32(total[u][t], bias, *x.sums.get_unchecked(at));
                }
            }
        }
        for u in 0..U {
            for t in 0..T {
                let (first, pairs) = (units[u][0] - range.start, vpaddq_f32(total[u][t], total[u][t]));
                if D::PAIRS {
                    out[t * height + first] = vgetq_lane_f32::<0>(pairs);
                    out[t * height + units[u][1] - range.start] = vgetq_lane_f32::<1>(pairs);
                } else {
                    out[t * height + first] = vgetq_lane_f32::<0>(vpaddq_f32(pairs, pairs));
                }
            }
        }
    }
}

/// A block's codes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn codes<const BITS: usize>(from: *const u8) -> [int8x16_t; 2] {
    // SAFETY: the caller promises 4 × BITS readable bytes.
    unsafe {
        let packed = vld1q_u8(from);
        let codes = if BITS == 4 {
            [vandq_u8(packed, vdupq_n_u8(15)), vshrq_n_u8::<4>(packed)]
        } else {
            [packed, vld1q_u8(from.add(16))].map(|codes| veorq_u8(codes, vdupq_n_u8(128)))
        };
        codes.map(|codes| vreinterpretq_s8_u8(codes))
    }
}

/// The first halves of two vectors, and the second.
#[inline]
#[target_feature(enable = "neon")]
fn halves(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
    [vreinterpretq_s8_s64(vtrn1q_s64(a, b)), vreinterpretq_s8_s64(vtrn2q_s64(a, b))]
}

/// What a unit's lanes are multiplied with, and what the sum of x is, so that their total is that of the row or of both.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn sides<D: Dot, const BITS: usize, P: Param>(w: &Matrix<'_>, at: [usize; 2]) -> (float32x4_t, float32x4_t) {
    // SAFETY: the caller promises that these numbers can be read.
    unsafe {
        let [(scale, bias), (other, other_bias)] = at.map(|at| {
            let (scale, bias) = (P::get(w.scales.as_ptr(), at), P::get(w.biases.as_ptr(), at));
            (scale, if BITS == 8 { scale.mul_add(128.0, bias) } else { bias })
        });
        if D::PAIRS {
            let scales = [256.0 * scale, scale, 256.0 * other, other];
            (vld1q_f32(scales.as_ptr()), vld1q_f32([bias, 0.0, other_bias, 0.0].as_ptr()))
        } else {
            (vdupq_n_f32(scale), vsetq_lane_f32::<0>(bias, vdupq_n_f32(0.0)))
        }
    }
}

/// One row, block by block.
#[target_feature(enable = "neon")]
unsafe fn to_fixed<D: Dot>(x: &[f32], fixed: FixedRow<'_>) {
    fixed.check(x);
    let FixedRow { bits, group, scales, bytes } = fixed;
    for ((x, scale), bytes) in x.chunks_exact(group).zip(scales).zip(bytes.chunks_exact_mut(2 * group)) {
        let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        *scale = most / FIXED_MAX;
        let inverse = if most > 0.0 { FIXED_MAX / most } else { 0.0 };
        for (x, bytes) in x.as_chunks::<32>().0.iter().zip(bytes.as_chunks_mut::<64>().0) {
            // SAFETY: 32 floats, 64 bytes.
            unsafe {
                let four = |at: usize| vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x.as_ptr().add(at)), inverse)));
                let eight = |at: usize| vcombine_s16(four(at), four(at + 4));
                // High and low bytes of 16 columns.
                let split = |at: usize| {
                    let both = [eight(at), eight(at + 8)];
                    let [a, b] = both.map(|x| vreinterpretq_s8_s16(vsubq_s16(x, vshrq_n_s16::<8>(vshlq_n_s16::<8>(x)))));
                    let [low_a, low_b] = both.map(|x| vreinterpretq_s8_s16(x));
                    (vuzp2q_s8(a, b), vuzp1q_s8(low_a, low_b))
                };
                let ((high, low), (later_high, later_low)) = (split(0), split(16));
                let vectors = if bits == 4 {
                    [(vuzp1q_s8(high, later_high), vuzp1q_s8(low, later_low)), (vuzp2q_s8(high, later_high), vuzp2q_s8(low, later_low))]
                } else {
                    [(high, low), (later_high, later_low)]
                };
                for (i, (high, low)) in vectors.into_iter().enumerate() {
                    let [first, second] = if D::PAIRS { halves(high, low) } else { [high, low] };
                    vst1q_s8(bytes.as_mut_ptr().add(32 * i), first);
                    vst1q_s8(bytes.as_mut_ptr().add(32 * i + 16), second);
                }
            }
        }
    }
}
