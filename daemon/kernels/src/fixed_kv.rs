//! Keys and values as 16-bit fixed point, and attention over them in portable code: the reference for kernels whose CPU multiplies
//! pairs of 16-bit integers. A head's key or value is numbers of 14 bits and a scale, so that its rounding is 2⁻¹⁴ of its largest
//! number, where f16's is 2⁻¹² of each. Queries have 16 bits, and so has a span of weights, each already times its value's scale.
//!
//! `STEP` products of such numbers fit 32 bits, so they are summed exactly; these sums are added up in f32, in order.
//!
//! A run of a block is the numbers, then a scale for each token as an f32. Neighbours in a product lie side by side, two to a lane of
//! 32 bits, sixteen lanes to a vector, vectors in the order in which kernels read them: keys as `[token / 16][head_dim / 2][16][2]`, values as
//! `[head_dim / 16][token / 2][16][2]`. Memory gives one long row faster than the same lines in another order.

use crate::{
    attention::{BLOCK, Partial, SPAN, Stored, Tile},
    matrix::sum,
};

/// Largest number of a key or a value.
const KV_MAX: f32 = 8191.0;
/// Of a query, and of a weight.
pub(crate) const WIDE_MAX: f32 = 32767.0;
/// Of a vector of pairs.
const LANES: usize = 16;
/// Products between two sums in f32: 8 × 8191 × 32767 < 2³¹.
pub(crate) const STEP: usize = 8;

/// The largest magnitude; NaN if there is one. Of magnitudes, bits are ordered as numbers are, and NaN's are above.
fn most(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff)))
}

/// The scale that makes `x` numbers up to `max`, and its inverse. What is not finite has a scale that is not.
fn scale(x: &[f32], max: f32) -> (f32, f32) {
    let most = most(x);
    (most / max, if most > 0.0 { max / most } else { 0.0 })
}

impl Stored for i16 {
    /// The scales.
    const BESIDE: usize = 2 * BLOCK;

    fn put_key(run: &mut [Self], token: usize, key: &[f32]) {
        let (scale, inverse) = scale(key, KV_MAX);
        for (i, x) in key.iter().enumerate() {
            run[key_at(token, i, key.len())] = rounded(x * inverse);
        }
        put_scale(run, key.len(), token, scale);
    }

    fn put_value(run: &mut [Self], token: usize, value: &[f32]) {
        let ((scale, inverse), d) = (scale(value, KV_MAX), value.len());
        for (i, x) in value.iter().enumerate() {
            run[value_at(token, i, d)] = rounded(x * inverse);
        }
        put_scale(run, d, token, scale);
    }
}

/// Where number `i` of a token's key lies in a run.
fn key_at(token: usize, i: usize, d: usize) -> usize {
    token / LANES * LANES * d + i / 2 * 2 * LANES + token % LANES * 2 + i % 2
}

/// The same of its value; the last vector of a head that is not whole vectors is shorter.
fn value_at(token: usize, i: usize, d: usize) -> usize {
    let (first, lane) = (i / LANES * LANES, i % LANES);
    first * BLOCK + token / 2 * 2 * LANES.min(d - first) + 2 * lane + token % 2
}

/// To the nearest, without a call into the mathematics library on CPUs of 2003.
fn rounded(x: f32) -> i16 {
    ((x + 12_582_912.0).to_bits() & 0xffff) as i16
}

fn put_scale(run: &mut [i16], d: usize, token: usize, scale: f32) {
    let halves = scale.to_bits();
    run[BLOCK * d + 2 * token..][..2].copy_from_slice(&[halves as i16, (halves >> 16) as i16]);
}

fn scale_of(run: &[i16], d: usize, token: usize) -> f32 {
    let [low, high] = [0, 1].map(|half| u32::from(run[BLOCK * d + 2 * token + half] as u16));
    f32::from_bits(high << 16 | low)
}

/// Scores, softmax and weighted values of every pair of `tile`.
pub fn attend(tile: &Tile<'_, i16>, out: Partial<'_>) {
    tile.check(&out);
    let (d, mut scores, mut numbers) = (tile.head_dim, [0.0f32; SPAN], [0i16; SPAN]);
    for (pair, acc) in out.acc.chunks_exact_mut(d).enumerate().take(tile.pairs()) {
        let (query_scale, inverse) = scale(tile.query(pair), WIDE_MAX);
        let query: Vec<i16> = tile.query(pair).iter().map(|q| rounded(q * inverse)).collect();
        let scores = &mut scores[..tile.count(pair)];
        for (position, score) in scores.iter_mut().enumerate() {
            let (run, token) = (tile.keys[position / BLOCK], position % BLOCK);
            let key = |i: usize| run[key_at(token, i, d)];
            let sums = (0..d).step_by(STEP).map(|from| {
                let exact: i32 = (from..d.min(from + STEP)).map(|i| i32::from(query[i]) * i32::from(key(i))).sum();
                exact as f32
            });
            *score = sums.sum::<f32>() * (scale_of(run, d, token) * (query_scale * tile.scale));
        }
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|score| *score = (*score - max).exp());
        (out.max[pair], out.sum[pair]) = (max, sum(scores));
        for (position, weight) in scores.iter_mut().enumerate() {
            *weight *= scale_of(tile.values[position / BLOCK], d, position % BLOCK);
        }
        let (weight_scale, inverse) = scale(scores, WIDE_MAX);
        for (number, weight) in numbers.iter_mut().zip(&*scores) {
            *number = rounded(weight * inverse);
        }
        acc.fill(0.0);
        for (from, weights) in (0..).step_by(STEP).zip(numbers[..scores.len()].chunks(STEP)) {
            let (run, first) = (tile.values[from / BLOCK], from % BLOCK);
            for (i, acc) in acc.iter_mut().enumerate() {
                let value = |token: usize| run[value_at(token, i, d)];
                let exact: i32 = weights.iter().enumerate().map(|(t, weight)| i32::from(*weight) * i32::from(value(first + t))).sum();
                *acc += exact as f32;
            }
        }
        acc.iter_mut().for_each(|acc| *acc *= weight_scale);
    }
}
