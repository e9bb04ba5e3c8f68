//! Who runs in a step, and who waits. Pure data; the engine performs it.

use std::collections::VecDeque;

/// Rows of a step at most: a prompt is read in chunks of what decoding leaves of this.
pub(crate) const ROWS_MAX: usize = 256;

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

/// What a running sequence wants of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wants {
    Nothing,
    /// One row.
    Decode,
    /// This many rows of prompt.
    Prefill(usize),
}

/// Rows for each sequence: every decoding one gets its row, prompts share the rest in order.
pub(crate) fn rows(wants: &[Wants]) -> Vec<usize> {
    let decoding = wants.iter().filter(|wants| **wants == Wants::Decode).count();
    let mut left = ROWS_MAX.saturating_sub(decoding);
    wants
        .iter()
        .map(|wants| match wants {
            Wants::Nothing => 0,
            Wants::Decode => 1,
            Wants::Prefill(tokens) => {
                let rows = (*tokens).min(left);
                left -= rows;
                rows
            }
        })
        .collect()
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
    fn decoding_comes_first_and_prompts_share_the_rest() {
        use Wants::*;
        let check = |wants: &[Wants], expected: &[usize]| assert_eq!(rows(wants), expected);
        check(&[Decode, Prefill(1000), Decode, Nothing], &[1, ROWS_MAX - 2, 1, 0]);
        check(&[Prefill(100), Prefill(1000)], &[100, ROWS_MAX - 100]);
        check(&[Prefill(1000), Prefill(10)], &[ROWS_MAX, 0]);
    }
}
