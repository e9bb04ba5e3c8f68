//! Who uses which expert in one layer of one step: what the engine tells the cache with a fetch, and all that policies learn
//! from. Plain data, borrowed from the engine's plan; not the router's weights, and nothing of it is kept but [`crate::Trace`].

use crate::key::ExpertId;

/// Rows of `experts[i]` are `rows[first[i]..first[i + 1]]`, ascending and below `tokens`.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// Distinct.
    pub experts: &'a [ExpertId],
    pub first: &'a [usize],
    pub rows: &'a [u32],
    /// Rows of the step. Each is a tick of its own: a prompt of n tokens teaches what n steps of decoding would.
    pub tokens: u32,
    /// False for the rest of a fetch that was dropped half-way: its uses, hits and misses have been counted, and rows are
    /// not looked at.
    pub first_time: bool,
}

static FIRST: [usize; Routing::TOKEN_MAX + 1] = {
    let mut first = [0; Routing::TOKEN_MAX + 1];
    let mut i = 0;
    while i <= Routing::TOKEN_MAX {
        first[i] = i;
        i += 1;
    }
    first
};
static ROWS: [u32; Routing::TOKEN_MAX] = [0; Routing::TOKEN_MAX];

impl<'a> Routing<'a> {
    /// As many experts as [`Routing::token`] takes; no model comes near.
    pub const TOKEN_MAX: usize = 512;

    /// One token that uses all of `experts`.
    pub fn token(experts: &'a [ExpertId]) -> Self {
        assert!(experts.len() <= Self::TOKEN_MAX, "{} experts for one token", experts.len());
        Self { experts, first: &FIRST[..=experts.len()], rows: &ROWS[..experts.len()], tokens: 1, first_time: true }
    }

    /// What is left to do of a fetch that was dropped half-way.
    pub fn rest(experts: &'a [ExpertId], tokens: u32) -> Self {
        Self { experts, first: &[], rows: &[], tokens, first_time: false }
    }

    /// The rows that use `experts[i]`.
    pub fn rows_of(&self, i: usize) -> &'a [u32] {
        &self.rows[self.first[i]..self.first[i + 1]]
    }
}
