//! Decoding apart: each thread takes some requests through whole steps, draws included, and meets the others after a while instead of
//! after every product. Where the cache has room for every expert: who misses one ends the meeting, and it is loaded by a step of all
//! together. What two threads need, each reads for itself; whether that costs more than meeting depends on model and machine, so
//! [`Trials`] finds out. Each token is what it would have been.
//!
//! [`Trials`]: crate::schedule::Trials

use std::{
    collections::HashSet,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use flash_experts::Held;

use super::{Engine, said::say};
use crate::{
    Delivery, Event, RequestId, Text,
    backend::{
        Backend,
        cpu::{Crew, lock},
    },
    forward::{Forward, Lane},
    profile::Stage,
    sequence::{Counters, Sequence},
};

/// From one meeting to the next: commands wait as long, and a meeting costs half a step.
const MEETING: Duration = Duration::from_millis(25);
/// Positions that memory is taken for before: steps until the next meeting, at most.
const STEPS: usize = 64;

/// A thread's requests and what it computes them with.
#[derive(Debug, Default)]
pub(super) struct Own {
    lane: Lane,
    scratch: Vec<f32>,
}

/// What the threads have in common until they meet.
struct Meeting<'a> {
    forward: &'a Forward,
    experts: Held<'a>,
    text: &'a Text,
    vocab: usize,
    end: Instant,
    /// A request has ended or cannot go on: others may take its place.
    over: AtomicBool,
    /// An expert was not in memory.
    missed: AtomicBool,
    tokens: AtomicUsize,
    gone: Mutex<&'a mut HashSet<RequestId>>,
    deliver: Mutex<&'a mut (dyn FnMut(RequestId, Event) -> Delivery + Send)>,
}

impl Engine {
    /// Decodes apart for a while; how many tokens that gave, or `None` if it has to be done together now.
    pub(super) fn decode_apart(
        &mut self,
        gone: &mut HashSet<RequestId>,
        deliver: &mut (dyn FnMut(RequestId, Event) -> Delivery + Send),
    ) -> Option<usize> {
        let Self { running, backend, experts, forward, text, info, owns, meetings, missed, apart, .. } = self;
        #[cfg_attr(not(feature = "mlx"), expect(irrefutable_let_patterns, reason = "there is another backend with the feature"))]
        let Backend::Cpu(cpu) = backend else { return None };
        if experts.slots() < info.experts || std::mem::take(missed) {
            return None;
        }
        let mut sequences: Vec<_> = running.iter_mut().filter(|sequence| sequence.decodes()).collect();
        for sequence in &sequences {
            cpu.reserve(&sequence.blocks, sequence.cached..(sequence.cached + STEPS).min(sequence.positions()));
        }
        // A thread whose core is slower than the others' is not always the same requests'.
        *meetings += 1;
        let first = *meetings % sequences.len();
        sequences.rotate_left(first);
        let lanes = cpu.lanes(sequences.len());
        owns.resize_with(lanes.max(owns.len()), Mutex::default);
        let (count, mut sequences) = (sequences.len(), sequences.into_iter());
        let share =
            |lane: usize| Mutex::new(sequences.by_ref().take((lane + 1) * count / lanes - lane * count / lanes).collect::<Vec<_>>());
        let shares: Vec<_> = (0..lanes).map(share).collect();
        let meeting = Meeting {
            forward,
            experts: experts.held(),
            text,
            vocab: info.vocab_size,
            end: Instant::now() + MEETING,
            over: AtomicBool::new(false),
            missed: AtomicBool::new(false),
            tokens: AtomicUsize::new(0),
            gone: Mutex::new(gone),
            deliver: Mutex::new(deliver),
        };
        cpu.apart(lanes, &|lane, crew| meeting.go_on(crew, &mut lock(&owns[lane]), &mut lock(&shares[lane])));
        let tokens = meeting.tokens.into_inner();
        *missed = meeting.missed.into_inner() && tokens > 0;
        *apart += tokens as u64;
        (tokens > 0).then_some(tokens)
    }
}

impl Meeting<'_> {
    /// A thread's steps.
    fn go_on(&self, mut crew: Crew<'_>, Own { lane, scratch }: &mut Own, sequences: &mut [&mut Sequence]) {
        lane.batch.tables.clear();
        lane.batch.tables.extend(sequences.iter().map(|sequence| sequence.blocks.clone()));
        for _ in 0..STEPS {
            lane.batch.rows.clear();
            lane.batch.rows.extend(sequences.iter().enumerate().map(|(index, sequence)| sequence.next(index)));
            if !self.forward.through(crew.again(), &self.experts, lane) {
                self.missed.store(true, Relaxed);
                return self.over.store(true, Relaxed);
            }
            let logits = crew.again().logits(&lane.act, 0..sequences.len());
            let (began, (hits, misses, bytes)) = (Instant::now(), self.experts.counters());
            let now = Counters { hits, misses, bytes };
            let mut gone = HashSet::new();
            for (sequence, logits) in sequences.iter_mut().zip(logits.chunks_exact(self.vocab)) {
                sequence.cached += 1;
                say(sequence, self.text, logits, now, scratch, &mut gone, &mut |id, event| lock(&self.deliver)(id, event));
            }
            self.tokens.fetch_add(sequences.len(), Relaxed);
            crew.again().spent(Stage::Sampling, began);
            let done = !gone.is_empty() || sequences.iter().any(|sequence| sequence.paused) || Instant::now() >= self.end;
            if !gone.is_empty() {
                lock(&self.gone).extend(gone);
            }
            if self.over.fetch_or(done, Relaxed) || done {
                return;
            }
        }
    }
}
