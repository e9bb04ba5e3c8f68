//! The state machine against a naive reference that knows experts but no slots: random operations, in any order that the
//! engine and the loaders could produce, both asked the same questions after each. Tests only.

mod pair;

use std::{collections::BTreeSet, io, time::Duration};

use proptest::prelude::*;

use super::{
    claim::{Load, Pin, Vacant},
    core::{Core, Found, Shape, Taken},
    policy::{PolicyKind, Use},
};
use crate::{
    Error, Routing,
    hot::HotLayer,
    key::{ExpertId, ExpertKey, LayerId, Slot, Tick},
};

const SHAPE: Shape = Shape { layers: 2, experts: 6, places: 4, loaders: 1 };
const POLICIES: [PolicyKind; 4] = [PolicyKind::Lfru, PolicyKind::Lru, PolicyKind::Lcp, PolicyKind::None];

#[derive(Clone, Copy, PartialEq)]
enum Whom {
    Demand,
    Joined,
    Nobody,
    Prefetch,
    Warm,
}

/// One layer as a human would keep it.
struct Layer {
    resident: BTreeSet<u16>,
    /// Of those and of what loads: brought by a prefetch, not asked for yet.
    unused: BTreeSet<u16>,
    loading: Vec<(Slot, u16, Whom)>,
    populating: Option<Slot>,
    draining: usize,
    tick: u64,
    uses: [Use; SHAPE.experts],
    /// Not to be evicted by a prefetch, and last by anything else.
    expected: BTreeSet<u16>,
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            resident: BTreeSet::new(),
            unused: BTreeSet::new(),
            loading: Vec::new(),
            populating: None,
            draining: 0,
            tick: 0,
            uses: [Use::NEVER; SHAPE.experts],
            expected: BTreeSet::new(),
        }
    }
}

/// A fetch as a human would keep it: every id is in one of these, done, or failed.
struct Demand {
    layer: usize,
    many: bool,
    pending: Vec<u16>,
    queued: Vec<u16>,
    waiting: Vec<u16>,
    ready: Vec<Result<u16, u16>>,
    pinned: Vec<u16>,
    /// Has or had a load in this fetch.
    missed: BTreeSet<u16>,
}

#[derive(Default)]
struct Model {
    budget: usize,
    policy: PolicyKind,
    layers: [Layer; SHAPE.layers],
    demand: Option<Demand>,
    wish: (usize, Vec<u16>),
    warm: Vec<(usize, u16)>,
    bad: BTreeSet<(u16, u16)>,
    /// hits, misses, joined, evictions, loads, errors, prefetched, useful, wasted, late, warm
    counts: [u64; 11],
}

impl Model {
    fn enabled(&self, l: usize) -> usize {
        self.budget.min(SHAPE.places - self.layers[l].draining)
    }

    /// Slots in use, by whatever.
    fn used(&self, l: usize) -> usize {
        let queued = self.demand.as_ref().filter(|demand| demand.layer == l).map_or(0, |demand| demand.queued.len());
        let layer = &self.layers[l];
        layer.resident.len() + layer.loading.len() + usize::from(layer.populating.is_some()) + queued
    }

    fn key(&self, l: usize, expert: u16) -> f64 {
        let layer = &self.layers[l];
        if layer.expected.contains(&expert) {
            return f64::INFINITY;
        }
        self.policy.key(&layer.uses[usize::from(expert)], l as f64)
    }

    /// What would be evicted next, and its key.
    fn victim(&self, l: usize) -> Option<(f64, u16)> {
        let pinned = self.demand.as_ref().filter(|demand| demand.layer == l).map_or(&[][..], |demand| &demand.pinned);
        let idle = self.layers[l].resident.iter().filter(|expert| !pinned.contains(expert));
        idle.map(|&expert| (self.key(l, expert), expert)).min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
    }

