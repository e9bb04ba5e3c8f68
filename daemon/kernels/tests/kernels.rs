//! Every instruction set of this CPU against the portable kernels, and against itself in other batch shapes.

use flash_kernels::{
    Isa, TOKENS_MAX,
    attention::{BLOCK, Partial, SPAN, Stored, Tile},
    exponentials, fixed_kv,
    matrix::{Acts, Float, Format, Matrix, Piece, Prepared},
    norm, portable,
};
use half::{bf16, f16};
use proptest::prelude::*;

struct Owned {
    rows: usize,
    cols: usize,
    format: Format,
    weight: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
}

impl Owned {
    fn view(&self) -> Matrix<'_> {
        Matrix {
            rows: self.rows,
            cols: self.cols,
            format: self.format,
            weight: &self.weight,
            scales: &self.scales,
            biases: &self.biases,
            then: None,
        }
    }
}

/// xorshift64*, in [0, 1).
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed | 1;
    move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u64 << 24) as f32
    }
}

fn floats(kind: Float, count: usize, mut value: impl FnMut() -> f32) -> Vec<u8> {
    (0..count)
        .flat_map(|_| match kind {
            Float::F32 => value().to_le_bytes().to_vec(),
            Float::F16 => f16::from_f32(value()).to_le_bytes().to_vec(),
            Float::Bf16 => bf16::from_f32(value()).to_le_bytes().to_vec(),
        })
        .collect()
}

fn matrix(rows: usize, cols: usize, format: Format, seed: u64) -> Owned {
    let mut next = noise(seed);
    let (weight, scales, biases) = match format {
        Format::Affine { bits, group, params } => (
            (0..rows * cols * usize::from(bits) / 8).map(|_| (next() * 256.0) as u8).collect(),
            floats(params, rows * cols / group, || next() * 0.02),
            floats(params, rows * cols / group, || next() * 0.2 - 0.1),
        ),
        Format::F32 => (floats(Float::F32, rows * cols, || next() - 0.5), vec![], vec![]),
        Format::F16 => (floats(Float::F16, rows * cols, || next() - 0.5), vec![], vec![]),
        Format::Bf16 => (floats(Float::Bf16, rows * cols, || next() - 0.5), vec![], vec![]),
    };
    Owned { rows, cols, format, weight, scales, biases }
}

fn acts<'a>(prepared: &'a mut Prepared, isa: &Isa, x: &'a [f32], cols: usize, format: Format) -> Acts<'a> {
    prepared.resize(isa, x.len() / cols, cols, format);
    prepared.pieces(isa, 0, x, 3).for_each(Piece::fill);
    prepared.acts(x)
}

