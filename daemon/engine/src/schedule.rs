//! Who runs in a step and how, and who waits. Pure data; the engine performs it.

use std::{collections::VecDeque, fmt, str::FromStr, time::Duration};

use crate::{
    Bytes, Error,
    backend::cpu::{PIECE_MAX, PLACES_MAX},
};

/// Rows of a prompt that are always read together, whatever the memory: experts are read once for all of them.
pub(crate) const CHUNK_MIN: usize = 512;
/// A prompt's time between two looks at the commands, with nobody else to be served.
const SLICE: Duration = Duration::from_millis(50);
/// Pieces of a prompt that fit into a slice of time: one that began within it ends little behind it.
const PIECES: u32 = 4;
/// Rows of attention between two looks at the clock, at least and (with [`PIECE_MAX`]) at most.
const ROWS_MIN: usize = 8;
/// Expert rows, likewise.
const PLACES_MIN: usize = 32;

/// Rows of a prompt to read in one pass: every expert it needs is then loaded once for all of them. `room` bytes are
/// free for its activations.
pub(crate) fn chunk(tokens: usize, row_bytes: Bytes, room: Bytes) -> usize {
    tokens.min(usize::try_from(room / row_bytes).unwrap_or(usize::MAX).max(CHUNK_MIN))
}

/// How long prompts may be read in a step in which decoding took `decoded`: as long, so that others get a token in twice the time.
pub(crate) fn slice(decoded: Option<Duration>) -> Duration {
    decoded.unwrap_or(SLICE)
}

/// How much of a prompt is computed between two looks at the clock.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// Of attention.
    pub(crate) rows: usize,
    /// Of experts, each row for each of its experts; one expert at least.
    pub(crate) places: usize,
    /// What that should take; `None`: it stays as it is.
    aim: Option<Duration>,
}

impl Pace {
    /// With nobody else to be served.
    pub(crate) const LONG: Self = Self { rows: PIECE_MAX, places: PLACES_MAX, aim: None };
    /// With others decoding, where pieces must not depend on the clock: MLX chooses kernels by their shape.
    pub(crate) const SHORT: Self = Self { rows: 64, ..Self::LONG };

    /// Rows of a chunk whose experts have as many places each, one with another.
    pub(crate) fn chunk(&self, experts: usize, top_k: usize) -> usize {
        self.places * experts / top_k
    }

    /// Pieces shall fit into a slice of this length.
    pub(crate) fn aim(&mut self, slice: Duration) {
        self.aim = Some(slice / PIECES);
    }

    pub(crate) fn took_rows(&mut self, rows: usize, took: Duration) {
        self.rows = self.fit(self.rows, rows, took).clamp(ROWS_MIN, PIECE_MAX);
    }

    pub(crate) fn took_places(&mut self, places: usize, took: Duration) {
        self.places = self.fit(self.places, places, took).clamp(PLACES_MIN, PLACES_MAX);
    }

    /// As much as fits, if `done` took so long; in steps, because some pieces are dearer than others.
    fn fit(&self, size: usize, done: usize, took: Duration) -> usize {
        let Some(aim) = self.aim else { return size };
        let fits = (done as f64 * aim.as_secs_f64() / took.as_secs_f64().max(1e-9)) as usize;
        // What was left at an end says little of larger pieces.
        if 2 * done < size && fits < size { size } else { fits.clamp(size / 2, size * 2) }
    }
}

/// Whether the next layer's experts are read before they are asked for, while the disk has nothing else to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lookahead {
    /// On for packed models, for as long as it is useful.
    #[default]
    Auto,
    On,
    Off,
}

impl FromStr for Lookahead {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.trim().to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(Error::Setting { value: text.into(), wants: "`auto`, `on` or `off`" }),
        }
    }
}

impl fmt::Display for Lookahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

/// Switches lookahead off while it does more harm than good, and tries again later.
#[derive(Debug, Default)]
pub(crate) struct Worth {
    /// Useful and wasted prefetches at the last look.
    seen: (u64, u64),
    /// Steps until it may try again.
    pause: u32,
}

/// Prefetches that a verdict needs.
const VERDICT: u64 = 256;
/// Steps without lookahead after a bad one.
const PAUSE: u32 = 512;

