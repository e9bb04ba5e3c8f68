//! Routing: router logits to the experts each row needs and their weights, and from there to what each expert runs.
//! Pure; the same code serves every backend, so that routing cannot differ between them.

use flash_experts::ExpertId;

/// How a router's logits become weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Router {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    /// Weights of the chosen experts are scaled to sum to 1 (config.json's `norm_topk_prob`).
    pub(crate) normalize: bool,
}

/// What one layer of a step runs. Reused from layer to layer.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    top_k: usize,
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
    order: Vec<u32>,
}

impl Plan {
    /// Routes every row that is `alive` from its logits [rows, experts].
    pub(crate) fn route(&mut self, router: Router, logits: &[f32], alive: &[bool]) {
        let k = router.top_k;
        self.top_k = k;
        self.alive.clear();
        self.alive.extend_from_slice(alive);
        self.chosen.clear();
        self.weights.clear();
        for (logits, alive) in logits.chunks_exact(router.experts).zip(alive) {
            if *alive {
                self.route_row(router, logits);
            } else {
                self.chosen.resize(self.chosen.len() + k, ExpertId(0));
                self.weights.resize(self.weights.len() + k, 0.0);
            }
        }
        self.group();
    }

    /// softmax over all experts, the k most likely (lower id first on ties), optionally scaled to sum to 1.
    fn route_row(&mut self, router: Router, logits: &[f32]) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
        let start = self.chosen.len();
        for (expert, logit) in logits.iter().enumerate() {
            let taken = &self.chosen[start..];
            let at = start + taken.partition_point(|taken| logits[usize::from(taken.0)] >= *logit);
            if at < start + router.top_k {
                self.chosen.truncate(start + router.top_k - 1);
                self.chosen.insert(at, ExpertId(expert as u16));
            }
        }
        self.weights.extend(self.chosen[start..].iter().map(|expert| (logits[usize::from(expert.0)] - max).exp() / total));
        if router.normalize {
            let weights = &mut self.weights[start..];
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
    }

    /// Sorts (row, rank) places by expert.
    fn group(&mut self) {
        let (k, chosen) = (self.top_k, &self.chosen);
        self.order.clear();
        self.order.extend((0..chosen.len() as u32).filter(|place| self.alive[*place as usize / k]));
        self.order.sort_by_key(|place| chosen[*place as usize]);
        self.experts.clear();
        self.first.clear();
        self.tokens.clear();
        self.places.clear();
        for &place in &self.order {
            let expert = chosen[place as usize];
            if self.experts.last() != Some(&expert) {
                self.experts.push(expert);
                self.first.push(self.places.len());
            }
            self.tokens.push(place / k as u32);
            self.places.push(place);
        }
        self.first.push(self.places.len());
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
        if self.alive[row] { &self.weights[row * self.top_k..][..self.top_k] } else { &[] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(logits: &[f32], experts: usize, top_k: usize, normalize: bool, alive: &[bool]) -> Plan {
        let mut plan = Plan::default();
        plan.route(Router { experts, top_k, normalize }, logits, alive);
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
}