fn formats() -> impl Strategy<Value = Format> {
    let params = prop_oneof![Just(Float::F32), Just(Float::F16), Just(Float::Bf16)];
    let bits = prop_oneof![Just(2u8), Just(3), Just(4), Just(6), Just(8)];
    let group = prop_oneof![Just(32usize), Just(64), Just(128)];
    prop_oneof![
        1 => Just(Format::F32),
        1 => Just(Format::F16),
        1 => Just(Format::Bf16),
        5 => (bits, group, params).prop_map(|(bits, group, params)| Format::Affine { bits, group, params }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn rows_agree_with_portable_and_do_not_depend_on_the_batch(
        format in formats(), rows in 1usize..19, blocks in 1usize..21, tokens in prop_oneof![1usize..11, 11..TOKENS_MAX + 1], seed: u64,
    ) {
        // Multiples of the group, whole blocks of 128 or not.
        let group = if let Format::Affine { group, .. } = format { group } else { 16 };
        let cols = (blocks * 32).next_multiple_of(group);
        let owned = matrix(rows, cols, format, seed);
        let w = owned.view();
        let mut next = noise(seed ^ 77);
        let x: Vec<f32> = (0..tokens * cols).map(|_| next() * 2.0 - 1.0).collect();
        let mut prepared = Prepared::default();
        let acts = self::acts(&mut prepared, &Isa::PORTABLE, &x, cols, format);
        let ids: Vec<u32> = (0..tokens as u32).collect();
        let mut expected = vec![0.0; rows * tokens];
        portable::rows(&w, 0..rows, &acts, &ids, &mut expected);
        let exact: Vec<f64> = (0..rows * tokens)
            .map(|i| {
                let mut wide = vec![0.0; cols];
                w.dequantize_row(i % rows, &mut wide);
                wide.iter().zip(acts.token(i / rows)).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
            })
            .collect();
        // Half a step of 8 bits, of activations up to 1.
        let rounding: Vec<f32> = (0..rows)
            .map(|row| {
                let mut wide = vec![0.0; cols];
                w.dequantize_row(row, &mut wide);
                wide.iter().map(|w| w.abs() / 254.0).sum()
            })
            .collect();
        for isa in Isa::available().into_iter().chain(Isa::fast_math()) {
            let mut prepared = Prepared::default();
            let acts = self::acts(&mut prepared, &isa, &x, cols, format);
            let (mut out, mut first) = (vec![0.0; rows * tokens], vec![0.0; rows]);
            (isa.rows)(&w, 0..rows, &acts, &ids, &mut out);
            (isa.rows)(&w, 0..rows, &acts, &[0], &mut first);
            for row in 0..rows {
                for token in 0..tokens {
                    let (got, exact) = (out[token * rows + row], exact[token * rows + row]);
                    let near = 2e-3 + if isa.price.is_some() { rounding[row] } else { 0.0 };
                    prop_assert!((f64::from(got) - exact).abs() < f64::from(near), "{} {format:?}: {got} for {exact}", isa.name);
                    prop_assert!((got - expected[token * rows + row]).abs() < near);
                    let mut alone = [0.0];
                    (isa.rows)(&w, row..row + 1, &acts, &[token as u32], &mut alone);
                    prop_assert_eq!(alone[0].to_bits(), got.to_bits(), "{} {:?}: batch changes bits", isa.name, format);
                }
                prop_assert_eq!(first[row].to_bits(), out[row].to_bits(), "{} {:?}: row block changes bits", isa.name, format);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_agrees_with_portable_and_does_not_depend_on_the_tile(
        lanes in 1usize..9, odd in prop_oneof![3 => Just(0usize), 1 => Just(4)], shared in 1usize..12, rows in 1usize..6, seed: u64,
    ) {
        let (d, mut next) = (lanes * 16 + odd, noise(seed));
        let mut counts: Vec<usize> = (0..rows).map(|_| 1 + (next() * SPAN as f32) as usize).collect();
        counts.sort_unstable();
        let blocks = counts[rows - 1].div_ceil(BLOCK);
        // Subnormal halves included.
        let mut halves = || (0..BLOCK * d).map(|i| f16::from_f32((next() - 0.5) * if i % 7 == 0 { 1e-6 } else { 2.0 })).collect();
        let (keys, values): (Vec<Vec<f16>>, Vec<Vec<f16>>) = (0..blocks).map(|_| (halves(), halves())).unzip();
        let queries: Vec<f32> = (0..rows * shared * d).map(|_| (next() - 0.5) * 20.0).collect();
        let wide = |runs: &[Vec<f16>]| runs.iter().map(|run| run.iter().map(|x| x.to_f32()).collect()).collect::<Vec<Vec<f32>>>();
        let scale = 1.0 / (d as f32).sqrt();
        let (queries, counts) = (&queries[..], &counts[..]);
        let (wide_keys, wide_values) = (wide(&keys), wide(&values));
        let (keys, values): (Vec<&[f16]>, Vec<&[f16]>) = keys.iter().zip(&values).map(|(k, v)| (&k[..], &v[..])).unzip();
        let (wide_keys, wide_values): (Vec<&[f32]>, Vec<&[f32]>) = wide_keys.iter().zip(&wide_values).map(|(k, v)| (&k[..], &v[..])).unzip();
        let tile = Tile { keys: &keys, values: &values, then: None, queries, width: shared * d, head_dim: d, shared, counts, scale };
        let wide = Tile { keys: &wide_keys, values: &wide_values, then: None, queries, width: shared * d, head_dim: d, shared, counts, scale };
        let expected = attended(portable::attend, &tile);
        for isa in Isa::available() {
            let got = attended(isa.attend_f16, &tile);
            for (got, expected) in got.iter().zip(&expected) {
                prop_assert!((got - expected).abs() <= 2e-5 * (1.0 + expected.abs()), "{}: {got} for {expected}", isa.name);
            }
            let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(same(&attended(isa.attend, &wide), &got), "{}: f32 differs from f16", isa.name);
            for pair in 0..tile.pairs() {
                let counts = &[tile.count(pair)];
                let alone = attended(isa.attend_f16, &Tile { queries: tile.query(pair), shared: 1, counts, ..tile });
                prop_assert!(same(&alone, &got[pair * (d + 2)..][..d + 2]), "{}: the tile changes bits", isa.name);
            }
        }
    }

    #[test]
    fn attention_in_fixed_point_agrees_with_portable_and_does_not_depend_on_the_tile(
        lanes in 1usize..10, odd in prop_oneof![3 => Just(0usize), 1 => Just(4)], shared in 1usize..12, rows in 1usize..6, seed: u64,
    ) {
        let (d, mut next) = (lanes * 16 + odd, noise(seed));
        let mut counts: Vec<usize> = (0..rows).map(|_| 1 + (next() * SPAN as f32) as usize).collect();
        counts.sort_unstable();
        let blocks = counts[rows - 1].div_ceil(BLOCK);
        // Tokens of very different size, some of them 0; what lies behind the last one is another's leavings.
        let mut run = |put: fn(&mut [i16], usize, &[f32]), block: usize| {
            let mut run = vec![-1i16; BLOCK * d + <i16 as Stored>::BESIDE];
            for token in 0..BLOCK.min(counts[rows - 1] - block * BLOCK) {
                let size = [0.0, 1e-3, 1.0, 30.0][(next() * 4.0) as usize];
                put(&mut run, token, &(0..d).map(|_| (next() - 0.5) * size).collect::<Vec<f32>>());
            }
            run
        };
        let (keys, values): (Vec<Vec<i16>>, Vec<Vec<i16>>) = (0..blocks).map(|i| (run(i16::put_key, i), run(i16::put_value, i))).unzip();
        let (keys, values): (Vec<&[i16]>, Vec<&[i16]>) = keys.iter().zip(&values).map(|(k, v)| (&k[..], &v[..])).unzip();
        let queries: Vec<f32> = (0..rows * shared * d).map(|_| (next() - 0.5) * 2.0).collect();
        let (queries, counts, scale) = (&queries[..], &counts[..], 1.0 / (d as f32).sqrt());
        let tile = Tile { keys: &keys, values: &values, then: None, queries, width: shared * d, head_dim: d, shared, counts, scale };
        let expected = attended(fixed_kv::attend, &tile);
        for (name, kernel) in Isa::available().iter().filter_map(|isa| Some((isa.name, isa.attend_fixed?))) {
            let got = attended(kernel, &tile);
            for (got, expected) in got.iter().zip(&expected) {
                prop_assert!((got - expected).abs() <= 2e-3 * (1.0 + expected.abs()), "{name}: {got} for {expected}");
            }
            for pair in 0..tile.pairs() {
                let counts = &[tile.count(pair)];
                let alone = attended(kernel, &Tile { queries: tile.query(pair), shared: 1, counts, ..tile });
                let same = alone.iter().zip(&got[pair * (d + 2)..]).all(|(a, b)| a.to_bits() == b.to_bits());
                prop_assert!(same, "{name}: the tile changes bits");
            }
        }
    }
}

#[test]
fn attention_in_fixed_point_hides_no_number_that_is_not_finite() {
    let (d, mut next) = (32, noise(3));
    let mut numbers = || (0..d).map(|_| next() - 0.5).collect::<Vec<f32>>();
    let (mut keys, mut values) = (vec![0i16; BLOCK * d + <i16 as Stored>::BESIDE], vec![0i16; BLOCK * d + <i16 as Stored>::BESIDE]);
    for token in 0..BLOCK {
        i16::put_key(&mut keys, token, &numbers());
        i16::put_value(&mut values, token, &numbers());
    }
    let queries = [numbers(), numbers(), numbers()].concat();
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
        let spoilt = |put: fn(&mut [i16], usize, &[f32]), run: &[i16]| {
            let (mut run, mut numbers) = (run.to_vec(), vec![0.5; d]);
            numbers[7] = bad;
            put(&mut run, 9, &numbers);
            run
        };
        let (bad_key, bad_value) = (spoilt(i16::put_key, &keys), spoilt(i16::put_value, &values));
        let mut bad_query = queries.clone();
        bad_query[2 * d + 7] = bad;
        let kernels = Isa::available()
            .iter()
            .filter_map(|isa| isa.attend_fixed)
            .chain([fixed_kv::attend as fn(&Tile<'_, i16>, Partial<'_>)])
            .collect::<Vec<_>>();
        for kernel in kernels {
            for (keys, values, queries) in [(&bad_key, &values, &queries), (&keys, &bad_value, &queries), (&keys, &values, &bad_query)] {
                // The last row sees position 9 and has the bad query; the others have nothing to do with either.
                let tile = Tile {
                    keys: &[keys],
                    values: &[values],
                    then: None,
                    queries,
                    width: d,
                    head_dim: d,
                    shared: 1,
                    counts: &[3, 9, 20],
                    scale: 0.2,
                };
                let finite: Vec<bool> =
                    attended(kernel, &tile).chunks(d + 2).map(|pair| pair[2..].iter().all(|acc| (acc / pair[1]).is_finite())).collect();
                assert_eq!(finite, [true, true, false], "{bad}");
            }
        }
    }
}

/// [pairs, max and sum and head_dim]
fn attended<N: Stored>(kernel: fn(&Tile<'_, N>, Partial<'_>), tile: &Tile<'_, N>) -> Vec<f32> {
    let (pairs, d) = (tile.pairs(), tile.head_dim);
    let (mut max, mut sum, mut acc) = (vec![0.0; pairs], vec![0.0; pairs], vec![f32::NAN; pairs * d]);
    kernel(tile, Partial { max: &mut max, sum: &mut sum, acc: &mut acc });
    (0..pairs).flat_map(|pair| [max[pair], sum[pair]].into_iter().chain(acc[pair * d..][..d].iter().copied())).collect()
}

#[test]
fn swiglu_agrees_with_portable_wherever_its_vectors_begin() {
    let mut next = noise(5);
    let gate: Vec<f32> = (0..500).map(|i| (next() - 0.5) * [1.0, 20.0, 300.0][i % 3]).collect();
    let up: Vec<f32> = (0..500).map(|_| next() * 4.0 - 2.0).collect();
    let mut expected = gate.clone();
    norm::swiglu(&mut expected, &up);
    for isa in Isa::available() {
        for (from, to) in [(0, 500), (0, 33), (3, 20), (7, 8), (9, 9)] {
            let mut got = gate[from..to].to_vec();
            (isa.swiglu)(&mut got, &up[from..to]);
            for (i, got) in got.iter().enumerate() {
                let (expected, mut alone) = (expected[from + i], [gate[from + i]]);
                assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1e-6), "{}: {got} for {expected}", isa.name);
                (isa.swiglu)(&mut alone, &up[from + i..]);
                assert_eq!(alone[0].to_bits(), got.to_bits(), "{}", isa.name);
            }
        }
        let mut none = [f32::NAN];
        (isa.swiglu)(&mut none, &[1.0]);
        assert!(none[0].is_nan(), "{}", isa.name);
    }
}

#[test]
fn exponentials_are_near_and_the_same_wherever_their_vectors_begin() {
    let mut x: Vec<f32> = (0..10_007).map(|i| -(i as f32) * 0.01).collect();
    x.extend([f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -0.0]);
    let mut all = vec![1.0; x.len()];
    exponentials(&x, 1.5, 0.7, &mut all);
    for (got, x) in all.iter().zip(x) {
        let mut alone = [2.0];
        exponentials(&[x], 1.5, 0.7, &mut alone);
        assert_eq!(alone[0].to_bits(), got.to_bits());
        let x = (x - 1.5) * 0.7;
        let exact = if (-86.0..=0.0).contains(&x) { f64::from(x).exp() } else { 0.0 };
        assert!((f64::from(*got) - exact).abs() <= 2e-7 * exact, "e^{x}: {got}");
    }
}
