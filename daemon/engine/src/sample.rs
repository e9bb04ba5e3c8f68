//! From logits to a token: penalties → logit bias → temperature → top-k → top-p → min-p → seeded draw.
//!
//! The i-th draw of a request depends on its seed and i alone, never on what else runs.

use std::{
    cmp::Ordering,
    collections::HashMap,
    hash::{BuildHasher, RandomState},
};

use crate::{Sampling, TokenLogprob};

/// Candidates sorted at first when only top-p or min-p limits them; almost always enough.
const HEAD: usize = 1024;

/// One request's sampling state.
#[derive(Debug)]
pub(crate) struct Sampler {
    settings: Sampling,
    seed: u64,
    draws: u64,
    /// How often each token was generated.
    counts: HashMap<u32, u32>,
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    pub(crate) fn new(settings: Sampling) -> Self {
        // RandomState is seeded by the operating system.
        let seed = settings.seed.unwrap_or_else(|| RandomState::new().hash_one(0u8));
        Self { settings, seed, draws: 0, counts: HashMap::new(), candidates: Vec::new() }
    }

    /// Draws the next token; `history` is prompt and completion so far. `logits` are changed. `None` if none is finite.
    pub(crate) fn draw(&mut self, logits: &mut [f32], history: &[u32]) -> Option<u32> {
        self.penalize(logits, history);
        let token = if self.settings.temperature == 0.0 { greedy(logits) } else { self.pick(logits) }?;
        *self.counts.entry(token).or_default() += 1;
        Some(token)
    }

    fn penalize(&self, logits: &mut [f32], history: &[u32]) {
        let s = &self.settings;
        if s.repetition_penalty != 1.0 {
            let window = if s.repetition_window == 0 { history.len() } else { s.repetition_window.min(history.len()) };
            let mut seen = history[history.len() - window..].to_vec();
            seen.sort_unstable();
            seen.dedup();
            for token in seen {
                let logit = &mut logits[token as usize];
                *logit = if *logit > 0.0 { *logit / s.repetition_penalty } else { *logit * s.repetition_penalty };
            }
        }
        if s.frequency_penalty != 0.0 || s.presence_penalty != 0.0 {
            for (token, count) in &self.counts {
                logits[*token as usize] -= s.frequency_penalty * *count as f32 + s.presence_penalty;
            }
        }
        for (token, bias) in &s.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
    }

