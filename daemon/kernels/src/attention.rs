//! Attention of some query heads over one span of positions: what its kernels take and give, and how keys and values lie in a block.
//! Cutting contexts into spans and joining them is the engine's.

use half::{f16, slice::HalfFloatSliceExt};

/// Tokens of a block of the KV cache.
pub const BLOCK: usize = 32;

/// Positions that are computed by themselves. Of Qwen3-30B's heads, 256 KiB of keys and values and about 20 µs: enough to
/// forget the joining, few enough that two threads end together.
pub const SPAN: usize = 512;

/// What a block holds. Any bits are one.
pub trait Stored: Copy + Sync {
    /// Places in a run of keys or values beside these.
    const BESIDE: usize = 0;

    /// Stores the key of one head and token.
    fn put_key(run: &mut [Self], token: usize, key: &[f32]);
    fn put_value(run: &mut [Self], token: usize, value: &[f32]);
}

impl Stored for f32 {
    fn put_key(run: &mut [Self], token: usize, key: &[f32]) {
        spread(run, token, key, |to, from| to.copy_from_slice(from));
    }

    fn put_value(run: &mut [Self], token: usize, value: &[f32]) {
        run[token * value.len()..][..value.len()].copy_from_slice(value);
    }
}

impl Stored for f16 {
    fn put_key(run: &mut [Self], token: usize, key: &[f32]) {
        spread(run, token, key, |to, from| to.convert_from_f32_slice(from));
    }

    fn put_value(run: &mut [Self], token: usize, value: &[f32]) {
        run[token * value.len()..][..value.len()].convert_from_f32_slice(value);
    }
}

/// Keys lie as [head_dim, BLOCK].
fn spread<N: Copy + Default>(run: &mut [N], token: usize, key: &[f32], convert: impl Fn(&mut [N], &[f32])) {
    let mut narrow = [N::default(); 64];
    for (key, run) in key.chunks(narrow.len()).zip(run.chunks_mut(narrow.len() * BLOCK)) {
        let narrow = &mut narrow[..key.len()];
        convert(narrow, key);
        for (number, places) in narrow.iter().zip(run.chunks_exact_mut(BLOCK)) {
            places[token] = *number;
        }
    }
}

/// Numbers' places in the keys or the values of one head in a block.
pub fn run_len<N: Stored>(head_dim: usize) -> usize {
    BLOCK * head_dim + N::BESIDE
}

/// What a kernel computes in one call: the query heads of some rows that share a kv head, over one span.
#[derive(Debug)]
pub struct Tile<'a, N> {
    /// Blocks of the span, each [head_dim, BLOCK] or as `fixed_kv.rs` says.
    pub keys: &'a [&'a [N]],
    /// The same blocks, each [BLOCK, head_dim] or as there.
    pub values: &'a [&'a [N]],
    /// Keys that are read next, perhaps: kernels may ask for them meanwhile.
    pub then: Option<&'a [N]>,
    /// [rows, width], of which the first shared × head_dim are queries.
    pub queries: &'a [f32],
    pub width: usize,
    pub head_dim: usize,
    /// Query heads of a row.
    pub shared: usize,
    /// Positions of the span that each row sees, 1 at least.
    pub counts: &'a [usize],
    /// What products become scores with.
    pub scale: f32,
}

/// Where the results of a tile's pairs (row × shared + head) go.
#[derive(Debug)]
pub struct Partial<'a> {
    /// Highest score.
    pub max: &'a mut [f32],
    /// Σ e^(score − max)
    pub sum: &'a mut [f32],
    /// Σ e^(score − max) × value [pairs, head_dim]
    pub acc: &'a mut [f32],
}

impl<N: Stored> Tile<'_, N> {
    pub fn pairs(&self) -> usize {
        self.counts.len() * self.shared
    }

    pub fn count(&self, pair: usize) -> usize {
        self.counts[pair / self.shared]
    }

    pub fn query(&self, pair: usize) -> &[f32] {
        &self.queries[pair / self.shared * self.width + pair % self.shared * self.head_dim..][..self.head_dim]
    }

    /// Asserts what kernels rely on.
    pub(crate) fn check(&self, out: &Partial<'_>) {
        let (pairs, run) = (self.pairs(), run_len::<N>(self.head_dim));
        assert!(self.keys.len() == self.values.len() && self.keys.len() <= SPAN / BLOCK);
        assert!(self.keys.iter().chain(self.values).all(|numbers| numbers.len() == run));
        assert!(self.counts.iter().all(|count| (1..=self.keys.len() * BLOCK).contains(count)));
        assert!(out.max.len() >= pairs && out.sum.len() >= pairs && out.acc.len() >= pairs * self.head_dim);
    }
}
