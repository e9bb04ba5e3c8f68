//! Products of AVX-512's dots of bytes with matrices of few columns, as experts' are: a row of them would spend more on its scales and on
//! adding up its dots than on these, so eight rows do both together. Codes and activations are those of `avx512vnni.rs`.

use std::{arch::x86_64::*, ops::Range};

use super::{Coming, F32, Param, avx512vnni::Half};
use crate::matrix::{Acts, Fixed, Matrix};

/// Rows of a tile.
const ROWS: usize = 8;
/// Tokens of a tile at most.
const TOKENS: usize = 6;
/// Groups of a row at most.
pub(super) const GROUPS: usize = 8;

/// Scales or biases of a tile's rows.
pub(super) trait Sides: Param {
    type Loaded: Copy;

    /// Of `rows` rows, `groups` numbers each; others are zero.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load(from: *const u8, rows: usize, groups: usize) -> Self::Loaded;

    /// Lane i has row × [`GROUPS`] + group of the i-th of the sixteen words of `at`.
    fn pick(of: Self::Loaded, at: __m512i) -> __m512;
}

impl Sides for F32 {
    type Loaded = [[f32; GROUPS]; ROWS];

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn load(from: *const u8, rows: usize, groups: usize) -> Self::Loaded {
        let mut loaded = [[0.0; GROUPS]; ROWS];
        for (r, row) in loaded[..rows].iter_mut().enumerate() {
            for (g, number) in row[..groups].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *number = unsafe { Self::get(from, r * groups + g) };
            }
        }
        loaded
    }

    #[inline(always)]
    fn pick(of: Self::Loaded, at: __m512i) -> __m512 {
        // SAFETY: for the features see ISA; indices are below ROWS × GROUPS.
        unsafe { _mm512_i32gather_ps::<4>(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(at)), of.as_ptr().cast()) }
    }
}

impl<P: Half> Sides for P {
    /// Four rows a vector.
    type Loaded = [__m512i; 2];

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn load(from: *const u8, rows: usize, groups: usize) -> Self::Loaded {
        let mut of_row = [_mm_setzero_si128(); ROWS];
        for (r, of_row) in of_row[..rows].iter_mut().enumerate() {
            let mask = (0xff_u32 >> (GROUPS - groups)) as __mmask8;
            // SAFETY: the caller's promise; masked numbers are not read.
            *of_row = unsafe { _mm_maskz_loadu_epi16(mask, from.cast::<i16>().add(r * groups)) };
        }
        let [a, b, c, d, e, f, g, h] = of_row;
        let four = |a, b, c, d| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_set_m128i(b, a)), _mm256_set_m128i(d, c));
        [four(a, b, c, d), four(e, f, g, h)]
    }

    #[inline(always)]
    fn pick([a, b]: Self::Loaded, at: __m512i) -> __m512 {
        // SAFETY: for the features see ISA.
        unsafe { P::widened(_mm512_castsi512_si256(_mm512_permutex2var_epi16(a, at, b))) }
    }
}

/// Token tiles outside, rows inside: a tile's activations stay in the first cache for all rows.
///
/// # Safety
/// `fixed_point` checked the lengths, a row has at most [`GROUPS`] groups, and the CPU has the features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn product<const EXACT: bool, const BITS: usize, P: Sides>(
    w: &Matrix<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: &[u32],
    out: &mut [f32],
) {
    let coming = Coming::new(w, range.end);
    for (index, tile) in tokens.chunks(TOKENS).enumerate() {
        let out = &mut out[index * TOKENS * range.len()..];
        // SAFETY: `rows` checked the lengths.
        unsafe {
            match *tile {
                [a] => column::<EXACT, BITS, P, 1>(&coming, range.clone(), x, [a], out),
                [a, b] => column::<EXACT, BITS, P, 2>(&coming, range.clone(), x, [a, b], out),
                [a, b, c] => column::<EXACT, BITS, P, 3>(&coming, range.clone(), x, [a, b, c], out),
                [a, b, c, d] => column::<EXACT, BITS, P, 4>(&coming, range.clone(), x, [a, b, c, d], out),
                [a, b, c, d, e] => column::<EXACT, BITS, P, 5>(&coming, range.clone(), x, [a, b, c, d, e], out),
                [a, b, c, d, e, f, ..] => column::<EXACT, BITS, P, TOKENS>(&coming, range.clone(), x, [a, b, c, d, e, f], out),
                [] => {}
            }
        }
    }
}

