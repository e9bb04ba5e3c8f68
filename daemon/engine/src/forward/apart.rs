//! A thread's own rows through all layers, with the experts that are in memory: as [`Forward::run`], with nobody to share a product with
//! and nothing to wait for. The same bits.

use std::time::Instant;

use flash_experts::{ExpertId, Held};

use super::Forward;
use crate::{
    backend::{
        Batch,
        cpu::{Activations, Crew},
    },
    moe::Plan,
    profile::Stage,
};

/// The rows of one thread.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    pub(crate) batch: Batch,
    pub(crate) act: Activations,
    plan: Plan,
    alive: Vec<bool>,
    /// [MoE layers, rows, top_k]
    chosen: Vec<ExpertId>,
}

impl Forward {
    /// From embedding to the last layer; [`Crew::logits`] reads the result. False: an expert is not in memory, and all of it is void.
    pub(crate) fn through(&self, mut crew: Crew<'_>, experts: &Held<'_>, lane: &mut Lane) -> bool {
        let Lane { batch, act, plan, alive, chosen } = lane;
        let rows = batch.rows.len();
        crew.again().size(act, rows);
        alive.clear();
        alive.resize(rows, true);
        chosen.clear();
        for (layer, moe_layer) in self.moe_layers.iter().enumerate() {
            crew.again().attention(layer, act, batch, alive, 0..rows);
            let mut began = Instant::now();
            match (crew.again().route(layer, act, 0..rows), moe_layer) {
                (Some(logits), Some(moe_layer)) => {
                    plan.begin(self.router);
                    plan.route(logits, alive, |_| None);
                    plan.group();
                    (0..rows).for_each(|row| chosen.extend_from_slice(plan.chosen(row)));
                    began = crew.again().spent(Stage::Router, began);
                    let bytes = |expert: ExpertId| experts.bytes(*moe_layer, expert);
                    if plan.experts().iter().any(|expert| bytes(*expert).is_none()) {
                        return false;
                    }
                    crew.again().experts(layer, act, plan, plan.experts(), &|expert| bytes(expert).expect("looked at above"));
                    crew.again().combine(act, plan);
                }
                _ => crew.again().dense(layer, act, 0..rows),
            }
            crew.again().spent(Stage::Experts, began);
        }
        let (began, mut learn) = (Instant::now(), experts.learn());
        for (layer, chosen) in self.moe_layers.iter().flatten().zip(chosen.chunks_exact(rows * self.router.top_k)) {
            plan.begin(self.router);
            plan.note(chosen);
            plan.group();
            learn(*layer, &plan.routing());
        }
        drop(learn);
        crew.spent(Stage::Wait, began);
        true
    }
}
