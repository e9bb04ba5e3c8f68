//! Attention over keys and values in 16-bit fixed point on AVX-512's dot product of words (VNNI): twice the products of an f32
//! instruction, and nothing to widen, so that a long context is read as fast as memory gives it. The arithmetic is `fixed_kv.rs`'s.
//!
//! T query heads are taken together, as many as find registers for their sums; each has its own.

use std::arch::{asm, x86_64::*};

use super::avx512::{exp, highest, keep};
use crate::{
    attention::{BLOCK, Partial, SPAN, Tile},
    fixed_kv::{self, STEP, WIDE_MAX},
};

const LANES: usize = 16;
/// Heads taken together at most.
const TILE: usize = 8;
/// Largest head; others are left to the portable code.
pub(super) const HEAD: usize = 256;
/// Numbers from one head's weights to the next's: a power of two would put all heads' into the same few cache sets.
pub(super) const ROW: usize = SPAN + 2 * LANES;

/// What a tile's heads keep between their steps.
pub(super) struct Scratch {
    pub(super) queries: [[i16; HEAD]; TILE],
    /// Of queries, times what makes scores of products.
    pub(super) scales: [f32; TILE],
    pub(super) scores: [[f32; SPAN + LANES]; TILE],
    pub(super) weights: [[i16; ROW]; TILE],
}

impl Scratch {
    pub(super) const EMPTY: Self =
        Self { queries: [[0; HEAD]; TILE], scales: [0.0; TILE], scores: [[0.0; SPAN + LANES]; TILE], weights: [[0; ROW]; TILE] };
}

pub(super) fn attend(tile: &Tile<'_, i16>, mut out: Partial<'_>) {
    if !tile.head_dim.is_multiple_of(LANES) || tile.head_dim > HEAD {
        return fixed_kv::attend(tile, out);
    }
    tile.check(&out);
    let mut scratch = Scratch::EMPTY;
    // SAFETY: this table is handed out only where the features were detected, and every access lies inside what `check` asserted.
    unsafe {
        touch(tile);
        let (mut at, pairs) = (0, tile.pairs());
        while at < pairs {
            at += match pairs - at {
                8.. => attend_tile::<8, 1>(tile, at, &mut scratch, &mut out),
                4.. => attend_tile::<4, 2>(tile, at, &mut scratch, &mut out),
                2.. => attend_tile::<2, 2>(tile, at, &mut scratch, &mut out),
                _ => attend_tile::<1, 2>(tile, at, &mut scratch, &mut out),
            };
        }
    }
}

/// As `attend.rs` does it: has the processor look up where the span's pages are.
pub(super) fn touch(tile: &Tile<'_, i16>) {
    for run in tile.keys.iter().chain(tile.values) {
        run.chunks(2048).for_each(|page| prefetch(page.as_ptr()));
    }
}

/// Into the second cache: the first has too few buffers for lines under way, which halves what one core reads.
#[inline(always)]
pub(super) fn prefetch(from: *const i16) {
    // SAFETY: a prefetch may name any address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
}

/// Pairs `at` to `at` + T, W vectors of keys or values at a time; returns T.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")]
unsafe fn attend_tile<const T: usize, const W: usize>(
    tile: &Tile<'_, i16>,
    at: usize,
    scratch: &mut Scratch,
    out: &mut Partial<'_>,
) -> usize {
    let d = tile.head_dim;
    let counts: [usize; T] = std::array::from_fn(|t| tile.count(at + t));
    let blocks = counts.iter().fold(0, |most, count| most.max(*count)).div_ceil(BLOCK);
    // SAFETY: `check` asserted blocks' and queries' lengths, d ≤ HEAD and counts ≤ blocks × BLOCK ≤ SPAN.
    unsafe {
        for t in 0..T {
            let (scale, inverse) = scale(most(tile.query(at + t).as_ptr(), d));
            for i in (0..d).step_by(LANES) {
                narrow(_mm512_loadu_ps(tile.query(at + t).as_ptr().add(i)), inverse, scratch.queries[t].as_mut_ptr().add(i));
            }
            scratch.scales[t] = scale * tile.scale;
        }
        for block in 0..blocks {
            let next = *tile.keys[..blocks].get(block + 1).unwrap_or(&tile.values[0]);
            scores_of::<T, W>(tile.keys[block], next, d, block, counts, scratch);
        }
        let mut scales = [0.0; T];
        // Memory goes on meanwhile: a block for every four heads.
        let (values, early) = (&tile.values[..blocks], T / 4);
        for t in 0..T {
            let next = values.get(1 + t / 4).filter(|_| early > 0).map_or(&scratch.queries[0][..], |next| &next[t % 4 * BLOCK * d / 4..]);
            let next = next.as_ptr();
            (out.max[at + t], out.sum[at + t], scales[t]) =
                weights_of(values, next, d, counts[t], &mut scratch.scores[t], &mut scratch.weights[t]);
        }
        let acc = &mut out.acc[at * d..(at + T) * d];
        acc.fill(0.0);
        for block in 0..blocks {
            let next = *values.get(block + 1 + early).or(tile.then.as_ref()).unwrap_or(&tile.values[block]);
            let weights = scratch.weights[0].as_ptr().add(block * BLOCK);
            let mut column = 0;
            while column + W * LANES <= d {
                columns::<T, W>(tile.values[block], next, d, column, weights, acc.as_mut_ptr());
                column += W * LANES;
            }
            if column < d {
                columns::<T, 1>(tile.values[block], next, d, column, weights, acc.as_mut_ptr());
            }
        }
        for (acc, scale) in acc.chunks_exact_mut(d).zip(scales) {
            acc.iter_mut().for_each(|acc| *acc *= scale);
        }
    }
    T
}