/// All rows for one tile of tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn column<const EXACT: bool, const BITS: usize, P: Sides, const T: usize>(
    coming: &Coming<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: [u32; T],
    out: &mut [f32],
) {
    let height = range.len();
    for row in range.clone().step_by(ROWS) {
        let out = &mut out[row - range.start..];
        // SAFETY: `rows` checked the lengths.
        unsafe {
            match (row + ROWS <= range.end, BITS == 4 && x.group == 32) {
                (true, false) => tile::<EXACT, BITS, P, T, true, 1>(coming, row, x, tokens, out, height),
                (false, false) => tile::<EXACT, BITS, P, T, false, 1>(coming, row, x, tokens, out, height),
                (true, true) => tile::<EXACT, BITS, P, T, true, 2>(coming, row, x, tokens, out, height),
                (false, true) => tile::<EXACT, BITS, P, T, false, 2>(coming, row, x, tokens, out, height),
            }
        }
    }
}

/// ROWS rows, or if not FULL those that are left, × T tokens; out[t × height + r]. Each is summed in one order, whatever T.
///
/// A block is 64 bytes of codes, 32 / BITS columns of it in each lane of 32 bits. Its dots are added up as integers, to halves of a
/// block or, where that has four groups, to quarters: V vectors of sixteen sums, each within a group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile<const EXACT: bool, const BITS: usize, P: Sides, const T: usize, const FULL: bool, const V: usize>(
    coming: &Coming<'_>,
    row: usize,
    x: &Acts<'_>,
    tokens: [u32; T],
    out: &mut [f32],
    height: usize,
) {
    let Coming { w, bytes, side_bytes, end, .. } = *coming;
    let rows = if FULL { ROWS } else { end - row };
    let (group, groups, columns, planes) = (x.group, w.cols / x.group, 512 / BITS, 8 / BITS);
    let stride = Fixed::row_bytes(w.cols, BITS as u8);
    let low_nibbles = _mm512_set1_epi8(15);
    let of_block = (columns / group).max(1);
    let (at, spread) = places::<V>(of_block > 1);
    // SAFETY: `rows` checked every length that these pointers are moved within; the last block is masked.
    unsafe {
        let codes = w.weight.as_ptr().add(row * bytes);
        let scales = P::load(w.scales.as_ptr().add(row * side_bytes), rows, groups);
        let biases = P::load(w.biases.as_ptr().add(row * side_bytes), rows, groups);
        let xs: [*const i8; T] = std::array::from_fn(|t| x.fixed.bytes.as_ptr().add(tokens[t] as usize * stride));
        let x_scales: [*const f32; T] = std::array::from_fn(|t| x.fixed.scales.as_ptr().add(tokens[t] as usize * groups));
        let sums: [*const f32; T] = std::array::from_fn(|t| x.sums.as_ptr().add(tokens[t] as usize * groups));
        let mut ahead = coming.codes::<ROWS>(row);
        if T < TOKENS {
            coming.sides(row, ROWS);
        }
        let mut total = [[_mm512_setzero_ps(); V]; T];
        for start in (0..w.cols).step_by(columns) {
            let g = start / group;
            let mut sides = [[_mm512_setzero_ps(); 2]; V];
            for v in 0..V {
                let at = _mm512_add_epi16(at[v], _mm512_set1_epi16(g as i16));
                sides[v] = [P::pick(scales, at), P::pick(biases, at)];
            }
            let left = bytes - start * BITS / 8;
            let mut w_of = [[_mm512_setzero_si512(); 2]; ROWS];
            for (r, w_of) in w_of.iter_mut().enumerate() {
                let from = codes.add(if FULL { r } else { r.min(rows - 1) } * bytes + start * BITS / 8);
                if T < TOKENS {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    ahead = ahead.wrapping_add(64);
                }
                let packed =
                    if left >= 64 { _mm512_loadu_si512(from.cast()) } else { _mm512_maskz_loadu_epi8((1u64 << left) - 1, from.cast()) };
                *w_of = if BITS == 4 {
                    [_mm512_and_si512(packed, low_nibbles), _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles)]
                } else {
                    [packed, packed]
                };
            }
            // A bias counts once for a group that is more than half a block.
            let once = if of_block > 1 {
                u16::MAX
            } else if start % group == 0 {
                0x0f0f
            } else {
                0
            };
            for t in 0..T {
                let from: *const __m512i = xs[t].add(start * 2).cast();
                let mut dots = [_mm512_setzero_si512(); ROWS];
                for plane in 0..if EXACT { 2 * planes } else { planes } {
                    let x = _mm512_loadu_si512(from.add(plane));
                    for r in 0..ROWS {
                        if plane == planes {
                            dots[r] = _mm512_slli_epi32(dots[r], 8);
                        }
                        dots[r] = _mm512_dpbusd_epi32(dots[r], w_of[r][plane % planes], x);
                    }
                }
                let dots = added_up::<V>(dots);
                let x_scale = of_groups(x_scales[t].add(g), of_block.min(groups - g), spread, u16::MAX);
                let sum = of_groups(sums[t].add(g), of_block.min(groups - g), spread, once);
                for v in 0..V {
                    let [scale, bias] = sides[v];
                    total[t][v] = _mm512_fmadd_ps(_mm512_mul_ps(scale, x_scale), _mm512_cvtepi32_ps(dots[v]), total[t][v]);
                    total[t][v] = _mm512_fmadd_ps(bias, sum, total[t][v]);
                }
            }
        }
        for t in 0..T {
            let of_rows = of_rows::<V>(total[t]);
            let out = &mut out[t * height..][..rows];
            if FULL {
                _mm256_storeu_ps(out.as_mut_ptr(), of_rows);
            } else {
                _mm256_mask_storeu_ps(out.as_mut_ptr(), (0xff_u32 >> (ROWS - rows)) as __mmask8, of_rows);
            }
        }
    }
}

