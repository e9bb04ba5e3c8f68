//! Products of `avx2fixed.rs` of few tokens with matrices of few columns, as experts' are: so little is a row that what is done once for
//! each counts as much as its dots. Scales and biases of eight rows are widened together, as they lie.

use std::{arch::x86_64::*, array::from_fn, ops::Range};

use super::{
    Bf16, Coming, F16, F32, Param, avx2,
    avx2fixed::{CHUNK, Cut, SIDES, dots, lanes, prefetch_codes, put, some},
};
use crate::matrix::{Acts, Fixed, Float};

/// Whose scales lie in as many vectors as a row has groups.
pub(super) const ROWS: usize = 8;
/// Of them, whose dots are added up together.
const TILE: usize = 4;

/// Eight rows' numbers, and what is read with the last.
#[repr(C, align(32))]
struct Sides([f32; ROWS * CHUNK + CHUNK]);

impl Sides {
    const ZEROS: Self = Self([0.0; ROWS * CHUNK + CHUNK]);
}

/// All rows of `range`, which are whole eights, of a matrix of at most [`CHUNK`] groups; the sums are those of `avx2fixed::many`.
///
/// # Safety
/// `fixed_point` checked the lengths, and the CPU has the features.
#[expect(clippy::needless_range_loop, reason = "as the inner loops, which index several")]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn column<const BITS: usize, const GROUP: usize, const T: usize>(
    params: Float,
    coming: &Coming<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: [u32; T],
    out: &mut [f32],
    height: usize,
) {
    let Coming { w, bytes, side_bytes, .. } = *coming;
    let (groups, blocks, planes) = (w.cols / GROUP, Cut::<BITS, GROUP>::BLOCKS, Cut::<BITS, GROUP>::PLANES);
    let tokens = tokens.map(|token| token as usize);
    assert!((1..=CHUNK).contains(&groups) && range.len().is_multiple_of(ROWS) && out.len() >= (T - 1) * height + range.len());
    // SAFETY: `fixed_point` checked every length that these pointers are moved within.
    unsafe {
        let xs: [*const __m256i; T] = tokens.map(|token| x.fixed.bytes.as_ptr().add(token * Fixed::row_bytes(w.cols, BITS as u8)).cast());
        let sums = tokens.map(|token| some::<F32>(x.sums.as_ptr().cast(), token * groups, groups));
        // A token's scales as often as rows have some; what follows a row's is the next one's.
        let mut x_scales: [Sides; T] = from_fn(|_| Sides::ZEROS);
        for (scales, token) in x_scales.iter_mut().zip(tokens) {
            let of_row = some::<F32>(x.fixed.scales.as_ptr().cast(), token * groups, groups);
            for r in 0..ROWS {
                _mm256_storeu_ps(scales.0.as_mut_ptr().add(r * groups), of_row);
            }
        }
        let mask = lanes(groups);
        let (mut scales, mut biases): ([Sides; T], _) = (from_fn(|_| Sides::ZEROS), Sides::ZEROS);
        let mut codes = w.weight.as_ptr().add(range.start * bytes);
        for (row, to) in range.clone().step_by(ROWS).zip((0..).step_by(ROWS)) {
            if row.is_multiple_of(SIDES) {
                coming.sides(row, SIDES);
            }
            let from = [w.scales, w.biases].map(|side| side.as_ptr().add(row * side_bytes));
            match params {
                Float::F32 => widen::<F32, T>(from, groups, &x_scales, &mut scales, &mut biases),
                Float::F16 => widen::<F16, T>(from, groups, &x_scales, &mut scales, &mut biases),
                Float::Bf16 => widen::<Bf16, T>(from, groups, &x_scales, &mut scales, &mut biases),
            }
            let mut ahead = coming.codes::<ROWS>(row);
            for tile in [0, TILE] {
                let mut totals = [[_mm256_setzero_ps(); T]; TILE];
                for r in 0..TILE {
                    let bias = _mm256_and_ps(avx2::load(biases.0.as_ptr().add((tile + r) * groups)), mask);
                    for t in 0..T {
                        totals[r][t] = _mm256_fmadd_ps(bias, sums[t], totals[r][t]);
                    }
                }
                let (mut at, mut xs) = (0, xs);
                for step in 0..Cut::<BITS, GROUP>::steps(groups) {
                    for r in 0..TILE {
                        let dots = dots!(BITS, GROUP, T, codes.add(r * bytes + at), bytes - at, xs);
                        for t in 0..T {
                            let scale = |group: usize| *scales[t].0.as_ptr().add((tile + r) * groups + group);
                            let scale = if Cut::<BITS, GROUP>::SHARED {
                                let high = if 2 * step + 1 < groups { scale(2 * step + 1) } else { 0.0 };
                                _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(scale(2 * step)))
                            } else {
                                _mm256_set1_ps(scale(step))
                            };
                            totals[r][t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[t]), totals[r][t]);
                        }
                    }
                    ahead = prefetch_codes::<TILE>(ahead, at, blocks);
                    at += 32 * blocks;
                    xs = xs.map(|x| x.add(blocks * planes));
                }
                codes = codes.add(TILE * bytes);
                for t in 0..T {
                    put::<TILE>(from_fn(|r| totals[r][t]), &mut out[t * height + to + tile..]);
                }
            }
        }
    }
}

/// Scales, each times those of a token, and biases of eight rows from `from` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen<P: Param, const T: usize>(
    from: [*const u8; 2],
    groups: usize,
    x_scales: &[Sides; T],
    scales: &mut [Sides; T],
    biases: &mut Sides,
) {
    for at in (0..groups * ROWS).step_by(8) {
        // SAFETY: the caller's promise: there are eight times `groups`.
        unsafe {
            let [scale, bias] = from.map(|from| avx2::wide::<P>(from.add(at * P::BYTES)));
            for t in 0..T {
                let product = _mm256_mul_ps(scale, avx2::load(x_scales[t].0.as_ptr().add(at)));
                _mm256_store_ps(scales[t].0.as_mut_ptr().add(at), product);
            }
            _mm256_store_ps(biases.0.as_mut_ptr().add(at), bias);
        }
    }
}
