//! The KV cache's bytes and attention over them.
//!
//! Blocks of [`BLOCK`] tokens; a block holds every layer as [layer][keys, values][kv head], a head's keys as
//! [head_dim][token] and its values as [token][head_dim]: kernels take the scores of many positions side by side and never
//! sum across a vector. In fixed point neighbours come in pairs ([`fixed_kv`]).
//!
//! A context is cut into spans of [`SPAN`] positions, always at the same places. A span's scores, softmax and weighted
//! values are computed by themselves, then joined in order of position (as in flash-decoding, arXiv 2311.01282, but with
//! boundaries that depend on nothing). So a row's bits are the same alone, in any cut of a prompt and beside others, while
//! threads share a single row's context, and the rows of a prompt share what they load.

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use flash_kernels::{
    Isa,
    attention::{BLOCK, Partial, SPAN, Stored, Tile, run_len},
    fixed_kv,
};
use half::f16;

use super::{
    Shape,
    blocks::Blocks,
    pool::{Cells, Pool},
};
use crate::{
    Kernels,
    backend::Row,
    kv::{BlockId, Table},
};

const SPAN_BLOCKS: usize = SPAN / BLOCK;
/// Pairs of a row and a query head that a unit of work takes along, if it finds as many: what the first tile of them
/// brought from memory, the others find in the L2 cache.
const PAIRS: usize = 32;
/// Units between two joins, a thread: the last one's end is waited for seldom, and their results (17 KB each) stay in cache.
pub(super) const UNITS: usize = 64;

/// The blocks in use.
#[derive(Debug)]
pub(super) enum Kv {
    F32(Blocks<f32>),
    F16(Blocks<f16>),
    /// 16-bit fixed point, where the kernels multiply that.
    Fixed(Blocks<i16>),
}

/// The same for every kind of numbers.
macro_rules! either {
    ($kv:expr, $blocks:ident => $body:expr) => {
        match $kv {
            Kv::F32($blocks) => $body,
            Kv::F16($blocks) => $body,
            Kv::Fixed($blocks) => $body,
        }
    };
}

impl Kv {
    pub(super) fn new(kernels: Kernels, isa: &Isa) -> Self {
        match isa.attend_fixed {
            _ if kernels == Kernels::Reference => Self::F32(Blocks::default()),
            Some(_) => Self::Fixed(Blocks::default()),
            None => Self::F16(Blocks::default()),
        }
    }

    /// Bytes of one block.
    pub(super) fn block_bytes(&self, shape: &Shape) -> usize {
        either!(self, blocks => block_numbers(blocks, shape) * blocks.number_bytes())
    }

    pub(super) fn blocks_used(&self) -> usize {
        either!(self, blocks => blocks.used())
    }

    pub(super) fn free(&mut self, block: BlockId) {
        either!(self, blocks => blocks.free(block));
    }

    /// Of a block that was written.
    pub(super) fn bytes(&self, block: BlockId) -> Option<&[u8]> {
        either!(self, blocks => blocks.bytes(block))
    }

    pub(super) fn bytes_mut(&mut self, shape: &Shape, block: BlockId) -> &mut [u8] {
        either!(self, blocks => {
            let numbers = block_numbers(blocks, shape);
            blocks.bytes_mut(block, numbers)
        })
    }

    /// Takes the memory for a block.
    pub(super) fn reserve(&mut self, shape: &Shape, block: BlockId) {
        either!(self, blocks => {
            let numbers = block_numbers(blocks, shape);
            blocks.reserve(block, numbers);
        });
    }

    /// As [`Kv::write`], with nobody beside.
    pub(super) fn put(&mut self, shape: &Shape, layer: usize, table: &[BlockId], position: usize, k: &[f32], v: &[f32]) {
        self.reserve(shape, table[position / BLOCK]);
        // SAFETY: the borrow is exclusive.
        unsafe { self.write(shape, layer, table, position, k, v) }
    }

    /// Stores one token's keys and values [kv_heads × head_dim] of `layer`, in a block that is reserved.
    ///
    /// # Safety
    /// Nobody else reads or writes the position's block meanwhile.
    pub(super) unsafe fn write(&self, shape: &Shape, layer: usize, table: &[BlockId], position: usize, k: &[f32], v: &[f32]) {
        // SAFETY: the caller's promise.
        either!(self, blocks => unsafe { write(blocks, shape, layer, table, position, [k, v]) });
    }

