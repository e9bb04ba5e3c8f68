//! Products with 4- and 8-bit weights on AVX-512's dot product of bytes (VNNI); everything else is `avx512.rs`.
//!
//! Activations become 16-bit fixed point, with a scale for each group of columns: x ≈ scale·(256·high + low), two signed bytes. Codes are
//! unsigned bytes, so that within a group Σ q·x is exact integer arithmetic, in two dots. The rounding is 2⁻¹⁶ of the group's
//! largest activation: as near to f32 as f32 sums are to each other, at the price of one bf16 dot.
//!
//! Row · x = Σ_groups scale·(Σ q·x) + Σ_groups bias·(Σ x), the latter in f32.

use std::{arch::x86_64::*, ops::Range};

use super::{
    Bf16, Coming, F16, F32, FIXED_MAX, Isa, Param, avx512, avx512attend,
    avx512narrow::{self, product as narrow},
    by_kind, fixed_point,
};
use crate::matrix::{Acts, Fixed, FixedRow, Float, Matrix};

pub(super) const ISA: Isa = Isa {
    name: "avx512-vnni",
    rows: rows::<true>,
    fixed: Some(|x, fixed| {
        // SAFETY: here and below, `Isa::available` hands this table out only where the features were detected.
        unsafe { to_fixed::<true>(x, fixed) }
    }),
    attend_fixed: Some(avx512attend::attend),
    ..avx512::ISA
};

/// The same with activations of 8 bits: half the dots, and a rounding of 2⁻⁸ of the group's largest, which changes what a model says.
pub(super) const FAST_MATH: Isa = Isa {
    name: "avx512-vnni-int8",
    // `cargo bench -p flash-engine --bench accuracy -- reference fast-math`
    price: Some("fast-math: 95.1% of 12,288 held-out tokens of flash-tiny-moe kept their most likely token, perplexity +0.40%"),
    rows: rows::<false>,
    fixed: Some(|x, fixed| {
        // SAFETY: as above.
        unsafe { to_fixed::<false>(x, fixed) }
    }),
    ..ISA
};

/// Tokens of a tile, of two rows. Up to four tokens take four rows: their sums fill the registers, and scales wait in the first cache.
const TOKENS: usize = 6;
/// Results of a tile.
const RESULTS: usize = 16;

fn rows<const EXACT: bool>(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
    let Some(kind) = fixed_point(w, &range, x, tokens, out) else { return (avx512::ISA.rows)(w, range, x, tokens, out) };
    // SAFETY: the features were detected (see ISA) and every access of the tiles lies inside what `fixed_point` asserted.
    unsafe {
        if w.cols <= avx512narrow::GROUPS * x.group {
            by_kind!(kind, narrow, (w, range, x, tokens, out), EXACT)
        } else {
            by_kind!(kind, product, (w, range, x, tokens, out), EXACT)
        }
    }
}

/// Sixteen scales or biases as floats.
trait Wide {
    /// # Safety
    /// As many numbers as `mask` has bits must be readable from the `at`-th on.
    unsafe fn wide(from: *const u8, at: usize, mask: __mmask16) -> __m512;
}

impl Wide for F32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn wide(from: *const u8, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise; masked numbers are not read.
        unsafe { _mm512_maskz_loadu_ps(mask, from.cast::<f32>().add(at)) }
    }
}

/// A 16-bit float.
pub(super) trait Half: Param {
    /// Sixteen of them.
    ///
    /// # Safety
    /// For the features see ISA.
    unsafe fn widened(words: __m256i) -> __m512;
}

impl Half for F16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn widened(words: __m256i) -> __m512 {
        _mm512_cvtph_ps(words)
    }
}

impl Half for Bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn widened(words: __m256i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))
    }
}

impl<P: Half> Wide for P {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn wide(from: *const u8, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: as above.
        unsafe { P::widened(_mm256_maskz_loadu_epi16(mask, from.cast::<i16>().add(at))) }
    }
}

/// Of a matrix's rows and their activations; found once, because a narrow row takes no longer than these divisions.
#[derive(Clone, Copy)]
struct Sizes<'a> {
    group: usize,
    /// Of a row.
    groups: usize,
    /// Bytes of a token's fixed point.
    stride: usize,
    coming: Coming<'a>,
}

impl<'a> Sizes<'a> {
    fn of<const BITS: usize>(w: &'a Matrix<'a>, x: &Acts<'_>, end: usize) -> Self {
        let stride = Fixed::row_bytes(w.cols, BITS as u8);
        Self { group: x.group, groups: w.cols / x.group, stride, coming: Coming::new(w, end) }
    }
}

