//! Matrix products over the pool: rows of weights are split into pieces, a piece is computed by one thread, and a
//! result's bits depend on neither.

use std::ops::Range;

use arrayvec::ArrayVec;
use flash_kernels::{
    Isa, TOKENS_MAX,
    matrix::{Acts, Format, Matrix, Piece, Prepared},
};

use super::pool::{Cells, Pool, TASK_ROWS};

/// Rows of weights computed between two writes of results for many tokens; with [`TOKENS_MAX`] of them the buffer is 8 KiB.
const ROWS: usize = 32;

/// Results between two writes for few tokens: of longer runs of rows, which memory gives faster.
const RESULTS: usize = 512;

/// So many are few.
const FEW: usize = RESULTS / ROWS;

/// What a piece reads at least: about a microsecond, several times what handing it out costs.
const PIECE_BYTES: usize = 16 << 10;

/// Rows of weights computed between two writes of results, by tokens.
fn run_rows(tokens: usize) -> usize {
    if tokens <= FEW { RESULTS / tokens.max(1) } else { ROWS }
}

/// Calls `f` with N buffers for results of as many rows. A decode step's are small: to clear large ones takes longer than a small model's
/// piece.
pub(super) fn with_tiles<const N: usize>(tokens: usize, f: impl FnOnce(&mut [&mut [f32]; N])) {
    if tokens <= FEW {
        let mut tiles = [[0.0; RESULTS]; N];
        f(&mut tiles.each_mut().map(|tile| &mut tile[..]));
    } else {
        let mut tiles = [[0.0; ROWS * TOKENS_MAX]; N];
        f(&mut tiles.each_mut().map(|tile| &mut tile[..]));
    }
}

/// `x` [rows, cols] as products with matrices of `format` read it.
pub(super) fn prepare<'a>((pool, isa): (&Pool, &Isa), to: &'a mut Prepared, x: &'a [f32], cols: usize, format: Format) -> Acts<'a> {
    to.resize(isa, x.len() / cols, cols, format);
    pool.each(to.pieces(isa, 0, x, TASK_ROWS), Piece::fill);
    to.acts(x)
}

/// out[i × width + at + row] = w[row] · x[i], for the i-th token and every row.
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
    let pieces = Pieces::new(pool, jobs.iter().map(|job| job.w.rows), tokens * jobs.first().map_or(0, |job| job.w.row_bytes()));
    pool.run(pieces.count(), &|piece| {
        with_tiles(tokens, |[tile]| {
            pieces.get(piece).for_each(|(job, rows, then)| {
                jobs[job].rows(isa, tokens, &rows, then.map(|next| jobs[next].w.from(0)), tile);
            });
        });
    });
}

impl Linear<'_> {
    fn rows(&self, isa: &Isa, tokens: usize, rows: &Range<usize>, then: Option<[&[u8]; 3]>, tile: &mut [f32]) {
        let last = rows.end;
        let mut ids = [0u32; TOKENS_MAX];
        for first in (0..tokens).step_by(TOKENS_MAX) {
            let count = TOKENS_MAX.min(tokens - first);
            for (i, id) in ids[..count].iter_mut().enumerate() {
                *id = (first + i) as u32;
            }
            each_tile(rows.clone(), count, |rows| {
                let out = &mut tile[..rows.len() * count];
                let w = Matrix { then: then.filter(|_| rows.end == last), ..self.w };
                (isa.rows)(&w, rows.clone(), &self.x, &ids[..count], out);
                for (i, out) in (first..).zip(out.chunks_exact(rows.len())) {
                    self.out.fill(i * self.width + self.at + rows.start, out);
                }
            });
        }
    }
}

/// Cuts `rows` into runs whose results for so many tokens fit the buffers.
pub(super) fn each_tile(rows: Range<usize>, tokens: usize, mut f: impl FnMut(Range<usize>)) {
    let most = run_rows(tokens);
    for start in rows.clone().step_by(most) {
        f(start..(start + most).min(rows.end));
    }
}

/// Several jobs' rows, one after the other, cut into pieces: a large one for each thread first, then ever smaller ones, so that threads
/// end together (guided self-scheduling, Polychronopoulos and Kuck 1987).
#[derive(Debug)]
pub(super) struct Pieces {
    /// Rows of the jobs up to and including each.
    ends: ArrayVec<usize, 32>,
    /// A round has as many pieces and takes three quarters of what is left.
    threads: usize,
    least: usize,
    count: usize,
}

impl Pieces {
    /// `row_bytes`: what one row of a job makes a thread read, caches included.
    pub(super) fn new(pool: &Pool, rows: impl Iterator<Item = usize>, row_bytes: usize) -> Self {
        let mut total = 0;
        let ends = rows.map(|rows| {
            total += rows;
            total
        });
        let (ends, threads) = (ends.collect(), pool.threads());
        // Who is alone waits for nobody.
        let least = if threads == 1 { total.max(1) } else { PIECE_BYTES.div_ceil(row_bytes.max(1)).next_multiple_of(8) };
        let mut pieces = Self { ends, threads, least, count: 0 };
        pieces.count = pieces.walk(usize::MAX).1;
        pieces
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The jobs and their rows of a piece, each with the job that comes next in it.
    pub(super) fn get(&self, piece: usize) -> impl Iterator<Item = (usize, Range<usize>, Option<usize>)> {
        let Range { start, end } = self.walk(piece).0;
        let first = self.ends.partition_point(|job_end| *job_end <= start);
        self.ends.iter().enumerate().skip(first).map_while(move |(job, job_end)| {
            let begin = if job == 0 { 0 } else { self.ends[job - 1] };
            (begin < end).then(|| (job, start.max(begin) - begin..end.min(*job_end) - begin, (*job_end < end).then_some(job + 1)))
        })
    }

    /// Rows of a piece, counted through all jobs, and its number; past the last one, no rows and how many there are.
    fn walk(&self, piece: usize) -> (Range<usize>, usize) {
        let total = self.ends.last().copied().unwrap_or(0);
        let (mut start, mut first) = (0, 0);
        while start < total {
            let size = (3 * (total - start)).div_ceil(4 * self.threads).next_multiple_of(8).max(self.least);
            let pieces = self.threads.min((total - start).div_ceil(size));
            if piece < first + pieces {
                let start = start + (piece - first) * size;
                return (start..(start + size).min(total), piece);
            }
            (start, first) = ((start + pieces * size).min(total), first + pieces);
        }
        (total..total, first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_in_one_piece() {
        for (threads, jobs) in [(1, &[5][..]), (2, &[4096, 512, 512]), (2, &[768; 8]), (3, &[1, 7, 8, 9]), (4, &[0, 100_000]), (2, &[])] {
            let pool = Pool::new(threads).expect("threads");
            for row_bytes in [1, 1152, 1 << 20] {
                let pieces = Pieces::new(&pool, jobs.iter().copied(), row_bytes);
                let mut seen: Vec<Vec<usize>> = jobs.iter().map(|rows| vec![0; *rows]).collect();
                for piece in 0..pieces.count() {
                    assert!(pieces.get(piece).count() > 0, "{jobs:?}");
                    for (job, rows, _) in pieces.get(piece) {
                        seen[job][rows].iter_mut().for_each(|row| *row += 1);
                    }
                }
                assert!(seen.iter().flatten().all(|times| *times == 1), "{jobs:?} x {row_bytes}");
            }
        }
    }
}