/// The largest magnitude of some whole vectors, or NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")]
unsafe fn most(x: *const f32, count: usize) -> f32 {
    let mut most = _mm512_setzero_si512();
    for i in (0..count).step_by(LANES) {
        // SAFETY: the caller promises as many.
        most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(unsafe { _mm512_loadu_ps(x.add(i)) })));
    }
    f32::from_bits(_mm512_reduce_max_epu32(most))
}

/// The scale that makes numbers up to [`WIDE_MAX`] of something up to `most`, and its inverse.
#[inline]
pub(super) fn scale(most: f32) -> (f32, f32) {
    (most / WIDE_MAX, if most > 0.0 { WIDE_MAX / most } else { 0.0 })
}

/// Stores x × inverse as sixteen integers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")]
unsafe fn narrow(x: __m512, inverse: f32, to: *mut i16) {
    let numbers = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
    // SAFETY: the caller promises sixteen places.
    unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtsepi32_epi16(numbers)) };
}

/// sums[t][w] += the products of each lane's two numbers in `numbers[w]` with the two at `others`, ROW numbers further for each t.
///
/// In assembly, because the compiler, which knows the intrinsic, makes two instructions of it where it expects a wait, loads a pair
/// before it multiplies it, and moves prefetches together; each of these costs a third.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")]
unsafe fn dots<const T: usize, const W: usize, const ROW: usize>(sums: &mut [[__m512i; W]; T], numbers: [__m512i; W], others: *const i16) {
    // SAFETY: the caller promises T pairs.
    unsafe {
        if let ([a, b, c, d, e, f, g, h], 1) = (sums.as_flattened_mut(), W) {
            asm!(
                "vpdpwssd {a}, {n}, dword ptr [{p}]{{1to16}}",
                "vpdpwssd {b}, {n}, dword ptr [{p} + 2 * {row}]{{1to16}}",
                "vpdpwssd {c}, {n}, dword ptr [{p} + 4 * {row}]{{1to16}}",
                "vpdpwssd {d}, {n}, dword ptr [{p} + 6 * {row}]{{1to16}}",
                "vpdpwssd {e}, {n}, dword ptr [{p} + 8 * {row}]{{1to16}}",
                "vpdpwssd {f}, {n}, dword ptr [{p} + 10 * {row}]{{1to16}}",
                "vpdpwssd {g}, {n}, dword ptr [{p} + 12 * {row}]{{1to16}}",
                "vpdpwssd {h}, {n}, dword ptr [{p} + 14 * {row}]{{1to16}}",
                a = inout(zmm_reg) *a, b = inout(zmm_reg) *b, c = inout(zmm_reg) *c, d = inout(zmm_reg) *d,
                e = inout(zmm_reg) *e, f = inout(zmm_reg) *f, g = inout(zmm_reg) *g, h = inout(zmm_reg) *h,
                n = in(zmm_reg) numbers[0], p = in(reg) others, row = const ROW,
                options(readonly, nostack, preserves_flags)
            );
            return;
        }
        for (t, sums) in sums.iter_mut().enumerate() {
            let pair = _mm512_set1_epi32(others.add(t * ROW).cast::<i32>().read_unaligned());
            for (sum, numbers) in sums.iter_mut().zip(numbers) {
                asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) *sum, in(zmm_reg) numbers, in(zmm_reg) pair, options(nomem, nostack, preserves_flags));
            }
        }
    }
}

