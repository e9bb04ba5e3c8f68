//! NEON primitives (every aarch64 has them).

use std::arch::aarch64::*;

/// Eight lanes in two registers: eight halves are one load.
type V = float32x4x2_t;
const LANES: usize = 8;
/// Heads that attention takes together: eight sums of two registers each, in 32.
const TILE: usize = 4;
/// Rows of plain weights that four tokens take together.
const ROWS: usize = 2;
/// A guess, not measured: one row's sums would wait for each other.
const ROWS_OF_FEW: usize = 4;

super::kernels!("neon", "neon");
super::attend::attention!("neon");

#[inline]
#[target_feature(enable = "neon")]
fn splat(x: f32) -> V {
    float32x4x2_t(vdupq_n_f32(x), vdupq_n_f32(x))
}

#[inline]
#[target_feature(enable = "neon")]
fn fma(a: V, b: V, c: V) -> V {
    float32x4x2_t(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1))
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(from: *const f32) -> V {
    // SAFETY: the caller promises eight readable floats.
    unsafe { float32x4x2_t(vld1q_f32(from), vld1q_f32(from.add(4))) }
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(to: *mut f32, v: V) {
    // SAFETY: the caller promises eight writable floats.
    unsafe {
        vst1q_f32(to, v.0);
        vst1q_f32(to.add(4), v.1);
    }
}

/// Widened by arithmetic on the bit patterns (the f16 vector types are not stable): exponent rebased by a multiply, which
/// also makes subnormals right; infinities and NaN do not occur in a KV cache or a checkpoint's weights.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_f16(from: *const u8) -> V {
    // SAFETY: the caller promises 16 readable bytes.
    let half = unsafe { vreinterpretq_u16_u8(vld1q_u8(from)) };
    let widen = |half: uint16x4_t| {
        let bits = vmovl_u16(half);
        let magnitude = vreinterpretq_f32_u32(vshlq_n_u32::<13>(vandq_u32(bits, vdupq_n_u32(0x7fff))));
        let rebased = vmulq_n_f32(magnitude, f32::from_bits(0x7780_0000)); // 2^112
        let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
        vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(rebased), sign))
    };
    float32x4x2_t(widen(vget_low_u16(half)), widen(vget_high_u16(half)))
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_bf16(from: *const u8) -> V {
    // SAFETY: the caller promises 16 readable bytes.
    let half = unsafe { vreinterpretq_u16_u8(vld1q_u8(from)) };
    let widen = |half: uint16x4_t| vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(half)));
    float32x4x2_t(widen(vget_low_u16(half)), widen(vget_high_u16(half)))
}

#[inline]
#[target_feature(enable = "neon")]
fn total(v: V) -> f32 {
    vaddvq_f32(vaddq_f32(v.0, v.1))
}

#[inline]
#[target_feature(enable = "neon")]
fn mul(a: V, b: V) -> V {
    float32x4x2_t(vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1))
}

#[inline]
#[target_feature(enable = "neon")]
fn div(a: V, b: V) -> V {
    float32x4x2_t(vdivq_f32(a.0, b.0), vdivq_f32(a.1, b.1))
}

#[inline]
#[target_feature(enable = "neon")]
fn sub(a: V, b: V) -> V {
    float32x4x2_t(vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1))
}

#[inline]
#[target_feature(enable = "neon")]
fn max(a: V, b: V) -> V {
    float32x4x2_t(vmaxq_f32(a.0, b.0), vmaxq_f32(a.1, b.1))
}

#[inline]
#[target_feature(enable = "neon")]
fn highest(v: V) -> f32 {
    vmaxvq_f32(vmaxq_f32(v.0, v.1))
}

/// The first `count` lanes of `v`, the rest of `other`.
#[inline]
#[target_feature(enable = "neon")]
fn keep(v: V, count: usize, other: V) -> V {
    let count = vdupq_n_u32(count.min(LANES) as u32);
    // SAFETY: four readable numbers each.
    let [low, high] = [[0, 1, 2, 3], [4, 5, 6, 7]].map(|lanes: [u32; 4]| vcltq_u32(unsafe { vld1q_u32(lanes.as_ptr()) }, count));
    float32x4x2_t(vbslq_f32(low, v.0, other.0), vbslq_f32(high, v.1, other.1))
}

#[inline]
#[target_feature(enable = "neon")]
fn exponent(shifted: V) -> V {
    let up = |x| vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(x)));
    float32x4x2_t(up(shifted.0), up(shifted.1))
}

/// In assembly: the intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn prefetch(from: *const u8) {
    // SAFETY: a hint; no address is wrong.
    unsafe { std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) from, options(readonly, nostack, preserves_flags)) }
}
