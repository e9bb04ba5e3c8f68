//! The experts of a layer that may be evicted, lowest key first: a binary heap that knows where each expert is, so that one
//! can leave from the middle when it is wanted. Allocates nothing after it is made. Ties go by number, whatever came first.

use crate::key::ExpertId;

#[derive(Debug)]
pub(crate) struct Idle {
    heap: Vec<(f64, ExpertId)>,
    /// Per expert; meaningless for one that is not here.
    place: Vec<u16>,
}

fn before(a: (f64, ExpertId), b: (f64, ExpertId)) -> bool {
    a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).is_lt()
}

impl Idle {
    pub(crate) fn new(experts: usize) -> Self {
        Self { heap: Vec::with_capacity(experts), place: vec![0; experts] }
    }

    pub(crate) fn contains(&self, expert: ExpertId) -> bool {
        self.heap.get(usize::from(self.place[expert.index()])).is_some_and(|(_, here)| *here == expert)
    }

    pub(crate) fn lowest(&self) -> Option<(f64, ExpertId)> {
        self.heap.first().copied()
    }

    pub(crate) fn push(&mut self, key: f64, expert: ExpertId) {
        assert!(!self.contains(expert), "an expert idles once");
        self.heap.push((key, expert));
        self.up(self.heap.len() - 1);
    }

    pub(crate) fn remove(&mut self, expert: ExpertId) {
        assert!(self.contains(expert), "only what idles can leave");
        let at = usize::from(self.place[expert.index()]);
        self.heap.swap_remove(at);
        if at < self.heap.len() {
            self.down(at);
            self.up(at);
        }
    }

    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (f64, ExpertId)> {
        self.heap.iter().copied()
    }

    /// Gives every expert a new key.
    pub(crate) fn rekey(&mut self, key: impl Fn(ExpertId) -> f64) {
        self.heap.iter_mut().for_each(|(old, expert)| *old = key(*expert));
        (0..self.heap.len()).rev().for_each(|at| self.down(at));
    }

    fn set(&mut self, at: usize, node: (f64, ExpertId)) {
        self.heap[at] = node;
        self.place[node.1.index()] = at as u16;
    }

    fn up(&mut self, mut at: usize) {
        let node = self.heap[at];
        while at > 0 && before(node, self.heap[(at - 1) / 2]) {
            self.set(at, self.heap[(at - 1) / 2]);
            at = (at - 1) / 2;
        }
        self.set(at, node);
    }

    fn down(&mut self, mut at: usize) {
        let node = self.heap[at];
        loop {
            let mut child = 2 * at + 1;
            if child + 1 < self.heap.len() && before(self.heap[child + 1], self.heap[child]) {
                child += 1;
            }
            if child >= self.heap.len() || !before(self.heap[child], node) {
                break;
            }
            self.set(at, self.heap[child]);
            at = child;
        }
        self.set(at, node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn the_lowest_key_leaves_first(operations in prop::collection::vec((0u8..6, 0u16..12, 0u8..4), 0..200)) {
            let (mut idle, mut expected) = (Idle::new(12), BTreeMap::new());
            for (which, expert, key) in operations {
                match which {
                    0..=2 if !expected.contains_key(&expert) => {
                        idle.push(f64::from(key), ExpertId(expert));
                        expected.insert(expert, key);
                    }
                    3..=4 if expected.contains_key(&expert) => {
                        idle.remove(ExpertId(expert));
                        expected.remove(&expert);
                    }
                    5 => {
                        idle.rekey(|expert| f64::from((expert.0 % 5) ^ u16::from(key)));
                        expected.iter_mut().for_each(|(expert, old)| *old = ((expert % 5) ^ u16::from(key)) as u8);
                    }
                    _ => {}
                }
                let lowest = expected.iter().map(|(expert, key)| (*key, *expert)).min();
                prop_assert_eq!(idle.lowest(), lowest.map(|(key, expert)| (f64::from(key), ExpertId(expert))));
                prop_assert!((0..12).all(|expert| idle.contains(ExpertId(expert)) == expected.contains_key(&expert)));
            }
        }
    }
}
