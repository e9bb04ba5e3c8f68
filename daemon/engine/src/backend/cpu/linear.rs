//! Matrix products over the pool: rows of weights are split into pieces, a piece is computed by one thread, and a
//! result's bits depend on neither.

use super::{
    matrix::{Acts, Matrix},
    pool::{Cells, Pool},
    simd::{Isa, TOKENS_MAX},
};

/// Rows of weights computed between two writes of results; with [`TOKENS_MAX`] tokens the buffer is 8 KiB.
const ROWS: usize = 32;

/// Results for [`ROWS`] × [`TOKENS_MAX`].
pub(super) type Tile = [f32; ROWS * TOKENS_MAX];

/// out[i × width + at + row] = w[row] · x[tokens[i]], for the i-th token and every row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Linear<'a> {
    pub(super) w: Matrix<'a>,
    pub(super) x: Acts<'a>,
    pub(super) out: &'a Cells<'a>,
    pub(super) width: usize,
    pub(super) at: usize,
}

/// All of `jobs` as one fork-join; result i belongs to x's token i, for `tokens` of them.
pub(super) fn linear(pool: &Pool, isa: &Isa, tokens: usize, jobs: &[Linear<'_>]) {
    let pieces = Pieces::new(pool, jobs.iter().map(|job| job.w.rows));
    pool.run(pieces.count(), &|piece| {
        let (job, rows) = pieces.get(piece);
        let job = &jobs[job];
        let mut tile: Tile = [0.0; ROWS * TOKENS_MAX];
        let mut ids = [0u32; TOKENS_MAX];
        for first in (0..tokens).step_by(TOKENS_MAX) {
            let count = TOKENS_MAX.min(tokens - first);
            for (i, id) in ids[..count].iter_mut().enumerate() {
                *id = (first + i) as u32;
            }
            each_tile(rows.clone(), |rows| {
                let out = &mut tile[..rows.len() * count];
                (isa.rows)(&job.w, rows.clone(), &job.x, &ids[..count], out);
                for (row, out) in rows.zip(out.chunks_exact(count)) {
                    for (i, value) in out.iter().enumerate() {
                        job.out.set((first + i) * job.width + job.at + row, *value);
                    }
                }
            });
        }
    });
}

/// Cuts `rows` into runs of at most [`ROWS`].
pub(super) fn each_tile(rows: std::ops::Range<usize>, mut f: impl FnMut(std::ops::Range<usize>)) {
    for start in rows.clone().step_by(ROWS) {
        f(start..(start + ROWS).min(rows.end));
    }
}

/// Several row counts cut into pieces of about equal work.
#[derive(Debug)]
pub(super) struct Pieces {
    /// (first piece, rows, rows a piece) of each job.
    jobs: Vec<(usize, usize, usize)>,
    count: usize,
}

impl Pieces {
    /// Four pieces a thread even out an unlucky core; a piece has at least eight rows, whole tiles of four.
    pub(super) fn new(pool: &Pool, rows: impl Iterator<Item = usize> + Clone) -> Self {
        let total: usize = rows.clone().sum();
        let size = total.div_ceil(pool.threads() * 4).next_multiple_of(8).max(8);
        let mut count = 0;
        let jobs = rows
            .map(|rows| {
                let first = count;
                count += rows.div_ceil(size);
                (first, rows, size)
            })
            .collect();
        Self { jobs, count }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The job and the rows of a piece.
    pub(super) fn get(&self, piece: usize) -> (usize, std::ops::Range<usize>) {
        let job = self.jobs.partition_point(|(first, ..)| *first <= piece) - 1;
        let (first, rows, size) = self.jobs[job];
        let start = (piece - first) * size;
        (job, start..(start + size).min(rows))
    }
}
