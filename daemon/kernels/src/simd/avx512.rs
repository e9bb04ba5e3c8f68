//! AVX-512 (F, BW, VL) primitives.

use std::arch::x86_64::*;

type V = __m512;
const LANES: usize = 16;
/// Heads that attention takes together: 16 sums, two vectors of keys and a query leave registers over.
const TILE: usize = 8;
/// Rows of plain weights that four tokens take together.
const ROWS: usize = 4;
/// One row after the other: on Zen 4, four at a time came from memory no faster.
const ROWS_OF_FEW: usize = 1;

super::kernels!("avx512f,avx512bw,avx512vl,fma,f16c", "avx512");
super::attend::attention!("avx512f,avx512bw,avx512vl,fma,f16c");

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn splat(x: f32) -> V {
    _mm512_set1_ps(x)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn fma(a: V, b: V, c: V) -> V {
    _mm512_fmadd_ps(a, b, c)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
unsafe fn load(from: *const f32) -> V {
    // SAFETY: the caller promises 16 readable floats.
    unsafe { _mm512_loadu_ps(from) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
unsafe fn store(to: *mut f32, v: V) {
    // SAFETY: the caller promises 16 writable floats.
    unsafe { _mm512_storeu_ps(to, v) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
unsafe fn load_f16(from: *const u8) -> V {
    // SAFETY: the caller promises 32 readable bytes.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
unsafe fn load_bf16(from: *const u8) -> V {
    // SAFETY: the caller promises 32 readable bytes.
    let half = unsafe { _mm256_loadu_si256(from.cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn total(v: V) -> f32 {
    _mm512_reduce_add_ps(v)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn mul(a: V, b: V) -> V {
    _mm512_mul_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn div(a: V, b: V) -> V {
    _mm512_div_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn sub(a: V, b: V) -> V {
    _mm512_sub_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn max(a: V, b: V) -> V {
    _mm512_max_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
pub(super) fn highest(v: V) -> f32 {
    _mm512_reduce_max_ps(v)
}

/// The first `count` lanes of `v`, the rest of `other`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
pub(super) fn keep(v: V, count: usize, other: V) -> V {
    let mask = if count < LANES { (1u16 << count) - 1 } else { u16::MAX };
    _mm512_mask_blend_ps(mask, other, v)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn exponent(shifted: V) -> V {
    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(shifted)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
fn prefetch(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(from.cast());
}
