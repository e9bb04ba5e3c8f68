//! Routing: router logits to the experts each row needs and their weights, and from there to what each expert runs.
//! Pure; the same code serves every backend, so that routing cannot differ between them.

use flash_experts::{ExpertId, LayerId, Routing};

/// How a router's logits become weights.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Router {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    /// Weights of the chosen experts are scaled to sum to 1 (config.json's `norm_topk_prob`).
    pub(crate) normalize: bool,
}

/// Choices that replace the routers', for measurements: token position → MoE layer → its experts in rank order. Starts
/// over where the recording ends.
#[derive(Debug)]
pub(crate) struct Forced {
    /// [tokens, layers, top_k]
    chosen: Vec<ExpertId>,
    layers: usize,
    top_k: usize,
}

impl Forced {
    /// `chosen` is [tokens, layers, top_k], at least one token.
    pub(crate) fn new(chosen: Vec<ExpertId>, layers: usize, top_k: usize) -> Self {
        assert!(!chosen.is_empty() && chosen.len().is_multiple_of(layers * top_k), "whole tokens");
        Self { chosen, layers, top_k }
    }

    pub(crate) fn choice(&self, position: usize, layer: LayerId) -> &[ExpertId] {
        let tokens = self.chosen.len() / (self.layers * self.top_k);
        &self.chosen[(position % tokens * self.layers + usize::from(layer.0)) * self.top_k..][..self.top_k]
    }
}

/// What one layer of a pass runs. Reused from layer to layer.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    router: Router,
    /// [rows, top_k] in rank order, most likely first; empty rows are left out of the layer.
    chosen: Vec<ExpertId>,
    weights: Vec<f32>,
    alive: Vec<bool>,
    /// Distinct experts, ascending.
    experts: Vec<ExpertId>,
    /// tokens/places of expert i are at first[i]..first[i + 1].
    first: Vec<usize>,
    tokens: Vec<u32>,
    places: Vec<u32>,
    /// Per expert: its places, then where the next of them goes.
    next: Vec<usize>,
}

impl Plan {
    /// Forgets the last layer.
    pub(crate) fn begin(&mut self, router: Router) {
        self.router = router;
        self.alive.clear();
        self.chosen.clear();
        self.weights.clear();
    }

    /// Routes the next rows from their logits [rows, experts], those that are `alive`; `forced` says what else to choose.
    pub(crate) fn route<'a>(&mut self, logits: &[f32], alive: &[bool], forced: impl Fn(usize) -> Option<&'a [ExpertId]>) {
        self.alive.extend_from_slice(alive);
        for (row, (logits, alive)) in logits.chunks_exact(self.router.experts).zip(alive).enumerate() {
            if *alive {
                self.route_row(logits, forced(row));
            } else {
                self.chosen.resize(self.chosen.len() + self.router.top_k, ExpertId(0));
                self.weights.resize(self.weights.len() + self.router.top_k, 0.0);
            }
        }
    }

    /// Takes all rows' routing, [rows, top_k] in rank order, from where it was computed.
    #[cfg(feature = "mlx")]
    pub(crate) fn take(&mut self, chosen: &[u32], weights: &[f32], alive: &[bool]) {
        self.alive.extend_from_slice(alive);
        self.chosen.extend(chosen.iter().map(|expert| ExpertId(*expert as u16)));
        self.weights.extend_from_slice(weights);
        self.group();
    }

    /// Takes what rows were routed to elsewhere, [rows, top_k] in rank order, for the cache to learn from.
    pub(crate) fn note(&mut self, chosen: &[ExpertId]) {
        self.alive.resize(self.alive.len() + chosen.len() / self.router.top_k, true);
        self.chosen.extend_from_slice(chosen);
    }

    /// softmax over all experts, the k most likely (lower id first on ties), optionally scaled to sum to 1.
    fn route_row(&mut self, logits: &[f32], forced: Option<&[ExpertId]>) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
        let start = self.chosen.len();
        match forced {
            Some(forced) => self.chosen.extend_from_slice(forced),
            None => most_likely(logits, self.router.top_k, &mut self.chosen),
        }
        self.weights.extend(self.chosen[start..].iter().map(|expert| (logits[usize::from(expert.0)] - max).exp() / total));
        if self.router.normalize {
            let weights = &mut self.weights[start..];
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
    }

    /// Sorts (row, rank) places by expert, when all rows are routed.
    pub(crate) fn group(&mut self) {
        let Self { router, chosen, alive, experts, first, tokens, places, next, .. } = self;
        let k = router.top_k;
        let placed = || chosen.iter().enumerate().filter(|(place, _)| alive[place / k]);
        next.clear();
        next.resize(router.experts, 0);
        placed().for_each(|(_, expert)| next[usize::from(expert.0)] += 1);
        experts.clear();
        first.clear();
        let mut at = 0;
        for (expert, next) in (0u16..).zip(next.iter_mut()).filter(|(_, count)| **count > 0) {
            experts.push(ExpertId(expert));
            first.push(at);
            at += std::mem::replace(next, at);
        }
        first.push(at);
        tokens.resize(at, 0);
        places.resize(at, 0);
        for (place, expert) in placed() {
            let at = &mut next[usize::from(expert.0)];
            (tokens[*at], places[*at]) = ((place / k) as u32, place as u32);
            *at += 1;
        }
    }

    pub(crate) fn top_k(&self) -> usize {
        self.router.top_k
    }

    /// A row's experts in rank order.
    pub(crate) fn chosen(&self, row: usize) -> &[ExpertId] {
        &self.chosen[row * self.router.top_k..][..self.router.top_k]
    }

    /// Every expert that some row needs with the rows that need it.
    pub(crate) fn routing(&self) -> Routing<'_> {
        Routing { experts: &self.experts, first: &self.first, rows: &self.tokens, tokens: self.alive.len() as u32, first_time: true }
    }

    /// The rest of a fetch of [`Plan::routing`] that was dropped half-way.
    pub(crate) fn rest<'a>(&self, left: &'a [ExpertId]) -> Routing<'a> {
        Routing::rest(left, self.alive.len() as u32)
    }

    /// Every expert that some row needs, once.
    pub(crate) fn experts(&self) -> &[ExpertId] {
        &self.experts
    }

    /// The rows routed to an expert, and for each its place row × top_k + rank.
    pub(crate) fn rows_of(&self, expert: ExpertId) -> (&[u32], &[u32]) {
        match self.experts.binary_search(&expert) {
            Ok(i) => (&self.tokens[self.first[i]..self.first[i + 1]], &self.places[self.first[i]..self.first[i + 1]]),
            Err(_) => (&[], &[]),
        }
    }

    /// Weights of a row in rank order; empty for a row that was left out.
    pub(crate) fn weights(&self, row: usize) -> &[f32] {
        if self.alive[row] { &self.weights[row * self.router.top_k..][..self.router.top_k] } else { &[] }
    }
}