    fn pick(&mut self, logits: &[f32]) -> Option<u32> {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.settings;
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend((0u32..).zip(logits).filter(|(_, logit)| logit.is_finite()).map(|(id, logit)| (id, logit / temperature)));
        let all = if top_k == 0 { candidates.len() } else { top_k.min(candidates.len()) };
        let max = candidates.iter().map(|candidate| candidate.1).fold(f32::NEG_INFINITY, f32::max);
        if all < candidates.len() {
            candidates.select_nth_unstable_by(all, likelier);
            candidates.truncate(all);
        }
        let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.1 - max).exp()).sum();
        // The kept candidates are a prefix in order of likelihood; sort only as much as it takes to find its end.
        let mut sorted = HEAD.min(all);
        loop {
            if sorted < all {
                candidates.select_nth_unstable_by(sorted, likelier);
            }
            candidates[..sorted].sort_unstable_by(likelier);
            let (mut mass, mut kept) = (0.0, Vec::new());
            for candidate in &candidates[..sorted] {
                let p = f64::from(candidate.1 - max).exp() / total;
                if !kept.is_empty() && (mass >= f64::from(top_p) || f64::from(candidate.1 - max).exp() < f64::from(min_p)) {
                    return Some(self.choose(&kept, mass));
                }
                mass += p;
                kept.push((candidate.0, p));
            }
            if sorted == all {
                return if kept.is_empty() { None } else { Some(self.choose(&kept, mass)) };
            }
            sorted = all;
        }
    }

    fn choose(&mut self, kept: &[(u32, f64)], mass: f64) -> u32 {
        let mut left = self.uniform() * mass;
        for (id, p) in kept {
            left -= p;
            if left < 0.0 {
                return *id;
            }
        }
        // Rounding left a sliver: it belongs to the last one.
        kept[kept.len() - 1].0
    }

    /// SplitMix64 (Steele, Lea, Flood 2014) of seed and draw number, in [0, 1).
    fn uniform(&mut self) -> f64 {
        self.draws += 1;
        let mut z = self.seed.wrapping_add(self.draws.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn likelier(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The most likely token, the lower id on ties; `None` if no logit is finite.
fn greedy(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, logit) in (0u32..).zip(logits).filter(|(_, logit)| logit.is_finite()) {
        if best.is_none_or(|best| *logit > best.1) {
            best = Some((id, *logit));
        }
    }
    best.map(|best| best.0)
}

/// Log-softmax of the model's own logits (before penalties and temperature) at `token` and its `top` alternatives.
pub(crate) fn logprob(logits: &[f32], token: u32, top: usize) -> TokenLogprob {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    let of = |logit: f32| (f64::from(logit - max) - total.ln()) as f32;
    let mut ranked: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
    if top < ranked.len() {
        ranked.select_nth_unstable_by(top, likelier);
        ranked.truncate(top);
    }
    ranked.sort_unstable_by(likelier);
    TokenLogprob { id: token, logprob: of(logits[token as usize]), top: ranked.into_iter().map(|(id, logit)| (id, of(logit))).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut Sampling)) -> Sampler {
        let mut settings = Sampling { temperature: 1.0, seed: Some(7), ..Sampling::greedy() };
        change(&mut settings);
        Sampler::new(settings)
    }

    /// Which tokens 4,000 draws give, and how often.
    fn tally(logits: &[f32], change: impl FnOnce(&mut Sampling)) -> Vec<usize> {
        let mut sampler = sampler(change);
        let mut counts = vec![0; logits.len()];
        for _ in 0..4000 {
            let token = sampler.pick(logits).expect("finite logits");
            counts[token as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_distribution_and_its_cuts() {
        let logits = [0.0, 1.0, 2.0, 3.0].map(|x: f32| x.exp2().ln() * 1.0);
        // Probabilities 1, 2, 4, 8 of 15.
        let counts = tally(&logits, |_| ());
        for (count, share) in counts.iter().zip([1.0, 2.0, 4.0, 8.0]) {
            assert!((*count as f64 / 4000.0 - share / 15.0).abs() < 0.03, "{counts:?}");
        }
        assert_eq!(tally(&logits, |s| s.top_k = 2)[..2], [0, 0]);
        assert_eq!(tally(&logits, |s| s.top_k = 1)[3], 4000);
        // 8/15 < 0.6 ≤ 12/15
        assert_eq!(tally(&logits, |s| s.top_p = 0.6)[..2], [0, 0]);
        // 2/8 ≥ 0.2 > 1/8
        let kept = tally(&logits, |s| s.min_p = 0.2);
        assert!(kept[0] == 0 && kept[1] > 0);
        assert!(tally(&logits, |s| s.temperature = 0.2)[3] > 3800);
    }

    #[test]
    fn a_long_flat_tail_is_sorted_whole_when_top_p_needs_it() {
        let logits = vec![0.5; 5000];
        let counts = tally(&logits, |s| s.top_p = 0.9);
        assert!(counts[..4500].iter().filter(|count| **count > 0).count() > HEAD);
        assert!(counts[4510..].iter().all(|count| *count == 0));
    }

    #[test]
    fn greedy_ties_penalties_bias_and_broken_logits() {
        let greedy = |logits: &[f32], history: &[u32], change: fn(&mut Sampling)| {
            let mut sampler = sampler(|s| {
                s.temperature = 0.0;
                change(s);
            });
            sampler.draw(&mut logits.to_vec(), history)
        };
        assert_eq!(greedy(&[1.0, 3.0, 3.0], &[], |_| ()), Some(1));
        assert_eq!(greedy(&[1.0, 3.0, 2.9], &[1], |s| s.repetition_penalty = 1.5), Some(2));
        assert_eq!(greedy(&[1.0, 3.0, 2.9], &[1, 0, 0], |s| (s.repetition_penalty, s.repetition_window) = (1.5, 2)), Some(1));
        assert_eq!(greedy(&[-1.0, -1.1], &[0], |s| s.repetition_penalty = 2.0), Some(1));
        assert_eq!(greedy(&[1.0, 3.0], &[], |s| s.logit_bias = HashMap::from([(0, 5.0)])), Some(0));
        assert_eq!(greedy(&[f32::NAN, f32::NEG_INFINITY, -5.0], &[], |_| ()), Some(2));
        assert_eq!(greedy(&[f32::NAN; 3], &[], |_| ()), None);
        let mut sampler = sampler(|s| (s.temperature, s.presence_penalty) = (0.0, 1.0));
        let draws: Vec<_> = (0..3).map(|_| sampler.draw(&mut [2.0, 1.5, 1.2], &[]).expect("finite")).collect();
        assert_eq!(draws, [0, 1, 2]);
    }

    #[test]
    fn seeds_repeat_and_differ() {
        let draws = |seed| {
            let mut sampler = sampler(|s| s.seed = seed);
            (0..32).map(|_| sampler.pick(&[0.0; 100]).expect("finite")).collect::<Vec<_>>()
        };
        assert_eq!(draws(Some(1)), draws(Some(1)));
        assert_ne!(draws(Some(1)), draws(Some(2)));
        assert_ne!(draws(None), draws(None));
    }

    #[test]
    fn logprobs_are_log_softmax() {
        let got = logprob(&[0.0, 1.0, 1.0], 0, 2);
        let total = (1.0 + 2.0 * 1f32.exp()).ln();
        assert!((got.logprob + total).abs() < 1e-6);
        assert_eq!(got.top.iter().map(|top| top.0).collect::<Vec<_>>(), [1, 2]);
        assert!((got.top[0].1 - (1.0 - total)).abs() < 1e-6);
    }
}
