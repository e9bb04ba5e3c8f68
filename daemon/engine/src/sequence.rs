//! One request on its way: tokens, KV blocks, stop rules, what it has said so far.

use std::time::{Duration, Instant};

use crate::{
    Channel, Done, Error, Finish, Part, Request, RequestId, Script, Text, Timing,
    backend::Row,
    forward::Pass,
    kv::Table,
    model::output::{Added, Output},
    sample::{Sampler, logprob},
};

/// State of an admitted request.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    /// Prompt, then completion.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt: usize,
    /// Positions whose keys and values are in the KV cache.
    pub(crate) cached: usize,
    /// Those of them that were there already.
    pub(crate) reused: usize,
    /// Those of its prompt, if they were computed in chunks as any other request's are.
    pub(crate) on_grid: usize,
    /// Others decoded while a chunk was read, which is cut into shorter pieces then.
    pub(crate) hurried: bool,
    /// [`Done::price`]
    pub(crate) price: Option<&'static str>,
    /// First tokens that are to be kept on disk.
    pub(crate) keep: usize,
    /// Its logits were not finite: nothing of what it computed is to be trusted.
    pub(crate) suspect: bool,
    /// Taken when it starts to run, for every position it may reach.
    pub(crate) blocks: Table,
    /// A chunk of its prompt that is being read.
    pub(crate) pass: Option<Box<Pass>>,
    /// The receiver has no room: no step until it says so.
    pub(crate) paused: bool,
    /// Wants [`crate::Event::Routing`].
    pub(crate) record: bool,
    /// Wants [`crate::Event::Prompt`].
    pub(crate) scored: bool,
    max_tokens: usize,
    ignore_eos: bool,
    top_logprobs: Option<usize>,
    sampler: Sampler,
    script: Option<Script>,
    output: Output,
    clock: Clock,
}

#[derive(Debug)]
struct Clock {
    admitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    /// Counters of the expert cache when it started.
    at_start: Counters,
}

/// Expert cache counters, to be compared between two moments.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) bytes: u64,
}

/// What a new token adds to the reply.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) parts: Vec<Part>,
    pub(crate) channel: Channel,
    pub(crate) logprobs: Vec<crate::TokenLogprob>,
    pub(crate) finish: Option<Finish>,
}

impl Sequence {
    /// `max_tokens` is what is left of the context at most.
    pub(crate) fn new(id: RequestId, request: Request, max_tokens: usize, script: Option<Script>) -> Self {
        Self {
            id,
            prompt: request.prompt.len(),
            tokens: request.prompt,
            cached: 0,
            reused: 0,
            on_grid: 0,
            hurried: false,
            price: None,
            keep: request.keep,
            suspect: false,
            blocks: Table::default(),
            pass: None,
            paused: false,
            record: request.record_routing,
            scored: request.prompt_logprobs && request.top_logprobs.is_some(),
            max_tokens,
            ignore_eos: request.ignore_eos,
            top_logprobs: request.top_logprobs,
            sampler: Sampler::new(request.sampling),
            script,
            output: Output::new(request.reply, request.stop),
            clock: Clock { admitted: Instant::now(), started: None, first_token: None, at_start: Counters::default() },
        }
    }

    /// Positions it may reach: the last token it generates is never fed back.
    pub(crate) fn positions(&self) -> usize {
        self.prompt + self.max_tokens - 1
    }

    pub(crate) fn start(&mut self, counters: Counters) {
        self.clock.started = Some(Instant::now());
        self.clock.at_start = counters;
    }

    pub(crate) fn prefilling(&self) -> bool {
        self.cached < self.prompt
    }

    /// Its next token can be computed.
    pub(crate) fn decodes(&self) -> bool {
        !self.paused && !self.prefilling()
    }

    /// What is computed for its next token, as the `index`-th of a batch.
    pub(crate) fn next(&self, index: usize) -> Row {
        Row { token: self.tokens[self.cached], position: self.cached, sequence: index }
    }

