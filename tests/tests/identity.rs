//! Exactness: the same request gives the same tokens, bit for bit, whatever the cache budget, the thread count, the order
//! and delay of loads, budget changes in mid-stream and whoever else is in the batch. Log-probabilities are compared too,
//! bit for bit: a token alone would hide most differences.

use std::path::Path;

use anyhow::{Context, Result};
use flash_engine::{CacheBudget, Engine, Io, Kernels, Lookahead, Options, PolicyKind, Request, Split};
use flash_tests::{
    daemon::bundled_model,
    drive::{Late, Outcome, SERVING, answered, drawn, greedy, options, run, run_with},
    fault_storage::{Fault, Faults, When},
    golden,
    rng::Rng,
    tiny_model::{Spec, TinyModel},
};
use tempfile::TempDir;

/// Ids, and the bits of log-probabilities.
type Answer = (Vec<u32>, Vec<u32>);

fn answers(outcomes: Vec<Outcome>) -> Result<Vec<Answer>> {
    Ok(answered(outcomes)?.into_iter().map(|outcome| (outcome.ids, outcome.bits)).collect())
}

fn same(got: Vec<Outcome>, expected: &[Answer], what: &str) -> Result<()> {
    let got = answers(got)?;
    assert_eq!(got.len(), expected.len(), "{what}");
    for (index, ((ids, bits), (expected_ids, expected_bits))) in got.iter().zip(expected).enumerate() {
        assert_eq!(ids, expected_ids, "{what}, request {index}: tokens");
        assert_eq!(bits, expected_bits, "{what}, request {index}: bits of the log-probabilities of equal tokens");
    }
    Ok(())
}

/// What is varied; everything else is equal.
#[derive(Clone, Copy)]
struct Setting {
    slots: usize,
    threads: usize,
    kernels: Kernels,
}

struct Subject<'a> {
    dir: &'a Path,
    experts: usize,
    requests: Vec<Request>,
}

