//! Decode steps ahead of the host: the device chooses experts and finds their slots in a table, so that several layers, at best
//! all of them and the head, are one graph, and the host waits once for what they were routed to. An expert that was not in
//! memory makes everything after its layer void, which `forward/ahead.rs` sees and has computed again. A layer asks MLX for the
//! same operations whether its experts were there or had to be waited for: its bits cannot differ.

use std::ops::Range;

use flash_experts::{ExpertId, Slot};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    fast,
    ops::{
        argsort_axis,
        indexing::{Ellipsis, TryIndexOp, take_along_axis},
        softmax_axis,
    },
    transforms::{async_eval, eval},
};

use super::{Activations, GATHER_ROWS, LayerFfn, Mlx, Result, TRACE, indices, whole};
use crate::{
    backend::Batch,
    moe::{Plan, Router},
};

/// A layer's rows before their experts.
#[derive(Clone, Debug)]
pub(super) struct Routed {
    hidden: Array,
    normed: Array,
    /// [rows, top_k], in rank order.
    chosen: Array,
    weights: Array,
}

/// What is run ahead.
pub(crate) struct Ahead<'a> {
    pub(crate) batch: &'a Batch,
    pub(crate) alive: &'a [bool],
    /// With experts that are in memory, as is hoped. The next one is routed, or the logits are computed.
    pub(crate) layers: Range<usize>,
    pub(crate) router: Router,
    /// Where a layer's experts are.
    pub(crate) found: &'a dyn Fn(usize) -> &'a [Option<Slot>],
    /// Replaces the routers' choices [rows, top_k].
    pub(crate) forced: Option<&'a dyn Fn(usize) -> Vec<u32>>,
    /// Whether the choices of the layer after the last are wanted.
    pub(crate) foresees: bool,
}

impl Mlx {
    /// Whether passes of so many rows are run ahead.
    pub(crate) fn runs_ahead(rows: usize) -> bool {
        rows <= GATHER_ROWS
    }

    /// Computes layers on, and waits for what they were routed to. What was found in memory may not change before this returns.
    pub(crate) fn ahead(&mut self, act: &mut Activations, ahead: &Ahead<'_>) -> Result<()> {
        let end = ahead.layers.end;
        act.first = ahead.layers.start;
        act.routed.clear();
        for layer in ahead.layers.clone() {
            let routed = self.routed(layer, act, ahead)?;
            if let Some(routed) = &routed {
                let LayerFfn::Moe { bank: Some(bank), .. } = &mut self.layers[layer].ffn else { unreachable!("it was routed") };
                let slots = bank.slots((ahead.found)(layer), self.moe_layers as u32)?;
                let slots = slots.ok_or_else(|| Exception::custom("no expert is in memory"))?;
                let slots = slots.take_axis(routed.chosen.reshape(&[-1])?, 0)?;
                act.hidden[0] = self.mix(layer, routed, &slots)?;
            } else {
                self.dense(layer, act)?;
            }
            act.routed.push(routed);
            // It begins while the next layer's graph is built.
            async_eval(&act.hidden)?;
        }
        act.foreseen = None;
        if end < self.layers.len() {
            let routed = self.routed(end, act, ahead)?;
            if ahead.foresees {
                tracing::trace!(target: TRACE, layer = end + 1, "foresight");
                let logits = self.router(end + 1, &act.hidden[0])?;
                act.foreseen = logits.map(|logits| favourites(&logits, ahead.router)).transpose()?;
            }
            act.routed.push(routed);
        } else {
            act.logits = Some(self.head(&whole(&mut act.hidden)?)?);
        }
        self.syncs += 1;
        let routings = act.routed.iter().flatten().flat_map(|routed| [&routed.chosen, &routed.weights]);
        eval(routings.chain(&act.foreseen).chain(&act.logits))
    }

