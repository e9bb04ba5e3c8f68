//! The routing of the latest decoded tokens, in a ring that is allocated once: what live replays look at. Not a log; prompts
//! are left out, their uses of one layer come in one fetch. The engine's thread writes and copies, so there is no lock.

use crate::{
    Routing,
    key::{ExpertId, LayerId},
    replay::Trace,
};

/// A few of them fill the ring of a model of any size within [`BYTES_MAX`].
const TOKENS: usize = 1024;
const BYTES_MAX: usize = 4 << 20;

/// A step of more rows is a prompt, or has one in it.
const DECODED_MAX: u32 = 16;

/// No expert has this number: there are 65,535 at most.
const NONE: ExpertId = ExpertId(u16::MAX);

#[derive(Debug)]
pub(crate) struct Recent {
    experts: usize,
    top_k: usize,
    tokens: usize,
    /// [layers, tokens, top_k]
    ids: Vec<ExpertId>,
    /// Per layer, tokens so far.
    seen: Vec<usize>,
}

impl Recent {
    pub(crate) fn new(layers: usize, experts: usize, top_k: usize) -> Self {
        let tokens = (BYTES_MAX / (layers * top_k * size_of::<ExpertId>())).clamp(DECODED_MAX as usize, TOKENS);
        Self { experts, top_k, tokens, ids: vec![NONE; layers * tokens * top_k], seen: vec![0; layers] }
    }

    pub(crate) fn record(&mut self, layer: LayerId, routing: &Routing<'_>) {
        if !routing.first_time || routing.tokens > DECODED_MAX {
            return;
        }
        let seen = &mut self.seen[layer.index()];
        let start = layer.index() * self.tokens;
        let (from, tokens, top_k) = (*seen, self.tokens, self.top_k);
        let row_at = |row: usize| (start + (from + row) % tokens) * top_k;
        *seen += routing.tokens as usize;
        (0..routing.tokens as usize).for_each(|row| self.ids[row_at(row)..][..top_k].fill(NONE));
        for (i, expert) in routing.experts.iter().enumerate() {
            for &row in routing.rows_of(i) {
                let row = &mut self.ids[row_at(row as usize)..][..top_k];
                if let Some(place) = row.iter_mut().find(|id| **id == NONE) {
                    *place = *expert;
                }
            }
        }
    }

    /// The tokens that every layer remembers, the oldest first.
    pub(crate) fn trace(&self) -> Trace {
        let mut trace = Trace::new(self.seen.len(), self.experts);
        let tokens = self.seen.iter().copied().min().unwrap_or(0).min(self.tokens);
        for back in (1..=tokens).rev() {
            for (layer, seen) in self.seen.iter().enumerate() {
                let row = &self.ids[(layer * self.tokens + (seen - back) % self.tokens) * self.top_k..][..self.top_k];
                let used = row.iter().position(|id| *id == NONE).unwrap_or(self.top_k);
                trace.push(&row[..used]).expect("the ring holds what routers chose");
            }
        }
        trace
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_decoded_tokens_are_remembered() {
        let mut recent = Recent::new(2, 9, 2);
        let ids = |ids: [u16; 2]| ids.map(ExpertId);
        for token in 0..1500u16 {
            recent.record(LayerId(0), &Routing::token(&ids([token % 8, 8])));
            recent.record(LayerId(1), &Routing::token(&ids([8, token % 7])));
        }
        // A batch of two rows; a row that lost its sequence in layer 1; a prompt; the rest of a fetch.
        let experts = ids([3, 5]);
        let batch = Routing { experts: &experts, first: &[0, 2, 3], rows: &[0, 1, 1], tokens: 2, first_time: true };
        recent.record(LayerId(0), &batch);
        recent.record(LayerId(1), &Routing { first: &[0, 1, 2], rows: &[1, 1], ..batch });
        recent.record(LayerId(0), &Routing { tokens: 17, ..batch });
        recent.record(LayerId(0), &Routing::rest(&experts, 1));
        let trace = recent.trace();
        assert_eq!((trace.tokens(), trace.layers, trace.experts, trace.top_k()), (TOKENS, 2, 9, 2));
        for token in 0..TOKENS - 2 {
            let number = (1500 + 2 - TOKENS + token) as u16;
            assert_eq!(trace.get(token, 0), ids([number % 8, 8]));
            assert_eq!(trace.get(token, 1), ids([8, number % 7]));
        }
        let last = |back, layer| trace.get(TOKENS - back, layer);
        assert_eq!([last(2, 0), last(1, 0), last(2, 1), last(1, 1)], [&ids([3, 0])[..1], &ids([3, 5]), &[], &ids([3, 5])]);
    }
}