/// Scores of T queries with a block; meanwhile the one that comes next is fetched, in the order in which it lies.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")]
unsafe fn scores_of<const T: usize, const W: usize>(
    keys: &[i16],
    next: &[i16],
    d: usize,
    block: usize,
    counts: [usize; T],
    scratch: &mut Scratch,
) {
    let (keys, mut next) = (keys.as_ptr(), next.as_ptr());
    // SAFETY: the caller checked that blocks are [BLOCK / 16, d / 2, 16, 2] and BLOCK scales, queries d, d whole vectors, scores SPAN.
    unsafe {
        for first in (0..BLOCK).step_by(W * LANES) {
            let mut sums = [[_mm512_setzero_ps(); W]; T];
            for step in 0..d / STEP {
                let mut exact = [[_mm512_setzero_si512(); W]; T];
                for i in 0..STEP / 2 {
                    let i = step * STEP + 2 * i;
                    let keys: [__m512i; W] =
                        std::array::from_fn(|w| _mm512_loadu_si512(keys.add((first + w * LANES) * d + i * LANES).cast()));
                    for _ in 0..W {
                        prefetch(next);
                        next = next.wrapping_add(2 * LANES);
                    }
                    dots::<T, W, HEAD>(&mut exact, keys, scratch.queries[0].as_ptr().add(i));
                }
                for t in 0..T {
                    for w in 0..W {
                        sums[t][w] = _mm512_add_ps(sums[t][w], _mm512_cvtepi32_ps(exact[t][w]));
                    }
                }
            }
            for (t, sums) in sums.into_iter().enumerate() {
                for (w, sum) in sums.into_iter().enumerate() {
                    let (token, position) = (first + w * LANES, block * BLOCK + first + w * LANES);
                    let scales = _mm512_loadu_ps(keys.add(BLOCK * d).cast::<f32>().add(token));
                    let scores = _mm512_mul_ps(sum, _mm512_mul_ps(scales, _mm512_set1_ps(scratch.scales[t])));
                    let seen = keep(scores, counts[t].saturating_sub(position), _mm512_set1_ps(f32::NEG_INFINITY));
                    _mm512_storeu_ps(scratch.scores[t].as_mut_ptr().add(position), seen);
                }
            }
        }
        // Its scales.
        (0..BLOCK / LANES).for_each(|line| prefetch(next.wrapping_add(line * 2 * LANES)));
    }
}

/// Makes weights of one head's scores, those that it does not see being 0; returns the highest score, Σ e^(score − highest) and the
/// weights' scale. Meanwhile a line at `next` is fetched for each vector.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")]
unsafe fn weights_of(
    values: &[&[i16]],
    next: *const i16,
    d: usize,
    count: usize,
    scores: &mut [f32],
    weights: &mut [i16],
) -> (f32, f32, f32) {
    let (scores, weights, all) = (scores.as_mut_ptr(), weights.as_mut_ptr(), values.len() * BLOCK);
    // SAFETY: the caller checked blocks of BLOCK × d values and BLOCK scales, and gives SPAN scores and weights; all ≤ SPAN.
    unsafe {
        let mut highest_of = _mm512_set1_ps(f32::NEG_INFINITY);
        for at in (0..count).step_by(LANES) {
            highest_of = _mm512_max_ps(_mm512_loadu_ps(scores.add(at)), highest_of);
        }
        let highest = highest(highest_of);
        let mut sum = _mm512_setzero_ps();
        for at in (0..all).step_by(LANES) {
            prefetch(next.wrapping_add(2 * at));
            let weight = exp(_mm512_sub_ps(_mm512_loadu_ps(scores.add(at)), _mm512_set1_ps(highest)));
            sum = _mm512_add_ps(sum, weight);
            let scales = _mm512_loadu_ps(values[at / BLOCK].as_ptr().add(BLOCK * d).cast::<f32>().add(at % BLOCK));
            let scaled = keep(_mm512_mul_ps(weight, scales), count.saturating_sub(at), _mm512_setzero_ps());
            _mm512_storeu_ps(scores.add(at), scaled);
        }
        let (scale, inverse) = scale(most(scores, all));
        for at in (0..all).step_by(LANES) {
            narrow(_mm512_loadu_ps(scores.add(at)), inverse, weights.add(at));
        }
        (highest, _mm512_reduce_add_ps(sum), scale)
    }
}

/// acc[t × d + column ..] += Σ weights[t × ROW + token] × values[token] of a block, for W × LANES columns; `next` is fetched as above.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")]
unsafe fn columns<const T: usize, const W: usize>(
    values: &[i16],
    next: &[i16],
    d: usize,
    column: usize,
    weights: *const i16,
    acc: *mut f32,
) {
    // SAFETY: the caller checked blocks of [d / 16, BLOCK / 2, 16, 2], weights for BLOCK tokens and T × d sums; column + W × LANES ≤ d.
    unsafe {
        let values = values.as_ptr().add(column * BLOCK);
        let mut next = next.as_ptr().wrapping_add(column * BLOCK);
        let acc: [[*mut f32; W]; T] = std::array::from_fn(|t| std::array::from_fn(|w| acc.add(t * d + column + w * LANES)));
        let mut sums: [[__m512; W]; T] = std::array::from_fn(|t| std::array::from_fn(|w| _mm512_loadu_ps(acc[t][w])));
        for step in 0..BLOCK / STEP {
            let mut exact = [[_mm512_setzero_si512(); W]; T];
            for token in 0..STEP / 2 {
                let token = step * STEP + 2 * token;
                let values: [__m512i; W] = std::array::from_fn(|w| _mm512_loadu_si512(values.add((w * BLOCK + token) * LANES).cast()));
                for _ in 0..W {
                    prefetch(next);
                    next = next.wrapping_add(2 * LANES);
                }
                dots::<T, W, ROW>(&mut exact, values, weights.add(token));
            }
            for t in 0..T {
                for w in 0..W {
                    sums[t][w] = _mm512_add_ps(sums[t][w], _mm512_cvtepi32_ps(exact[t][w]));
                }
            }
        }
        for t in 0..T {
            for w in 0..W {
                _mm512_storeu_ps(acc[t][w], sums[t][w]);
            }
        }
    }
}