impl Subject<'_> {
    fn options(&self, setting: Setting) -> Options {
        Options {
            kernels: setting.kernels,
            threads: Some(setting.threads),
            // Half a slot more, so that rounding down meets the number.
            expert_cache: share(setting.slots, self.experts),
            parallel: 6,
            // Every run computes everything; what is reused is in prefix.rs.
            prefix_cache: CacheBudget::Bytes(0),
            ..options()
        }
    }

    fn engine(&self, setting: Setting) -> Result<Engine> {
        Ok(Engine::load(self.dir, &self.options(setting), &mut |_| {})?)
    }

    /// Each request by itself, one thread, everything resident.
    fn expected(&self, kernels: Kernels) -> Result<Vec<Answer>> {
        let mut engine = self.engine(Setting { slots: self.experts, threads: 1, kernels })?;
        let alone = |request| answers(run(&mut engine, std::slice::from_ref(request))?)?.pop().context("an answer");
        self.requests.iter().map(alone).collect()
    }

    fn slots(&self, kernels: Kernels, slots: &[usize]) -> Result<()> {
        let expected = self.expected(kernels)?;
        for &slots in slots {
            for threads in [1, 2] {
                let mut engine = self.engine(Setting { slots, threads, kernels })?;
                assert_eq!(engine.report().experts.slots_per_layer, slots);
                for (request, expected) in self.requests.iter().zip(&expected) {
                    let got = run(&mut engine, std::slice::from_ref(request))?;
                    same(got, std::slice::from_ref(expected), &format!("{kernels:?}, {slots} slots, {threads} threads"))?;
                }
            }
        }
        Ok(())
    }

    fn shuffled_loads(&self, kernels: Kernels, slots: usize) -> Result<()> {
        let expected = self.expected(kernels)?;
        for seed in 0..3 {
            let faults = Faults::new();
            let options = self.options(Setting { slots, threads: 2, kernels });
            let mut engine = Engine::load_from(self.dir, &options, &faults.opener(), &mut |_| {})?;
            faults.shuffle(seed);
            same(run(&mut engine, &self.requests)?, &expected, &format!("{kernels:?}, loads shuffled with seed {seed}"))?;
            assert!(faults.reads() > 0, "experts were read through the storage");
        }
        Ok(())
    }

    fn moving_budgets(&self, kernels: Kernels) -> Result<()> {
        let expected = self.expected(kernels)?;
        let mut engine = self.engine(Setting { slots: self.experts, threads: 2, kernels })?;
        let layers = engine.report().experts.layers.len() as u64;
        let slot = engine.report().experts.slot_bytes;
        let mut rng = Rng::new(7);
        let requests: Vec<Late> = self.requests.iter().map(|request| Late { at: 0, request: request.clone() }).collect();
        let mut seen = std::collections::HashSet::new();
        let got = run_with(&mut engine, &requests, &mut |engine, step| {
            seen.insert(engine.report().experts.slots_per_layer);
            match step % 6 {
                2 => engine.set_cache(share(1 + rng.below(self.experts), self.experts)),
                5 => engine.set_ceiling((rng.below(3) > 0).then(|| slot * layers * (1 + rng.below(self.experts)) as u64)),
                _ => {}
            }
        })?;
        same(got, &expected, &format!("{kernels:?}, budgets moving"))?;
        assert!(seen.len() > 2, "the budget did move: {seen:?}");
        Ok(())
    }

    /// Every policy, way of reading and lookahead, under a budget that shrinks and grows every ten tokens.
    fn settings(&self, kernels: Kernels) -> Result<()> {
        let expected = self.expected(kernels)?;
        let policies = [PolicyKind::Lfru, PolicyKind::Lru, PolicyKind::Lcp, PolicyKind::None];
        let ios = [Io::Direct, Io::Buffered, Io::Uring, Io::Mmap];
        for (round, policy) in policies.iter().cycle().take(8).enumerate() {
            // Two rounds: each policy with two ways of reading, with and without lookahead.
            let (io, lookahead) = (ios[(round + round / 4) % 4], if round < 4 { Lookahead::On } else { Lookahead::Off });
            let options =
                Options { policy: *policy, io, lookahead, ..self.options(Setting { slots: self.experts / 2, threads: 2, kernels }) };
            let mut engine = Engine::load(self.dir, &options, &mut |_| {})?;
            let requests: Vec<Late> = self.requests.iter().map(|request| Late { at: 0, request: request.clone() }).collect();
            let got = run_with(&mut engine, &requests, &mut |engine, step| {
                if step % 10 == 0 {
                    let slots = if step % 20 == 0 { self.experts / 8 } else { self.experts / 2 };
                    engine.set_cache(share(slots, self.experts));
                }
            })?;
            same(got, &expected, &format!("{kernels:?}, {policy}, {io}, lookahead {lookahead}"))?;
            let looked = engine.report().lookahead_wanted > 0;
            assert_eq!(looked, lookahead == Lookahead::On, "lookahead {lookahead} did as it was told");
        }
        Ok(())
    }

    /// Threads that share steps by requests, of which more and fewer decode, and experts that are not there yet.
    fn apart(&self, kernels: Kernels) -> Result<()> {
        if cfg!(feature = "mlx") && kernels == SERVING {
            return Ok(()); // which has no threads of ours
        }
        // Beside a prompt that is read nobody does.
        let longer = |request: &Request| Request { max_tokens: request.max_tokens.map(|most| most + 100), ..request.clone() };
        let subject = Subject { requests: self.requests.iter().map(longer).collect(), ..*self };
        let once = subject.expected(kernels)?;
        let expected = [once.clone(), once].concat();
        for threads in [2, 3] {
            let mut engine = self.engine(Setting { slots: self.experts, threads, kernels })?;
            engine.set_split(Split::Rows);
            for stride in [0, 1, 3] {
                let late = |(index, request): (usize, &Request)| Late { at: index * stride, request: request.clone() };
                let requests: Vec<Late> = subject.requests.iter().chain(&subject.requests).enumerate().map(late).collect();
                let what = format!("{kernels:?}, {threads} threads apart, one more every {stride} steps");
                same(run_with(&mut engine, &requests, &mut |_, _| {})?, &expected, &what)?;
            }
            let apart = engine.report().decoded_apart;
            let hits = engine.report().experts.hits;
            assert!(apart > 0 && hits > apart, "{apart} tokens were decoded apart, with {hits} hits");
        }
        Ok(())
    }

    /// Neighbours that come and go at other times than the first request.
    fn neighbours(&self, kernels: Kernels) -> Result<()> {
        // Twice as many requests, so that steps have more rows than a tile of four.
        let once = self.expected(kernels)?;
        let expected = [once.clone(), once].concat();
        let mut engine = self.engine(Setting { slots: self.experts / 4, threads: 2, kernels })?;
        for stride in [0, 1, 3, 11] {
            let late = |(index, request): (usize, &Request)| Late { at: index * stride, request: request.clone() };
            let requests: Vec<Late> = self.requests.iter().chain(&self.requests).enumerate().map(late).collect();
            same(run_with(&mut engine, &requests, &mut |_, _| {})?, &expected, &format!("{kernels:?}, one more every {stride} steps"))?;
        }
        Ok(())
    }
}

fn with_logprobs(request: Request) -> Request {
    Request { top_logprobs: Some(8), ..request }
}

fn share(slots: usize, experts: usize) -> CacheBudget {
    CacheBudget::Share(((slots as f64 + 0.5) / experts as f64).min(1.0))
}

