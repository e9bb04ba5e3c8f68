//! Prefixes that were computed before: a request that begins like another gives the same tokens and the same bits of
//! log-probabilities as one that finds nothing, whoever computed its beginning, however much of it is there and whatever became of
//! the donor; and blocks that nobody uses give way to everything else.

use anyhow::Result;
use flash_engine::{CacheBudget, Delivery, Engine, Error, Event, Kernels, Options, Request};
use flash_tests::{
    drive::{Late, Outcome, SERVING, answered, drawn, greedy, options, run, run_with},
    fault_storage::{Fault, Faults, When},
    rng::Rng,
    tiny_model::{Spec, TinyModel},
};
use tempfile::TempDir;

/// Tokens of a block.
const BLOCK: usize = 32;

struct Subject {
    dir: TempDir,
    kernels: Kernels,
    /// For tokens.
    rng: Rng,
}

impl Subject {
    fn new(kernels: Kernels) -> Result<Self> {
        let dir = TempDir::new()?;
        TinyModel::generate(Spec { experts: 16, top_k: 4, seed: 5, context: 4096, ..Spec::default() }).write(dir.path())?;
        Ok(Self { dir, kernels, rng: Rng::new(17) })
    }

    fn options(&self) -> Options {
        Options { kernels: self.kernels, threads: Some(2), parallel: 4, expert_cache: CacheBudget::Share(0.5), ..options() }
    }

    fn engine(&self) -> Result<Engine> {
        Ok(Engine::load(self.dir.path(), &self.options(), &mut |_| {})?)
    }

    fn tokens(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.rng.below(256) as u32).collect()
    }

    /// What a request gives that finds nothing.
    fn alone(&self, request: &Request) -> Result<Outcome> {
        let options = Options { prefix_cache: CacheBudget::Bytes(0), ..self.options() };
        let mut engine = Engine::load(self.dir.path(), &options, &mut |_| {})?;
        let outcome = answered(run(&mut engine, std::slice::from_ref(request))?)?.remove(0);
        assert_eq!(outcome.cached, 0);
        Ok(outcome)
    }

    /// Tokens that are shared or are not: MLX shares whole chunks of prompts, and nothing of replies.
    fn grain(&self) -> usize {
        if self.kernels == Kernels::Reference || !cfg!(feature = "mlx") { BLOCK } else { 512 }
    }

    fn check(&self, got: &Outcome, request: &Request, cached: Option<usize>, what: &str) -> Result<()> {
        let expected = self.alone(request)?;
        assert_eq!(got.error, None, "{what}");
        assert_eq!(got.ids, expected.ids, "{what}: tokens");
        assert_eq!(got.bits, expected.bits, "{what}: bits of the log-probabilities");
        if let Some(cached) = cached {
            assert_eq!(got.cached, cached / self.grain() * self.grain(), "{what}: tokens that were there");
        }
        Ok(())
    }
}

fn with_logprobs(request: Request) -> Request {
    Request { top_logprobs: Some(8), ..request }
}

fn both(check: impl Fn(Subject) -> Result<()>) -> Result<()> {
    check(Subject::new(Kernels::Reference)?)?;
    check(Subject::new(SERVING)?)
}

#[test]
fn whatever_is_there_changes_no_bit() -> Result<()> {
    both(|mut subject| {
        let mut engine = subject.engine()?;
        let first = subject.tokens(700);
        let ask = |engine: &mut Engine, prompt: &[u32], cached: usize, what: &str| -> Result<Vec<u32>> {
            let request = with_logprobs(drawn(prompt, 24, 9));
            let got = run(engine, std::slice::from_ref(&request))?.remove(0);
            subject.check(&got, &request, Some(cached), what)?;
            Ok(got.ids)
        };
        let reply = ask(&mut engine, &first, 0, "cold")?;
        ask(&mut engine, &first, 699 / BLOCK * BLOCK, "again")?;
        ask(&mut engine, &first[..640], 608, "the last token is computed, and with it its block")?;
        ask(&mut engine, &first[..641], 640, "a whole number of blocks, and one token")?;
        let mut other = first.clone();
        other[300] ^= 1;
        ask(&mut engine, &other, 288, "another question after the same beginning")?;
        ask(&mut engine, &first[1..], 0, "the same tokens at other positions")?;
        other[31] ^= 1;
        ask(&mut engine, &other, 0, "a difference in the first block")?;
        ask(&mut engine, &first[..1], 0, "one token")?;
        // The next turn of a chat repeats the reply; its last token was never fed back.
        let turn = [&first[..], &reply, &other[..50]].concat();
        ask(&mut engine, &turn, (700 + 23) / BLOCK * BLOCK, "the next turn")?;
        let found = engine.report().prefix;
        if subject.grain() == BLOCK {
            assert_eq!((found.hits, found.misses), (5, 4));
            assert_eq!(found.memory_tokens, 672 + 608 + 640 + 288 + 704);
        }
        Ok(())
    })
}

