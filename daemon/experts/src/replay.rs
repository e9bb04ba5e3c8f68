//! What a cache would have done: recorded routing through the real state machine, or through Belady's oracle. No bytes and no
//! threads, so that thousands of tokens take milliseconds. `flashctl trace replay` and the live gap in stats call it, outside
//! of any lock.
//!
//! A layer's experts of one token are one fetch, as when the engine decodes. With fewer slots than that, experts pass through
//! in the order of the trace, and hit rates are near the engine's but not equal to them.

use std::{fmt, str::FromStr, time::Duration};

use crate::{
    PolicyKind, Routing,
    cache::{Core, Found, Shape, Taken, belady},
    key::{ExpertId, LayerId},
};

/// Which experts each token used in each layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    pub layers: usize,
    /// Of each layer.
    pub experts: usize,
    ids: Vec<ExpertId>,
    /// Where the ids of each layer of each token end.
    ends: Vec<usize>,
}

impl Trace {
    /// Without tokens. `layers` is at least 1.
    pub fn new(layers: usize, experts: usize) -> Self {
        assert!(layers > 0, "a trace has layers");
        Self { layers, experts, ids: Vec::new(), ends: Vec::new() }
    }

    /// Adds what the next layer used; a token is whole after `layers` calls. Refuses what no router can choose.
    pub fn push(&mut self, ids: &[ExpertId]) -> Result<(), String> {
        let token = || format!("token {} layer {}", self.ends.len() / self.layers, self.ends.len() % self.layers);
        if ids.len() > Routing::TOKEN_MAX {
            return Err(format!("{}: {} experts for one token; at most {}", token(), ids.len(), Routing::TOKEN_MAX));
        }
        if let Some(id) = ids.iter().find(|id| id.index() >= self.experts) {
            return Err(format!("{}: expert {} of {}", token(), id.0, self.experts));
        }
        if let Some((_, id)) = ids.iter().enumerate().find(|(i, id)| ids[..*i].contains(id)) {
            return Err(format!("{}: expert {} twice", token(), id.0));
        }
        self.ids.extend_from_slice(ids);
        self.ends.push(self.ids.len());
        Ok(())
    }

    /// Whole ones.
    pub fn tokens(&self) -> usize {
        self.ends.len() / self.layers
    }

    /// The most experts that a token uses in a layer.
    pub fn top_k(&self) -> usize {
        (0..self.layers).flat_map(|layer| self.layer(layer)).map(<[_]>::len).max().unwrap_or(0)
    }

    pub fn get(&self, token: usize, layer: usize) -> &[ExpertId] {
        let at = token * self.layers + layer;
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.ids[start..self.ends[at]]
    }

    fn layer(&self, layer: usize) -> impl DoubleEndedIterator<Item = &[ExpertId]> + Clone {
        (0..self.tokens()).map(move |token| self.get(token, layer))
    }
}

/// What decides in a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayPolicy {
    /// As a running engine does.
    Live(PolicyKind),
    /// With knowledge of the future: the bound.
    Belady,
}

impl FromStr for ReplayPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("belady") {
            return Ok(Self::Belady);
        }
        text.parse().map(Self::Live).map_err(|error| format!("{error}; or belady, in a replay"))
    }
}

impl fmt::Display for ReplayPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Live(kind) => kind.fmt(f),
            Self::Belady => f.pad("belady"),
        }
    }
}

/// Uses that found their expert in memory, and that did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub hits: u64,
    pub misses: u64,
}

/// The result of a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    pub hits: u64,
    pub misses: u64,
    pub per_layer: Vec<Tally>,
}

impl Replayed {
    /// 0 for nothing at all.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / (self.hits + self.misses).max(1) as f64
    }
}

/// Runs a trace from a cold cache with so many slots in each layer, within 1 and the number of experts.
pub fn replay(trace: &Trace, policy: ReplayPolicy, slots: usize) -> Replayed {
    let slots = slots.clamp(1, trace.experts.max(1));
    let per_layer = match policy {
        ReplayPolicy::Live(kind) => live(trace, kind, slots),
        ReplayPolicy::Belady => (0..trace.layers).map(|layer| oracle(trace, layer, slots)).collect(),
    };
    let sum = |field: fn(&Tally) -> u64| per_layer.iter().map(field).sum();
    Replayed { hits: sum(|layer| layer.hits), misses: sum(|layer| layer.misses), per_layer }
}

fn oracle(trace: &Trace, layer: usize, slots: usize) -> Tally {
    let uses: usize = trace.layer(layer).map(<[_]>::len).sum();
    let hits = belady(trace.layer(layer), trace.experts, slots);
    Tally { hits, misses: uses as u64 - hits }
}

