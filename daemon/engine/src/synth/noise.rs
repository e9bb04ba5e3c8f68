//! Seeded random bytes by position: any piece of any tensor can be made alone, in any order. Counters through the finaliser
//! of splitmix64, several GB/s; good enough for weights, no use for secrets. `synth.rs` and its tensors draw from it.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One stream of random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Self {
        Self(mix(seed ^ GOLDEN))
    }

    /// An unrelated stream for each number.
    pub(super) fn of(self, number: u64) -> Self {
        Self(mix(self.0.wrapping_add(mix(number.wrapping_add(GOLDEN)))))
    }

    pub(super) fn word(self, at: u64) -> u64 {
        mix(self.0.wrapping_add((at + 1).wrapping_mul(GOLDEN)))
    }

    /// The stream's bytes from `at` on; both `at` and the length are multiples of 8.
    pub(super) fn fill(self, at: u64, out: &mut [u8]) {
        assert!(at.is_multiple_of(8) && out.len().is_multiple_of(8), "whole words: {} bytes from {at}", out.len());
        for (word, out) in (at / 8..).zip(out.chunks_exact_mut(8)) {
            out.copy_from_slice(&self.word(word).to_le_bytes());
        }
    }

    /// Mean 0, deviation 1: the sum of the word's four 16-bit parts and those of a second one, whose sum has a variance of
    /// 8/12 in units of 2^16.
    pub(super) fn normal(self, at: u64) -> f32 {
        let parts = |word: u64| (0..4).map(|part| (word >> (16 * part)) as u16 as f32).sum::<f32>();
        let sum = parts(self.word(2 * at)) + parts(self.word(2 * at + 1));
        (sum / 65536.0 - 4.0) / (8.0f32 / 12.0).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_parts_of_the_whole() {
        let noise = Noise::new(3).of(1);
        let (mut whole, mut piece) = ([0; 256], [0; 64]);
        noise.fill(0, &mut whole);
        noise.fill(128, &mut piece);
        assert_eq!(piece, whole[128..192]);
        for other in [Noise::new(4).of(1), Noise::new(3).of(2), Noise::new(3)] {
            other.fill(0, &mut piece);
            assert_ne!(piece, whole[..64]);
        }
    }

    #[test]
    fn bytes_are_even_and_normals_are_standard() {
        let mut bytes = vec![0; 1 << 16];
        Noise::new(1).fill(0, &mut bytes);
        let mean = bytes.iter().map(|byte| f64::from(*byte)).sum::<f64>() / bytes.len() as f64;
        assert!((mean - 127.5).abs() < 1.5, "{mean}");
        let draws: Vec<f64> = (0..20_000).map(|at| f64::from(Noise::new(2).normal(at))).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|draw| draw * draw).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04, "{mean} {variance}");
    }
}
