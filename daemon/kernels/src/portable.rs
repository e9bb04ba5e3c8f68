//! The reference kernels: plain code, any format, any shape. The SIMD twins are tested against these.
//!
//! Every result has one accumulation order, independent of how many rows, tokens or threads are computed together.

use half::f16;

use crate::{
    attention::{BLOCK, Partial, SPAN, Stored, Tile},
    matrix::{Acts, Matrix, fold, sum},
    simd::TOKENS_MAX,
};

/// Columns widened at a time.
const CHUNK: usize = 128;

/// `out[i × rows.len() + row − rows.start] = W[row] · x[tokens[i]]`, at most [`TOKENS_MAX`] tokens.
pub fn rows(w: &Matrix<'_>, rows: std::ops::Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
    let mut wide = vec![0.0f32; w.cols];
    let height = rows.len();
    for (at, row) in rows.enumerate() {
        w.dequantize_row(row, &mut wide);
        let mut lanes = [[0.0f32; 8]; TOKENS_MAX];
        for at in (0..w.cols).step_by(CHUNK) {
            let w = &wide[at..(at + CHUNK).min(wide.len())];
            for (lanes, &token) in lanes.iter_mut().zip(tokens) {
                accumulate(lanes, w, &x.token(token as usize)[at..at + w.len()]);
            }
        }
        for (i, lanes) in lanes[..tokens.len()].iter().enumerate() {
            out[i * height + at] = fold(*lanes);
        }
    }
}

fn accumulate(lanes: &mut [f32; 8], w: &[f32], x: &[f32]) {
    for (w, x) in w.chunks(8).zip(x.chunks(8)) {
        for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
            *lane += w * x;
        }
    }
}

/// What a KV cache holds as it is.
pub trait Number: Stored + Into<f32> {}
impl Number for f32 {}
impl Number for f16 {}

/// Scores, softmax and weighted values of every pair of `tile`, position by position.
pub fn attend<N: Number>(tile: &Tile<'_, N>, out: Partial<'_>) {
    tile.check(&out);
    let mut scores = [0.0f32; SPAN];
    for (pair, acc) in out.acc.chunks_exact_mut(tile.head_dim).enumerate().take(tile.pairs()) {
        let scores = &mut scores[..tile.count(pair)];
        for (scores, keys) in scores.chunks_mut(BLOCK).zip(tile.keys) {
            scores.fill(0.0);
            for (q, keys) in tile.query(pair).iter().zip(keys.chunks_exact(BLOCK)) {
                for (score, key) in scores.iter_mut().zip(keys) {
                    *score += q * (*key).into();
                }
            }
        }
        let max = scores.iter().fold(f32::NEG_INFINITY, |max, score| max.max(score * tile.scale));
        scores.iter_mut().for_each(|score| *score = (*score * tile.scale - max).exp());
        (out.max[pair], out.sum[pair]) = (max, sum(scores));
        acc.fill(0.0);
        for (weights, values) in scores.chunks(BLOCK).zip(tile.values) {
            for (weight, values) in weights.iter().zip(values.chunks_exact(tile.head_dim)) {
                for (acc, value) in acc.iter_mut().zip(values) {
                    *acc += weight * (*value).into();
                }
            }
        }
    }
}