    fn evict(&mut self, l: usize, victim: u16) {
        let layer = &mut self.layers[l];
        assert!(layer.resident.remove(&victim));
        layer.expected.remove(&victim);
        self.counts[3] += 1;
        self.counts[8] += u64::from(layer.unused.remove(&victim));
    }

    /// Whatever nobody holds goes, if nothing is to stay.
    fn keep_none(&mut self) {
        if self.policy == PolicyKind::None {
            self.evict_all();
        }
    }

    fn evict_all(&mut self) {
        for l in 0..SHAPE.layers {
            while let Some((_, victim)) = self.victim(l) {
                self.evict(l, victim);
            }
        }
    }

    fn assign(&mut self, mut force: bool) {
        while let Some(Demand { layer, many, pending, queued, waiting, pinned, missed, .. }) = &self.demand
            && let Some(&next) = pending.first()
        {
            let l = *layer;
            if self.used(l) >= self.enabled(l) {
                let Some((key, victim)) = self.victim(l) else { return };
                let streaming = [queued, waiting, pinned].iter().flat_map(|list| list.iter()).filter(|id| missed.contains(id)).count();
                let passes = key > self.key(l, next) && *many && streaming > SHAPE.loaders;
                if passes && !force {
                    return;
                }
                force &= !(*many && streaming > SHAPE.loaders);
                self.evict(l, victim);
            }
            let demand = self.demand.as_mut().unwrap();
            demand.pending.remove(0);
            demand.queued.push(next);
            demand.missed.insert(next);
        }
    }

    fn begin(&mut self, l: usize, ids: &[u16], tokens: u32, rows: impl Fn(u16) -> Vec<u32>, first_time: bool) {
        let mut demand = Demand {
            layer: l,
            many: tokens > 1,
            pending: vec![],
            queued: vec![],
            waiting: vec![],
            ready: vec![],
            pinned: vec![],
            missed: BTreeSet::new(),
        };
        if self.wish.0 == l {
            self.wish.1.clear();
        }
        let layer = &mut self.layers[l];
        layer.expected.clear();
        let count = u64::from(first_time);
        for &id in ids {
            if first_time {
                rows(id).into_iter().for_each(|row| layer.uses[usize::from(id)].used(Tick(layer.tick + 1 + u64::from(row))));
            }
            if layer.resident.contains(&id) {
                demand.pinned.push(id);
                demand.ready.push(Ok(id));
                self.counts[0] += count;
                self.counts[7] += u64::from(layer.unused.remove(&id));
            } else if let Some((_, _, whom)) = layer.loading.iter_mut().find(|(_, expert, _)| *expert == id) {
                self.counts[9] += u64::from(*whom == Whom::Prefetch);
                *whom = Whom::Joined;
                demand.waiting.push(id);
                demand.missed.insert(id);
                self.counts[2] += count;
            } else {
                demand.pending.push(id);
                self.counts[1] += count;
            }
        }
        layer.tick += u64::from(tokens) * count;
        self.demand = Some(demand);
        self.assign(false);
    }

    fn end(&mut self) {
        if let Some(Demand { layer, .. }) = self.demand.take() {
            let loading = self.layers[layer].loading.iter_mut().filter(|(.., whom)| matches!(whom, Whom::Demand | Whom::Joined));
            loading.for_each(|(.., whom)| *whom = Whom::Nobody);
            self.keep_none();
        }
    }

    fn background(&self) -> usize {
        let loading = self.layers.iter().flat_map(|layer| &layer.loading);
        loading.filter(|(.., whom)| matches!(whom, Whom::Prefetch | Whom::Warm)).count()
    }