#[test]
fn a_long_prompt_is_gone_on_from_wherever_another_parts_from_it() -> Result<()> {
    both(|mut subject| {
        let mut engine = subject.engine()?;
        let first = subject.tokens(1700);
        // The last one's prompt is read while another request decodes.
        let neighbour = Late { at: 0, request: drawn(&first[1650..], 200, 3) };
        let asked = [(1700, 0, false), (1100, 1088, false), (1690, 1664, false), (1100, 1696, false), (5, 0, true), (1699, 1696, true)];
        for (at, cached, decoding) in asked {
            let mut prompt = first.clone();
            prompt.iter_mut().skip(at).for_each(|token| *token ^= 1);
            let request = with_logprobs(drawn(&prompt, 12, 4));
            let late: Vec<_> = decoding.then(|| neighbour.clone()).into_iter().chain([Late { at: 5, request: request.clone() }]).collect();
            let got = run_with(&mut engine, &late, &mut |_, _| {})?.pop().expect("the last one's");
            // Beside others MLX chooses other kernels: bits are those of the same neighbours without a prefix.
            if decoding && subject.grain() > BLOCK {
                assert_eq!((got.error, got.cached), (None, cached / 512 * 512));
            } else {
                subject.check(&got, &request, Some(cached), &format!("another question after {at} tokens"))?;
            }
        }
        let report = engine.report();
        assert_eq!(report.kv_reserved_bytes, 0);
        if subject.grain() == BLOCK {
            assert_eq!(report.kv_bytes, report.prefix.bytes, "nothing is held but what is known");
        }
        engine.clear_prefixes()?;
        assert_eq!(engine.report().kv_bytes, 0);
        Ok(())
    })
}

#[test]
fn requests_that_run_together_share_what_they_have_in_common() -> Result<()> {
    both(|mut subject| {
        let system = subject.tokens(400);
        let requests: Vec<Request> = (0..4u64)
            .map(|seed| with_logprobs(drawn(&[&system[..], &subject.tokens(3 + 40 * seed as usize)].concat(), 20, seed)))
            .collect();
        for stride in [0, 1, 4, 50] {
            let mut engine = subject.engine()?;
            let late: Vec<Late> =
                requests.iter().enumerate().map(|(index, request)| Late { at: index * stride, request: request.clone() }).collect();
            // All four found what they have in common by then, however long the first took to read it.
            let mut most = 0;
            let got = run_with(&mut engine, &late, &mut |engine, _| {
                let report = engine.report();
                if report.running == requests.len() {
                    most = report.kv_reserved_bytes;
                }
            })?;
            for (index, (got, request)) in got.iter().zip(&requests).enumerate() {
                // Whoever comes first computes it, the others find it: at once, or when it is done.
                let cached = if index == 0 { 0 } else { 400 / BLOCK * BLOCK };
                subject.check(got, request, Some(cached), &format!("request {index}, one every {stride} steps"))?;
            }
            let block = engine.report().prefix.bytes.checked_div(engine.report().prefix.blocks as u64).unwrap_or(0);
            if subject.grain() == BLOCK && stride == 4 {
                // Three times the twelve blocks in common are not there.
                let apart: usize = requests.iter().map(|request| (request.prompt.len() + 19).div_ceil(BLOCK)).sum();
                assert_eq!(most, (apart - 3 * 12) as u64 * block, "KV of four requests");
            }
            assert_eq!(engine.report().kv_reserved_bytes, 0);
        }
        Ok(())
    })
}

