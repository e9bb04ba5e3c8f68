//! The names of things: which layer, which expert, which slot. Plain numbers that must not be mistaken for each other;
//! every other file of the crate uses them, and the engine speaks in them.

/// A Mixture-of-Experts layer, counted over those only (dense layers have no number here).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub u16);

/// An expert within its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId(pub u16);

/// A place in the slab that holds one expert; backends address experts by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// The unit of residency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertKey {
    pub layer: LayerId,
    pub expert: ExpertId,
}

/// The number of tokens that a layer has seen: the only clock that eviction policies see, so that a replay decides as the run
/// did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tick(pub(crate) u64);

impl Tick {
    pub(crate) fn as_f64(self) -> f64 {
        self.0 as f64
    }
}

impl LayerId {
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl ExpertId {
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl Slot {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}
