//! The decoder on one page: a pass through the layers, which may stop between pieces and be taken up again.

#[cfg(feature = "mlx")]
mod ahead;
mod apart;

use std::{ops::Range, sync::Arc, time::Instant};

pub(crate) use apart::Lane;

use flash_experts::{Arrival, ExpertId, Experts, LayerId};

use crate::{
    Event,
    backend::{Activations, Backend, Batch},
    moe::{Forced, Plan, Router, most_likely},
    profile::Stage as Spent,
    schedule::Pace,
};

/// What every pass shares.
#[derive(Debug)]
pub(crate) struct Forward {
    router: Router,
    /// For each layer, its number among the MoE layers.
    moe_layers: Vec<Option<LayerId>>,
    /// Replaces the routers' choices, for measurements.
    pub(crate) forced: Option<Arc<Forced>>,
    pub(crate) foresight: Foresight,
    #[cfg(feature = "mlx")]
    odds: ahead::Odds,
}

/// Some rows on their way through the layers. A long one stops between pieces, so that others get their turn.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    pub(crate) batch: Batch,
    pub(crate) act: Activations,
    plan: Plan,
    /// Rows whose sequence has all its experts so far.
    alive: Vec<bool>,
    layer: usize,
    stage: Stage,
    /// Experts of this layer that have not run.
    left: Vec<ExpertId>,
    /// What a fetch gave last, and those of it that can run.
    arrivals: Vec<Arrival>,
    ready: Vec<ExpertId>,
    /// Sequences that lost an expert.
    pub(crate) lost: Vec<Lost>,
    /// What the routers chose, if somebody wants to know: [MoE layers, rows, top_k].
    pub(crate) recorded: Option<Vec<ExpertId>>,
}

/// Where a pass is within its layer.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// Rows from here on have no attention yet.
    Rows(usize),
    /// All rows are routed; `first` until their experts have been asked for.
    Experts { first: bool },
}

impl Default for Stage {
    fn default() -> Self {
        Self::Rows(0)
    }
}

/// A sequence that lost an expert: its rows were left out from that layer on.
#[derive(Debug)]
pub(crate) struct Lost {
    /// Index into [`Batch::tables`].
    pub(crate) sequence: usize,
    pub(crate) error: Arc<flash_experts::Error>,
}

/// How a pass is cut up.
pub(crate) struct Cut<'a> {
    pub(crate) pace: &'a mut Pace,
    /// After the piece that passes it, the pass stops for now.
    pub(crate) end: Option<Instant>,
}

impl Cut<'_> {
    fn enough(&self) -> bool {
        self.end.is_some_and(|end| Instant::now() >= end)
    }
}

impl Pass {
    /// Starts over with other rows, in the memory that is there.
    pub(crate) fn start(&mut self, backend: &mut Backend, record: bool, fill: impl FnOnce(&mut Batch)) {
        self.batch.rows.clear();
        self.batch.tables.clear();
        fill(&mut self.batch);
        self.alive.clear();
        self.alive.resize(self.batch.rows.len(), true);
        (self.layer, self.stage) = (0, Stage::Rows(0));
        self.lost.clear();
        self.recorded = record.then(Vec::new);
        backend.begin(&mut self.act, &self.batch);
    }

    /// What the routers chose for some rows, if it was recorded.
    pub(crate) fn routing(&self, rows: Range<usize>) -> Event {
        let (all, top_k) = (self.batch.rows.len(), self.plan.top_k());
        let layers = self.recorded.iter().flat_map(|recorded| recorded.chunks_exact(all * top_k));
        let ids = rows.clone().flat_map(|row| layers.clone().flat_map(move |layer| &layer[row * top_k..][..top_k]).map(|expert| expert.0));
        let layers = layers.clone().count();
        Event::Routing { tokens: self.batch.rows[rows.clone()].iter().map(|row| row.token).collect(), layers, ids: ids.collect() }
    }

    /// Share of the layers that are done.
    pub(crate) fn progress(&self, layers: usize) -> f64 {
        self.layer as f64 / layers.max(1) as f64
    }
}

impl Forward {
    pub(crate) fn new(router: Router, moe: impl Iterator<Item = bool>) -> Self {
        let mut next = 0;
        let moe_layers: Vec<_> = moe
            .map(|moe| {
                next += u16::from(moe);
                moe.then(|| LayerId(next - 1))
            })
            .collect();
        Self {
            router,
            forced: None,
            foresight: Foresight::default(),
            #[cfg(feature = "mlx")]
            odds: ahead::Odds::new(moe_layers.len()),
            moe_layers,
        }
    }

