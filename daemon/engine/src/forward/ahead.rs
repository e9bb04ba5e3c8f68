//! A decode step that does not wait for every layer's routing: as many layers as are likely to find their experts in memory are
//! computed on faith, then all their routings are read at once. What stands is counted as if it had been fetched; from the
//! first layer that missed an expert on, everything is computed again. Void results are never seen: keys and values are
//! written over, and experts that a graph may read keep their slots until it has been computed. What is guessed here decides
//! how long a token takes, nothing else.

use std::{ops::Range, time::Instant};

use flash_experts::{Arrival, ExpertId, Experts, LayerId, Slot};

use super::{Cut, Foresight, Forward, Pace, Pass, Stage, drop_rows};
use crate::{
    backend::{
        Backend,
        mlx::{Mlx, ahead::Ahead, must},
    },
    moe::Router,
    profile::Stage as Spent,
};

/// Layers are computed on faith for as long as it is likelier than this that none of them misses: a miss costs what was
/// computed after it, half of the run on average, and to ask costs a wait. Row "MLX decodes ahead" of experiments.tsv.
const FAITH: f32 = 0.5;
/// Share of the latest token in a layer's odds.
const LATEST: f32 = 1.0 / 16.0;

/// How often each layer has found all its experts in memory.
#[derive(Debug)]
pub(super) struct Odds(Vec<f32>);

impl Odds {
    pub(super) fn new(layers: usize) -> Self {
        Self(vec![0.0; layers])
    }

    fn learn(&mut self, layer: usize, hit: bool) {
        self.0[layer] += LATEST * (f32::from(u8::from(hit)) - self.0[layer]);
    }

    /// The first layer from `from` on whose routing is worth waiting for, if `routed` says that it has one.
    fn reach(&self, from: usize, routed: impl Fn(usize) -> bool) -> usize {
        let mut odds = 1.0;
        let likely = |layer: &usize| {
            odds *= if routed(*layer) { self.0[*layer] } else { 1.0 };
            odds >= FAITH
        };
        from + (from..self.0.len()).take_while(likely).count()
    }
}

impl Forward {
    /// As [`Forward::run`], the logits included.
    pub(super) fn run_ahead(&mut self, backend: &mut Backend, experts: &mut Experts, pass: &mut Pass) {
        let mut found = Vec::new();
        while pass.alive.contains(&true) && !self.run_on(backend, experts, pass, &mut found) {}
    }

    /// Runs some layers on faith and the one after them with its experts, or back to the first that missed one; true at the end.
    fn run_on(&mut self, backend: &mut Backend, experts: &mut Experts, pass: &mut Pass, found: &mut Vec<Option<Slot>>) -> bool {
        let (from, router) = (pass.layer, self.router);
        let until = self.odds.reach(from, |layer| self.moe_layers[layer].is_some());
        experts.survey(until > from, found);
        let found = |moe: LayerId| &found[usize::from(moe.0) * router.experts..][..router.experts];
        let empty = |layer: &usize| self.moe_layers[*layer].is_some_and(|moe| found(moe).iter().all(Option::is_none));
        let until = (from..until).find(empty).unwrap_or(until);
        let foresees = self.foresight.on && self.forced.is_none() && experts.slots() < router.experts;
        self.ahead(backend, pass, from..until, &found, foresees);
        for layer in from..=until {
            pass.layer = layer;
            if layer == self.layers() {
                return true;
            }
            let Some(moe) = self.moe_layers[layer] else { continue };
            let hit = self.routed(backend, pass, layer, found(moe));
            if !hit || layer == until {
                self.await_experts(backend, experts, pass, foresees);
                pass.layer = layer + 1;
                return false;
            }
            let mut fetch = experts.fetch(moe, &pass.plan.routing());
            while fetch.next(&mut pass.arrivals) {}
        }
        unreachable!("a run ends with the head or with a layer that is routed")
    }