/// The engine and one loader, taking turns.
fn live(trace: &Trace, kind: PolicyKind, slots: usize) -> Vec<Tally> {
    let shape = Shape { layers: trace.layers, experts: trace.experts, places: slots, loaders: 1 };
    let mut core = Core::new(shape, kind);
    core.resize(slots);
    let mut found = Vec::new();
    for token in 0..trace.tokens() {
        for layer in 0..trace.layers {
            core.begin(LayerId(layer as u16), &Routing::token(trace.get(token, layer)));
            loop {
                match core.take(&mut found) {
                    Taken::Found => {}
                    Taken::Wait => {
                        let load = core.start().expect("what is waited for is queued");
                        core.loaded(load, Ok(0), Duration::ZERO);
                    }
                    Taken::Stuck => unreachable!("everything found is done before more is asked for"),
                    Taken::End => break,
                }
                for found in found.drain(..) {
                    match found {
                        Found::Ready(pin) => core.done(pin),
                        Found::Failed(..) => unreachable!("no load fails here"),
                    }
                }
            }
            core.end();
        }
    }
    core.stats().layers.iter().map(|layer| Tally { hits: layer.hits, misses: layer.misses }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One layer of four experts, a digit per use, tokens apart.
    fn trace(text: &str) -> Trace {
        let mut trace = Trace::new(1, 4);
        for token in text.split(' ') {
            trace.push(&token.bytes().map(|digit| ExpertId(u16::from(digit - b'0'))).collect::<Vec<_>>()).unwrap();
        }
        trace
    }

    #[test]
    fn hits_of_small_traces_are_those_counted_by_hand() {
        let check = |text: &str, slots: usize, expected: [(&str, u64); 5]| {
            let trace = trace(text);
            for (policy, hits) in expected {
                let misses = trace.ids.len() as u64 - hits;
                let expected = Replayed { hits, misses, per_layer: vec![Tally { hits, misses }] };
                assert_eq!(replay(&trace, policy.parse().unwrap(), slots), expected, "{policy} of {text:?}");
            }
        };
        // A loop one longer than the cache: recency keeps what comes last, the oracle keeps one of them for good.
        check("0 1 2 0 1 2 0 1 2", 2, [("lru", 0), ("lfru", 0), ("lcp", 0), ("none", 0), ("belady", 3)]);
        // One favourite between others.
        check("0 0 0 1 2 0 3 1 0 2 3 0", 2, [("lru", 2), ("lfru", 5), ("lcp", 5), ("none", 0), ("belady", 5)]);
        // A token's experts are in memory together, and may evict each other only when they do not fit.
        check("01 12 01", 2, [("lru", 2), ("lfru", 2), ("lcp", 2), ("none", 0), ("belady", 2)]);
        check("0123 0123", 4, [("lru", 4), ("lfru", 4), ("lcp", 4), ("none", 0), ("belady", 4)]);
        // Two of three stay: which two, the future says.
        check("012 12 012 12", 2, [("lru", 5), ("lfru", 5), ("lcp", 5), ("none", 0), ("belady", 6)]);
        check("0", 1, [("lru", 0), ("lfru", 0), ("lcp", 0), ("none", 0), ("belady", 0)]);
    }

    #[test]
    fn no_policy_beats_the_oracle() {
        let mut state = 1u64;
        let mut random = |end: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % end
        };
        let mut trace = Trace::new(2, 16);
        for _ in 0..500 {
            for _ in 0..2 {
                let mut ids: Vec<ExpertId> = Vec::new();
                while ids.len() < 3 {
                    let id = ExpertId((random(16) * random(16) / 15) as u16 % 16);
                    if !ids.contains(&id) {
                        ids.push(id);
                    }
                }
                trace.push(&ids).unwrap();
            }
        }
        // With one or two slots experts of a token pass through.
        for slots in 1..=16 {
            let belady = replay(&trace, ReplayPolicy::Belady, slots).hit_rate();
            for kind in [PolicyKind::Lfru, PolicyKind::Lru, PolicyKind::Lcp] {
                let rate = replay(&trace, ReplayPolicy::Live(kind), slots).hit_rate();
                assert!(rate <= belady && (rate > 0.0 || slots < 3), "{kind} with {slots} slots: {rate} of {belady}");
            }
        }
    }

    #[test]
    fn what_no_router_chooses_is_refused() {
        let mut trace = Trace::new(2, 4);
        assert_eq!(trace.push(&[ExpertId(4)]), Err("token 0 layer 0: expert 4 of 4".into()));
        trace.push(&[ExpertId(3)]).unwrap();
        assert_eq!(trace.push(&[ExpertId(1), ExpertId(1)]), Err("token 0 layer 1: expert 1 twice".into()));
        assert_eq!((trace.tokens(), trace.top_k()), (0, 0), "half a token is none");
        assert!("fifo".parse::<ReplayPolicy>().unwrap_err().contains("belady"));
        assert_eq!(format!("{:>7}", ReplayPolicy::Belady), " belady");
    }
}