/// Appends the k experts with the highest logits, highest first, lower id first on ties.
pub(crate) fn most_likely(logits: &[f32], k: usize, into: &mut Vec<ExpertId>) {
    let start = into.len();
    for (expert, logit) in logits.iter().enumerate() {
        // Most are not among them: one comparison then.
        if into.len() == start + k && into.last().is_some_and(|last| logits[usize::from(last.0)] >= *logit) {
            continue;
        }
        let at = start + into[start..].partition_point(|taken| logits[usize::from(taken.0)] >= *logit);
        if at < start + k {
            into.truncate(start + k - 1);
            into.insert(at, ExpertId(expert as u16));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(logits: &[f32], experts: usize, top_k: usize, normalize: bool, alive: &[bool]) -> Plan {
        let mut plan = Plan::default();
        plan.begin(Router { experts, top_k, normalize });
        // In two pieces, as a long prompt is.
        let rows = alive.len().div_ceil(2);
        plan.route(&logits[..rows * experts], &alive[..rows], |_| None);
        plan.route(&logits[rows * experts..], &alive[rows..], |_| None);
        plan.group();
        plan
    }

    #[test]
    fn rows_are_grouped_by_expert_and_ranked_by_weight() {
        let logits = [0.0, 2.0, 1.0, 0.0, /* ties */ 5.0, 5.0, 5.0, 5.0, /* dead */ 9.0, 0.0, 0.0, 0.0];
        let plan = plan(&logits, 4, 2, true, &[true, true, false]);
        let ids: Vec<u16> = plan.experts().iter().map(|id| id.0).collect();
        assert_eq!(ids, [0, 1, 2]);
        assert_eq!(plan.rows_of(ExpertId(1)), (&[0, 1][..], &[0, 3][..]));
        assert_eq!(plan.rows_of(ExpertId(0)), (&[1][..], &[2][..]));
        assert_eq!(plan.rows_of(ExpertId(3)), (&[][..], &[][..]));
        assert!(plan.weights(2).is_empty());
        let weights = plan.weights(0);
        assert!((weights[0] - 1.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6 && (weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn weights_keep_the_whole_softmax_without_norm_topk_prob() {
        let plan = plan(&[1.0, 1.0, 1.0, 1.0], 4, 1, false, &[true]);
        assert_eq!(plan.weights(0), [0.25]);
    }

    #[test]
    fn forced_choices_take_the_routers_weights_and_start_over() {
        let ids = |ids: &[u16]| ids.iter().map(|id| ExpertId(*id)).collect::<Vec<_>>();
        let forced = Forced::new(ids(&[3, 1, 0, 2, 2, 0, 1, 3]), 2, 2);
        assert_eq!(forced.choice(0, LayerId(1)), ids(&[0, 2]));
        assert_eq!(forced.choice(3, LayerId(0)), ids(&[2, 0]));
        let mut plan = Plan::default();
        plan.begin(Router { experts: 4, top_k: 2, normalize: true });
        plan.route(&[0.0, 0.0, 9.0, 0.0], &[true], |row| Some(forced.choice(row, LayerId(0))));
        plan.group();
        assert_eq!((plan.chosen(0), plan.weights(0)), (&ids(&[3, 1])[..], &[0.5, 0.5][..]));
        assert_eq!(plan.experts(), ids(&[1, 3]));
    }
}