    fn ahead<'a>(
        &self,
        backend: &mut Backend,
        pass: &mut Pass,
        layers: Range<usize>,
        found: &dyn Fn(LayerId) -> &'a [Option<Slot>],
        foresees: bool,
    ) {
        let began = Instant::now();
        let (batch, alive) = (&pass.batch, &pass.alive[..]);
        let moe = |layer: usize| self.moe_layers[layer].expect("asked of routed layers only");
        let forced = self.forced.as_ref().map(|forced| {
            move |layer: usize| {
                let choices = batch.rows.iter().flat_map(|row| forced.choice(row.position, moe(layer)));
                choices.map(|expert| u32::from(expert.0)).collect::<Vec<_>>()
            }
        });
        let forced = forced.as_ref().map(|forced| forced as &dyn Fn(usize) -> Vec<u32>);
        let found = &|layer| found(moe(layer));
        let ahead = Ahead { batch, alive, layers, router: self.router, found, forced, foresees };
        must(mlx(backend).ahead(&mut pass.act.mlx, &ahead));
        backend.spent(Spent::Router, began);
    }

    /// Takes a layer's routing; whether all its experts were `found`.
    fn routed(&mut self, backend: &mut Backend, pass: &mut Pass, layer: usize, found: &[Option<Slot>]) -> bool {
        let Pass { batch, act, plan, alive, recorded, .. } = pass;
        let (chosen, weights) = mlx(backend).routing(layer, &act.mlx).expect("it was run");
        plan.begin(self.router);
        plan.take(chosen, weights, alive);
        if let Some(recorded) = recorded {
            (0..batch.rows.len()).for_each(|row| recorded.extend_from_slice(plan.chosen(row)));
        }
        self.foresight.check(layer, plan.experts());
        let hit = plan.experts().iter().all(|expert| found[usize::from(expert.0)].is_some());
        self.odds.learn(layer, hit);
        hit
    }

    /// Runs the experts of the layer that was just routed, when all of them are there.
    fn await_experts(&mut self, backend: &mut Backend, experts: &mut Experts, pass: &mut Pass, foresees: bool) {
        let began = Instant::now();
        let layer = pass.layer;
        mlx(backend).back(layer, &mut pass.act.mlx);
        let moe = self.moe_layers[layer].expect("it was routed");
        if pass.plan.experts().len() > experts.slots() {
            pass.left.clear();
            pass.left.extend_from_slice(pass.plan.experts());
            pass.stage = Stage::Experts { first: true };
            self.experts(backend, experts, pass, moe, &mut Cut { pace: &mut Pace::LONG.clone(), end: None });
            backend.combine(&mut pass.act, &pass.plan);
            return;
        }
        let Pass { batch, act, plan, alive, arrivals, lost, .. } = pass;
        let mut fetch = experts.fetch(moe, &plan.routing());
        let next = self.moe_layers.get(layer + 1).copied().flatten().filter(|_| foresees);
        if let (Some(next), Some(guessed)) = (next, mlx(backend).guessed(layer + 1, &act.mlx)) {
            fetch.prefetch(next, self.foresight.guess(layer + 1, guessed, self.router));
        }
        let mut held = Vec::with_capacity(plan.experts().len());
        while fetch.next(arrivals) {
            for arrival in arrivals.drain(..) {
                match arrival {
                    Arrival::Ready { expert, slot } => held.push((expert, slot)),
                    Arrival::Failed { expert, error } => drop_rows(batch, plan, expert, &error, alive, lost),
                }
            }
        }
        let began = backend.spent(Spent::Wait, began);
        must(mlx(backend).all_experts(layer, &mut act.mlx, plan, &held));
        fetch.hold(); // until something that builds on it has been read
        backend.spent(Spent::Experts, began);
    }
}

impl Foresight {
    /// As [`Foresight::rank`], of choices [rows, top_k] in rank order.
    fn guess(&mut self, layer: usize, chosen: &[u32], router: Router) -> &[ExpertId] {
        self.favourites.clear();
        self.favourites.extend(chosen.iter().map(|expert| ExpertId(*expert as u16)));
        self.merge(layer, router)
    }
}

fn mlx(backend: &mut Backend) -> &mut Mlx {
    let Backend::Mlx(mlx) = backend else { unreachable!("nothing else runs ahead") };
    mlx
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_before_a_layer_that_makes_a_miss_likely() {
        let mut odds = Odds::new(6);
        let reach = |odds: &Odds, from| odds.reach(from, |layer| layer != 2);
        assert_eq!(reach(&odds, 0), 0);
        for _ in 0..100 {
            (0..6).for_each(|layer| odds.learn(layer, layer != 4));
        }
        assert_eq!((reach(&odds, 0), reach(&odds, 4), reach(&odds, 5), reach(&odds, 6)), (4, 4, 6, 6));
        (0..40).for_each(|_| odds.learn(4, true));
        assert_eq!(reach(&odds, 0), 6);
    }
}
