//! The KV cache's bytes and attention over them.
//!
//! Blocks of [`BLOCK`] tokens; a block holds every layer as [layer][K, V][kv head][token][head_dim], so that a head's
//! keys lie in one run. A row's scores are taken in position order, whatever the batch.

use half::{f16, slice::HalfFloatSliceExt};

use super::{Shape, pool::Cells, simd::Isa};
use crate::kv::{BLOCK, BlockId};

/// Memory of the blocks in use; a block's memory is taken when it is first written and returned when it is freed.
#[derive(Debug)]
pub(super) enum Kv {
    F32(Vec<Option<Box<[f32]>>>),
    F16(Vec<Option<Box<[f16]>>>),
}

impl Kv {
    /// Bytes of one block.
    pub(super) fn block_bytes(&self, shape: &Shape) -> usize {
        shape.block_numbers() * if matches!(self, Self::F32(_)) { 4 } else { 2 }
    }

    pub(super) fn blocks_used(&self) -> usize {
        match self {
            Self::F32(blocks) => blocks.iter().flatten().count(),
            Self::F16(blocks) => blocks.iter().flatten().count(),
        }
    }

    pub(super) fn free(&mut self, block: BlockId) {
        match self {
            Self::F32(blocks) => drop(blocks.get_mut(block.0 as usize).and_then(Option::take)),
            Self::F16(blocks) => drop(blocks.get_mut(block.0 as usize).and_then(Option::take)),
        }
    }

    /// Stores one token's keys and values [kv_heads × head_dim] of `layer`.
    pub(super) fn write(&mut self, shape: &Shape, layer: usize, table: &[BlockId], position: usize, k: &[f32], v: &[f32]) {
        match self {
            Self::F32(blocks) => write(blocks, shape, layer, table, position, [k, v], |to, from| to.copy_from_slice(from)),
            Self::F16(blocks) => write(blocks, shape, layer, table, position, [k, v], |to, from| to.convert_from_f32_slice(from)),
        }
    }

    /// out[head × head_dim ..] of the query heads that share `kv_head`, over positions 0..=position.
    pub(super) fn attend(&self, isa: &Isa, shape: &Shape, layer: usize, kv_head: usize, q: &Query<'_>, out: (&Cells<'_>, usize)) {
        match self {
            Self::F32(blocks) => attend(blocks, (isa.dot, isa.axpy), shape, layer, kv_head, q, out),
            Self::F16(blocks) => attend(blocks, (isa.dot_f16, isa.axpy_f16), shape, layer, kv_head, q, out),
        }
    }
}

/// One row's queries [heads × head_dim] and where it stands.
pub(super) struct Query<'a> {
    pub(super) heads: &'a [f32],
    pub(super) position: usize,
    pub(super) table: &'a [BlockId],
}

impl Shape {
    fn block_numbers(&self) -> usize {
        self.layers * 2 * self.kv_heads * BLOCK * self.head_dim
    }

    /// Where the run of (layer, K or V, kv head) starts in a block.
    fn run(&self, layer: usize, side: usize, kv_head: usize) -> usize {
        ((layer * 2 + side) * self.kv_heads + kv_head) * BLOCK * self.head_dim
    }
}

fn write<N: Copy + Default>(
    blocks: &mut Vec<Option<Box<[N]>>>,
    shape: &Shape,
    layer: usize,
    table: &[BlockId],
    position: usize,
    sides: [&[f32]; 2],
    convert: impl Fn(&mut [N], &[f32]),
) {
    let id = table[position / BLOCK].0 as usize;
    if blocks.len() <= id {
        blocks.resize_with(id + 1, || None);
    }
    let block = blocks[id].get_or_insert_with(|| vec![N::default(); shape.block_numbers()].into());
    let d = shape.head_dim;
    for (side, numbers) in sides.iter().enumerate() {
        for (kv_head, numbers) in numbers.chunks_exact(d).enumerate() {
            let at = shape.run(layer, side, kv_head) + position % BLOCK * d;
            convert(&mut block[at..at + d], numbers);
        }
    }
}

type Kernels<N> = (fn(&[f32], &[N]) -> f32, fn(f32, &[N], &mut [f32]));

fn attend<N>(
    blocks: &[Option<Box<[N]>>],
    (dot, axpy): Kernels<N>,
    shape: &Shape,
    layer: usize,
    kv_head: usize,
    q: &Query<'_>,
    (out, at): (&Cells<'_>, usize),
) {
    let (d, shared) = (shape.head_dim, shape.heads / shape.kv_heads);
    let scale = 1.0 / (d as f32).sqrt();
    let count = q.position + 1;
    let mut scores = vec![0.0f32; count * shared];
    let runs = |side: usize| {
        let at = shape.run(layer, side, kv_head);
        q.table.iter().take(count.div_ceil(BLOCK)).flat_map(move |id| {
            let block = blocks[id.0 as usize].as_ref().expect("positions up to the row's own were written");
            block[at..at + BLOCK * d].chunks_exact(d)
        })
    };
    // Keys once for all the heads that share them.
    for (position, key) in runs(0).take(count).enumerate() {
        for head in 0..shared {
            let query = &q.heads[(kv_head * shared + head) * d..][..d];
            scores[head * count + position] = dot(query, key) * scale;
        }
    }
    for scores in scores.chunks_exact_mut(count) {
        softmax(scores);
    }
    let mut sums = vec![0.0f32; shared * d];
    for (position, value) in runs(1).take(count).enumerate() {
        for (head, sum) in sums.chunks_exact_mut(d).enumerate() {
            axpy(scores[head * count + position], value, sum);
        }
    }
    out.fill(at + kv_head * shared * d, &sums);
}

fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
    }
    let inverse = 1.0 / super::matrix::sum(scores);
    for score in scores {
        *score *= inverse;
    }
}