/// Token tiles outside, rows inside: a tile's activations stay in the first cache for all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn product<const EXACT: bool, const BITS: usize, P: Wide>(
    w: &Matrix<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: &[u32],
    out: &mut [f32],
) {
    let sizes = Sizes::of::<BITS>(w, x, range.end);
    for (index, tile) in tokens.chunks(TOKENS).enumerate() {
        let out = &mut out[index * TOKENS * range.len()..];
        // SAFETY: `rows` checked the lengths.
        unsafe {
            match *tile {
                [a] => column::<EXACT, BITS, P, 4, 1>(&sizes, range.clone(), x, [a], out),
                [a, b] => column::<EXACT, BITS, P, 4, 2>(&sizes, range.clone(), x, [a, b], out),
                [a, b, c] => column::<EXACT, BITS, P, 4, 3>(&sizes, range.clone(), x, [a, b, c], out),
                [a, b, c, d] => column::<EXACT, BITS, P, 4, 4>(&sizes, range.clone(), x, [a, b, c, d], out),
                [a, b, c, d, e] => column::<EXACT, BITS, P, 2, 5>(&sizes, range.clone(), x, [a, b, c, d, e], out),
                [a, b, c, d, e, f, ..] => column::<EXACT, BITS, P, 2, TOKENS>(&sizes, range.clone(), x, [a, b, c, d, e, f], out),
                [] => {}
            }
        }
    }
}

/// All rows for one tile of tokens, R at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn column<const EXACT: bool, const BITS: usize, P: Wide, const R: usize, const T: usize>(
    sizes: &Sizes<'_>,
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
                tile::<EXACT, BITS, P, R, T>(sizes, row, x, tokens, out, height);
                row += R;
            } else {
                tile::<EXACT, BITS, P, 1, T>(sizes, row, x, tokens, out, height);
                row += 1;
            }
        }
    }
}

/// R rows × T tokens; out[t × height + r]. Each of them is summed in one order, whatever R and T.
///
/// A block is 64 bytes of codes, and 32 / BITS columns of it belong to each lane of 32 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile<const EXACT: bool, const BITS: usize, P: Wide, const R: usize, const T: usize>(
    sizes: &Sizes<'_>,
    row: usize,
    x: &Acts<'_>,
    tokens: [u32; T],
    out: &mut [f32],
    height: usize,
) {
    let Sizes { group, groups, stride, ref coming } = *sizes;
    let Coming { w, bytes, .. } = *coming;
    let columns = 512 / BITS;
    // Groups of 16 blocks at the most; a group may span two blocks of 8-bit codes.
    let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let shift = _mm512_set1_epi32((group * BITS / 32).trailing_zeros() as i32);
    let low_nibbles = _mm512_set1_epi8(15);
    // SAFETY: `rows` checked every length that these pointers are moved within; the last block is masked.
    unsafe {
        let codes: [*const u8; R] = std::array::from_fn(|r| w.weight.as_ptr().add((row + r) * bytes));
        let xs: [*const i8; T] = std::array::from_fn(|t| x.fixed.bytes.as_ptr().add(tokens[t] as usize * stride));
        let x_scales: [*const f32; T] = std::array::from_fn(|t| x.fixed.scales.as_ptr().add(tokens[t] as usize * groups));
        let sums: [*const f32; T] = std::array::from_fn(|t| x.sums.as_ptr().add(tokens[t] as usize * groups));
        let mut ahead = coming.codes::<R>(row);
        if T < TOKENS {
            coming.sides(row, R);
        }
        let mut total = [[_mm512_setzero_ps(); T]; R];
        // Sixteen groups at a time, so that their scales are one load.
        for first in (0..groups).step_by(16) {
            let here = (groups - first).min(16);
            let mask = (0xffff_u32 >> (16 - here)) as __mmask16;
            let mut scales = [[_mm512_setzero_ps(); T]; R];
            for r in 0..R {
                let at = (row + r) * groups + first;
                let (scale, bias) = (P::wide(w.scales.as_ptr(), at, mask), P::wide(w.biases.as_ptr(), at, mask));
                for t in 0..T {
                    scales[r][t] = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, x_scales[t].add(first)));
                    total[r][t] = _mm512_fmadd_ps(bias, _mm512_maskz_loadu_ps(mask, sums[t].add(first)), total[r][t]);
                }
            }
            let end = (first + here) * group;
            for start in (first * group..end).step_by(columns) {
                // Which of the sixteen groups a lane's columns belong to.
                let lanes =
                    _mm512_srlv_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(((start - first * group) * BITS / 32) as i32)), shift);
                let mut w_of = [[_mm512_setzero_si512(); 2]; R];
                for r in 0..R {
                    let from = codes[r].add(start * BITS / 8);
                    if T < TOKENS {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                        ahead = ahead.wrapping_add(64);
                    }
                    let left = bytes - start * BITS / 8;
                    let packed =
                        if left >= 64 { _mm512_loadu_si512(from.cast()) } else { _mm512_maskz_loadu_epi8((1u64 << left) - 1, from.cast()) };
                    w_of[r] = if BITS == 4 {
                        [_mm512_and_si512(packed, low_nibbles), _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles)]
                    } else {
                        [packed, packed]
                    };
                }
                for t in 0..T {
                    let from: *const __m512i = xs[t].add(start * 2).cast();
                    for r in 0..R {
                        let mut dots = _mm512_setzero_si512();
                        if BITS == 4 {
                            dots = _mm512_dpbusd_epi32(dots, w_of[r][0], _mm512_loadu_si512(from));
                            dots = _mm512_dpbusd_epi32(dots, w_of[r][1], _mm512_loadu_si512(from.add(1)));
                            if EXACT {
                                dots = _mm512_slli_epi32(dots, 8);
                                dots = _mm512_dpbusd_epi32(dots, w_of[r][0], _mm512_loadu_si512(from.add(2)));
                                dots = _mm512_dpbusd_epi32(dots, w_of[r][1], _mm512_loadu_si512(from.add(3)));
                            }
                        } else {
                            dots = _mm512_dpbusd_epi32(dots, w_of[r][0], _mm512_loadu_si512(from));
                            if EXACT {
                                dots = _mm512_slli_epi32(dots, 8);
                                dots = _mm512_dpbusd_epi32(dots, w_of[r][0], _mm512_loadu_si512(from.add(1)));
                            }
                        }
                        total[r][t] = _mm512_fmadd_ps(_mm512_permutexvar_ps(lanes, scales[r][t]), _mm512_cvtepi32_ps(dots), total[r][t]);
                    }
                }
            }
        }
        let mut of = [0.0; RESULTS];
        for (four, of) in of.as_chunks_mut::<4>().0.iter_mut().enumerate().take((R * T).div_ceil(4)) {
            let total = std::array::from_fn(|i| {
                let i = 4 * four + i;
                if i < R * T { total[i % R][i / R] } else { _mm512_setzero_ps() }
            });
            _mm_storeu_ps(of.as_mut_ptr(), added_up(total));
        }
        for t in 0..T {
            out[t * height..][..R].copy_from_slice(&of[t * R..][..R]);
        }
    }
}