    /// What of its prompt need not be computed, if it is there: all but the last token, whose logits are wanted. Nothing where
    /// every position's routing is, or logits.
    pub(crate) fn reusable(&self) -> &[u32] {
        &self.tokens[..if self.record || self.scored { 0 } else { self.prompt - 1 }]
    }

    /// Log-probabilities of the prompt's tokens that follow those from `first` on, by their logits [positions, vocab].
    pub(crate) fn score(&self, first: usize, logits: &[f32], vocab: usize) -> Vec<crate::TokenLogprob> {
        let top = self.top_logprobs.unwrap_or(0);
        let next = self.tokens[..self.prompt].iter().skip(first + 1);
        next.zip(logits.chunks_exact(vocab)).map(|(token, logits)| logprob(logits, *token, top, None)).collect()
    }

    /// Draws the next token from the logits of its last position.
    pub(crate) fn advance(&mut self, text: &Text, logits: &[f32], scratch: &mut Vec<f32>) -> Result<Said, Error> {
        scratch.clear();
        scratch.extend_from_slice(logits);
        if let Some(Script(script)) = &self.script {
            script(&self.tokens, self.prompt, scratch);
        }
        self.sampler.penalize(scratch, &self.tokens);
        let forced = self.output.forced();
        // A mask looks at the whole vocabulary, and most often the model keeps to the form by itself.
        let guesses = forced.is_none() && self.output.guided() && self.top_logprobs.is_none() && self.sampler.may_guess();
        let guess = forced.or_else(|| guesses.then(|| self.sampler.draw(scratch, None)).flatten());
        let (token, mask) = match guess {
            Some(token) if forced.is_some() || self.output.allows(text, token)? => (guess, None),
            _ => {
                let mask = self.output.mask(text)?;
                (self.sampler.draw(scratch, mask), mask)
            }
        };
        self.suspect |= token.is_none();
        let token = token.ok_or_else(|| Error::Internal("the model's logits are not finite".into()))?;
        self.sampler.count(token);
        self.clock.first_token.get_or_insert_with(Instant::now);
        let logprob = self.top_logprobs.map(|top| logprob(logits, token, top, mask));
        self.tokens.push(token);
        let mut added = Added::default();
        if !self.ignore_eos && text.end_ids().contains(&token) {
            self.output.end(&mut added, Finish::Stop(None));
            added.channel = Some(Channel::Content);
        } else {
            added = self.output.push(text, token, logprob)?;
            if added.finish.is_none() && self.tokens.len() - self.prompt >= self.max_tokens {
                self.output.end(&mut added, Finish::Length);
            }
        }
        let Added { parts, channel, finish, logprobs } = added;
        Ok(Said { parts, channel: channel.unwrap_or_default(), logprobs, finish })
    }

    pub(crate) fn done(&self, finish: Finish, now: Counters) -> Done {
        let clock = &self.clock;
        let since = |later: Option<Instant>, earlier: Option<Instant>| match (later, earlier) {
            (Some(later), Some(earlier)) => later.duration_since(earlier),
            _ => Duration::ZERO,
        };
        let timing = Timing {
            queue: since(clock.started, Some(clock.admitted)),
            prefill: since(clock.first_token, clock.started),
            ttft: since(clock.first_token, Some(clock.admitted)),
            decode: clock.first_token.map_or(Duration::ZERO, |first| first.elapsed()),
            expert_hits: now.hits - clock.at_start.hits,
            expert_misses: now.misses - clock.at_start.misses,
            ssd_bytes: now.bytes - clock.at_start.bytes,
        };
        Done {
            finish,
            prompt_tokens: self.prompt,
            cached_tokens: self.reused,
            reasoning_tokens: self.output.reasoning_tokens(),
            token_ids: self.tokens[self.prompt..].to_vec(),
            timing,
            price: self.price,
        }
    }
}