/// The sixteen sums of each vector of [`added_up`]: row × GROUPS + group of each, and for [`of_groups`] which of a block's groups it is of.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn places<const V: usize>(several: bool) -> ([__m512i; V], __m512i) {
    let group = match (V, several) {
        (2, _) => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
        (_, true) => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1),
        (_, false) => _mm512_setzero_si512(),
    };
    let row = |low: i32, high: i32| {
        let rows = _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
        let first = _mm512_setr_epi32(low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high);
        let at = _mm512_add_epi32(_mm512_slli_epi32(_mm512_add_epi32(rows, first), GROUPS.ilog2()), group);
        _mm512_castsi256_si512(_mm512_cvtepi32_epi16(at))
    };
    let mut at = [row(0, if V == 1 { 4 } else { 0 }); V];
    if V == 2 {
        at[V - 1] = row(4, 4);
    }
    (at, group)
}

/// The sums of rows' dots within halves of the vectors, or quarters if V is 2: by quarters of the result rows 0 to 3, left; 0 to 3, right;
/// 4 to 7, left; 4 to 7, right; or rows 0 to 3 of each quarter, and rows 4 to 7.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn added_up<const V: usize>([a, b, c, d, e, f, g, h]: [__m512i; ROWS]) -> [__m512i; V] {
    let two = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let four = |ab, cd| _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let (low, high) = (four(two(a, b), two(c, d)), four(two(e, f), two(g, h)));
    if V == 2 {
        let mut both = [low; V];
        both[V - 1] = high;
        return both;
    }
    [_mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(low, high), _mm512_shuffle_i32x4::<0xdd>(low, high)); V]
}

/// A block's numbers of a token, each where `spread` says, in `lanes`.
///
/// # Safety
/// `count` ≤ 4 of them must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn of_groups(from: *const f32, count: usize, spread: __m512i, lanes: __mmask16) -> __m512 {
    // SAFETY: the caller's promise; masked numbers are not read.
    let all = unsafe { _mm_maskz_loadu_ps((0xf_u32 >> (4 - count)) as __mmask8, from) };
    _mm512_maskz_permutevar_ps(lanes, _mm512_broadcast_f32x4(all), spread)
}

/// The rows' results of totals in the order of [`added_up`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn of_rows<const V: usize>(total: [__m512; V]) -> __m256 {
    let pairs = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    let halves = if V == 2 { pairs(total[0], total[V - 1]) } else { total[0] };
    _mm512_castps512_ps256(pairs(halves, halves))
}