#[test]
fn a_donor_that_was_cancelled_leaves_what_it_had_computed() -> Result<()> {
    both(|mut subject| {
        let prompt = subject.tokens(600);
        let mut engine = subject.engine()?;
        let (id, _) = engine.admit(drawn(&prompt, 100, 1))?;
        let mut said = 0;
        while said < 40 {
            engine.step(&mut |_, event| {
                said += usize::from(matches!(event, Event::Token { .. }));
                Delivery::Taken
            });
        }
        engine.cancel(id);
        let request = with_logprobs(drawn(&prompt, 10, 2));
        let got = run(&mut engine, std::slice::from_ref(&request))?.remove(0);
        subject.check(&got, &request, Some(599 / BLOCK * BLOCK), "after a cancelled one")
    })
}

/// A pass that lost an expert is no one's prefix, and what was whole before it is.
#[test]
fn a_donor_that_failed_leaves_nothing_wrong() -> Result<()> {
    let mut subject = Subject::new(SERVING)?;
    let prompt = subject.tokens(700);
    let request = with_logprobs(drawn(&prompt, 10, 2));
    for after in [0, 3, 10, 40] {
        let faults = Faults::new();
        let options = Options { expert_cache: CacheBudget::Share(0.25), ..subject.options() };
        let mut engine = Engine::load_from(subject.dir.path(), &options, &faults.opener(), &mut |_| {})?;
        faults.arm(When::Nth(after), Fault::Error);
        let failed = run(&mut engine, std::slice::from_ref(&request))?.remove(0);
        // The read that fails may be nobody's, or one that was joined and is made again: on MLX once in some twenty runs, elsewhere
        // where a pass was cut. Then nothing may come of it.
        if failed.error.is_none() && faults.struck() > 0 {
            subject.check(&failed, &request, Some(0), &format!("with a fault at read {after}"))?;
        } else {
            assert!(failed.error.is_some(), "the fault after {after} reads was met");
        }
        let got = run(&mut engine, std::slice::from_ref(&request))?.remove(0);
        subject.check(&got, &request, None, &format!("after a fault at read {after}"))?;
    }
    Ok(())
}

#[test]
fn routing_that_is_recorded_or_forced_is_computed() -> Result<()> {
    let mut subject = Subject::new(Kernels::Reference)?;
    let prompt = subject.tokens(200);
    let mut engine = subject.engine()?;
    let plain = greedy(&prompt, 4);
    let outcome = |engine: &mut Engine, request: &Request| Ok::<_, anyhow::Error>(run(engine, std::slice::from_ref(request))?.remove(0));
    outcome(&mut engine, &plain)?;
    assert_eq!(outcome(&mut engine, &Request { record_routing: true, ..plain.clone() })?.cached, 0, "every position is said");
    let natural = outcome(&mut engine, &plain)?;
    assert_eq!(natural.cached, 192);
    let layers = engine.report().experts.layers.len();
    let ids: Vec<u16> = (0..layers).flat_map(|_| [0, 1, 2, 3]).collect();
    engine.force_routing(Some(&ids))?;
    for _ in 0..2 {
        assert_eq!(outcome(&mut engine, &plain)?.cached, 0, "what is forced is neither found nor kept");
    }
    engine.force_routing(None)?;
    let again = outcome(&mut engine, &plain)?;
    assert_eq!((again.cached, again.ids), (0, natural.ids));
    Ok(())
}

fn block_bytes(engine: &Engine) -> u64 {
    let found = engine.report().prefix;
    found.bytes / found.blocks as u64
}

#[test]
fn idle_blocks_keep_their_budget_and_the_oldest_goes_first() -> Result<()> {
    let mut subject = Subject::new(Kernels::Reference)?;
    let prompts: Vec<_> = (0..3).map(|_| subject.tokens(10 * BLOCK + 1)).collect();
    let mut engine = subject.engine()?;
    run(&mut engine, &[greedy(&prompts[0], 1)])?;
    let block = block_bytes(&engine);
    let options = Options { prefix_cache: CacheBudget::Bytes(25 * block), ..subject.options() };
    let mut engine = Engine::load(subject.dir.path(), &options, &mut |_| {})?;
    let mut ask = |prompt: &[u32]| -> Result<usize> {
        let cached = run(&mut engine, &[greedy(prompt, 1)])?.remove(0).cached;
        let found = engine.report().prefix;
        assert!(found.idle_bytes <= found.budget_bytes && found.budget_bytes == 25 * block, "{found:?}");
        assert_eq!(found.idle_bytes, found.bytes, "nobody runs");
        Ok(cached / BLOCK)
    };
    assert_eq!((ask(&prompts[0])?, ask(&prompts[1])?, ask(&prompts[0])?), (0, 0, 10));
    // Five blocks of the second one make room, from its end.
    assert_eq!(ask(&prompts[2])?, 0);
    assert_eq!((ask(&prompts[0])?, ask(&prompts[2])?), (10, 10));
    assert_eq!(ask(&prompts[1])?, 5);
    Ok(())
}

