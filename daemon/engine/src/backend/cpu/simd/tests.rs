//! Every instruction set of this CPU against the portable kernels, and against itself in other batch shapes.

use half::{bf16, f16};
use proptest::prelude::*;

use super::{
    super::{matrix::Prepared, pool::Pool},
    *,
};
use crate::model::weights::{Float, Format};

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
        Matrix { rows: self.rows, cols: self.cols, format: self.format, weight: &self.weight, scales: &self.scales, biases: &self.biases }
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
        format in formats(), rows in 1usize..13, blocks in 1usize..21, tokens in 1usize..11, seed: u64,
    ) {
        // Multiples of the group, whole blocks of 128 or not.
        let group = if let Format::Affine { group, .. } = format { group } else { 16 };
        let cols = (blocks * 32).next_multiple_of(group);
        let owned = matrix(rows, cols, format, seed);
        let w = owned.view();
        let mut next = noise(seed ^ 77);
        let x: Vec<f32> = (0..tokens * cols).map(|_| next() * 2.0 - 1.0).collect();
        let (mut prepared, pool) = (Prepared::default(), Pool::new(2).expect("a thread"));
        // One for all sets: those that don't read fixed point pass it over.
        let acts = prepared.of((&pool, &Isa::available()[0]), &x, cols, format);
        let ids: Vec<u32> = (0..tokens as u32).collect();
        let mut expected = vec![0.0; rows * tokens];
        portable::rows(&w, 0..rows, &acts, &ids, &mut expected);
        let exact = |row: usize, token: usize| {
            let mut wide = vec![0.0; cols];
            w.dequantize_row(row, &mut wide);
            wide.iter().zip(acts.token(token)).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>()
        };
        for isa in Isa::available() {
            let mut out = vec![0.0; rows * tokens];
            (isa.rows)(&w, 0..rows, &acts, &ids, &mut out);
            for row in 0..rows {
                for token in 0..tokens {
                    let (got, exact) = (out[row * tokens + token], exact(row, token));
                    prop_assert!((f64::from(got) - exact).abs() < 2e-3, "{} {format:?}: {got} for {exact}", isa.name);
                    prop_assert!((got - expected[row * tokens + token]).abs() < 2e-3);
                    let mut alone = [0.0];
                    (isa.rows)(&w, row..row + 1, &acts, &[token as u32], &mut alone);
                    prop_assert_eq!(alone[0].to_bits(), got.to_bits(), "{} {:?}: batch changes bits", isa.name, format);
                }
                let mut alone = vec![0.0; rows];
                (isa.rows)(&w, 0..rows, &acts, &[0], &mut alone);
                prop_assert_eq!(alone[row].to_bits(), out[row * tokens].to_bits(), "{} {:?}: row block changes bits", isa.name, format);
            }
        }
    }

    #[test]
    fn vectors_agree_with_portable(len in 0usize..200, seed: u64) {
        let mut next = noise(seed);
        let a: Vec<f32> = (0..len).map(|_| next() - 0.5).collect();
        let b: Vec<f32> = (0..len).map(|_| next() - 0.5).collect();
        // Subnormal halves included.
        let h: Vec<f16> = (0..len).map(|i| f16::from_f32((next() - 0.5) * if i % 7 == 0 { 1e-6 } else { 1.0 })).collect();
        for isa in Isa::available() {
            let close = |got: f32, expected: f32| (got - expected).abs() < 1e-4;
            prop_assert!(close((isa.dot)(&a, &b), portable::dot(&a, &b)));
            prop_assert!(close((isa.dot_f16)(&a, &h), portable::dot_f16(&a, &h)));
            let (mut y, mut z) = (b.clone(), b.clone());
            (isa.axpy)(0.37, &a, &mut y);
            portable::axpy(0.37, &a, &mut z);
            prop_assert!(y.iter().zip(&z).all(|(y, z)| close(*y, *z)));
            (isa.axpy_f16)(-1.7, &h, &mut y);
            portable::axpy_f16(-1.7, &h, &mut z);
            prop_assert!(y.iter().zip(&z).all(|(y, z)| close(*y, *z)));
        }
    }
}