impl Worth {
    /// Asked once a step with the counters of useful and wasted prefetches: whether to look ahead.
    pub(crate) fn go_on(&mut self, useful: u64, wasted: u64) -> bool {
        if self.pause > 0 {
            self.pause -= 1;
            self.seen = (useful, wasted);
            return false;
        }
        let (good, bad) = (useful.saturating_sub(self.seen.0), wasted.saturating_sub(self.seen.1));
        if good + bad >= VERDICT {
            self.seen = (useful, wasted);
            // A wasted read has cost an idle disk nothing but the expert it displaced.
            if bad > good {
                self.pause = PAUSE;
            }
        }
        self.pause == 0
    }
}

/// How the threads share a step that several requests decode in. Results are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// Whichever takes less time, by trying.
    #[default]
    Auto,
    /// Each matrix by its rows: every weight is read once.
    Matrices,
    /// The step by its requests, each thread some of them through all layers, where the cache has room for every expert: nobody waits for
    /// others between two products.
    Rows,
}

/// How long steps of each kind are measured ...
const TRIED: Duration = Duration::from_millis(100);
/// ... before those of the faster one are taken for so long. Then both are tried again: other programs come and go.
const KEPT: Duration = Duration::from_secs(3);

/// Whether requests decode together or apart, by what a token took of late, for every number of them.
#[derive(Debug, Default)]
pub(crate) struct Trials {
    pub(crate) split: Split,
    by_rows: Vec<Trial>,
}

/// Together, and apart.
#[derive(Clone, Debug, Default)]
struct Trial {
    took: [Duration; 2],
    tokens: [usize; 2],
    kept: Duration,
}

impl Trial {
    fn apart(&self) -> bool {
        let [together, apart] = self.took;
        let token = |kind: usize| self.took[kind].as_secs_f64() / self.tokens[kind] as f64;
        together >= TRIED && (apart < TRIED || token(1) < token(0))
    }
}

impl Trials {
    /// Whether so many requests are to decode apart next.
    pub(crate) fn apart(&self, rows: usize) -> bool {
        match self.split {
            Split::Matrices => false,
            Split::Rows => true,
            Split::Auto => self.by_rows.get(rows).is_some_and(Trial::apart),
        }
    }

    pub(crate) fn took(&mut self, rows: usize, apart: bool, tokens: usize, time: Duration) {
        if self.by_rows.len() <= rows {
            self.by_rows.resize(rows + 1, Trial::default());
        }
        let trial = &mut self.by_rows[rows];
        if trial.took.iter().any(|took| *took < TRIED) {
            trial.took[usize::from(apart)] += time;
            trial.tokens[usize::from(apart)] += tokens;
            return;
        }
        trial.kept += time;
        if trial.kept >= KEPT {
            *trial = Trial::default();
        }
    }
}

/// Requests that wait: one queue a client, clients take turns.
#[derive(Debug)]
pub(crate) struct Waiting<T> {
    /// Never holds an empty queue; the front client is next.
    clients: VecDeque<(String, VecDeque<T>)>,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self { clients: VecDeque::new() }
    }
}

impl<T> Waiting<T> {
    pub(crate) fn len(&self) -> usize {
        self.clients.iter().map(|(_, queue)| queue.len()).sum()
    }

    pub(crate) fn push(&mut self, client: String, item: T) {
        match self.clients.iter_mut().find(|(name, _)| *name == client) {
            Some((_, queue)) => queue.push_back(item),
            None => self.clients.push_back((client, VecDeque::from([item]))),
        }
    }

    /// The next request, if `fits` says it can start now; nobody overtakes it.
    pub(crate) fn pop_if(&mut self, fits: impl FnOnce(&T) -> bool) -> Option<T> {
        let (_, queue) = self.clients.front()?;
        if !queue.front().is_some_and(fits) {
            return None;
        }
        let (client, mut queue) = self.clients.pop_front()?;
        let item = queue.pop_front();
        if !queue.is_empty() {
            self.clients.push_back((client, queue));
        }
        item
    }

