//! Counters of the daemon's life and the speed of its recent requests. The worker and the services add, Stats reads;
//! what the engine counts itself is in its report.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use flash_engine::Done;

/// Recent requests that speeds are taken over.
const RECENT: usize = 100;

#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) finished: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) completion_tokens: AtomicU64,
    grammar_ns: AtomicU64,
    pub(crate) relaxed: AtomicU64,
    recent: Mutex<VecDeque<Sample>>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Those that were computed.
    prompt_tokens: usize,
    prefill: Duration,
    ttft: Duration,
    /// The first token belongs to the prompt's time.
    decoded_tokens: usize,
    decode: Duration,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Speed {
    pub(crate) decode_tok_s: Option<f64>,
    pub(crate) prefill_tok_s: Option<f64>,
    pub(crate) ttft_ms_p50: Option<f64>,
    pub(crate) ttft_ms_p95: Option<f64>,
}

impl Totals {
    /// Requests that came to their end, whatever that was.
    pub(crate) fn ended(&self) -> u64 {
        [&self.finished, &self.cancelled, &self.failed].map(|count| count.load(Relaxed)).iter().sum()
    }

    /// A request's grammar has been made, perhaps a laxer one than asked for.
    pub(crate) fn grammar(&self, took: Duration, relaxed: bool) {
        self.relaxed.fetch_add(relaxed.into(), Relaxed);
        self.grammar_ns.fetch_add(took.as_nanos() as u64, Relaxed);
    }

    /// What all of them took.
    pub(crate) fn grammars(&self) -> Duration {
        Duration::from_nanos(self.grammar_ns.load(Relaxed))
    }

    pub(crate) fn finish(&self, done: &Done) {
        self.finished.fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(done.prompt_tokens as u64, Relaxed);
        self.completion_tokens.fetch_add(done.token_ids.len() as u64, Relaxed);
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == RECENT {
            recent.pop_front();
        }
        recent.push_back(Sample {
            prompt_tokens: done.prompt_tokens - done.cached_tokens,
            prefill: done.timing.prefill,
            ttft: done.timing.ttft,
            decoded_tokens: done.token_ids.len().saturating_sub(1),
            decode: done.timing.decode,
        });
    }

    pub(crate) fn speed(&self) -> Speed {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = |tokens: fn(&Sample) -> usize, time: fn(&Sample) -> Duration| {
            let tokens: usize = recent.iter().map(tokens).sum();
            let seconds: f64 = recent.iter().map(|sample| time(sample).as_secs_f64()).sum();
            (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
        };
        let mut ttft: Vec<f64> = recent.iter().map(|sample| sample.ttft.as_secs_f64() * 1e3).collect();
        ttft.sort_by(f64::total_cmp);
        let percentile = |share: f64| ttft.get(((ttft.len().max(1) - 1) as f64 * share).round() as usize).copied();
        Speed {
            decode_tok_s: rate(|sample| sample.decoded_tokens, |sample| sample.decode),
            prefill_tok_s: rate(|sample| sample.prompt_tokens, |sample| sample.prefill),
            ttft_ms_p50: percentile(0.5),
            ttft_ms_p95: percentile(0.95),
        }
    }

    /// Seconds until a place in a full queue is likely: what the recent requests took, divided among those that run
    /// together. 1..=60.
    pub(crate) fn retry_after_s(&self, parallel: usize) -> u64 {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let total: f64 = recent.iter().map(|sample| (sample.prefill + sample.decode).as_secs_f64()).sum();
        (total / recent.len().max(1) as f64 / parallel.max(1) as f64).ceil().clamp(1.0, 60.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use flash_engine::{Finish, Timing};

    use super::*;

    fn done(prompt_tokens: usize, tokens: usize, [prefill, ttft, decode]: [u64; 3]) -> Done {
        let [prefill, ttft, decode] = [prefill, ttft, decode].map(Duration::from_millis);
        let timing = Timing { prefill, ttft, decode, ..Timing::default() };
        Done {
            finish: Finish::Length,
            prompt_tokens,
            cached_tokens: 0,
            reasoning_tokens: 0,
            token_ids: vec![0; tokens],
            timing,
            price: None,
        }
    }

    #[test]
    fn speeds_are_of_the_recent_requests() {
        let totals = Totals::default();
        assert_eq!((totals.speed(), totals.retry_after_s(2)), (Speed::default(), 1));
        totals.finish(&done(50, 0, [0, 0, 0]));
        assert_eq!(totals.speed().decode_tok_s, None);
        for n in 1..=100 {
            totals.finish(&done(50, 11, [1000, n, 9000]));
        }
        let speed = totals.speed();
        assert_eq!((speed.prefill_tok_s, speed.ttft_ms_p50, speed.ttft_ms_p95), (Some(50.0), Some(51.0), Some(95.0)));
        assert!((speed.decode_tok_s.expect("measured") - 10.0 / 9.0).abs() < 1e-9);
        assert_eq!((totals.retry_after_s(2), totals.retry_after_s(100)), (5, 1));
        assert_eq!(totals.finished.load(Relaxed), 101);
    }
}
