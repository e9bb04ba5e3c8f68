//! Which tokens the content is made of, for the list of their log-probabilities: not those of marks, of stop strings, of space that
//! belongs to a mark. Everything is told by its place in the text that the tokens make, in bytes. `output.rs` asks.

use std::{collections::VecDeque, ops::Range};

use crate::TokenLogprob;

#[derive(Debug, Default)]
pub(super) struct Tokens {
    /// Of which it is not known yet whether they are content.
    waiting: VecDeque<(Range<usize>, TokenLogprob)>,
    /// Content that has not been said yet.
    spans: VecDeque<Range<usize>>,
}

impl Tokens {
    pub(super) fn push(&mut self, place: Range<usize>, logprob: TokenLogprob) {
        self.waiting.push_back((place, logprob));
    }

    /// What lies there is content, once it is said.
    pub(super) fn content(&mut self, place: Range<usize>) {
        self.spans.push_back(place);
    }

    /// The next `bytes` of the content have been said: its tokens.
    pub(super) fn said(&mut self, mut bytes: usize, listed: &mut Vec<TokenLogprob>) {
        while let Some(span) = self.spans.front_mut().filter(|_| bytes > 0) {
            let part = span.start..span.end.min(span.start + bytes);
            bytes -= part.len();
            span.start = part.end;
            self.spans.pop_front_if(|span| span.start == span.end);
            self.forget(part.start);
            while let Some((_, logprob)) = self.waiting.pop_front_if(|(place, _)| place.start < part.end) {
                listed.push(logprob);
            }
        }
    }

    /// Tokens before that place will be no content any more.
    pub(super) fn forget(&mut self, before: usize) {
        let before = self.spans.front().map_or(before, |span| span.start.min(before));
        while self.waiting.pop_front_if(|(place, _)| place.end <= before).is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_what_is_said_are_listed() {
        let mut tokens = Tokens::default();
        let logprob = |id| TokenLogprob { id, logprob: 0.0, top: Vec::new() };
        for (id, place) in [(0, 0..2), (1, 2..4), (2, 4..5), (3, 4..7), (4, 7..9), (5, 9..12), (6, 12..13)] {
            tokens.push(place, logprob(id));
        }
        let mut listed = Vec::new();
        let mut check = |tokens: &mut Tokens, bytes, expected: &[u32]| {
            tokens.said(bytes, &mut listed);
            assert_eq!(listed.drain(..).map(|found| found.id).collect::<Vec<_>>(), expected);
        };
        tokens.content(3..7);
        tokens.content(10..13);
        tokens.forget(9);
        check(&mut tokens, 0, &[]);
        check(&mut tokens, 1, &[1]);
        // Parts of one character are of it, what lies between is not listed, and nothing is twice.
        check(&mut tokens, 4, &[2, 3, 5]);
        tokens.forget(13);
        check(&mut tokens, 1, &[]);
        check(&mut tokens, 1, &[6]);
    }
}
