//! AVX2 + FMA + F16C primitives (x86-64-v3).

use std::arch::x86_64::*;

type V = __m256;
const LANES: usize = 8;
/// Heads that attention takes together: eight sums, two vectors of keys and a query in 16 registers.
const TILE: usize = 4;
/// Rows of plain weights that four tokens take together.
const ROWS: usize = 2;
/// One row after the other: on Zen 4, four at a time came from memory no faster.
const ROWS_OF_FEW: usize = 1;

super::kernels!("avx2,fma,f16c", "avx2");
super::attend::attention!("avx2,fma,f16c");

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn splat(x: f32) -> V {
    _mm256_set1_ps(x)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fma(a: V, b: V, c: V) -> V {
    _mm256_fmadd_ps(a, b, c)
}

/// # Safety
/// Eight floats must be readable.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn load(from: *const f32) -> V {
    // SAFETY: the caller promises eight readable floats.
    unsafe { _mm256_loadu_ps(from) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store(to: *mut f32, v: V) {
    // SAFETY: the caller promises eight writable floats.
    unsafe { _mm256_storeu_ps(to, v) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_f16(from: *const u8) -> V {
    // SAFETY: the caller promises 16 readable bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_bf16(from: *const u8) -> V {
    // SAFETY: the caller promises 16 readable bytes.
    let half = unsafe { _mm_loadu_si128(from.cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn total(v: V) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn mul(a: V, b: V) -> V {
    _mm256_mul_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn div(a: V, b: V) -> V {
    _mm256_div_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sub(a: V, b: V) -> V {
    _mm256_sub_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn max(a: V, b: V) -> V {
    _mm256_max_ps(a, b)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn highest(v: V) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

/// The first `count` lanes of `v`, the rest of `other`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn keep(v: V, count: usize, other: V) -> V {
    let (count, lanes) = (_mm256_set1_epi32(count.min(LANES) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    _mm256_blendv_ps(other, v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, lanes)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exponent(shifted: V) -> V {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(shifted)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(from.cast());
}
