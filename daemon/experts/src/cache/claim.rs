//! Rights to a slot's memory, as values that only `cache/core.rs` makes and nobody can copy. The slab and the store take
//! them as the proof that their unsafe access is alone. Not locks: holding one does not block anybody.

use crate::key::{ExpertId, ExpertKey, Slot};

/// The right to write a slot, from the start of a load to its end.
#[derive(Debug)]
pub(crate) struct Load {
    pub(super) slot: Slot,
    pub(super) key: ExpertKey,
}

/// The right to read a slot, until the fetch gives it back.
#[derive(Debug)]
pub(crate) struct Pin {
    pub(super) slot: Slot,
    pub(super) expert: ExpertId,
    /// The fetch that pins it had it loaded.
    pub(super) missed: bool,
}

/// The right to read everything that is in memory, [layers, experts], for as long as nobody fetches, evicts or changes the budget.
#[derive(Debug)]
pub(crate) struct Hold<'a> {
    pub(super) slots: &'a [Option<Slot>],
}

/// The right to throw away the contents of a slot that is out of use.
#[derive(Debug)]
pub(crate) struct Vacant {
    pub(super) slot: Slot,
}

impl Load {
    pub(crate) fn slot(&self) -> Slot {
        self.slot
    }

    pub(crate) fn key(&self) -> ExpertKey {
        self.key
    }

    #[cfg(test)]
    pub(crate) fn for_test(slot: Slot, key: ExpertKey) -> Self {
        Self { slot, key }
    }
}

impl Pin {
    pub(crate) fn slot(&self) -> Slot {
        self.slot
    }

    pub(crate) fn expert(&self) -> ExpertId {
        self.expert
    }
}

impl Hold<'_> {
    pub(crate) fn slot(&self, index: usize) -> Option<Slot> {
        self.slots[index]
    }
}

impl Vacant {
    pub(crate) fn slot(&self) -> Slot {
        self.slot
    }
}
