//! Where the time of steps goes. Always counted: a clock reading between two stages is little beside the smallest of them.

use std::time::{Duration, Instant};

/// What a step does, in the order of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Embedding, norms before attention, queries, keys, values and the output product, rotary embedding.
    Projections,
    /// Over the KV cache, its writing included.
    Attention,
    /// The norm before the feed-forward, router logits and their choice, and the look at the next layer's.
    Router,
    /// Expert products and their sum; dense feed-forwards too.
    Experts,
    /// The cache's bookkeeping, and waiting for experts that are not in memory.
    Wait,
    /// The last norm and the logits.
    Head,
    /// Drawing tokens, their text, handing it out.
    Sampling,
}

impl Stage {
    pub const ALL: [Self; 7] = [Self::Projections, Self::Attention, Self::Router, Self::Experts, Self::Wait, Self::Head, Self::Sampling];

    pub fn name(self) -> &'static str {
        match self {
            Self::Projections => "projections",
            Self::Attention => "attention",
            Self::Router => "router",
            Self::Experts => "experts",
            Self::Wait => "I/O wait",
            Self::Head => "head",
            Self::Sampling => "sampling",
        }
    }
}

/// Time by stage since the engine was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Profile([Duration; Stage::ALL.len()]);

impl Profile {
    pub fn get(&self, stage: Stage) -> Duration {
        self.0[stage as usize]
    }

    /// Since an earlier moment.
    pub fn since(&self, earlier: &Self) -> Self {
        Self(std::array::from_fn(|stage| self.0[stage] - earlier.0[stage]))
    }

    /// What began at `since` was of this stage; gives the time at which the next one begins.
    pub(crate) fn add(&mut self, stage: Stage, since: Instant) -> Instant {
        let now = Instant::now();
        self.0[stage as usize] += now - since;
        now
    }

    /// Adds what several threads spent side by side, as one of them would have.
    pub(crate) fn mean(&mut self, of: impl ExactSizeIterator<Item = Self>) {
        let count = of.len() as u32;
        for other in of {
            self.0.iter_mut().zip(other.0).for_each(|(sum, time)| *sum += time / count);
        }
    }
}