/// The cap holds in every step, a request that needs all of it gets it, and the slab takes no more than idle blocks leave.
#[test]
fn idle_blocks_give_way_to_requests_and_count_in_the_cap() -> Result<()> {
    let mut subject = Subject::new(Kernels::Reference)?;
    let (small, large) = (subject.tokens(600), subject.tokens(3000));
    let mut engine = subject.engine()?;
    run(&mut engine, &[greedy(&small, 1)])?;
    let (report, block) = (engine.report(), block_bytes(&engine));
    let experts = &report.experts;
    let slab = |slots: usize| experts.slot_bytes * (experts.layers.len() * slots) as u64;
    let fixed = report.trunk_bytes + report.scratch_bytes;
    // Both and the slab's least; not both, the chunks' activations and a full slab.
    let cap = fixed + slab(4) + 96 * block;
    let options = Options { memory: Some(cap), prefix_cache: CacheBudget::Bytes(u64::MAX), parallel: 4, ..subject.options() };
    let mut engine = Engine::load(subject.dir.path(), &options, &mut |_| {})?;
    let mut step = |engine: &mut Engine, _: usize| {
        let report = engine.report();
        let taken = fixed + slab(report.experts.slots_per_layer) + report.kv_reserved_bytes + report.prefix.idle_bytes;
        assert!(taken <= cap, "{taken} of {cap} bytes: {report:?}");
    };
    let mut ask = |engine: &mut Engine, prompt: &[u32]| -> Result<usize> {
        let late = Late { at: 0, request: greedy(prompt, 1) };
        let cached = answered(run_with(engine, &[late], &mut step)?)?.remove(0).cached;
        step(engine, 0);
        Ok(cached / BLOCK)
    };
    assert_eq!((ask(&mut engine, &small)?, ask(&mut engine, &small)?), (0, 18));
    assert_eq!(engine.report().prefix.idle_bytes, 18 * block);
    assert_eq!(ask(&mut engine, &large)?, 0);
    assert!(engine.report().prefix.evicted > 0, "the large one took the small one's place");
    assert_eq!(ask(&mut engine, &large)?, 93, "and stays in it");
    // Too large for an empty machine is refused, not because of what is idle.
    engine.set_memory(Some(fixed + slab(4) + 10 * block));
    assert!(engine.report().prefix.idle_bytes <= 10 * block);
    assert!(matches!(engine.admit(greedy(&small, 1)), Err(Error::Memory { .. })));
    Ok(())
}

#[test]
fn idle_blocks_give_way_to_pressure_and_to_a_word() -> Result<()> {
    let mut subject = Subject::new(Kernels::Reference)?;
    let prompt = subject.tokens(600);
    let mut engine = subject.engine()?;
    run(&mut engine, &[greedy(&prompt, 1)])?;
    let block = block_bytes(&engine);
    let idle = |engine: &Engine| engine.report().prefix.idle_bytes / block;
    assert_eq!(idle(&engine), 18);
    let experts = engine.report().experts;
    let wanted = experts.slot_bytes * (experts.layers.len() * experts.slots_wanted) as u64;
    engine.set_ceiling(Some(wanted));
    assert_eq!(idle(&engine), 18, "no pressure yet");
    engine.set_ceiling(Some(0));
    let left = engine.report().prefix;
    assert!(left.idle_bytes <= left.budget_bytes, "{left:?}");
    engine.set_ceiling(None);
    let cleared = engine.clear_prefixes()?;
    assert_eq!((cleared.memory_bytes, cleared.files), (left.idle_bytes, 0));
    assert_eq!((idle(&engine), engine.report().kv_bytes), (0, 0), "the backend's memory too");
    assert_eq!(run(&mut engine, &[greedy(&prompt, 1)])?.remove(0).cached, 0);
    Ok(())
}
