//! Attention over a sequence's keys and values, which lie in one piece: MLX's fast attention wants them so, and to gather
//! blocks of 32 positions would copy them at every step. A sequence is named by its first KV block.

use std::{collections::HashMap, ops::Range};

use mlx_rs::{
    Array, Dtype,
    fast::{ScaledDotProductAttentionMask as Mask, scaled_dot_product_attention},
    ops::{
        concatenate,
        indexing::{Ellipsis, TryIndexMutOp, TryIndexOp},
        zeros_dtype,
    },
};

use super::Result;
use crate::kv::{BLOCK, BlockId, Table};

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
    /// Per layer; `None` where nothing was written yet.
    sequences: HashMap<BlockId, Vec<Option<[Array; 2]>>>,
}

impl Kv {
    pub(super) fn new(layers: usize, [heads, head_dim]: [usize; 2], dtype: Dtype) -> Self {
        Self { heads: heads as i32, head_dim: head_dim as i32, layers, dtype, sequences: HashMap::new() }
    }

    pub(super) fn free(&mut self, block: BlockId) {
        self.sequences.remove(&block);
    }

    pub(super) fn block_bytes(&self) -> usize {
        2 * self.layers * BLOCK * (self.heads * self.head_dim) as usize * super::size_of(self.dtype)
    }

    pub(super) fn blocks_used(&self) -> usize {
        let positions = |layers: &Vec<Option<[Array; 2]>>| layers.iter().flatten().map(|[keys, _]| keys.dim(2) as usize).max().unwrap_or(0);
        self.sequences.values().map(|layers| positions(layers) / BLOCK).sum()
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
        let empty = || vec![const { None }; self.layers];
        let slot = &mut self.sequences.entry(run.table[0]).or_insert_with(empty)[layer];
        let room = slot.as_ref().map_or(0, |[keys, _]| keys.dim(2) as usize);
        if room < end {
            // No more than is reserved.
            let wanted = end.next_multiple_of(GROWTH).min(run.table.len() * BLOCK);
            let more = || zeros_dtype(&[1, self.heads, (wanted - room) as i32, self.head_dim], self.dtype);
            *slot = Some(match slot.take() {
                None => [more()?, more()?],
                Some([keys, values]) => [concatenate(&[keys, more()?], 2)?, concatenate(&[values, more()?], 2)?],
            });
        }
        let cache = slot.as_mut().expect("made above");
        for (cache, new) in cache.iter_mut().zip(new) {
            // In place, because nobody else has the array by then: the last step has been evaluated.
            cache.try_index_mut((Ellipsis, run.position as i32..end as i32, ..), new)?;
        }
        Ok(cache)
    }
}
