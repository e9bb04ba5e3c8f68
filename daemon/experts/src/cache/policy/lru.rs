//! Least recently used: a linked list through the layer's slots, head = the latest. The tick is not looked at: calls come
//! in order of time.

use super::Policy;
use crate::key::{Slot, Tick};

/// The slots of a layer lie `stride` apart in the slab; the list is over their places in the layer.
#[derive(Debug)]
pub(crate) struct Lru {
    stride: usize,
    phase: usize,
    /// Per place; the last link is the list's own, joining head and tail. A place outside the list points to itself.
    links: Vec<Link>,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    newer: usize,
    older: usize,
}

impl Lru {
    /// For slots `layer`, `layer + layers`, … of which there are `places`.
    pub(crate) fn new(layer: usize, layers: usize, places: usize) -> Self {
        Self { stride: layers, phase: layer, links: (0..=places).map(|own| Link { newer: own, older: own }).collect() }
    }

    fn unlink(&mut self, place: usize) {
        let Link { newer, older } = self.links[place];
        self.links[newer].older = older;
        self.links[older].newer = newer;
        self.links[place] = Link { newer: place, older: place };
    }

    fn touch(&mut self, slot: Slot) {
        let (place, ends) = (slot.index() / self.stride, self.links.len() - 1);
        self.unlink(place);
        let head = self.links[ends].older;
        self.links[place] = Link { newer: ends, older: head };
        self.links[head].newer = place;
        self.links[ends].older = place;
    }
}

impl Policy for Lru {
    fn hit(&mut self, slot: Slot, _: Tick) {
        self.touch(slot);
    }

    fn fill(&mut self, slot: Slot, _: Tick) {
        self.touch(slot);
    }

    fn evicted(&mut self, slot: Slot) {
        self.unlink(slot.index() / self.stride);
    }

    fn victim(&self, evictable: &dyn Fn(Slot) -> bool) -> Option<Slot> {
        let ends = self.links.len() - 1;
        let slot = |place: usize| Slot((place * self.stride + self.phase) as u32);
        let oldest_first = std::iter::successors(Some(self.links[ends].newer), |&place| Some(self.links[place].newer));
        oldest_first.take_while(|&place| place != ends).map(slot).find(|&slot| evictable(slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_evictable_slot_goes() {
        let mut lru = Lru::new(1, 3, 4); // slots 1, 4, 7, 10
        let check = |lru: &Lru, refused: &[u32], expected: Option<u32>| {
            assert_eq!(lru.victim(&|slot| !refused.contains(&slot.0)), expected.map(Slot), "{lru:?} without {refused:?}");
        };
        let tick = Tick(0);
        check(&lru, &[], None);
        [4, 1, 10].into_iter().for_each(|slot| lru.fill(Slot(slot), tick));
        check(&lru, &[], Some(4));
        check(&lru, &[4, 1], Some(10));
        check(&lru, &[4, 1, 10], None);
        lru.hit(Slot(4), tick);
        check(&lru, &[], Some(1));
        lru.hit(Slot(4), tick);
        lru.evicted(Slot(1));
        check(&lru, &[], Some(10));
        lru.evicted(Slot(1)); // no harm
        lru.fill(Slot(1), tick);
        lru.evicted(Slot(10));
        check(&lru, &[], Some(4));
        lru.evicted(Slot(4));
        lru.evicted(Slot(1));
        check(&lru, &[], None);
    }
}
