//! The routed experts: how a record lies in a slab slot, and the SwiGLU feed-forward over slots.

use super::{
    linear::{Pieces, Tile, each_tile},
    matrix::{Acts, Matrix, sum},
    norm::swiglu,
    pool::{Cells, Pool},
    simd::{Isa, TOKENS_MAX},
};
use crate::model::{
    families::Ffn,
    weights::{Format, MatrixSpec},
};

/// Alignment of each tensor inside a slot: a cache line.
const ALIGN: usize = 64;

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
        let mut at = 0;
        let mut span = |len: usize| {
            let start = at;
            at = (at + len).next_multiple_of(ALIGN);
            (start, len)
        };
        let mut place = |spec: &MatrixSpec| {
            let side = |span: Option<crate::model::weights::Span>| span.map_or(0, |span| span.len as usize);
            Place {
                rows: spec.rows,
                cols: spec.cols,
                format: spec.format,
                weight: span(spec.weight.len as usize),
                scales: span(side(spec.scales)),
                biases: span(side(spec.biases)),
            }
        };
        let (gate, up, down) = (place(&ffn.gate), place(&ffn.up), place(&ffn.down));
        Self { gate, up, down, bytes: at }
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
    /// Rows of `mid` and of the result, one for each token; no two works share one.
    pub(super) places: &'a [u32],
}

/// Buffers of a feed-forward: `mid` [places, width], `out` [places, hidden].
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) mid: Vec<f32>,
    pub(super) mid_sums: Vec<f32>,
    pub(super) out: Vec<f32>,
}

/// out[place] = down · (silu(gate · x[token]) ⊙ up · x[token]) for every work's tokens. `x` is the activations with group
/// sums for gate and up.
pub(super) fn feed_forward(pool: &Pool, isa: &Isa, works: &[Work<'_>], x: &Acts<'_>, buffers: &mut Buffers) {
    let Buffers { mid, mid_sums, out } = buffers;
    let (width, hidden) = (works[0].gate.rows, works[0].down.rows);
    {
        let mid = Cells::new(mid);
        let pieces = Pieces::new(pool, works.iter().map(|work| work.gate.rows));
        pool.run(pieces.count(), &|piece| {
            let (work, rows) = pieces.get(piece);
            let work = &works[work];
            let (mut gates, mut ups): (Tile, Tile) = ([0.0; _], [0.0; _]);
            for (tokens, places) in work.tokens.chunks(TOKENS_MAX).zip(work.places.chunks(TOKENS_MAX)) {
                each_tile(rows.clone(), |rows| {
                    let cells = rows.len() * tokens.len();
                    (isa.rows)(&work.gate, rows.clone(), x, tokens, &mut gates[..cells]);
                    (isa.rows)(&work.up, rows.clone(), x, tokens, &mut ups[..cells]);
                    for (i, row) in rows.enumerate() {
                        for (t, place) in places.iter().enumerate() {
                            let cell = i * tokens.len() + t;
                            mid.set(*place as usize * width + row, swiglu(gates[cell], ups[cell]));
                        }
                    }
                });
            }
        });
    }
    let group = works[0].down.group();
    if let Some(groups) = width.checked_div(group) {
        for place in works.iter().flat_map(|work| work.places) {
            let row = &mid[*place as usize * width..][..width];
            for (sums, values) in mid_sums[*place as usize * groups..][..groups].iter_mut().zip(row.chunks_exact(group)) {
                *sums = sum(values);
            }
        }
    }
    let mid = Acts { x: mid, cols: width, sums: mid_sums, group };
    let out = Cells::new(out);
    let pieces = Pieces::new(pool, works.iter().map(|work| work.down.rows));
    pool.run(pieces.count(), &|piece| {
        let (work, rows) = pieces.get(piece);
        let work = &works[work];
        let mut tile: Tile = [0.0; _];
        for places in work.places.chunks(TOKENS_MAX) {
            each_tile(rows.clone(), |rows| {
                let tile = &mut tile[..rows.len() * places.len()];
                (isa.rows)(&work.down, rows.clone(), &mid, places, tile);
                for (row, values) in rows.zip(tile.chunks_exact(places.len())) {
                    for (place, value) in places.iter().zip(values) {
                        out.set(*place as usize * hidden + row, *value);
                    }
                }
            });
        }
    });
}