/// The sum of each vector's lanes, in the order of `_mm512_reduce_add_ps`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn added_up([a, b, c, d]: [__m512; 4]) -> __m128 {
    let halves = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    let (ab, cd) = (halves(a, b), halves(c, d));
    let quarters = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
    let two = _mm512_add_ps(quarters, _mm512_permute_ps::<0x4e>(quarters));
    let one = _mm512_add_ps(two, _mm512_movehdup_ps(two));
    _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, one))
}

/// One row; if it need not be exact, the low bytes are never read. For 4-bit codes a block of 128 columns is [high, low][even, odd columns][64], as their nibbles lie; for 8 bits a block
/// of 64 columns is [high, low][64].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn to_fixed<const EXACT: bool>(x: &[f32], fixed: FixedRow<'_>) {
    let max = if EXACT { FIXED_MAX } else { 127.0 };
    fixed.check(x);
    let FixedRow { bits, group, scales, bytes } = fixed;
    let columns = 512 / usize::from(bits);
    for (g, (x, scale)) in x.chunks_exact(group).zip(scales).enumerate() {
        let mut most = _mm512_setzero_ps();
        for x in x.chunks_exact(16) {
            // SAFETY: sixteen floats.
            most = _mm512_max_ps(most, _mm512_abs_ps(unsafe { _mm512_loadu_ps(x.as_ptr()) }));
        }
        let most = _mm512_reduce_max_ps(most);
        *scale = most / max;
        let inverse = _mm512_set1_ps(if most > 0.0 { max / most } else { 0.0 });
        for (i, x) in x.chunks_exact(32).enumerate() {
            // SAFETY: 32 floats; 64 bytes at `at`, and as many in each of the block's planes, lie inside the row's.
            unsafe {
                let rounded =
                    |at: usize| _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(at)), inverse)));
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(rounded(0)), rounded(16));
                let low = _mm512_srai_epi16(_mm512_slli_epi16(both, 8), 8);
                let high = if EXACT { _mm512_srai_epi16(_mm512_sub_epi16(both, low), 8) } else { both };
                let column = g * group + 32 * i;
                let block = bytes.as_mut_ptr().add(column / columns * columns * 2);
                if bits == 4 {
                    let to = block.add(column % columns / 2);
                    _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(high));
                    _mm_storeu_si128(to.add(64).cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32(high, 16)));
                    _mm_storeu_si128(to.add(128).cast(), _mm512_cvtepi32_epi8(low));
                    _mm_storeu_si128(to.add(192).cast(), _mm512_cvtepi32_epi8(_mm512_srli_epi32(low, 16)));
                } else {
                    let to = block.add(column % columns);
                    _mm256_storeu_si256(to.cast(), _mm512_cvtepi16_epi8(high));
                    _mm256_storeu_si256(to.add(64).cast(), _mm512_cvtepi16_epi8(low));
                }
            }
        }
    }
}
