//! The next tokens of those who decode: one of each by all threads together, or a few by each thread apart ([`super::apart`]).

use std::{collections::HashSet, time::Instant};

use super::{Engine, counters, said::say};
use crate::{Delivery, Error, Event, Lookahead, RequestId, profile::Stage, sequence::Sequence};

impl Engine {
    /// One position of every decoding request, or some of each; false if there is none.
    pub(super) fn decode(&mut self, gone: &mut HashSet<RequestId>, deliver: &mut (dyn FnMut(RequestId, Event) -> Delivery + Send)) -> bool {
        let rows = self.running.iter().filter(|sequence| sequence.decodes()).count();
        let reads = |sequence: &Sequence| sequence.prefilling() && !sequence.paused;
        // Whoever reads a prompt wants its turn soon; a listener to routing wants that of all.
        let may = self.backend.lanes(rows) > 1
            && self.forward.forced.is_none()
            && !self.running.iter().any(|sequence| sequence.record || reads(sequence));
        let began = Instant::now();
        let apart = if may && self.trials.apart(rows) { self.decode_apart(gone, deliver) } else { None };
        if apart.is_none() && rows > 0 {
            self.decode_together(gone, deliver);
        }
        if may {
            self.trials.took(rows, apart.is_some(), apart.unwrap_or(rows), began.elapsed());
        }
        rows > 0
    }

    /// One position of every decoding request.
    fn decode_together(&mut self, gone: &mut HashSet<RequestId>, deliver: &mut dyn FnMut(RequestId, Event) -> Delivery) {
        self.look_ahead();
        let Self { running, decoding, backend, experts, forward, .. } = self;
        let record = running.iter().any(|sequence| sequence.record && sequence.decodes());
        decoding.start(backend, record, |batch| {
            for sequence in running.iter().filter(|sequence| sequence.decodes()) {
                batch.rows.push(sequence.next(batch.tables.len()));
                batch.tables.push(sequence.blocks.clone());
            }
        });
        let rows = decoding.batch.rows.len();
        forward.run(backend, experts, decoding);
        let now = counters(experts);
        let logits = backend.logits(&mut decoding.act, 0..rows);
        experts.release();
        let began = Instant::now();
        let sequences = running.iter_mut().filter(|sequence| sequence.decodes());
        for ((row, sequence), logits) in sequences.enumerate().zip(logits.chunks_exact(self.info.vocab_size)) {
            if let Some(lost) = decoding.lost.iter().find(|lost| lost.sequence == row) {
                deliver(sequence.id, Event::Failed(Error::Experts(lost.error.clone())));
                gone.insert(sequence.id);
                continue;
            }
            sequence.cached += 1;
            if sequence.record {
                deliver(sequence.id, decoding.routing(row..row + 1));
            }
            say(sequence, &self.text, logits, now, &mut self.scratch, gone, deliver);
        }
        backend.spent(Stage::Sampling, began);
    }

    fn look_ahead(&mut self) {
        self.forward.foresight.on = match self.options.lookahead {
            Lookahead::Off => false,
            Lookahead::On => true,
            Lookahead::Auto => {
                let (useful, wasted) = self.experts.prefetches();
                self.info.packed && self.worth.go_on(useful, wasted)
            }
        };
    }
}
