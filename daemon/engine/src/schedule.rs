//! Who runs in a step, and who waits. Pure data; the engine performs it.

use std::{collections::VecDeque, time::Duration};

use crate::Bytes;

/// Rows of a prompt that are always read together, whatever the memory: experts are read once for all of them.
pub(crate) const CHUNK_MIN: usize = 512;
/// A prompt's time between two looks at the commands, with nobody else to be served.
const SLICE: Duration = Duration::from_millis(50);
/// With others decoding, prompts get as much of a step as they do, and this at least.
const SLICE_SHARED: Duration = Duration::from_millis(2);

/// Rows of a prompt to read in one pass: every expert it needs is then loaded once for all of them. `room` bytes are
/// free for its activations.
pub(crate) fn chunk(tokens: usize, row_bytes: Bytes, room: Bytes) -> usize {
    tokens.min(usize::try_from(room / row_bytes).unwrap_or(usize::MAX).max(CHUNK_MIN))
}

/// How long prompts may be read in a step in which decoding took `decoded`.
pub(crate) fn slice(decoded: Option<Duration>) -> Duration {
    decoded.map_or(SLICE, |decoded| decoded.max(SLICE_SHARED))
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
    fn chunks_grow_with_the_room_and_end_with_the_prompt() {
        let check = |tokens, room, expected| assert_eq!(chunk(tokens, 100, room), expected, "{tokens} tokens, {room} bytes");
        check(10, 0, 10);
        check(1000, 0, CHUNK_MIN);
        check(1000, 70_099, 700);
        check(1000, u64::MAX, 1000);
    }
}
