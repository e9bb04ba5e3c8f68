//! The routed experts on the CPU: a slot's matrices, and the SwiGLU feed-forward over slots.

use std::ops::Range;

use arrayvec::ArrayVec;
use flash_kernels::{
    Isa, TOKENS_MAX,
    matrix::{Acts, Matrix, Prepared},
};

use super::{
    linear::{Pieces, each_tile, prepare, with_tiles},
    pool::{Cells, Pool},
};
use crate::backend::record::Place;

impl Place {
    pub(super) fn matrix<'a>(&self, slot: &'a [u8]) -> Matrix<'a> {
        let part = |(at, len): (usize, usize)| &slot[at..at + len];
        Matrix {
            rows: self.rows,
            cols: self.cols,
            format: self.format,
            weight: part(self.weight),
            scales: part(self.scales),
            biases: part(self.biases),
            then: None,
        }
    }
}

/// One feed-forward and the rows it runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work<'a> {
    pub(super) gate: Matrix<'a>,
    pub(super) up: Matrix<'a>,
    pub(super) down: Matrix<'a>,
    /// Rows of the input.
    pub(super) tokens: &'a [u32],
    /// Rows of the result, one for each token; no two works share one.
    pub(super) places: &'a [u32],
    /// The first row of it between its two products.
    pub(super) first: usize,
}

/// What one fork-join takes at most; on the stack.
pub(super) type Works<'a> = ArrayVec<Work<'a>, 32>;

/// Between the two products of a feed-forward: silu(gate · x) ⊙ up · x of all works' rows, one after the other
/// [rows, width].
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) mid: Vec<f32>,
    pub(super) prepared: Prepared,
}

/// out[place] = down · (silu(gate · x[token]) ⊙ up · x[token]) for every work's tokens. `x` is prepared for gate and up.
pub(super) fn feed_forward(pool: &Pool, isa: &Isa, works: &[Work<'_>], x: &Acts<'_>, buffers: &mut Buffers, out: &mut [f32]) {
    let Buffers { mid, prepared } = buffers;
    let width = works[0].gate.rows;
    let rows = works.iter().map(|work| work.tokens.len()).sum::<usize>();
    let most = works.iter().map(|work| work.tokens.len()).max().unwrap_or(0);
    // Tokens differ from work to work; what counts is that a piece of few is not too small.
    let row_bytes = |w: &Matrix<'_>| w.row_bytes() * rows.div_ceil(works.len());
    {
        let mid = Cells::new(mid);
        let pieces = Pieces::new(pool, works.iter().map(|work| work.gate.rows), 2 * row_bytes(&works[0].gate));
        pool.run(pieces.count(), &|piece| {
            with_tiles(most, |tiles| {
                pieces.get(piece).for_each(|(index, rows, then)| {
                    works[index].gate_up(isa, x, &rows, then.map(|next| works[next].gate.from(0)), &mid, tiles);
                });
            });
        });
    }
    let mid = prepare((pool, isa), prepared, &mid[..rows * width], width, works[0].down.format);
    let out = Cells::new(out);
    let pieces = Pieces::new(pool, works.iter().map(|work| work.down.rows), row_bytes(&works[0].down));
    pool.run(pieces.count(), &|piece| {
        with_tiles(most, |[tile]| {
            pieces.get(piece).for_each(|(index, rows, then)| {
                works[index].down(isa, &mid, &rows, then.map(|next| works[next].down.from(0)), &out, tile);
            });
        });
    });
}

impl Work<'_> {
    /// mid[first + t] = silu(gate · x) ⊙ up · x, some of its columns.
    fn gate_up(
        &self,
        isa: &Isa,
        x: &Acts<'_>,
        rows: &Range<usize>,
        then: Option<[&[u8]; 3]>,
        mid: &Cells<'_>,
        [gates, ups]: &mut [&mut [f32]; 2],
    ) {
        let last = rows.end;
        let (mut first, width) = (self.first, self.gate.rows);
        for tokens in self.tokens.chunks(TOKENS_MAX) {
            each_tile(rows.clone(), tokens.len(), |rows| {
                let cells = rows.len() * tokens.len();
                let (mut gate, mut up) = (self.gate, self.up);
                gate.then = Some(up.from(rows.start));
                up.then = if rows.end < last { Some(gate.from(rows.end)) } else { then };
                (isa.rows)(&gate, rows.clone(), x, tokens, &mut gates[..cells]);
                (isa.rows)(&up, rows.clone(), x, tokens, &mut ups[..cells]);
                (isa.swiglu)(&mut gates[..cells], &ups[..cells]);
                for (t, gates) in (first..).zip(gates[..cells].chunks_exact(rows.len())) {
                    mid.fill(t * width + rows.start, gates);
                }
            });
            first += tokens.len();
        }
    }

    /// out[place] = down · mid[first + t], some of its columns.
    fn down(&self, isa: &Isa, mid: &Acts<'_>, rows: &Range<usize>, then: Option<[&[u8]; 3]>, out: &Cells<'_>, tile: &mut [f32]) {
        let last = rows.end;
        let (mut first, hidden) = (self.first as u32, self.down.rows);
        let mut ids = [0; TOKENS_MAX];
        for places in self.places.chunks(TOKENS_MAX) {
            let ids = &mut ids[..places.len()];
            ids.iter_mut().zip(first..).for_each(|(id, row)| *id = row);
            each_tile(rows.clone(), places.len(), |rows| {
                let tile = &mut tile[..rows.len() * places.len()];
                let down = Matrix { then: then.filter(|_| rows.end == last), ..self.down };
                (isa.rows)(&down, rows.clone(), mid, ids, tile);
                for (place, values) in places.iter().zip(tile.chunks_exact(rows.len())) {
                    out.fill(*place as usize * hidden + rows.start, values);
                }
            });
            first += places.len() as u32;
        }
    }
}
