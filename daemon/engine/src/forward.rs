//! The decoder on one page.

use std::sync::Arc;

use flash_experts::{Arrival, ExpertId, Experts, LayerId, Slot};

use crate::{
    backend::cpu::{Batch, Cpu},
    moe::{Plan, Router},
};

/// What a forward pass keeps between layers and steps.
#[derive(Debug)]
pub(crate) struct Forward {
    router: Router,
    /// For each layer, how many MoE layers come before it.
    moe_layers: Vec<LayerId>,
    plan: Plan,
    /// Rows whose sequence has all its experts so far.
    alive: Vec<bool>,
}

/// A sequence that lost an expert: its rows were left out from that layer on.
#[derive(Debug)]
pub(crate) struct Lost {
    /// Index into [`Batch::tables`].
    pub(crate) sequence: usize,
    pub(crate) error: Arc<flash_experts::Error>,
}

impl Forward {
    pub(crate) fn new(router: Router, moe: impl Iterator<Item = bool>) -> Self {
        let mut next = 0;
        let moe_layers = moe
            .map(|moe| {
                next += u16::from(moe);
                LayerId(next - u16::from(moe))
            })
            .collect();
        Self { router, moe_layers, plan: Plan::default(), alive: Vec::new() }
    }

    /// Embed, then for each layer attention, route, experts; [`Cpu::logits`] reads the result.
    pub(crate) fn run(&mut self, cpu: &mut Cpu, experts: &mut Experts, batch: &Batch<'_>) -> Vec<Lost> {
        let Self { router, moe_layers, plan, alive } = self;
        let mut lost = Vec::new();
        alive.clear();
        alive.resize(batch.rows.len(), true);
        cpu.begin(batch);
        for (layer, moe_layer) in moe_layers.iter().enumerate() {
            cpu.attention(layer, batch);
            let Some(logits) = cpu.route(layer) else {
                cpu.dense(layer);
                continue;
            };
            plan.route(*router, logits, alive);
            // Experts run as their bytes arrive, those in the cache first; their sum is taken in rank order.
            let mut fetch = experts.fetch(*moe_layer, plan.experts());
            while let Some(arrivals) = fetch.next() {
                let mut ready: Vec<(ExpertId, Slot)> = Vec::with_capacity(arrivals.len());
                for arrival in arrivals {
                    match arrival {
                        Arrival::Ready { expert, slot } => ready.push((expert, slot)),
                        Arrival::Failed { expert, error } => drop_rows(batch, plan, expert, &error, alive, &mut lost),
                    }
                }
                let slots: Vec<(ExpertId, &[u8])> = ready.iter().map(|(expert, slot)| (*expert, fetch.slot_bytes(*slot))).collect();
                cpu.experts(layer, plan, &slots);
                let computed: Vec<ExpertId> = ready.iter().map(|(expert, _)| *expert).collect();
                fetch.done(&computed);
            }
            cpu.combine(plan);
        }
        lost
    }
}

/// Every row of a sequence that needed `expert` is out: later positions build on the one that failed.
fn drop_rows(
    batch: &Batch<'_>,
    plan: &Plan,
    expert: ExpertId,
    error: &Arc<flash_experts::Error>,
    alive: &mut [bool],
    lost: &mut Vec<Lost>,
) {
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
