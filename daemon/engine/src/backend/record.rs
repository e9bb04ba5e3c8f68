//! How a record lies in a slab slot: in the slot's bytes the same as in an expert store, whatever the backend.

use crate::model::{
    families::Ffn,
    packed::lay_out,
    weights::{Format, MatrixSpec, Span},
};

/// Where the nine (or three) tensors of a layer's experts lie in a slot: `[gate.w gate.s gate.b up.w … down.b]`.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::backend) struct Record {
    pub(in crate::backend) gate: Place,
    pub(in crate::backend) up: Place,
    pub(in crate::backend) down: Place,
    pub(in crate::backend) bytes: usize,
}

/// One matrix of the record.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::backend) struct Place {
    pub(in crate::backend) rows: usize,
    pub(in crate::backend) cols: usize,
    pub(in crate::backend) format: Format,
    /// Of each tensor, where it begins and its length.
    pub(in crate::backend) weight: (usize, usize),
    pub(in crate::backend) scales: (usize, usize),
    pub(in crate::backend) biases: (usize, usize),
}

impl Record {
    pub(in crate::backend) fn new(ffn: &Ffn) -> Self {
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
    pub(in crate::backend) fn slices(&self, ffn: &Ffn) -> Option<Vec<flash_experts::Slice>> {
        if Self::new(ffn) != *self {
            return None;
        }
        let mut slices = Vec::with_capacity(9);
        for (place, spec) in [(&self.gate, &ffn.gate), (&self.up, &ffn.up), (&self.down, &ffn.down)] {
            let spans = [(place.weight, Some(spec.weight)), (place.scales, spec.scales), (place.biases, spec.biases)];
            for ((at, len), span) in spans.into_iter().filter_map(|(place, span)| Some((place, span?))) {
                slices.push(flash_experts::Slice { file: span.file, offset: span.offset, len: len as u32, at: at as u32 });
            }
        }
        Some(slices)
    }
}
