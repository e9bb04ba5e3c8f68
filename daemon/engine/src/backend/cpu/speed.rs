//! How fast attention runs alone, on a KV cache of noise, and products, on weights of noise: what `benches/attention.rs` and
//! `benches/products.rs` print. Not the speed of a model; `bench.rs` measures that.

use std::time::Instant;

use flash_experts::Pages;
use flash_kernels::{
    Isa,
    matrix::{Float, Format, Matrix, Prepared},
};

use super::{
    Kv, PIECE_MAX, Shape,
    attention::{self, Queries, UNITS},
    experts::{Buffers, Work, Works, feed_forward},
    linear::{Linear, linear, prepare},
    pool::{Cells, Pool, allowed_cpus},
};
use crate::{
    Bytes, Kernels,
    backend::Row,
    kv::{BlockId, Table},
    machine::memory_bandwidth,
};

/// Of KV cache or weights: more than any processor's caches hold, so that a layer's bytes are gone when its turn comes again, as they
/// are between two tokens of a large model.
const CACHE: usize = 256 << 20;

/// A model's heads and where its sequence stands.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub threads: usize,
    /// By its name; `None`: the best that this CPU has.
    pub kernels: Option<&'static str>,
}

/// What one token's attention took in a layer.
#[derive(Clone, Copy, Debug)]
pub struct Decoded {
    /// Keys and values, read once.
    pub bytes: Bytes,
    pub median_s: f64,
    /// On a machine that others use, nearer to what the kernels can do.
    pub best_s: f64,
    /// Of a sum by as many threads, just before.
    pub memory_bytes_s: f64,
}

impl Attention {
    /// A token at the end of `context` positions, every layer some `rounds` times in turn.
    pub fn decode(&self, context: usize, rounds: usize) -> Decoded {
        let memory_bytes_s = memory_bandwidth(self.threads, &allowed_cpus(), None);
        let bytes = 4 * context * self.kv_heads * self.head_dim;
        let layers = CACHE.div_ceil(bytes).max(2);
        let mut bench = Bench::new(self, layers, context);
        let mut times: Vec<f64> = (0..rounds * layers).map(|i| bench.attend(i % layers, context - 1..context)).collect();
        times.sort_unstable_by(f64::total_cmp);
        Decoded { bytes: bytes as Bytes, median_s: times[times.len() / 2], best_s: times[0], memory_bytes_s }
    }

    /// Seconds that a layer takes for a prompt, and how many of its multiplications and additions it does in one of them.
    pub fn prefill(&self, prompt: usize) -> (f64, f64) {
        let mut bench = Bench::new(self, 4, prompt);
        let seconds = (0..prompt).step_by(PIECE_MAX).map(|from| bench.attend(0, from..(from + PIECE_MAX).min(prompt))).sum();
        (seconds, (2 * self.heads * self.head_dim * prompt * (prompt + 1)) as f64 / seconds)
    }
}

struct Bench {
    isa: Isa,
    pool: Pool,
    shape: Shape,
    kv: Kv,
    table: Table,
    work: attention::Work,
}

impl Bench {
    fn new(of: &Attention, layers: usize, context: usize) -> Self {
        let shape = Shape {
            layers,
            heads: of.heads,
            kv_heads: of.kv_heads,
            head_dim: of.head_dim,
            hidden: 0,
            vocab: 0,
            eps: 0.0,
            top_k: 0,
            experts: 0,
        };
        let mut sets = Isa::available().into_iter();
        let isa = sets.find(|isa| of.kernels.is_none_or(|name| name == isa.name)).expect("kernels that this CPU has");
        let mut next = noise();
        let mut kv = Kv::new(Kernels::Auto, &isa);
        let table: Table = (0..context.div_ceil(crate::kv::BLOCK) as u32).map(BlockId).collect();
        let mut numbers = || (0..shape.kv_heads * shape.head_dim).map(|_| next()).collect::<Vec<f32>>();
        let some: Vec<[Vec<f32>; 2]> = (0..64).map(|_| [numbers(), numbers()]).collect();
        for position in 0..context {
            for layer in 0..layers {
                let [k, v] = &some[(position * 7 + layer) % some.len()];
                kv.put(&shape, layer, &table, position, k, v);
            }
        }
        let pool = Pool::new(of.threads).expect("threads");
        let work = attention::Work::new(&shape, UNITS * of.threads);
        Self { isa, pool, shape, kv, table, work }
    }

