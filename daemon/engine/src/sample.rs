//! From logits to a token: penalties → logit bias → grammar → temperature → top-k → top-p → min-p → seeded draw.
//!
//! The i-th draw of a request depends on its seed and i alone, never on what else runs.

use std::{
    cmp::Ordering,
    collections::HashMap,
    hash::{BuildHasher, RandomState},
};

use flash_kernels::exponentials;

use crate::{Sampling, TokenLogprob, model::output::Mask};

/// Candidates sorted at first when only top-p or min-p limits them; almost always enough.
const HEAD: usize = 1024;
/// Weights that are summed, compared or passed over together.
const RUN: usize = 256;
const LANES: usize = 16;

/// One request's sampling state.
#[derive(Debug)]
pub(crate) struct Sampler {
    settings: Sampling,
    seed: u64,
    draws: u64,
    /// How often each token was generated, where penalties ask for it.
    counts: HashMap<u32, u32>,
    /// e^((logit − highest) / temperature) of every token.
    weights: Vec<f32>,
    /// Of each run of weights, the highest.
    bests: Vec<f32>,
    /// (token, weight)
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    pub(crate) fn new(settings: Sampling) -> Self {
        // RandomState is seeded by the operating system.
        let seed = settings.seed.unwrap_or_else(|| RandomState::new().hash_one(0u8));
        Self { settings, seed, draws: 0, counts: HashMap::new(), weights: Vec::new(), bests: Vec::new(), candidates: Vec::new() }
    }

    /// Draws the next token among those of the mask; `None` if no logit is finite.
    pub(crate) fn draw(&mut self, logits: &mut [f32], mask: Option<&Mask>) -> Option<u32> {
        if let Some(mask) = mask {
            forbid(logits, mask);
        }
        if self.settings.temperature == 0.0 { greedy(logits) } else { self.pick(logits) }
    }

    /// Whether a token that was drawn without a mask and would be allowed by it is as good as one drawn with it. So it is where nothing is
    /// cut off before the draw. With p(t) the likelihood of a token and Z that of all that are allowed together, drawing again with the
    /// mask where the first draw is not allowed gives p(t) + (1 − Z) · p(t) / Z = p(t) / Z.
    pub(crate) fn may_guess(&self) -> bool {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.settings;
        temperature == 0.0 || top_k == 0 && top_p >= 1.0 && min_p <= 0.0
    }

    /// A token was said.
    pub(crate) fn count(&mut self, token: u32) {
        if self.settings.frequency_penalty != 0.0 || self.settings.presence_penalty != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
    }

