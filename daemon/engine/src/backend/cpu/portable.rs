//! The reference kernels: plain code, any format, any shape. The SIMD twins are tested against these.
//!
//! Every result has one accumulation order, independent of how many rows, tokens or threads are computed together.

use half::f16;

use super::{
    matrix::{Acts, Matrix, fold},
    simd::TOKENS_MAX,
};

/// Columns widened at a time.
const CHUNK: usize = 128;

/// out[(row − rows.start) × tokens.len() + i] = W[row] · x[tokens[i]], at most [`TOKENS_MAX`] tokens.
pub(super) fn rows(w: &Matrix<'_>, rows: std::ops::Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
    let mut wide = vec![0.0f32; w.cols];
    for (row, out) in rows.zip(out.chunks_exact_mut(tokens.len().max(1))) {
        w.dequantize_row(row, &mut wide);
        let mut lanes = [[0.0f32; 8]; TOKENS_MAX];
        for at in (0..w.cols).step_by(CHUNK) {
            let w = &wide[at..(at + CHUNK).min(wide.len())];
            for (lanes, &token) in lanes.iter_mut().zip(tokens) {
                accumulate(lanes, w, &x.token(token as usize)[at..at + w.len()]);
            }
        }
        for (out, lanes) in out.iter_mut().zip(lanes) {
            *out = fold(lanes);
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

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; 8];
    accumulate(&mut lanes, a, b);
    fold(lanes)
}

pub(super) fn dot_f16(a: &[f32], b: &[f16]) -> f32 {
    let mut lanes = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b.to_f32();
        }
    }
    fold(lanes)
}

/// y += a·x
pub(super) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

pub(super) fn axpy_f16(a: f32, x: &[f16], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x.to_f32();
    }
}