    /// Seconds of one layer's attention for some rows.
    fn attend(&mut self, layer: usize, positions: std::ops::Range<usize>) -> f64 {
        let width = self.shape.heads * self.shape.head_dim;
        let mut next = noise();
        let q: Vec<f32> = (0..positions.len() * width).map(|_| 4.0 * next()).collect();
        let rows: Vec<Row> = positions.map(|position| Row { token: 0, position, sequence: 0 }).collect();
        let mut out = vec![0.0; q.len()];
        let (shape, alive) = (&self.shape, vec![true; rows.len()]);
        let queries = Queries { shape, layer, heads: &q, width, rows: &rows, alive: &alive, tables: std::slice::from_ref(&self.table) };
        let start = Instant::now();
        self.kv.attend((&self.pool, &self.isa), &queries, &mut self.work, &Cells::new(&mut out));
        let seconds = start.elapsed().as_secs_f64();
        assert!(out.iter().all(|x| x.is_finite()));
        seconds
    }
}

/// Products of matrices with some tokens.
#[derive(Clone, Copy, Debug)]
pub struct Products {
    /// Of a weight: 4 or 8 with a bf16 scale and bias for each group of columns, or 16 for bf16.
    pub bits: u8,
    pub group: usize,
    /// Of one matrix, as many of which take turns as no cache holds; `None`: of one that is as large.
    pub rows: Option<usize>,
    pub cols: usize,
    pub tokens: usize,
    pub threads: usize,
}

/// What one took.
#[derive(Clone, Copy, Debug)]
pub struct Multiplied {
    pub kernels: &'static str,
    /// Weights, scales and biases, read once.
    pub bytes: Bytes,
    /// Multiplications and additions.
    pub operations: f64,
    pub median_s: f64,
    pub best_s: f64,
    /// Of a sum by as many threads, just before.
    pub memory_bytes_s: f64,
}

impl Products {
    /// Every kind of kernels that this CPU has, fast-math too, the portable ones apart, some `rounds` times in turn.
    pub fn measure(&self, rounds: usize) -> Vec<Multiplied> {
        let Self { bits, group, rows: of_one, cols, tokens, threads } = *self;
        let memory_bytes_s = memory_bandwidth(threads, &allowed_cpus(), None);
        let format = if bits == 16 { Format::Bf16 } else { Format::Affine { bits, group, params: Float::Bf16 } };
        // Many tokens do not wait for memory, and would take long.
        let bytes = if tokens < 8 { CACHE } else { CACHE / 64 };
        let row_bytes = cols * usize::from(bits) / 8;
        let rows = of_one.unwrap_or(bytes / row_bytes);
        let count = (bytes / (rows * row_bytes)).max(1);
        let mut next = noise();
        // Of small numbers, whatever they are read as; in huge pages, as a model's.
        let odd = |i: usize| i % 2 == 1;
        let weight = filled(count * rows * row_bytes, |i| if odd(i) && bits == 16 { 0x3c } else { (256.0 * next()) as i8 as u8 });
        let side_bytes = if bits == 16 { 0 } else { rows * cols / group * 2 };
        let side = [(); 2].map(|()| filled(count * side_bytes, |i| if odd(i) { 0x3c } else { 0 }));
        let matrix = |index: usize| {
            let [scales, biases] = side.each_ref().map(|side| &side.as_slice()[index * side_bytes..][..side_bytes]);
            Matrix {
                rows,
                cols,
                format,
                weight: &weight.as_slice()[index * rows * row_bytes..][..rows * row_bytes],
                scales,
                biases,
                then: None,
            }
        };
        let x: Vec<f32> = (0..tokens * cols).map(|_| next()).collect();
        let (mut out, mut prepared) = (vec![0.0; tokens * rows], Prepared::default());
        let pool = Pool::new(threads).expect("threads");
        let mut sets = Isa::available();
        sets.pop();
        sets.extend(Isa::fast_math());
        let mut times = vec![Vec::new(); sets.len()];
        for _ in 0..rounds {
            for (isa, times) in sets.iter().zip(&mut times) {
                times.extend((0..count).map(|index| {
                    let start = Instant::now();
                    let x = prepare((&pool, isa), &mut prepared, &x, cols, format);
                    let out = &Cells::new(&mut out);
                    linear(&pool, isa, tokens, &[Linear { w: matrix(index), x, out, width: rows, at: 0 }]);
                    start.elapsed().as_secs_f64()
                }));
            }
        }
        let (bytes, operations) = ((rows * row_bytes + 2 * side_bytes) as Bytes, (2 * rows * cols * tokens) as f64);
        let measured = sets.iter().zip(times).map(|(isa, mut times)| {
            times.sort_unstable_by(f64::total_cmp);
            Multiplied { kernels: isa.name, bytes, operations, median_s: times[times.len() / 2], best_s: times[0], memory_bytes_s }
        });
        measured.collect()
    }
}