    /// out[row × heads × head_dim ..] of all query heads, over each row's positions up to its own; rows that are not alive are
    /// left out.
    pub(super) fn attend(&self, (pool, isa): (&Pool, &Isa), queries: &Queries<'_>, work: &mut Work, out: &Cells<'_>) {
        match self {
            Self::F32(blocks) => attend(pool, &Pass { blocks, kernel: isa.attend, queries, out }, work),
            Self::F16(blocks) => attend(pool, &Pass { blocks, kernel: isa.attend_f16, queries, out }, work),
            Self::Fixed(blocks) => attend(pool, &Pass { blocks, kernel: isa.attend_fixed.unwrap_or(fixed_kv::attend), queries, out }, work),
        }
    }
}

/// The queries of a piece's rows.
pub(super) struct Queries<'a> {
    pub(super) shape: &'a Shape,
    pub(super) layer: usize,
    /// [rows, width], of which the first heads × head_dim are queries.
    pub(super) heads: &'a [f32],
    pub(super) width: usize,
    pub(super) rows: &'a [Row],
    pub(super) alive: &'a [bool],
    pub(super) tables: &'a [Table],
}

impl Shape {
    /// Which of a block's runs is that of (layer, K or V, kv head).
    fn run(&self, layer: usize, side: usize, kv_head: usize) -> usize {
        (layer * 2 + side) * self.kv_heads + kv_head
    }
}

fn block_numbers<N: Stored>(_: &Blocks<N>, shape: &Shape) -> usize {
    shape.layers * 2 * shape.kv_heads * run_len::<N>(shape.head_dim)
}

/// # Safety
/// As [`Kv::write`].
unsafe fn write<N: Stored>(blocks: &Blocks<N>, shape: &Shape, layer: usize, table: &[BlockId], position: usize, sides: [&[f32]; 2]) {
    let (d, token, run) = (shape.head_dim, position % BLOCK, run_len::<N>(shape.head_dim));
    // SAFETY: the caller's promise.
    let block = unsafe { blocks.share_mut(table[position / BLOCK]) };
    for (side, (heads, put)) in sides.into_iter().zip([N::put_key, N::put_value]).enumerate() {
        for (kv_head, numbers) in heads.chunks_exact(d).enumerate() {
            put(&mut block[shape.run(layer, side, kv_head) * run..][..run], token, numbers);
        }
    }
}

/// What attention works with, kept from call to call.
#[derive(Debug)]
pub(super) struct Work {
    plan: Plan,
    /// The head that the wave before left unfinished, then one for each unit of a wave. A lock is only ever held by the one
    /// task that it is for.
    parts: Vec<Mutex<Part>>,
}

/// Units of work: a group's rows, a kv head and a span. A head's spans follow each other, a group's heads do, groups do.
#[derive(Debug)]
struct Plan {
    kv_heads: usize,
    groups: Vec<Group>,
}

/// Rows of one sequence, neighbours in the piece, that go over their context together.
#[derive(Debug)]
struct Group {
    rows: Range<usize>,
    /// What the last row sees.
    spans: usize,
    /// Its first unit; it has kv_heads × spans.
    first: usize,
}

/// [`Partial`] of a group's pairs, over one span or over several that are joined.
#[derive(Debug)]
struct Part {
    max: Vec<f32>,
    sum: Vec<f32>,
    acc: Vec<f32>,
}

impl Work {
    /// For waves of `units`.
    pub(super) fn new(shape: &Shape, units: usize) -> Self {
        let pairs = PAIRS.max(shape.heads / shape.kv_heads);
        let part = || Part { max: vec![0.0; pairs], sum: vec![0.0; pairs], acc: vec![0.0; pairs * shape.head_dim] };
        let parts = (0..=units).map(|_| Mutex::new(part())).collect();
        Self { plan: Plan { kv_heads: shape.kv_heads, groups: Vec::new() }, parts }
    }

    pub(super) fn bytes(&self) -> usize {
        let part = lock(&self.parts[0]);
        4 * self.parts.len() * (part.max.len() + part.sum.len() + part.acc.len())
    }
}