/// 32 experts, top 4, prompts from one token to several prefill chunks.
fn with_tiny(check: impl Fn(&Subject<'_>, Kernels) -> Result<()>) -> Result<()> {
    let dir = TempDir::new()?;
    TinyModel::generate(Spec { experts: 32, top_k: 4, seed: 3, ..Spec::default() }).write(dir.path())?;
    let mut rng = Rng::new(11);
    let mut prompt = |len: usize| -> Vec<u32> { (0..len).map(|_| rng.below(256) as u32).collect() };
    let requests = [drawn(&prompt(9), 24, 1), greedy(&prompt(700), 12), drawn(&prompt(1), 30, 2), drawn(&prompt(130), 16, 3)];
    let requests = requests.map(with_logprobs).to_vec();
    let subject = Subject { dir: dir.path(), experts: 32, requests };
    check(&subject, Kernels::Reference)?;
    check(&subject, SERVING)
}

#[test]
fn cache_sizes_and_threads() -> Result<()> {
    with_tiny(|subject, kernels| subject.slots(kernels, &[1, 3, 4, 8, 16, 32]))
}

#[test]
fn delayed_and_reordered_loads() -> Result<()> {
    with_tiny(|subject, kernels| subject.shuffled_loads(kernels, 3))
}

#[test]
fn budgets_that_move_in_mid_stream() -> Result<()> {
    with_tiny(|subject, kernels| subject.moving_budgets(kernels))
}

#[test]
fn policies_storages_and_lookahead() -> Result<()> {
    with_tiny(|subject, kernels| subject.settings(kernels))
}

#[test]
fn batch_neighbours() -> Result<()> {
    with_tiny(|subject, kernels| subject.neighbours(kernels))
}

#[test]
fn threads_that_decode_apart() -> Result<()> {
    with_tiny(|subject, kernels| subject.apart(kernels))
}

/// As a prompt, tokens have the log-probabilities that they had as a reply, beside others and alone.
#[test]
fn a_prompts_logprobs_are_a_replys() -> Result<()> {
    with_tiny(|subject, kernels| {
        if cfg!(feature = "mlx") && kernels == SERVING {
            return Ok(()); // which chooses kernels by shape
        }
        let mut engine = subject.engine(Setting { slots: 8, threads: 2, kernels })?;
        let mut request = subject.requests[1].clone();
        let (ids, bits) = answers(run(&mut engine, std::slice::from_ref(&request))?)?.pop().context("an answer")?;
        request.prompt.extend(&ids);
        (request.prompt_logprobs, request.max_tokens) = (true, Some(1));
        // Of each token but the first: its own, and eight others'.
        let end = 1 + 9 * (request.prompt.len() - 1);
        let alone = run(&mut engine, std::slice::from_ref(&request))?;
        let beside =
            run_with(&mut engine, &[Late { at: 0, request: subject.requests[2].clone() }, Late { at: 9, request }], &mut |_, _| {})?;
        for (scored, what) in [(alone, "alone"), (beside, "beside another")] {
            let scored = answers(scored)?.pop().context("an answer")?.1;
            assert_eq!((scored.len(), f32::from_bits(scored[0]).is_nan()), (end + 9, true), "{kernels:?}, {what}");
            assert_eq!(scored[end - bits.len()..end], bits, "{kernels:?}, {what}");
        }
        Ok(())
    })
}

/// One token's working set, 25%, 50% and 100% of the trained model, with the kernels that serve by default.
#[test]
fn the_bundled_model() -> Result<()> {
    let goldens = golden::read("mlx_4bit_f32")?;
    let dir = bundled_model();
    let requests = [greedy(&goldens[0].prompt, 16), drawn(&goldens[1].prompt, 16, 5)].map(with_logprobs).to_vec();
    let subject = Subject { dir: &dir, experts: 64, requests };
    subject.slots(SERVING, &[1, 3, 8, 16, 32, 64])?;
    subject.shuffled_loads(SERVING, 16)?;
    subject.moving_budgets(SERVING)?;
    subject.settings(SERVING)?;
    subject.neighbours(SERVING)?;
    subject.apart(SERVING)
}

/// These tests could fail: one wrong bit in each expert shows in the log-probabilities.
#[test]
fn a_flipped_bit_is_seen() -> Result<()> {
    let dir = TempDir::new()?;
    TinyModel::generate(Spec::default()).write(dir.path())?;
    let subject = Subject { dir: dir.path(), experts: 8, requests: vec![with_logprobs(drawn(&[72, 101, 108], 4, 1))] };
    let expected = subject.expected(SERVING)?;
    let faults = Faults::new();
    let options = subject.options(Setting { slots: 4, threads: 1, kernels: SERVING });
    let mut engine = Engine::load_from(subject.dir, &options, &faults.opener(), &mut |_| {})?;
    faults.arm(When::Always, Fault::Flip);
    assert_ne!(answers(run(&mut engine, &subject.requests)?)?, expected);
    Ok(())
}