/// Some of a layer's experts, run together as a step runs them.
#[derive(Clone, Copy, Debug)]
pub struct FeedForwards {
    pub hidden: usize,
    /// Of an expert.
    pub width: usize,
    /// Experts that a step uses, with as many tokens each.
    pub experts: usize,
    pub tokens: usize,
    pub threads: usize,
}

impl FeedForwards {
    /// By the best kernels that this CPU has, 4 bits, groups of 64: each step uses other experts, of as many as no cache holds, in any
    /// order.
    pub fn measure(&self, steps: usize) -> Multiplied {
        let Self { hidden, width, experts, tokens, threads } = *self;
        let memory_bytes_s = memory_bandwidth(threads, &allowed_cpus(), None);
        let format = Format::Affine { bits: 4, group: 64, params: Float::Bf16 };
        let (codes, side) = (hidden * width / 2, hidden * width / 64 * 2);
        let bytes = 3 * (codes + 2 * side);
        let count = CACHE.div_ceil(bytes).next_multiple_of(experts);
        let mut next = noise();
        let weights = filled(count * bytes, |i| if i % bytes % (codes + 2 * side) < codes { (256.0 * next()) as i8 as u8 } else { 0x3c });
        let matrix = |expert: usize, part: usize, rows: usize, cols: usize| {
            let of = &weights.as_slice()[expert * bytes + part * bytes / 3..];
            Matrix {
                rows,
                cols,
                format,
                weight: &of[..codes],
                scales: &of[codes..][..side],
                biases: &of[codes + side..][..side],
                then: None,
            }
        };
        let x: Vec<f32> = (0..tokens * hidden).map(|_| next()).collect();
        let (pool, isa) = (Pool::new(threads).expect("threads"), Isa::available()[0]);
        let (mut prepared, mut out) = (Prepared::default(), vec![0.0; experts * tokens * hidden]);
        let mut buffers = Buffers { mid: vec![0.0; experts * tokens * width], prepared: Prepared::default() };
        let acts = prepare((&pool, &isa), &mut prepared, &x, hidden, format);
        let rows: Vec<u32> = (0..(experts * tokens) as u32).collect();
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by_cached_key(|_| next().to_bits());
        let mut times: Vec<f64> = order
            .chunks(experts)
            .cycle()
            .take(steps)
            .map(|chosen| {
                let works = chosen.iter().enumerate().map(|(i, expert)| Work {
                    gate: matrix(*expert, 0, width, hidden),
                    up: matrix(*expert, 1, width, hidden),
                    down: matrix(*expert, 2, hidden, width),
                    tokens: &rows[..tokens],
                    places: &rows[i * tokens..][..tokens],
                    first: i * tokens,
                });
                let works: Works<'_> = works.collect();
                let start = Instant::now();
                feed_forward(&pool, &isa, &works, &acts, &mut buffers, &mut out);
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_unstable_by(f64::total_cmp);
        let operations = (6 * hidden * width * experts * tokens) as f64;
        let bytes = (experts * bytes) as Bytes;
        Multiplied { kernels: isa.name, bytes, operations, median_s: times[times.len() / 2], best_s: times[0], memory_bytes_s }
    }
}

fn filled(len: usize, mut byte: impl FnMut(usize) -> u8) -> Pages {
    let mut pages = Pages::new(len).expect("memory");
    pages.as_mut_slice().iter_mut().enumerate().for_each(|(i, to)| *to = byte(i));
    pages
}

/// In [-0.5, 0.5).
fn noise() -> impl FnMut() -> f32 {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
}