fn lock(part: &Mutex<Part>) -> MutexGuard<'_, Part> {
    // A panic ends the pass, and the next one writes a part before it reads it.
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plan {
    /// Returns the number of units.
    fn make(&mut self, queries: &Queries<'_>) -> usize {
        let Queries { shape, rows, alive, .. } = queries;
        let most = (PAIRS * shape.kv_heads / shape.heads).max(1);
        let (mut from, mut units) = (0, 0);
        self.groups.clear();
        while from < rows.len() {
            let fits = |row: &usize| alive[*row] && rows[*row].sequence == rows[from].sequence;
            let end = from + (from..rows.len().min(from + most)).take_while(fits).count();
            if end > from {
                let spans = rows[end - 1].position / SPAN + 1;
                self.groups.push(Group { rows: from..end, spans, first: units });
                units += self.kv_heads * spans;
            }
            from = end.max(from + 1);
        }
        units
    }

    /// The group that a unit belongs to, and its number among the heads of all groups.
    fn head_of(&self, unit: usize) -> usize {
        let index = self.groups.partition_point(|group| group.first <= unit) - 1;
        index * self.kv_heads + (unit - self.groups[index].first) / self.groups[index].spans
    }

    /// The group, the kv head and the units of one of these heads.
    fn head(&self, head: usize) -> (&Group, usize, Range<usize>) {
        let (group, kv_head) = (&self.groups[head / self.kv_heads], head % self.kv_heads);
        let first = group.first + kv_head * group.spans;
        (group, kv_head, first..first + group.spans)
    }
}

/// In waves of as many units as there are parts for: every unit by itself, then each head's joined in order.
fn attend<N: Stored>(pool: &Pool, pass: &Pass<'_, N>, work: &mut Work) {
    let Work { plan, parts } = work;
    let units = plan.make(pass.queries);
    let several = plan.groups.iter().any(|group| group.spans > 1);
    let mut from = 0;
    while from < units {
        let to = units.min(from + parts.len() - 1);
        let part = |unit: usize| 1 + unit - from;
        pool.run(to - from, &|task| {
            let unit = from + task;
            let (group, kv_head, units) = plan.head(plan.head_of(unit));
            let part = &mut lock(&parts[part(unit)]);
            pass.compute(group, kv_head, unit - units.start, pool.threads(), part);
            if group.spans == 1 {
                pass.finish(group, kv_head, part);
            }
        });
        if several {
            let (first, last) = (plan.head_of(from), plan.head_of(to - 1));
            pool.run(last - first + 1, &|task| {
                let (group, kv_head, units) = plan.head(first + task);
                let (begun, rest) = if units.start < from { (0, from) } else { (part(units.start), units.start + 1) };
                let whole = &mut lock(&parts[begun]);
                for unit in rest..units.end.min(to) {
                    pass.join(group, unit - units.start, whole, &lock(&parts[part(unit)]));
                }
                if group.spans > 1 && units.end <= to {
                    pass.finish(group, kv_head, whole);
                }
            });
            // Only the last head can be unfinished.
            let (.., units) = plan.head(last);
            if units.end > to && units.start >= from {
                parts.swap(0, part(units.start));
            }
        }
        from = to;
    }
}

/// What units have in common.
struct Pass<'a, N> {
    blocks: &'a Blocks<N>,
    kernel: fn(&Tile<'_, N>, Partial<'_>),
    queries: &'a Queries<'a>,
    out: &'a Cells<'a>,
}