    pub(crate) fn layers(&self) -> usize {
        self.moe_layers.len()
    }

    /// From embedding to the last layer; [`Backend::logits`] reads the result.
    pub(crate) fn run(&mut self, backend: &mut Backend, experts: &mut Experts, pass: &mut Pass) {
        #[cfg(feature = "mlx")]
        if backend.runs_ahead(pass.batch.rows.len()) {
            return self.run_ahead(backend, experts, pass);
        }
        let done = self.advance(backend, experts, pass, &mut Cut { pace: &mut Pace::LONG.clone(), end: None });
        debug_assert!(done, "nothing stops it");
    }

    /// Takes a pass further, for each layer attention, route, experts; true at the end.
    pub(crate) fn advance(&mut self, backend: &mut Backend, experts: &mut Experts, pass: &mut Pass, cut: &mut Cut<'_>) -> bool {
        while pass.layer < self.moe_layers.len() && pass.alive.contains(&true) {
            match pass.stage {
                Stage::Rows(from) => {
                    let (began, rows) = (Instant::now(), cut.pace.rows.min(pass.batch.rows.len() - from));
                    self.rows(backend, pass, from, rows);
                    cut.pace.took_rows(rows, began.elapsed());
                }
                Stage::Experts { .. } => {
                    let moe_layer = self.moe_layers[pass.layer].expect("only routed layers come to this stage");
                    if self.experts(backend, experts, pass, moe_layer, cut) {
                        let began = Instant::now();
                        backend.combine(&mut pass.act, &pass.plan);
                        backend.spent(Spent::Experts, began);
                        (pass.layer, pass.stage) = (pass.layer + 1, Stage::Rows(0));
                    }
                }
            }
            if pass.layer < self.moe_layers.len() && cut.enough() {
                // Others fetch meanwhile.
                backend.settle(&mut pass.act);
                experts.release();
                return false;
            }
        }
        true
    }

    /// Attention and routing, or the dense feed-forward, of the next piece of the rows.
    fn rows(&mut self, backend: &mut Backend, pass: &mut Pass, from: usize, count: usize) {
        let Pass { batch, act, plan, alive, layer, stage, left, recorded, .. } = pass;
        let (layer, rows) = (*layer, batch.rows.len());
        let piece = from..from + count;
        if from == 0 {
            plan.begin(self.router);
        }
        backend.attention(layer, act, batch, alive, piece.clone());
        let began = Instant::now();
        match backend.route(layer, act, piece.clone()) {
            None => backend.dense(layer, act, piece.clone()),
            Some(logits) => {
                let forced = |row: usize| {
                    let forced = self.forced.as_ref()?;
                    Some(forced.choice(batch.rows[row].position, self.moe_layers[layer]?))
                };
                plan.route(logits, &alive[piece.clone()], |row| forced(piece.start + row));
            }
        }
        *stage = Stage::Rows(piece.end);
        if piece.end == rows {
            if self.moe_layers[layer].is_some() {
                plan.group();
                if let Some(recorded) = recorded {
                    (0..rows).for_each(|row| recorded.extend_from_slice(plan.chosen(row)));
                }
                self.foresight.check(layer, plan.experts());
                left.clear();
                left.extend_from_slice(plan.experts());
                *stage = Stage::Experts { first: true };
            } else {
                (pass.layer, pass.stage) = (layer + 1, Stage::Rows(0));
            }
        }
        backend.spent(if self.moe_layers[layer].is_some() { Spent::Router } else { Spent::Experts }, began);
    }

