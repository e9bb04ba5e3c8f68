//! One request on its way: tokens, KV blocks, stop rules, what it has said so far.

use std::time::{Duration, Instant};

use crate::{
    Done, Finish, Request, RequestId, Text, Timing,
    forward::Pass,
    kv::Table,
    model::text::Decoder,
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
    max_tokens: usize,
    ignore_eos: bool,
    top_logprobs: Option<usize>,
    sampler: Sampler,
    decoder: Decoder,
    stops: Stops,
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
    pub(crate) text: String,
    pub(crate) logprobs: Vec<crate::TokenLogprob>,
    pub(crate) finish: Option<Finish>,
}

impl Sequence {
    /// `max_tokens` is what is left of the context at most.
    pub(crate) fn new(id: RequestId, request: Request, max_tokens: usize) -> Self {
        Self {
            id,
            prompt: request.prompt.len(),
            tokens: request.prompt,
            cached: 0,
            reused: 0,
            keep: request.keep,
            suspect: false,
            blocks: Table::default(),
            pass: None,
            paused: false,
            record: request.record_routing,
            max_tokens,
            ignore_eos: request.ignore_eos,
            top_logprobs: request.top_logprobs,
            sampler: Sampler::new(request.sampling),
            decoder: Decoder::default(),
            stops: Stops::new(request.stop),
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

    /// What of its prompt need not be computed, if it is there: all but the last token, whose logits are wanted. Nothing where
    /// every position's routing is.
    pub(crate) fn reusable(&self) -> &[u32] {
        &self.tokens[..if self.record { 0 } else { self.prompt - 1 }]
    }

    /// Draws the next token from the logits of its last position; `None` if they are not finite.
    pub(crate) fn advance(&mut self, text: &Text, logits: &[f32], scratch: &mut Vec<f32>) -> Option<Said> {
        scratch.clear();
        scratch.extend_from_slice(logits);
        let token = self.sampler.draw(scratch, &self.tokens)?;
        self.clock.first_token.get_or_insert_with(Instant::now);
        self.tokens.push(token);
        let logprobs = self.top_logprobs.map(|top| logprob(logits, token, top)).into_iter().collect();
        if !self.ignore_eos && text.end_ids().contains(&token) {
            return Some(self.end(logprobs, Finish::Stop(None)));
        }
        let piece = self.decoder.push(text, token);
        let (said, stop) = self.stops.push(&piece);
        if let Some(stop) = stop {
            return Some(Said { text: said, logprobs, finish: Some(Finish::Stop(Some(stop))) });
        }
        if self.tokens.len() - self.prompt >= self.max_tokens {
            let mut last = self.end(logprobs, Finish::Length);
            last.text.insert_str(0, &said);
            return Some(last);
        }
        Some(Said { text: said, logprobs, finish: None })
    }

    /// Releases what was held back. A stop string completed by the last bytes still counts.
    fn end(&mut self, logprobs: Vec<crate::TokenLogprob>, finish: Finish) -> Said {
        let rest = self.decoder.finish();
        let (mut text, stop) = self.stops.push(&rest);
        let finish = if let Some(stop) = stop {
            Finish::Stop(Some(stop))
        } else {
            text.push_str(&self.stops.release());
            finish
        };
        Said { text, logprobs, finish: Some(finish) }
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
        Done { finish, prompt_tokens: self.prompt, cached_tokens: self.reused, token_ids: self.tokens[self.prompt..].to_vec(), timing }
    }
}

/// Looks for stop strings in the text as it comes, holding back what may be the start of one.
#[derive(Debug)]
struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// The text that may be said now, and the stop string that ends it.
    fn push(&mut self, piece: &str) -> (String, Option<String>) {
        if self.stops.is_empty() {
            return (piece.to_owned(), None);
        }
        self.held.push_str(piece);
        let found =
            self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop))).min_by_key(|(at, stop)| (*at, stop.len()));
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let may_start = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(may_start).unwrap_or(self.held.len());
        let held = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, held), None)
    }

    fn release(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_may_span_pieces_and_nothing_else_is_held() {
        let check = |stops: &[&str], pieces: &[&str], expected: &[&str], ended: Option<&str>| {
            let mut matcher = Stops::new(stops.iter().map(ToString::to_string).collect());
            let mut said = Vec::new();
            for piece in pieces {
                let (text, stop) = matcher.push(piece);
                said.push(text);
                if let Some(stop) = stop {
                    assert_eq!(Some(stop.as_str()), ended);
                    assert_eq!(said, expected);
                    return;
                }
            }
            said.push(matcher.release());
            assert_eq!(ended, None);
            assert_eq!(said, expected, "{stops:?} {pieces:?}");
        };
        check(&[], &["a", "b"], &["a", "b", ""], None);
        check(&["END"], &["the E", "N", "D of"], &["the ", "", ""], Some("END"));
        check(&["END"], &["the E", "N", "x"], &["the ", "", "ENx", ""], None);
        check(&["END"], &["E"], &["", "E"], None);
        check(&["\n\n", "é!"], &["caf", "é", "\n", "\n"], &["caf", "", "é", ""], Some("\n\n"));
        check(&["aab"], &["aa", "ab"], &["", "a"], Some("aab"));
        // The earliest match wins, then the shorter stop.
        check(&["bc", "b"], &["abcd"], &["a"], Some("b"));
    }
}
