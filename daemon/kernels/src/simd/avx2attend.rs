//! Attention over keys and values in 16-bit fixed point on AVX2's product of words that adds pairs: the arithmetic of `fixed_kv.rs`, as
//! `avx512attend.rs` does it, with half of a line of sixteen pairs in a vector. Widened to f32 the same bytes take twice as long.
//!
//! T query heads pass over a block together.

use std::{arch::x86_64::*, array::from_fn};

use super::{
    avx2::{exp, highest, keep, total},
    avx512attend::{HEAD, ROW, Scratch, prefetch, scale, touch},
};
use crate::{
    attention::{BLOCK, Partial, Tile},
    fixed_kv::{self, STEP},
};

const LANES: usize = 8;
/// Pairs of numbers in a line of memory, and how many tokens' or columns' they are.
const LINE: usize = 16;

pub(super) fn attend(tile: &Tile<'_, i16>, mut out: Partial<'_>) {
    if !tile.head_dim.is_multiple_of(LINE) || tile.head_dim > HEAD {
        return fixed_kv::attend(tile, out);
    }
    tile.check(&out);
    let mut scratch = Scratch::EMPTY;
    touch(tile);
    let (mut at, pairs) = (0, tile.pairs());
    while at < pairs {
        // SAFETY: this function is handed out only where the features were detected, and every access lies inside what `check` asserted.
        at += unsafe {
            match pairs - at {
                8.. => attend_tile::<8>(tile, at, &mut scratch, &mut out),
                4.. => attend_tile::<4>(tile, at, &mut scratch, &mut out),
                2.. => attend_tile::<2>(tile, at, &mut scratch, &mut out),
                _ => attend_tile::<1>(tile, at, &mut scratch, &mut out),
            }
        };
    }
}

/// Pairs `at` to `at` + T; returns T.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn attend_tile<const T: usize>(tile: &Tile<'_, i16>, at: usize, scratch: &mut Scratch, out: &mut Partial<'_>) -> usize {
    let d = tile.head_dim;
    let counts: [usize; T] = from_fn(|t| tile.count(at + t));
    let blocks = counts.iter().fold(0, |most, count| most.max(*count)).div_ceil(BLOCK);
    // SAFETY: `check` asserted blocks' and queries' lengths, d ≤ HEAD and counts ≤ blocks × BLOCK ≤ SPAN.
    unsafe {
        for t in 0..T {
            let (scale, inverse) = scale(most(tile.query(at + t).as_ptr(), d));
            for i in (0..d).step_by(LANES) {
                narrow(_mm256_loadu_ps(tile.query(at + t).as_ptr().add(i)), inverse, scratch.queries[t].as_mut_ptr().add(i));
            }
            scratch.scales[t] = scale * tile.scale;
        }
        for block in 0..blocks {
            let next = *tile.keys[..blocks].get(block + 1).unwrap_or(&tile.values[0]);
            scores_of::<T>(tile.keys[block], next, d, block, counts, scratch);
        }
        let mut scales = [0.0; T];
        for t in 0..T {
            (out.max[at + t], out.sum[at + t], scales[t]) =
                weights_of(&tile.values[..blocks], d, counts[t], &mut scratch.scores[t], &mut scratch.weights[t]);
        }
        let acc = &mut out.acc[at * d..(at + T) * d];
        acc.fill(0.0);
        for block in 0..blocks {
            let next = tile.values.get(block + 1).unwrap_or(&tile.values[block]);
            add_values::<T>(tile.values[block], next, d, scratch.weights[0].as_ptr().add(block * BLOCK), acc.as_mut_ptr());
        }
        for (acc, scale) in acc.chunks_exact_mut(d).zip(scales) {
            acc.iter_mut().for_each(|acc| *acc *= scale);
        }
    }
    T
}

/// The largest magnitude of some whole vectors, or NaN.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn most(x: *const f32, count: usize) -> f32 {
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let mut most = _mm256_setzero_si256();
    for i in (0..count).step_by(LANES) {
        // SAFETY: the caller promises as many.
        most = _mm256_max_epu32(most, _mm256_and_si256(magnitude, unsafe { _mm256_loadu_si256(x.add(i).cast()) }));
    }
    let four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
    let two = _mm_max_epu32(four, _mm_srli_si128::<8>(four));
    f32::from_bits(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_srli_si128::<4>(two))) as u32)
}

/// Stores x × inverse as eight integers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn narrow(x: __m256, inverse: f32, to: *mut i16) {
    let numbers = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(inverse)));
    // SAFETY: the caller promises eight places.
    unsafe { _mm_storeu_si128(to.cast(), _mm_packs_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256::<1>(numbers))) };
}

/// sums[t] += the products of STEP / 2 lines with as many pairs at `others`, `row` numbers further for each t; meanwhile as many lines
/// from `next` on are fetched.
///
/// One head after the other: the lines stay in registers, and the sums, for which there are none, come from the first cache once.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_step<const T: usize>(sums: &mut [[__m256; 2]; T], lines: *const i16, others: *const i16, row: usize, next: *const i16) {
    (0..STEP / 2).for_each(|line| prefetch(next.wrapping_add(line * 2 * LINE)));
    // SAFETY: the caller promises the lines, and T rows of STEP numbers.
    unsafe {
        let lines: [[__m256i; 2]; STEP / 2] =
            from_fn(|pair| from_fn(|half| _mm256_loadu_si256(lines.cast::<__m256i>().add(2 * pair + half))));
        for (t, sums) in sums.iter_mut().enumerate() {
            let mut exact = [_mm256_setzero_si256(); 2];
            for (pair, line) in lines.iter().enumerate() {
                let other = _mm256_set1_epi32(others.add(t * row + 2 * pair).cast::<i32>().read_unaligned());
                for (exact, half) in exact.iter_mut().zip(line) {
                    *exact = _mm256_add_epi32(*exact, _mm256_madd_epi16(*half, other));
                }
            }
            for (sum, exact) in sums.iter_mut().zip(exact) {
                *sum = _mm256_add_ps(*sum, _mm256_cvtepi32_ps(exact));
            }
        }
    }
}