    /// Runs experts as their bytes arrive, those in the cache first; their sum is taken in rank order. False: enough for
    /// now, `left` says what is to do.
    fn experts(&mut self, backend: &mut Backend, experts: &mut Experts, pass: &mut Pass, moe_layer: LayerId, cut: &mut Cut<'_>) -> bool {
        let Pass { batch, act, plan, alive, layer, left, arrivals, ready, lost, stage, .. } = pass;
        let first = std::mem::replace(stage, Stage::Experts { first: false }) == Stage::Experts { first: true };
        // A prompt needs most experts of the next layer anyway, and a full cache has them.
        let foresees = batch.rows.len() <= FORESEE_ROWS && self.foresight.on && self.forced.is_none();
        let next = self.moe_layers.get(*layer + 1).copied().flatten().filter(|_| foresees && experts.slots() < self.router.experts);
        // Slots that this very fetch needs again cannot wait to be read.
        let later = backend.lazy() && plan.experts().len() <= experts.slots();
        let mut began = Instant::now();
        let mut fetch = experts.fetch(moe_layer, &if first { plan.routing() } else { plan.rest(left) });
        if let Some(next_layer) = next {
            began = backend.spent(Spent::Wait, began);
            if let Some(logits) = backend.foresee(*layer + 1, act) {
                fetch.prefetch(next_layer, self.foresight.rank(*layer + 1, logits, self.router));
            }
            began = backend.spent(Spent::Router, began);
        }
        while fetch.next(arrivals) {
            ready.clear();
            for arrival in arrivals.drain(..) {
                match arrival {
                    Arrival::Ready { expert, .. } => ready.push(expert),
                    Arrival::Failed { expert, error } => {
                        left.retain(|left| *left != expert);
                        drop_rows(batch, plan, expert, &error, alive, lost);
                    }
                }
            }
            let mut ready = &ready[..];
            while !ready.is_empty() {
                let (mut rows, most) = (0, cut.pace.places);
                let fits = |expert: &&ExpertId| {
                    rows += plan.rows_of(**expert).0.len();
                    rows <= most
                };
                let (group, rest) = ready.split_at(ready.iter().take_while(fits).count().max(1));
                began = backend.spent(Spent::Wait, began);
                backend.experts(*layer, act, plan, group, &fetch);
                if !later {
                    backend.settle(act);
                }
                let ran = began;
                began = backend.spent(Spent::Experts, began);
                cut.pace.took_places(group.iter().map(|expert| plan.rows_of(*expert).0.len()).sum(), began - ran);
                if !later {
                    fetch.done(group);
                }
                left.retain(|left| !group.contains(left));
                ready = rest;
                if !left.is_empty() && cut.enough() {
                    return false;
                }
            }
        }
        if later {
            fetch.hold(); // until the next layer's routing is known, which builds on what was computed here
        } else {
            drop(fetch);
        }
        backend.spent(Spent::Wait, began);
        true
    }
}

/// Passes of more rows are not looked ahead of.
const FORESEE_ROWS: usize = 16;

/// Which experts the next layer will want, by its own router on this layer's residual (arXiv 2603.19289), and how often
/// that was right.
#[derive(Debug, Default)]
pub(crate) struct Foresight {
    pub(crate) on: bool,
    layer: usize,
    /// For `layer`: every row's favourites first, then their seconds, and so on.
    ranked: Vec<ExpertId>,
    favourites: Vec<ExpertId>,
    /// Experts that were wanted, and those of them that had been foreseen.
    pub(crate) wanted: u64,
    pub(crate) foreseen: u64,
}

impl Foresight {
    fn rank(&mut self, layer: usize, logits: &[f32], router: Router) -> &[ExpertId] {
        self.favourites.clear();
        logits.chunks_exact(router.experts).for_each(|logits| most_likely(logits, router.top_k, &mut self.favourites));
        self.merge(layer, router)
    }

    /// Every row's favourites as one list.
    fn merge(&mut self, layer: usize, router: Router) -> &[ExpertId] {
        self.layer = layer;
        self.ranked.clear();
        for rank in 0..router.top_k {
            for row in self.favourites.chunks_exact(router.top_k) {
                if !self.ranked.contains(&row[rank]) {
                    self.ranked.push(row[rank]);
                }
            }
        }
        &self.ranked
    }

    /// The layer has been routed.
    fn check(&mut self, layer: usize, wanted: &[ExpertId]) {
        if self.layer == layer && !self.ranked.is_empty() {
            self.wanted += wanted.len() as u64;
            self.foreseen += wanted.iter().filter(|expert| self.ranked.contains(expert)).count() as u64;
            self.ranked.clear();
        }
    }
}

/// Every row of a sequence that needed `expert` is out: later positions build on the one that failed.
fn drop_rows(batch: &Batch, plan: &Plan, expert: ExpertId, error: &Arc<flash_experts::Error>, alive: &mut [bool], lost: &mut Vec<Lost>) {
    for &row in plan.rows_of(expert).0 {
        let sequence = batch.rows[row as usize].sequence;
        if lost.iter().all(|lost| lost.sequence != sequence) {
            lost.push(Lost { sequence, error: error.clone() });
            for (row, alive) in batch.rows.iter().zip(alive.iter_mut()) {
                *alive &= row.sequence != sequence;
            }
        }
    }
}
