//! The routed experts: how a record lies in a slab slot, and the SwiGLU feed-forward over slots.

use std::ops::Range;

use arrayvec::ArrayVec;

use super::{
    linear::{Pieces, each_tile, with_tiles},
    matrix::{Acts, Matrix, Prepared},
    pool::{Cells, Pool},
    simd::{Isa, TOKENS_MAX},
};
use crate::model::{
    families::Ffn,
    packed::lay_out,
    weights::{Format, MatrixSpec, Span},
};

/// Where the nine (or three) tensors of a layer's experts lie in a slot: `[gate.w gate.s gate.b up.w … down.b]`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    pub(super) gate: Place,
    pub(super) up: Place,
    pub(super) down: Place,
    pub(super) bytes: usize,
}

/// One matrix of the record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Place {
    rows: usize,
    cols: usize,
    format: Format,
    weight: (usize, usize),
    scales: (usize, usize),
    biases: (usize, usize),
}

impl Record {
    pub(super) fn new(ffn: &Ffn) -> Self {
        let side = |span: Option<Span>| span.map_or(0, |span| span.len as usize);
        let lens = ffn.matrices().map(|spec| [spec.weight.len as usize, side(spec.scales), side(spec.biases)]);
        let ([g, u, d], [gate, up, down]) = (lens, ffn.matrices());
        let (at, bytes) = lay_out([g[0], g[1], g[2], u[0], u[1], u[2], d[0], d[1], d[2]]);
        let place = |spec: &MatrixSpec, lens: [usize; 3], at: &[usize]| Place {
            rows: spec.rows,
            cols: spec.cols,
            format: spec.format,
            weight: (at[0], lens[0]),
            scales: (at[1], lens[1]),
            biases: (at[2], lens[2]),
        };
        Self { gate: place(gate, g, &at[..3]), up: place(up, u, &at[3..6]), down: place(down, d, &at[6..]), bytes }
    }

    /// Which file bytes go where in a slot; `None` if this expert's tensors are of another shape or format.
    pub(super) fn slices(&self, ffn: &Ffn) -> Option<Vec<flash_experts::Slice>> {
        if Self::new(ffn) != *self {
            return None;
        }
        let mut slices = Vec::with_capacity(9);
        for (place, spec) in [(&self.gate, &ffn.gate), (&self.up, &ffn.up), (&self.down, &ffn.down)] {
            let spans = [(place.weight, Some(spec.weight)), (place.scales, spec.scales), (place.biases, spec.biases)];
            for ((at, len), span) in spans.into_iter().filter_map(|(place, span)| Some((place, span?))) {
                slices.push(flash_experts::Slice { file: span.file, offset: span.offset, len: len as u32, region: 0, at: at as u32 });
            }
        }
        Some(slices)
    }
}

impl Place {
    pub(super) fn format(&self) -> Format {
        self.format
    }

    pub(super) fn matrix<'a>(&self, slot: &'a [u8]) -> Matrix<'a> {
        let part = |(at, len): (usize, usize)| &slot[at..at + len];
        Matrix {
            rows: self.rows,
            cols: self.cols,
            format: self.format,
            weight: part(self.weight),
            scales: part(self.scales),
            biases: part(self.biases),
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
            with_tiles(most, |tiles| pieces.get(piece).for_each(|(index, rows)| works[index].gate_up(isa, x, &rows, &mid, tiles)));
        });
    }
    let mid = prepared.of((pool, isa), &mid[..rows * width], width, works[0].down.format);
    let out = Cells::new(out);
    let pieces = Pieces::new(pool, works.iter().map(|work| work.down.rows), row_bytes(&works[0].down));
    pool.run(pieces.count(), &|piece| {
        with_tiles(most, |[tile]| pieces.get(piece).for_each(|(index, rows)| works[index].down(isa, &mid, &rows, &out, tile)));
    });
}

impl Work<'_> {
    /// mid[first + t] = silu(gate · x) ⊙ up · x, some of its columns.
    fn gate_up(&self, isa: &Isa, x: &Acts<'_>, rows: &Range<usize>, mid: &Cells<'_>, [gates, ups]: &mut [&mut [f32]; 2]) {
        let (mut first, width) = (self.first, self.gate.rows);
        for tokens in self.tokens.chunks(TOKENS_MAX) {
            each_tile(rows.clone(), |rows| {
                let cells = rows.len() * tokens.len();
                (isa.rows)(&self.gate, rows.clone(), x, tokens, &mut gates[..cells]);
                (isa.rows)(&self.up, rows.clone(), x, tokens, &mut ups[..cells]);
                (isa.swiglu)(&mut gates[..cells], &ups[..cells]);
                for (row, gates) in rows.zip(gates.chunks_exact(tokens.len())) {
                    for (t, value) in gates.iter().enumerate() {
                        mid.set((first + t) * width + row, *value);
                    }
                }
            });
            first += tokens.len();
        }
    }

    /// out[place] = down · mid[first + t], some of its columns.
    fn down(&self, isa: &Isa, mid: &Acts<'_>, rows: &Range<usize>, out: &Cells<'_>, tile: &mut [f32]) {
        let (mut first, hidden) = (self.first as u32, self.down.rows);
        let mut ids = [0; TOKENS_MAX];
        for places in self.places.chunks(TOKENS_MAX) {
            let ids = &mut ids[..places.len()];
            ids.iter_mut().zip(first..).for_each(|(id, row)| *id = row);
            each_tile(rows.clone(), |rows| {
                let tile = &mut tile[..rows.len() * places.len()];
                (isa.rows)(&self.down, rows.clone(), mid, ids, tile);
                for (row, values) in rows.zip(tile.chunks_exact(places.len())) {
                    for (place, value) in places.iter().zip(values) {
                        out.set(*place as usize * hidden + row, *value);
                    }
                }
            });
            first += places.len() as u32;
        }
    }
}