/// Scores of T queries with a block; meanwhile the one that comes next is fetched, in the order in which it lies.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scores_of<const T: usize>(keys: &[i16], next: &[i16], d: usize, block: usize, counts: [usize; T], scratch: &mut Scratch) {
    let (keys, next) = (keys.as_ptr(), next.as_ptr());
    // SAFETY: the caller checked that blocks are [BLOCK / 16, d / 2, 16, 2] and BLOCK scales, queries d, d whole lines, scores SPAN.
    unsafe {
        for first in (0..BLOCK).step_by(LINE) {
            let mut sums = [[_mm256_setzero_ps(); 2]; T];
            for at in (0..d).step_by(STEP) {
                let line = first * d + at * LINE;
                add_step(&mut sums, keys.add(line), scratch.queries[0].as_ptr().add(at), HEAD, next.wrapping_add(line));
            }
            for (t, sums) in sums.into_iter().enumerate() {
                for (half, sum) in sums.into_iter().enumerate() {
                    let token = first + half * LANES;
                    let position = block * BLOCK + token;
                    let scales = _mm256_loadu_ps(keys.add(BLOCK * d).cast::<f32>().add(token));
                    let scores = _mm256_mul_ps(sum, _mm256_mul_ps(scales, _mm256_set1_ps(scratch.scales[t])));
                    let seen = keep(scores, counts[t].saturating_sub(position), _mm256_set1_ps(f32::NEG_INFINITY));
                    _mm256_storeu_ps(scratch.scores[t].as_mut_ptr().add(position), seen);
                }
            }
        }
        // Its scales.
        (0..2 * BLOCK).step_by(2 * LINE).for_each(|at| prefetch(next.wrapping_add(BLOCK * d + at)));
    }
}

/// Makes weights of one head's scores, those that it does not see being 0; returns the highest score, Σ e^(score − highest) and the
/// weights' scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weights_of(values: &[&[i16]], d: usize, count: usize, scores: &mut [f32], weights: &mut [i16]) -> (f32, f32, f32) {
    let (scores, weights, all) = (scores.as_mut_ptr(), weights.as_mut_ptr(), values.len() * BLOCK);
    // SAFETY: the caller checked blocks of BLOCK × d values and BLOCK scales, and gives SPAN scores and weights; all ≤ SPAN.
    unsafe {
        let mut highest_of = _mm256_set1_ps(f32::NEG_INFINITY);
        for at in (0..count).step_by(LANES) {
            highest_of = _mm256_max_ps(_mm256_loadu_ps(scores.add(at)), highest_of);
        }
        let highest = highest(highest_of);
        let mut sum = _mm256_setzero_ps();
        for at in (0..all).step_by(LANES) {
            let weight = exp(_mm256_sub_ps(_mm256_loadu_ps(scores.add(at)), _mm256_set1_ps(highest)));
            sum = _mm256_add_ps(sum, weight);
            let scales = _mm256_loadu_ps(values[at / BLOCK].as_ptr().add(BLOCK * d).cast::<f32>().add(at % BLOCK));
            let scaled = keep(_mm256_mul_ps(weight, scales), count.saturating_sub(at), _mm256_setzero_ps());
            _mm256_storeu_ps(scores.add(at), scaled);
        }
        let (scale, inverse) = scale(most(scores, all));
        for at in (0..all).step_by(LANES) {
            narrow(_mm256_loadu_ps(scores.add(at)), inverse, weights.add(at));
        }
        (highest, total(sum), scale)
    }
}

/// acc[t × d ..] += Σ weights[t × ROW + token] × values[token] of a block; `next` is fetched as above.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_values<const T: usize>(values: &[i16], next: &[i16], d: usize, weights: *const i16, acc: *mut f32) {
    let (values, next) = (values.as_ptr(), next.as_ptr());
    // SAFETY: the caller checked blocks of [d / 16, BLOCK / 2, 16, 2], weights for BLOCK tokens and T × d sums.
    unsafe {
        for column in (0..d).step_by(LINE) {
            let acc: [*mut f32; T] = from_fn(|t| acc.add(t * d + column));
            let mut sums: [[__m256; 2]; T] = from_fn(|t| from_fn(|half| _mm256_loadu_ps(acc[t].add(half * LANES))));
            for token in (0..BLOCK).step_by(STEP) {
                let line = column * BLOCK + token * LINE;
                add_step(&mut sums, values.add(line), weights.add(token), ROW, next.wrapping_add(line));
            }
            for (acc, sums) in acc.into_iter().zip(sums) {
                _mm256_storeu_ps(acc, sums[0]);
                _mm256_storeu_ps(acc.add(LANES), sums[1]);
            }
        }
    }
}