    /// Penalties and biases; `history` is prompt and completion so far.
    pub(crate) fn penalize(&self, logits: &mut [f32], history: &[u32]) {
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
        // Of the smallest temperatures the inverse is no number, and infinity times the 0 of the highest is none either.
        let (max, inverse) = (highest(logits)?, (1.0 / temperature).min(f32::MAX));
        self.weights.resize(logits.len(), 0.0);
        exponentials(logits, max, inverse, &mut self.weights);
        let weights = &self.weights[..];
        let all = self.weights.len();
        let total: f64 = weights.chunks(RUN).map(sum).sum();
        let limited = (1..all).contains(&top_k);
        if !limited && top_p >= 1.0 && min_p <= 0.0 {
            return Some(self.draw_from_all(total));
        }
        // Below it nothing is kept: neither of the k highest runs' best is, nor can all of the rest be more than top-p leaves out.
        let mut floor = f64::from(min_p);
        if limited {
            floor = floor.max(self.kth_best_run(top_k));
        } else {
            floor = floor.max((1.0 - f64::from(top_p)) * total / all as f64 * 0.999);
        }
        let (weights, candidates) = (&self.weights[..], &mut self.candidates);
        candidates.clear();
        for (first, run) in (0u32..).step_by(RUN).zip(weights.chunks(RUN)) {
            if f64::from(best(run)) >= floor {
                candidates.extend((first..).zip(run.iter().copied()).filter(|(_, weight)| *weight > 0.0 && f64::from(*weight) >= floor));
            }
        }
        if limited && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k, likelier);
            candidates.truncate(top_k);
        }
        let total = if limited { candidates.iter().map(|candidate| f64::from(candidate.1)).sum() } else { total };
        // The kept candidates are a prefix in order of likelihood; sort only as much as it takes to find its end.
        let mut sorted = HEAD.min(candidates.len());
        loop {
            if sorted < candidates.len() {
                candidates.select_nth_unstable_by(sorted, likelier);
            }
            candidates[..sorted].sort_unstable_by(likelier);
            let (mut mass, mut kept) = (0.0, 0);
            for (_, weight) in &candidates[..sorted] {
                if kept > 0 && (mass >= f64::from(top_p) * total || *weight < min_p) {
                    break;
                }
                mass += f64::from(*weight);
                kept += 1;
            }
            if kept < sorted || sorted == candidates.len() {
                return Some(self.choose(kept, mass));
            }
            sorted = candidates.len();
        }
    }

    /// In order of token ids, which no cut needs.
    fn draw_from_all(&mut self, total: f64) -> u32 {
        let mut left = self.uniform() * total;
        let mut last = 0;
        for (first, run) in (0u32..).step_by(RUN).zip(self.weights.chunks(RUN)) {
            let mass = sum(run);
            if left >= mass {
                left -= mass;
                continue;
            }
            for (id, weight) in (first..).zip(run).filter(|(_, weight)| **weight > 0.0) {
                left -= f64::from(*weight);
                if left < 0.0 {
                    return id;
                }
                last = id;
            }
        }
        // Rounding left a sliver.
        last
    }

    /// At least k weights are as high: each run's best is one of them. 0 where there are fewer runs.
    fn kth_best_run(&mut self, k: usize) -> f64 {
        self.bests.clear();
        self.bests.extend(self.weights.chunks(RUN).map(best));
        if self.bests.len() < k {
            return 0.0;
        }
        f64::from(*self.bests.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1)
    }

    /// One of the first `kept` candidates, whose weights sum to `mass`.
    fn choose(&mut self, kept: usize, mass: f64) -> u32 {
        let mut left = self.uniform() * mass;
        for (id, weight) in &self.candidates[..kept] {
            left -= f64::from(*weight);
            if left < 0.0 {
                return *id;
            }
        }
        // Rounding left a sliver: it belongs to the last one.
        self.candidates[kept - 1].0
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

/// Leaves the mask's tokens as they are, and takes all others away.
fn forbid(logits: &mut [f32], mask: &Mask) {
    let words = mask.as_slice().iter().copied().chain(std::iter::repeat(0));
    for (logits, word) in logits.chunks_mut(32).zip(words).filter(|(_, word)| *word != u32::MAX) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

fn likelier(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The most likely token, the lower id on ties; `None` if no logit is finite.
fn greedy(logits: &[f32]) -> Option<u32> {
    let max = highest(logits)?;
    logits.iter().position(|logit| *logit == max).map(|id| id as u32)
}

/// Of the finite ones. In lanes, as the loops below, because a vocabulary is long.
fn highest(logits: &[f32]) -> Option<f32> {
    let max = best_of(logits, |logit| if logit.is_finite() { logit } else { f32::NEG_INFINITY });
    (max > f32::NEG_INFINITY).then_some(max)
}

fn best(weights: &[f32]) -> f32 {
    best_of(weights, |weight| weight)
}

fn best_of(numbers: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let (runs, rest) = numbers.as_chunks::<LANES>();
    let higher = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for run in runs {
        lanes = std::array::from_fn(|i| higher(lanes[i], of(run[i])));
    }
    lanes.into_iter().chain(rest.iter().map(|number| of(*number))).fold(f32::NEG_INFINITY, higher)
}

/// Of a run of weights, few enough for f32.
fn sum(weights: &[f32]) -> f64 {
    let (runs, rest) = weights.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for run in runs {
        lanes = std::array::from_fn(|i| lanes[i] + run[i]);
    }
    lanes.iter().chain(rest).map(|weight| f64::from(*weight)).sum()
}

/// What a token gets that the mask forbids.
const FORBIDDEN: f32 = -9999.0;

/// Log-softmax of the model's own logits (before penalties and temperature) at `token` and its `top` alternatives.
pub(crate) fn logprob(logits: &[f32], token: u32, top: usize, mask: Option<&Mask>) -> TokenLogprob {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    let allowed = |id: u32| mask.is_none_or(|mask| (id as usize) < mask.len() && mask.is_allowed(id));
    let of = |id: u32, logit: f32| if allowed(id) { (f64::from(logit - max) - total.ln()) as f32 } else { FORBIDDEN };
    let known = |(id, logit): (u32, f32)| (id, if allowed(id) { logit } else { f32::NEG_INFINITY });
    let mut ranked: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).map(known).collect();
    if top < ranked.len() {
        ranked.select_nth_unstable_by(top, likelier);
        ranked.truncate(top);
    }
    ranked.sort_unstable_by(likelier);
    TokenLogprob {
        id: token,
        logprob: of(token, logits[token as usize]),
        top: ranked.into_iter().map(|(id, logit)| (id, of(id, logit))).collect(),
    }
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
    fn lanes_add_up_and_only_finite_numbers_are_the_highest() {
        let mut numbers: Vec<f32> = (0..1000).map(|i| ((i * 37) % 500) as f32).collect();
        numbers[77] = f32::INFINITY;
        numbers[78] = f32::NAN;
        assert_eq!((highest(&numbers), sum(&numbers[..40])), (Some(499.0), numbers[..40].iter().sum::<f32>().into()));
    }

    /// A long vocabulary against the definition: sort, cut, compare what can be drawn.
    #[test]
    fn cuts_keep_the_likeliest_of_many() {
        let logits: Vec<f32> = (0..3000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 22) as f32).collect();
        let mut ranked: Vec<u32> = (0..3000).collect();
        ranked.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        for (top_k, top_p, min_p) in [(7, 1.0, 0.0), (200, 1.0, 0.0), (0, 0.05, 0.0), (0, 1.0, 0.95), (50, 0.5, 0.9), (2999, 0.01, 0.0)] {
            let change = |s: &mut Sampling| (s.top_k, s.top_p, s.min_p) = (top_k, top_p, min_p);
            let weight = |id: &u32| f64::from(logits[*id as usize] - logits[ranked[0] as usize]).exp();
            let pool = &ranked[..if top_k == 0 { 3000 } else { top_k }];
            let total: f64 = pool.iter().map(weight).sum();
            let mut mass = 0.0;
            let kept = pool.iter().take_while(|id| {
                let keeps = mass < f64::from(top_p) * total && weight(id) >= f64::from(min_p);
                mass += weight(id);
                keeps
            });
            let kept: Vec<u32> = kept.copied().collect();
            let drawn = tally(&logits, change);
            let foreign = (0..3000u32).filter(|id| drawn[*id as usize] > 0 && !kept.contains(id)).count();
            assert_eq!(foreign, 0, "top_k {top_k}, top_p {top_p}, min_p {min_p}: {} kept", kept.len());
            // Nothing that is kept is much rarer than the rest.
            assert!(kept.len() > 60 || kept.iter().all(|id| drawn[*id as usize] > 0));
        }
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
            let logits = &mut logits.to_vec();
            sampler.penalize(logits, history);
            sampler.draw(logits, None)
        };
        assert_eq!(greedy(&[1.0, 3.0, 3.0], &[], |_| ()), Some(1));
        assert_eq!(greedy(&[1.0, 3.0, 2.9], &[1], |s| s.repetition_penalty = 1.5), Some(2));
        assert_eq!(greedy(&[1.0, 3.0, 2.9], &[1, 0, 0], |s| (s.repetition_penalty, s.repetition_window) = (1.5, 2)), Some(1));
        assert_eq!(greedy(&[-1.0, -1.1], &[0], |s| s.repetition_penalty = 2.0), Some(1));
        assert_eq!(greedy(&[1.0, 3.0], &[], |s| s.logit_bias = HashMap::from([(0, 5.0)])), Some(0));
        assert_eq!(greedy(&[f32::NAN, f32::NEG_INFINITY, -5.0], &[], |_| ()), Some(2));
        assert_eq!(greedy(&[f32::NAN; 3], &[], |_| ()), None);
        let mut sampler = sampler(|s| (s.temperature, s.presence_penalty) = (0.0, 1.0));
        let mut draw = || {
            let mut logits = [2.0, 1.5, 1.2];
            sampler.penalize(&mut logits, &[]);
            let token = sampler.draw(&mut logits, None).expect("finite");
            sampler.count(token);
            token
        };
        assert_eq!([draw(), draw(), draw()], [0, 1, 2]);
    }

    #[test]
    fn the_smallest_settings_draw_the_likeliest() {
        let tiny = [f32::from_bits(1), 1e-42, f32::MIN_POSITIVE];
        let logits: Vec<f32> = (0..400).map(|i| (i * 37 % 401) as f32 / 40.0 - 5.0).collect();
        let likeliest = greedy(&logits).expect("one is the highest");
        for temperature in tiny {
            for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1), (7, tiny[0], tiny[0])] {
                let settings = Sampling { temperature, top_k, top_p, min_p, seed: Some(1), ..Sampling::greedy() };
                assert_eq!(Sampler::new(settings.clone()).draw(&mut logits.clone(), None), Some(likeliest), "{settings:?}");
            }
            // Logits that are no longer finite.
            let settings = Sampling { repetition_penalty: temperature, temperature: 1.0, top_p: 0.9, seed: Some(1), ..Sampling::greedy() };
            let (mut sampler, mut logits) = (Sampler::new(settings), logits.clone());
            sampler.penalize(&mut logits, &[0, 3, 100]);
            assert!(sampler.draw(&mut logits, None).is_some());
        }
    }

    #[test]
    fn a_guess_that_is_allowed_is_as_good_as_a_draw_among_the_allowed() {
        // Probabilities 1, 2, 4, 8 of 15; the second and the last are allowed.
        let logits = [0.0, 1.0, 2.0, 3.0].map(|x: f32| x.exp2().ln());
        let mut mask = Mask::alloc(4);
        mask.allow_token(1);
        mask.allow_token(3);
        let mut sampler = sampler(|_| ());
        assert!(sampler.may_guess());
        let mut counts = [0; 4];
        for _ in 0..4000 {
            let guess = sampler.draw(&mut logits.clone(), None).expect("finite");
            let token = if mask.is_allowed(guess) { guess } else { sampler.draw(&mut logits.clone(), Some(&mask)).expect("finite") };
            counts[token as usize] += 1;
        }
        assert_eq!((counts[0], counts[2]), (0, 0));
        assert!((f64::from(counts[1]) / 4000.0 - 0.2).abs() < 0.03, "{counts:?}");
        let guesses = |change: fn(&mut Sampling)| self::sampler(change).may_guess();
        assert!(guesses(|s| (s.temperature, s.top_k) = (0.0, 5)), "the likeliest of all is the likeliest of the allowed");
        assert!(!guesses(|s| s.top_k = 5) && !guesses(|s| s.top_p = 0.9) && !guesses(|s| s.min_p = 0.1));
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
        let got = logprob(&[0.0, 1.0, 1.0], 0, 2, None);
        let total = (1.0 + 2.0 * 1f32.exp()).ln();
        assert!((got.logprob + total).abs() < 1e-6);
        assert_eq!(got.top.iter().map(|top| top.0).collect::<Vec<_>>(), [1, 2]);
        assert!((got.top[0].1 - (1.0 - total)).abs() < 1e-6);
    }
}
