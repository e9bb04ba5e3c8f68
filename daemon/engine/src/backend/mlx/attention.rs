//! Attention over a sequence's keys and values, which lie in one piece: MLX's fast attention wants them so, and to gather
//! blocks of 32 positions would copy them at every step. A sequence is named by its last KV block, which no other has; the chunks of a
//! prompt that others may begin with are kept as copies, and copied again to go on from.

use std::{collections::HashMap, ops::Range};

use mlx_rs::{
    Array, Dtype,
    fast::{ScaledDotProductAttentionMask as Mask, scaled_dot_product_attention},
    ops::{
        concatenate,
        indexing::{Ellipsis, TryIndexMutOp, TryIndexOp},
        zeros_dtype,
    },
    transforms::eval,
};

use super::Result;
use crate::{
    kv::{BLOCK, BlockId, Table},
    schedule::CHUNK_MIN,
};

/// Positions by which a cache grows: each time it is copied.
const GROWTH: usize = 8 * BLOCK;

/// Consecutive rows of one sequence.
#[derive(Clone, Debug)]
pub(super) struct Run {
    /// Of the first row in the pass.
    pub(super) first: usize,
    /// In the piece.
    pub(super) rows: Range<i32>,
    /// Of the first row in the sequence.
    pub(super) position: usize,
    pub(super) table: Table,
}

/// Keys and values of every sequence.
#[derive(Debug)]
pub(super) struct Kv {
    pub(super) heads: i32,
    pub(super) head_dim: i32,
    pub(super) layers: usize,
    pub(super) dtype: Dtype,
    sequences: HashMap<BlockId, Layers>,
    /// Chunks of [`CHUNK_MIN`] positions, by their last block: others may begin like it and go on otherwise.
    kept: HashMap<BlockId, Layers>,
}

/// [1, heads, positions, head_dim]; `None` where nothing was written yet.
type Layers = Vec<Option<[Array; 2]>>;

impl Kv {
    pub(super) fn new(layers: usize, [heads, head_dim]: [usize; 2], dtype: Dtype) -> Self {
        Self { heads: heads as i32, head_dim: head_dim as i32, layers, dtype, sequences: HashMap::new(), kept: HashMap::new() }
    }

    pub(super) fn free(&mut self, block: BlockId) {
        self.sequences.remove(&block);
        self.kept.remove(&block);
    }

    /// A sequence ends, which was named by `own`: of its prompt stay the chunks that end with `lasts`, one after the other.
    pub(super) fn end(&mut self, own: BlockId, lasts: &[BlockId]) -> Result<()> {
        let Some(layers) = self.sequences.remove(&own) else { return Ok(()) };
        for (last, start) in lasts.iter().zip((0..).step_by(CHUNK_MIN)) {
            if !self.kept.contains_key(last) {
                let copy = |array: &Array| {
                    let half = |at: usize| array.try_index((Ellipsis, at as i32..(at + CHUNK_MIN / 2) as i32, ..));
                    // A view would hold all of the sequence.
                    concatenate(&[half(start)?, half(start + CHUNK_MIN / 2)?], 2)
                };
                let copies: Layers =
                    layers.iter().map(|layer| layer.as_ref().map(|[k, v]| Ok([copy(k)?, copy(v)?])).transpose()).collect::<Result<_>>()?;
                eval(copies.iter().flatten().flatten())?;
                self.kept.insert(*last, copies);
            }
        }
        Ok(())
    }

    pub(super) fn block_bytes(&self) -> usize {
        2 * self.layers * BLOCK * (self.heads * self.head_dim) as usize * super::size_of(self.dtype)
    }

    pub(super) fn blocks_used(&self) -> usize {
        let positions = |layers: &Layers| layers.iter().flatten().map(|[keys, _]| keys.dim(2) as usize).max().unwrap_or(0);
        self.sequences.values().chain(self.kept.values()).map(|layers| positions(layers) / BLOCK).sum()
    }

    /// Writes a run's keys and values [1, heads, rows, head_dim] and attends with `queries` to all up to each row.
    pub(super) fn attend(&mut self, layer: usize, run: &Run, queries: &Array, keys: Array, values: Array) -> Result<Array> {
        let end = run.position + run.rows.len();
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let [keys, values] = self.append(layer, run, end, [keys, values])?;
        let up_to = |array: &Array| array.try_index((Ellipsis, 0..end as i32, ..));
        tracing::trace!(target: super::TRACE, queries = ?queries.shape(), positions = end, "attend");
        let mask = (run.rows.len() > 1).then_some(Mask::Causal);
        scaled_dot_product_attention(queries, up_to(keys)?, up_to(values)?, scale, mask, None)
    }

    fn append(&mut self, layer: usize, run: &Run, end: usize, new: [Array; 2]) -> Result<&[Array; 2]> {
        let own = *run.table.last().expect("a sequence has blocks");
        let slot = &mut self.sequences.entry(own).or_insert_with(|| vec![const { None }; self.layers])[layer];
        let room = slot.as_ref().map_or(0, |[keys, _]| keys.dim(2) as usize);
        if room < end {
            // No more than is reserved.
            let wanted = end.next_multiple_of(GROWTH).min(run.table.len() * BLOCK);
            let mut parts: [Vec<Array>; 2] = slot.take().map_or_else(Default::default, |arrays| arrays.map(|array| vec![array]));
            if room == 0 {
                // It begins with what another one computed.
                for last in (CHUNK_MIN..=run.position).step_by(CHUNK_MIN).map(|end| run.table[end / BLOCK - 1]) {
                    let [keys, values] = self.kept[&last][layer].as_ref().expect("all layers of a prompt are computed");
                    parts[0].push(keys.clone());
                    parts[1].push(values.clone());
                }
            }
            let there = parts[0].iter().map(|part| part.dim(2)).sum::<i32>();
            let [keys, values] = parts.map(|mut parts| {
                parts.push(zeros_dtype(&[1, self.heads, wanted as i32 - there, self.head_dim], self.dtype)?);
                concatenate(&parts, 2)
            });
            *slot = Some([keys?, values?]);
        }
        let cache = slot.as_mut().expect("made above");
        for (cache, new) in cache.iter_mut().zip(new) {
            // In place, because nobody else has the array by then: the last step has been evaluated.
            cache.try_index_mut((Ellipsis, run.position as i32..end as i32, ..), new)?;
        }
        Ok(cache)
    }
}