impl<N: Stored> Pass<'_, N> {
    /// The span `ahead` of this one is what the thread takes next, if threads take turns.
    fn compute(&self, group: &Group, kv_head: usize, span: usize, ahead: usize, part: &mut Part) {
        let Queries { shape, layer, heads, width, rows, tables, .. } = *self.queries;
        let (d, shared, start) = (shape.head_dim, shape.heads / shape.kv_heads, span * SPAN);
        let run = run_len::<N>(d);
        let table = &tables[rows[group.rows.start].sequence];
        let rows = &rows[group.rows.clone()];
        // The first rows of a group may end before this span.
        let skip = rows.partition_point(|row| row.position < start);
        let mut counts = [0; PAIRS];
        for (count, row) in counts.iter_mut().zip(&rows[skip..]) {
            *count = (row.position + 1 - start).min(SPAN);
        }
        let counts = &counts[..rows.len() - skip];
        let blocks = counts.iter().max().map_or(0, |count| count.div_ceil(BLOCK));
        let mut runs = [[&[][..]; SPAN_BLOCKS]; 2];
        for (i, id) in table[start / BLOCK..][..blocks].iter().enumerate() {
            let block = self.blocks.get(*id).expect("positions up to the row's own are reserved");
            for (side, runs) in runs.iter_mut().enumerate() {
                runs[i] = &block[shape.run(layer, side, kv_head) * run..][..run];
            }
        }
        let then = table.get((start + ahead * SPAN) / BLOCK).and_then(|id| self.blocks.get(*id));
        let then = then.map(|block| &block[shape.run(layer, 0, kv_head) * run..][..run]);
        let tile = Tile {
            keys: &runs[0][..blocks],
            values: &runs[1][..blocks],
            then,
            queries: &heads[(group.rows.start + skip) * width + kv_head * shared * d..],
            width,
            head_dim: d,
            shared,
            counts,
            scale: 1.0 / (d as f32).sqrt(),
        };
        let skip = skip * shared;
        (self.kernel)(&tile, Partial { max: &mut part.max[skip..], sum: &mut part.sum[skip..], acc: &mut part.acc[skip * d..] });
    }

    /// Adds the next span of those pairs that see it.
    fn join(&self, group: &Group, span: usize, whole: &mut Part, part: &Part) {
        let Queries { shape, rows, .. } = *self.queries;
        let (d, shared) = (shape.head_dim, shape.heads / shape.kv_heads);
        let skip = rows[group.rows.clone()].partition_point(|row| row.position < span * SPAN);
        for pair in skip * shared..group.rows.len() * shared {
            let max = whole.max[pair].max(part.max[pair]);
            let (old, new) = ((whole.max[pair] - max).exp(), (part.max[pair] - max).exp());
            whole.max[pair] = max;
            whole.sum[pair] = whole.sum[pair] * old + part.sum[pair] * new;
            for (whole, part) in whole.acc[pair * d..][..d].iter_mut().zip(&part.acc[pair * d..]) {
                *whole = *whole * old + part * new;
            }
        }
    }

    /// Divides by the weights' sum and writes the result.
    fn finish(&self, group: &Group, kv_head: usize, part: &mut Part) {
        let shape = self.queries.shape;
        let (d, shared) = (shape.head_dim, shape.heads / shape.kv_heads);
        for (row, heads) in group.rows.clone().zip(part.acc.chunks_exact_mut(shared * d)) {
            let sums = &part.sum[(row - group.rows.start) * shared..];
            for (acc, sum) in heads.chunks_exact_mut(d).zip(sums) {
                let inverse = 1.0 / sum;
                acc.iter_mut().for_each(|acc| *acc *= inverse);
            }
            self.out.fill((row * shape.heads + kv_head * shared) * d, heads);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const D: usize = 32;

    /// Two sequences of CONTEXT positions, block by block in turn, and queries for all of them.
    struct Case {
        shape: Shape,
        kv: Kv,
        tables: Vec<Table>,
        keys: Vec<f32>,
        values: Vec<f32>,
        queries: Vec<f32>,
    }

    const CONTEXT: usize = 2 * SPAN + 300;

    impl Case {
        fn new(mut kv: Kv, kv_heads: usize, shared: usize, seed: u64) -> Self {
            let shape =
                Shape { layers: 2, hidden: 0, heads: kv_heads * shared, kv_heads, head_dim: D, vocab: 0, eps: 0.0, top_k: 0, experts: 0 };
            let mut state = seed | 1;
            let mut noise = |count: usize, scale: f32| -> Vec<f32> {
                let next = |_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // What f16 holds as it is.
                    f16::from_f32(((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * scale).to_f32()
                };
                (0..count).map(next).collect()
            };
            let width = kv_heads * D;
            let (keys, values) = (noise(2 * CONTEXT * width, 2.0), noise(2 * CONTEXT * width, 2.0));
            let queries = noise(2 * CONTEXT * shape.heads * D, 8.0);
            let table = |sequence: u32| (0..CONTEXT.div_ceil(BLOCK) as u32).map(|block| BlockId(2 * block + sequence)).collect();
            let tables: Vec<Table> = vec![table(0), table(1)];
            for at in 0..2 * CONTEXT {
                let of = |numbers: &[f32]| numbers[at * width..][..width].to_vec();
                kv.put(&shape, 1, &tables[at / CONTEXT], at % CONTEXT, &of(&keys), &of(&values));
            }
            Self { shape, kv, tables, keys, values, queries }
        }

        /// Attention of these (sequence, position) as one piece, in waves of `units`.
        fn attend(&self, isa: &Isa, (threads, units): (usize, usize), asked: &[(usize, usize)]) -> Vec<f32> {
            let width = self.shape.heads * D;
            let rows: Vec<Row> = asked.iter().map(|&(sequence, position)| Row { token: 0, position, sequence }).collect();
            let heads: Vec<f32> = asked
                .iter()
                .flat_map(|(sequence, position)| &self.queries[(sequence * CONTEXT + position) * width..][..width])
                .copied()
                .collect();
            let (alive, mut out) = (vec![true; rows.len()], vec![f32::NAN; rows.len() * width]);
            let queries = Queries { shape: &self.shape, layer: 1, heads: &heads, width, rows: &rows, alive: &alive, tables: &self.tables };
            let mut work = Work::new(&self.shape, units);
            self.kv.attend((&Pool::new(threads).unwrap(), isa), &queries, &mut work, &Cells::new(&mut out));
            out
        }

        fn exact(&self, (sequence, position): (usize, usize)) -> Vec<f64> {
            let Shape { heads, kv_heads, .. } = self.shape;
            let at = |position: usize, head: usize| ((sequence * CONTEXT + position) * kv_heads + head * kv_heads / heads) * D;
            let mut out = Vec::new();
            for head in 0..heads {
                let query = &self.queries[((sequence * CONTEXT + position) * heads + head) * D..][..D];
                let score = |p: usize| query.iter().zip(&self.keys[at(p, head)..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
                let weights: Vec<f64> = (0..=position).map(|p| (score(p) / (D as f64).sqrt()).exp()).collect();
                let mean = |i: usize| (0..=position).map(|p| weights[p] * f64::from(self.values[at(p, head) + i])).sum::<f64>();
                out.extend((0..D).map(|i| mean(i) / weights.iter().sum::<f64>()));
            }
            out
        }
    }

    fn bits(floats: &[f32]) -> Vec<u32> {
        floats.iter().map(|float| float.to_bits()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]

        #[test]
        fn a_row_is_the_same_in_any_company(kv_heads in 1usize..3, shared in 1usize..10, kind in 0usize..3, seed: u64) {
            // What is stored as it is comes out as f32 sums do; fixed point rounds keys and values to 2⁻¹⁴, weights to 2⁻¹⁶.
            let (kv, near) = match kind {
                0 => (Kv::F32(Blocks::default()), 1e-5),
                1 => (Kv::F16(Blocks::default()), 1e-5),
                _ => (Kv::Fixed(Blocks::default()), 2e-4),
            };
            let case = Case::new(kv, kv_heads, shared, seed);
            let width = case.shape.heads * D;
            // Both sides of every boundary, and a prompt's end beside another's rows.
            let mut rows: Vec<(usize, usize)> = vec![(1, 700), (1, CONTEXT - 1)];
            rows.extend((SPAN - 5..SPAN + 5).chain(2 * SPAN - 3..2 * SPAN + 9).map(|position| (0, position)));
            rows.extend([(1, 0), (1, BLOCK), (0, CONTEXT - 1)]);
            for isa in Isa::available() {
                let together = case.attend(&isa, (2, UNITS), &rows);
                for (row, out) in rows.iter().zip(together.chunks_exact(width)) {
                    let alone = case.attend(&isa, (1, 1), &[*row]);
                    prop_assert_eq!(bits(&alone), bits(out), "{} {:?}", isa.name, row);
                }
                for (threads, units, cut) in [(1, 1, 7), (1, UNITS, 33), (3, 2, 64), (2, 5, 1000)] {
                    let cut: Vec<f32> = rows.chunks(cut).flat_map(|rows| case.attend(&isa, (threads, units), rows)).collect();
                    prop_assert_eq!(bits(&cut), bits(&together), "{}", isa.name);
                }
                for i in [0, 1, rows.len() / 2, rows.len() - 3, rows.len() - 1] {
                    for (got, exact) in together[i * width..].iter().zip(case.exact(rows[i])) {
                        prop_assert!((f64::from(*got) - exact).abs() < near, "{} {:?}: {got} for {exact}", isa.name, rows[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_are_not_alive_are_left_alone() {
        let case = Case::new(Kv::F16(Blocks::default()), 1, 2, 1);
        let rows = [(0, 3), (1, 4), (0, 5)].map(|(sequence, position)| Row { token: 0, position, sequence });
        let (queries, mut out) = (vec![1.0; 3 * 2 * D], vec![7.0; 3 * 2 * D]);
        let (heads, tables) = (&queries[..], &case.tables[..]);
        let queries = Queries { shape: &case.shape, layer: 1, heads, width: 2 * D, rows: &rows, alive: &[true, false, true], tables };
        let pool = Pool::new(1).unwrap();
        case.kv.attend((&pool, &Isa::PORTABLE), &queries, &mut Work::new(&case.shape, 4), &Cells::new(&mut out));
        assert!(out[2 * D..4 * D].iter().all(|x| *x == 7.0));
        assert!(out[..2 * D].iter().chain(&out[4 * D..]).all(|x| x.abs() <= 1.0));
    }
}
