//! Runs an [`Engine`] on the test's own thread and collects what it says. Not a scheduler: it steps until every request
//! is answered. Used by the tests that need no process.

use anyhow::{Result, bail};
use flash_engine::{CallPart, Delivery, Engine, Event, Finish, Kernels, Options, Part, Request, RequestId, Sampling, Step, TokenLogprob};

/// The kernels that are held against the reference: MLX with the feature `mlx`, else the CPU's own.
pub const SERVING: Kernels = if cfg!(feature = "mlx") { Kernels::Mlx } else { Kernels::Auto };

/// The default, with those.
pub fn options() -> Options {
    Options { kernels: SERVING, ..Options::default() }
}

/// What became of one request.
#[derive(Debug, Default)]
pub struct Outcome {
    pub ids: Vec<u32>,
    /// Prompt tokens that were not computed.
    pub cached: usize,
    /// Per token the bits of its log-probability and of its alternatives', if they were asked for; the prompt's first.
    pub bits: Vec<u32>,
    pub text: String,
    pub reasoning: String,
    pub calls: Vec<CallPart>,
    pub finish: Option<Finish>,
    pub price: Option<&'static str>,
    pub error: Option<String>,
}

/// `count` greedy tokens after `prompt`, past any end of turn.
pub fn greedy(prompt: &[u32], count: usize) -> Request {
    Request { max_tokens: Some(count), ignore_eos: true, ..Request::greedy(prompt.to_vec()) }
}

/// As [`greedy`], but drawn at temperature 1, so that the text does not repeat itself.
pub fn drawn(prompt: &[u32], count: usize, seed: u64) -> Request {
    Request { sampling: Sampling { temperature: 1.0, seed: Some(seed), ..Sampling::greedy() }, ..greedy(prompt, count) }
}

/// A request that is admitted before step `at`.
#[derive(Clone, Debug)]
pub struct Late {
    pub at: usize,
    pub request: Request,
}

/// Admits all requests together and steps until each has ended.
pub fn run(engine: &mut Engine, requests: &[Request]) -> Result<Vec<Outcome>> {
    let requests: Vec<Late> = requests.iter().map(|request| Late { at: 0, request: request.clone() }).collect();
    run_with(engine, &requests, &mut |_, _| {})
}

/// Admits each request in its time, and puts the engine in the caller's hands before each step.
pub fn run_with(engine: &mut Engine, requests: &[Late], between: &mut dyn FnMut(&mut Engine, usize)) -> Result<Vec<Outcome>> {
    let mut admitted: Vec<Option<RequestId>> = vec![None; requests.len()];
    let mut outcomes: Vec<Outcome> = requests.iter().map(|_| Outcome::default()).collect();
    let ended = |outcome: &Outcome| outcome.finish.is_some() || outcome.error.is_some();
    let mut steps = 0;
    while !outcomes.iter().all(ended) {
        for (late, id) in requests.iter().zip(&mut admitted) {
            if late.at == steps {
                *id = Some(engine.admit(late.request.clone())?.0);
            }
        }
        between(engine, steps);
        steps += 1;
        let bits = |of: &mut Vec<u32>, logprobs: Vec<TokenLogprob>| {
            for token in logprobs {
                of.push(token.logprob.to_bits());
                of.extend(token.top.iter().map(|(_, logprob)| logprob.to_bits()));
            }
        };
        let mut deliver = |id: RequestId, event: Event| {
            let Some(index) = admitted.iter().position(|&known| known == Some(id)) else { return Delivery::Gone };
            let outcome = &mut outcomes[index];
            match event {
                Event::Prefill { .. } | Event::Routing { .. } => {}
                Event::Prompt(logprobs) => bits(&mut outcome.bits, logprobs),
                Event::Token { parts, logprobs, .. } => {
                    for part in parts {
                        match part {
                            Part::Content(text) => outcome.text.push_str(&text),
                            Part::Reasoning(text) => outcome.reasoning.push_str(&text),
                            Part::Call(part) => outcome.calls.push(part),
                        }
                    }
                    bits(&mut outcome.bits, logprobs);
                }
                Event::Done(done) => {
                    outcome.ids = done.token_ids;
                    outcome.cached = done.cached_tokens;
                    outcome.finish = Some(done.finish);
                    outcome.price = done.price;
                }
                Event::Failed(error) => outcome.error = Some(error.to_string()),
            }
            Delivery::Taken
        };
        let worked = engine.step(&mut deliver) == Step::Worked;
        if !worked && !outcomes.iter().all(ended) && requests.iter().all(|late| late.at < steps) {
            bail!("the engine is idle after {steps} steps and has not answered every request: {outcomes:?}");
        }
    }
    Ok(outcomes)
}

/// The ids of each outcome, or the first error.
pub fn ids(outcomes: Vec<Outcome>) -> Result<Vec<Vec<u32>>> {
    Ok(answered(outcomes)?.into_iter().map(|outcome| outcome.ids).collect())
}

/// The outcomes if all came to an end, else the first error.
pub fn answered(outcomes: Vec<Outcome>) -> Result<Vec<Outcome>> {
    match outcomes.iter().find_map(|outcome| outcome.error.as_deref()) {
        None => Ok(outcomes),
        Some(error) => bail!("a request failed: {error}"),
    }
}