    fn start(&mut self) -> Option<(usize, u16, Whom)> {
        if let Some(demand) = self.demand.as_mut().filter(|demand| !demand.queued.is_empty()) {
            let expert = demand.queued.remove(0);
            demand.waiting.push(expert);
            return Some((demand.layer, expert, Whom::Demand));
        }
        if self.background() >= SHAPE.loaders.div_ceil(2) {
            return None;
        }
        let l = self.wish.0;
        while !self.wish.1.is_empty() {
            let expert = self.wish.1.remove(0);
            if self.there(l, expert) {
                continue;
            }
            if self.used(l) >= self.enabled(l) {
                match self.victim(l) {
                    Some((key, victim)) if key < f64::INFINITY => self.evict(l, victim),
                    _ => {
                        self.wish.1.clear();
                        return None;
                    }
                }
            }
            self.layers[l].expected.insert(expert);
            self.counts[6] += 1;
            return Some((l, expert, Whom::Prefetch));
        }
        None
    }

    fn start_warm(&mut self) -> Option<(usize, u16, Whom)> {
        while self.background() < SHAPE.loaders.div_ceil(2) {
            let (l, expert) = self.warm.pop()?;
            if !self.there(l, expert) && self.used(l) < self.enabled(l) {
                self.counts[10] += 1;
                return Some((l, expert, Whom::Warm));
            }
        }
        None
    }

    fn there(&self, l: usize, expert: u16) -> bool {
        let queued = self.demand.as_ref().is_some_and(|demand| demand.layer == l && demand.queued.contains(&expert));
        let layer = &self.layers[l];
        queued || layer.resident.contains(&expert) || layer.loading.iter().any(|(_, loading, _)| *loading == expert)
    }

    fn prefetch(&mut self, l: usize, ranked: &[u16]) {
        self.wish.1.clear();
        if self.policy != PolicyKind::None && self.demand.as_ref().is_none_or(|demand| demand.layer != l) {
            let (there, wished): (Vec<u16>, Vec<u16>) = ranked.iter().partition(|&&expert| self.there(l, expert));
            self.layers[l].expected = there.into_iter().collect();
            self.wish = (l, wished);
        }
    }

    /// True if the slot was given up.
    fn loaded(&mut self, key: ExpertKey, slot: Slot, ok: bool) -> bool {
        let (l, id) = (key.layer.index(), key.expert.0);
        self.counts[if ok { 4 } else { 5 }] += 1;
        if ok {
            self.bad.remove(&(key.layer.0, id))
        } else {
            self.bad.insert((key.layer.0, id))
        };
        let layer = &mut self.layers[l];
        let Some(at) = layer.loading.iter().position(|&(loading, ..)| loading == slot) else { return true };
        let (.., whom) = layer.loading.remove(at);
        if whom == Whom::Joined && !ok {
            let demand = self.demand.as_mut().unwrap();
            demand.waiting.retain(|&expert| expert != id);
            demand.queued.push(id);
            return false;
        }
        if ok {
            layer.resident.insert(id);
            if whom == Whom::Prefetch {
                layer.unused.insert(id);
            }
        } else {
            layer.expected.remove(&id);
        }
        if matches!(whom, Whom::Demand | Whom::Joined) {
            let demand = self.demand.as_mut().unwrap();
            demand.waiting.retain(|&expert| expert != id);
            demand.ready.push(if ok { Ok(id) } else { Err(id) });
            demand.pinned.extend(ok.then_some(id));
        }
        self.keep_none();
        self.assign(false);
        false
    }

    fn resize(&mut self, budget: usize) {
        self.budget = budget;
        for l in 0..SHAPE.layers {
            while self.used(l) > self.enabled(l) {
                if let Some((_, victim)) = self.victim(l) {
                    self.evict(l, victim);
                    continue;
                }
                let layer = &mut self.layers[l];
                let lowest = layer.loading.iter().map(|&(slot, ..)| slot).chain(layer.populating).min().unwrap();
                if let Some(at) = layer.loading.iter().position(|&(slot, ..)| slot == lowest) {
                    let (_, expert, whom) = layer.loading.remove(at);
                    layer.expected.remove(&expert);
                    self.counts[8] += u64::from(whom == Whom::Prefetch);
                }
                layer.populating = layer.populating.filter(|&slot| slot != lowest);
                layer.draining += 1;
            }
        }
    }
}