    /// Takes out whatever `gone` names.
    pub(crate) fn remove(&mut self, gone: impl Fn(&T) -> bool) -> Option<T> {
        for (index, (_, queue)) in self.clients.iter_mut().enumerate() {
            if let Some(at) = queue.iter().position(&gone) {
                let item = queue.remove(at);
                if queue.is_empty() {
                    self.clients.remove(index);
                }
                return item;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns_and_keep_their_order() {
        let mut waiting = Waiting::default();
        for (client, item) in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5)] {
            waiting.push(client.into(), item);
        }
        assert_eq!(waiting.len(), 5);
        assert_eq!(waiting.pop_if(|_| false), None);
        assert_eq!(waiting.remove(|item| *item == 5), Some(5));
        assert_eq!(waiting.remove(|item| *item == 9), None);
        let order: Vec<_> = std::iter::from_fn(|| waiting.pop_if(|_| true)).collect();
        assert_eq!(order, [1, 4, 2, 3]);
    }

    #[test]
    fn lookahead_pauses_when_most_of_it_is_wasted() {
        let mut worth = Worth::default();
        assert!(worth.go_on(0, 0) && worth.go_on(200, 55));
        assert!(worth.go_on(200, 200), "half is worth it");
        assert!(!worth.go_on(300, 400), "a third is not");
        assert!((1..PAUSE).all(|_| !worth.go_on(300, 400)));
        assert!(!worth.go_on(300, 400) && worth.go_on(300, 400), "tries again");
    }

    #[test]
    fn the_faster_way_is_kept_until_it_is_tried_again() {
        let mut trials = Trials::default();
        // Of so many milliseconds, those that were spent apart, if a token takes so long together and apart.
        let mut spent = |rows: usize, time: u64, token: [u32; 2]| {
            let mut apart_for = 0;
            for _ in 0..time / 10 {
                let apart = trials.apart(rows);
                trials.took(rows, apart, (1000 / token[usize::from(apart)]) as usize, Duration::from_millis(10));
                apart_for += 10 * u64::from(apart);
            }
            apart_for
        };
        assert_eq!((spent(4, 100, [10, 9]), spent(4, 100, [10, 9])), (0, 100));
        assert_eq!(spent(2, 3200, [10, 11]), 100, "another number of requests");
        assert_eq!(spent(4, 3000, [1, 20]), 3000, "nothing is looked at meanwhile");
        assert_eq!(spent(4, 3200, [1, 20]), 100, "then it is");
        assert_eq!(spent(4, 3200, [5, 5]), 100, "nothing is gained");
        let mut trials = Trials { split: Split::Rows, ..Trials::default() };
        assert!(trials.apart(3) && trials.apart(99));
        trials.took(3, true, 1, Duration::ZERO);
        trials.split = Split::Matrices;
        assert!(!trials.apart(3));
    }

    #[test]
    fn chunks_grow_with_the_room_and_end_with_the_prompt() {
        let check = |tokens, room, expected| assert_eq!(chunk(tokens, 100, room), expected, "{tokens} tokens, {room} bytes");
        check(10, 0, 10);
        check(1000, 0, CHUNK_MIN);
        check(1000, 70_099, 700);
        check(1000, u64::MAX, 1000);
    }

    #[test]
    fn pieces_grow_and_shrink_until_they_take_their_share_of_a_slice() {
        let settle = |slice: u64, row: u64| {
            let mut pace = Pace::LONG;
            pace.aim(Duration::from_micros(slice));
            for _ in 0..10 {
                let (rows, places) = (pace.rows, pace.places);
                pace.took_rows(rows, Duration::from_micros(rows as u64 * row));
                pace.took_places(places, Duration::from_micros(places as u64 * row));
            }
            (pace.rows, pace.places)
        };
        assert_eq!(settle(4_000, 10), (100, 100));
        assert_eq!(settle(40_000, 10), (PIECE_MAX, 1000));
        assert_eq!(settle(4, 10), (ROWS_MIN, PLACES_MIN));
        assert_eq!(Pace { places: 40, ..Pace::SHORT }.chunk(64, 8), 320);
        let mut pace = Pace::LONG;
        pace.aim(Duration::from_micros(4_000));
        pace.took_rows(3, Duration::from_micros(900));
        assert_eq!(pace.rows, PIECE_MAX, "a rest tells nothing of a whole piece");
        pace = Pace::SHORT;
        pace.took_rows(64, Duration::from_secs(1));
        assert_eq!(pace.rows, Pace::SHORT.rows);
    }
}
