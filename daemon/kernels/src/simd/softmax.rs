//! The exponentials of a softmax over a vocabulary: plain arithmetic without branches, of which the compiler makes vectors as wide as the
//! CPU has. Their bits are the same everywhere.

/// out = e^((x − highest) · inverse), within 2e-7 of it, for x ≤ highest; 0 below e^-86, and for what is not finite.
pub fn exponentials(x: &[f32], highest: f32, inverse: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: just detected.
        return unsafe { avx2(x, highest, inverse, out) };
    }
    plain(x, highest, inverse, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(x: &[f32], highest: f32, inverse: f32, out: &mut [f32]) {
    plain(x, highest, inverse, out);
}

#[inline(always)]
fn plain(x: &[f32], highest: f32, inverse: f32, out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = exp((x - highest) * inverse);
    }
}

/// For x ≤ 0: x = n·ln 2 + r, the power series of r, n into the exponent.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 × 2²³: the sum's low bits are the nearest integer
    let inside = (-86.0..=0.0).contains(&x);
    let x = if inside { x } else { 0.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let series = 1.0 / 5040.0;
    let series = series * r + 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let series = series * r + 1.0;
    let series = series * r + 1.0;
    let power = f32::from_bits(series.to_bits().wrapping_add(shifted.to_bits() << 23));
    if inside { power } else { 0.0 }
}