    /// Attention and router of a layer; `None` if it is dense.
    fn routed(&mut self, layer: usize, act: &mut Activations, ahead: &Ahead<'_>) -> Result<Option<Routed>> {
        let rows = ahead.batch.rows.len();
        self.attention(layer, act, ahead.batch, ahead.alive, 0..rows)?;
        let hidden = whole(&mut act.hidden)?;
        let l = &self.layers[layer];
        let normed = fast::rms_norm(&hidden, Some(&l.ffn_norm), self.arch.rms_eps)?;
        act.normed.push(normed.clone());
        let LayerFfn::Moe { router, .. } = &l.ffn else { return Ok(None) };
        let logits = router.product(&normed)?.as_dtype(Dtype::Float32)?;
        let chosen = match ahead.forced {
            Some(forced) => Array::from_slice(&forced(layer), &[rows as i32, ahead.router.top_k as i32]),
            None => favourites(&logits, ahead.router)?,
        };
        let weights = take_along_axis(softmax_axis(&logits, -1, true)?, &chosen, -1)?;
        let weights = if ahead.router.normalize { weights.divide(weights.sum_axis(-1, true)?)? } else { weights };
        Ok(Some(Routed { hidden, normed, chosen, weights }))
    }

    /// A layer's rows with their experts, which are in slots [rows * top_k] of its bank.
    fn mix(&self, layer: usize, routed: &Routed, slots: &Array) -> Result<Array> {
        tracing::trace!(target: TRACE, layer, "experts");
        let LayerFfn::Moe { bank: Some(bank), .. } = &self.layers[layer].ffn else { unreachable!("it was routed") };
        let (rows, top_k) = (routed.chosen.dim(0), routed.chosen.dim(1));
        let x = routed.normed.reshape(&[rows, 1, -1])?;
        let row_of = indices((0..rows as u32 * top_k as u32).map(|place| place / top_k as u32));
        let outs = bank.feed_forward(&x, Some(&row_of), slots)?.reshape(&[rows, top_k, -1])?;
        let weights = routed.weights.reshape(&[rows, top_k, 1])?.as_dtype(self.dtype)?;
        routed.hidden.add(outs.multiply(weights)?.sum_axis(1, false)?)
    }

    /// Goes back to before a layer's experts, whatever was computed after them.
    pub(crate) fn back(&self, layer: usize, act: &mut Activations) {
        let routed = act.routed[layer - act.first].as_ref().expect("it was routed");
        (act.hidden, act.normed) = (vec![routed.hidden.clone()], vec![routed.normed.clone()]);
        act.logits = None;
    }

    /// Adds a layer's experts, all of them held, to its rows, which [`Mlx::back`] went back to. As in [`Mlx::experts`], the slots
    /// may not change before a later result has been read.
    pub(crate) fn all_experts(&mut self, layer: usize, act: &mut Activations, plan: &Plan, held: &[(ExpertId, Slot)]) -> Result<()> {
        let LayerFfn::Moe { bank: Some(bank), .. } = &mut self.layers[layer].ffn else { return Ok(()) };
        let [(_, any), ..] = held else { return Ok(()) }; // every row was lost
        let layers = self.moe_layers as u32;
        held.iter().try_for_each(|(expert, slot)| bank.widen(*expert, slot.0 / layers))?;
        // Rows that were lost take any, and nobody looks at them.
        let slot_of = |expert: &ExpertId| held.iter().find(|held| held.0 == *expert).map_or(any, |(_, slot)| slot).0 / layers;
        let routed = act.routed[layer - act.first].as_ref().expect("it was routed");
        let slots = indices((0..routed.chosen.dim(0) as usize).flat_map(|row| plan.chosen(row)).map(slot_of));
        act.hidden = vec![self.mix(layer, routed, &slots)?];
        async_eval(&act.hidden)
    }

    /// What a layer's rows were routed to, experts and weights [rows, top_k]; `None` if it is dense, or was not computed.
    pub(crate) fn routing<'a>(&self, layer: usize, act: &'a Activations) -> Option<(&'a [u32], &'a [f32])> {
        let routed = act.routed.get(layer.checked_sub(act.first)?)?.as_ref()?;
        let read = "evaluated, in one piece";
        Some((routed.chosen.try_as_slice().expect(read), routed.weights.try_as_slice().expect(read)))
    }

    /// What a layer is probably routed to, because it was computed without some of what it builds on.
    pub(crate) fn guessed<'a>(&self, layer: usize, act: &'a Activations) -> Option<&'a [u32]> {
        match self.routing(layer, act) {
            Some((chosen, _)) => Some(chosen),
            None => act.foreseen.as_ref().map(|foreseen| foreseen.try_as_slice().expect("evaluated, in one piece")),
        }
    }
}

/// The experts with the highest logits, [rows, top_k], highest first.
fn favourites(logits: &Array, router: Router) -> Result<Array> {
    let order = argsort_axis(logits.negative()?, -1)?;
    order.try_index((Ellipsis, 0..router.top_k as i32))?.contiguous()
}
