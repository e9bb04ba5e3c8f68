//! RMSNorm, rotary embedding and the SwiGLU gate: element-wise pieces between the matrix products, in f32.

use crate::matrix;

/// out = x / √(mean(x²) + eps) ⊙ weight
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = rms_scale(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = rms_scale(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

fn rms_scale(x: &[f32], eps: f32) -> f32 {
    let squares = matrix::sum_of(x, |value| value * value);
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

/// Rotary position embedding (RoFormer, arXiv 2104.09864), half-split as in GPT-NeoX: `(x[i], x[i + d/2])` turns by
/// position · theta^(−2i/d). `turn` holds d/2 pairs (cos, sin) of the position.
pub fn rope(x: &mut [f32], turn: &[(f32, f32)]) {
    let (low, high) = x.split_at_mut(turn.len());
    for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(turn) {
        (*low, *high) = (*low * cos - *high * sin, *low * sin + *high * cos);
    }
}

/// The (cos, sin) pairs of one position.
pub fn turns(position: u32, inverse_frequencies: &[f32], out: &mut Vec<(f32, f32)>) {
    out.extend(inverse_frequencies.iter().map(|frequency| {
        let (sin, cos) = (position as f32 * frequency).sin_cos();
        (cos, sin)
    }));
}

/// gate = silu(gate) · up
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    }
}
