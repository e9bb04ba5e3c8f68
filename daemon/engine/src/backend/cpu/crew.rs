//! The blocks of the decoder, computed by a team of threads: all of them, or one alone beside others that do as much with other rows.

use std::{io, ops::Range, time::Instant};

use flash_experts::ExpertId;
use flash_kernels::{
    matrix::{Piece, Prepared, size},
    norm,
};

use super::{
    Activations, Decoder, Layer, LayerFfn, PIECE_MAX, PLACES_MAX, Shape,
    attention::{self, Kv, Queries},
    experts::{self, Buffers, Work, Works},
    linear::{Linear, linear, prepare},
    pool::{Cells, Pool, TASK_ROWS},
};
use crate::{
    Bytes,
    backend::Batch,
    moe::Plan,
    profile::{Profile, Stage},
};

/// Threads that compute the same rows, and what they need for it.
#[derive(Debug)]
pub(super) struct Team {
    pub(super) pool: Pool,
    scratch: Scratch,
    pub(super) profile: Profile,
}

/// A team at work.
pub(crate) struct Crew<'a> {
    decoder: &'a Decoder,
    kv: &'a Kv,
    team: &'a mut Team,
}

/// What lives no longer than a call; sized once for the largest piece.
#[derive(Debug)]
struct Scratch {
    /// Normalised rows of the piece [rows, hidden].
    normed: Vec<f32>,
    /// Queries, keys and values of a row side by side [rows, (heads + 2·kv_heads) × head_dim].
    qkv: Vec<f32>,
    /// Heads' outputs [rows, heads × head_dim].
    attended: Vec<f32>,
    /// A block's output before it joins the residual [rows, hidden].
    delta: Vec<f32>,
    /// Router logits [rows, experts].
    routed: Vec<f32>,
    attention: attention::Work,
    ffn: Buffers,
    /// [requested rows, vocab].
    logits: Vec<f32>,
    prepared: [Prepared; 3],
}

impl Team {
    /// For pieces of so many rows, and of so many experts' rows.
    pub(super) fn new(decoder: &Decoder, threads: usize, (rows, places): (usize, usize)) -> io::Result<Self> {
        let scratch = Scratch::new(decoder, threads, rows, places);
        Ok(Self { pool: Pool::new(threads)?, scratch, profile: Profile::default() })
    }

    /// Of its buffers.
    pub(super) fn bytes(&self, Decoder { isa, shape, .. }: &Decoder, rows: usize) -> Bytes {
        let Scratch { normed, qkv, attended, delta, routed, attention, logits, ffn, .. } = &self.scratch;
        let floats = [normed, qkv, attended, delta, routed, logits, &ffn.mid];
        let prepared = rows * (2 * Prepared::row_bytes(isa, shape.hidden) + Prepared::row_bytes(isa, shape.heads * shape.head_dim))
            + Prepared::row_bytes(isa, ffn.mid.len());
        attention.bytes() as Bytes + 4 * floats.iter().map(|floats| floats.capacity() as Bytes).sum::<Bytes>() + prepared as Bytes
    }
}

impl<'a> Crew<'a> {
    pub(super) fn new(decoder: &'a Decoder, kv: &'a Kv, team: &'a mut Team) -> Self {
        Self { decoder, kv, team }
    }

    /// The same, for one block of several.
    pub(crate) fn again(&mut self) -> Crew<'_> {
        Crew::new(self.decoder, self.kv, self.team)
    }

    /// As [`Profile::add`].
    pub(crate) fn spent(self, stage: Stage, since: Instant) -> Instant {
        self.team.profile.add(stage, since)
    }

    /// Sizes `act` for a pass of so many rows.
    pub(crate) fn size(self, act: &mut Activations, rows: usize) {
        let Shape { hidden, top_k, .. } = self.decoder.shape;
        size(&mut act.hidden, rows * hidden);
        size(&mut act.normed, rows * hidden);
        size(&mut act.out, rows * top_k.max(1) * hidden);
        act.turns.clear();
    }

    /// Embeds the tokens of the first layer's next piece: of a long prompt all at once would take longer than others can wait.
    fn embed(&self, act: &mut Activations, batch: &Batch, piece: Range<usize>) {
        let Decoder { shape, trunk, embed, inverse_frequencies, .. } = self.decoder;
        let hidden = shape.hidden;
        let embed = embed.view(trunk);
        for (row, out) in batch.rows[piece.clone()].iter().zip(act.hidden[piece.start * hidden..].chunks_exact_mut(hidden)) {
            norm::turns(row.position as u32, inverse_frequencies, &mut act.turns);
            embed.dequantize_row(row.token as usize, out);
        }
    }

    /// Attention of `layer` over a piece of the rows, added to the residual. Rows that are not `alive` take no part: their
    /// KV blocks may belong to others by now.
    pub(crate) fn attention(self, layer: usize, act: &mut Activations, batch: &Batch, alive: &[bool], piece: Range<usize>) {
        let began = Instant::now();
        if layer == 0 {
            self.embed(act, batch, piece.clone());
        }
        let Self { decoder: Decoder { isa, shape, trunk, layers, .. }, kv, team: Team { pool, scratch, profile } } = self;
        let l = &layers[layer];
        let (rows, d, hidden) = (piece.len(), shape.head_dim, shape.hidden);
        let (q_width, kv_width) = (shape.heads * d, shape.kv_heads * d);
        let width = q_width + 2 * kv_width;
        let (batch_rows, alive) = (&batch.rows[piece.clone()], &alive[piece.clone()]);
        let residual = &mut act.hidden[piece.start * hidden..piece.end * hidden];
        normalize(pool, residual, &l.attn_norm, shape.eps, &mut scratch.normed);
        {
            let x = &scratch.normed[..rows * hidden];
            let out = Cells::new(&mut scratch.qkv);
            let [q, k, v] = &mut scratch.prepared;
            let formats = [&l.q, &l.k, &l.v].map(|owned| owned.spec.format);
            let q_acts = prepare((pool, isa), q, x, hidden, formats[0]);
            // Most models quantise all three alike.
            let other = |prepared, format| if format == formats[0] { q_acts } else { prepare((pool, isa), prepared, x, hidden, format) };
            let jobs = [
                Linear { w: l.q.view(trunk), x: q_acts, out: &out, width, at: 0 },
                Linear { w: l.k.view(trunk), x: other(k, formats[1]), out: &out, width, at: q_width },
                Linear { w: l.v.view(trunk), x: other(v, formats[2]), out: &out, width, at: q_width + kv_width },
            ];
            linear(pool, isa, rows, &jobs);
        }
        let turns = &act.turns[piece.start * d / 2..];
        let of_rows = scratch.qkv[..rows * width].chunks_mut(TASK_ROWS * width).zip(turns.chunks(TASK_ROWS * d / 2));
        pool.each(of_rows, |(qkv, turns)| {
            for (qkv, turns) in qkv.chunks_exact_mut(width).zip(turns.chunks_exact(d / 2)) {
                for (head, x) in qkv[..q_width + kv_width].chunks_exact_mut(d).enumerate() {
                    norm::rms_norm_in_place(x, if head < shape.heads { &l.q_norm } else { &l.k_norm }, shape.eps);
                    norm::rope(x, turns);
                }
            }
        });
        let began = profile.add(Stage::Projections, began);
        for (i, row) in batch_rows.iter().enumerate().filter(|(i, _)| alive[*i]) {
            let (k, v) = scratch.qkv[i * width..][q_width..width].split_at(kv_width);
            // SAFETY: the block that a sequence writes is its own, and one crew has all rows of a sequence.
            unsafe { kv.write(shape, layer, &batch.tables[row.sequence], row.position, k, v) };
        }
        {
            let qkv = &scratch.qkv;
            let out = Cells::new(&mut scratch.attended);
            let queries = Queries { shape, layer, heads: qkv, width, rows: batch_rows, alive, tables: &batch.tables };
            kv.attend((pool, isa), &queries, &mut scratch.attention, &out);
        }
        let began = profile.add(Stage::Attention, began);
        let x = prepare((pool, isa), &mut scratch.prepared[0], &scratch.attended[..rows * q_width], q_width, l.o.spec.format);
        let out = Cells::new(&mut scratch.delta);
        linear(pool, isa, rows, &[Linear { w: l.o.view(trunk), x, out: &out, width: hidden, at: 0 }]);
        add(residual, &scratch.delta);
        profile.add(Stage::Projections, began);
    }

    /// Normalises a piece of the rows for the feed-forward and gives its router logits [rows, experts]; `None` for a dense
    /// layer.
    pub(crate) fn route(self, layer: usize, act: &mut Activations, piece: Range<usize>) -> Option<&'a [f32]> {
        let Self { decoder: Decoder { isa, shape, trunk, layers, .. }, team: Team { pool, scratch, .. }, .. } = self;
        let l = &layers[layer];
        let hidden = shape.hidden;
        let normed = &mut act.normed[piece.start * hidden..piece.end * hidden];
        normalize(pool, &act.hidden[piece.start * hidden..piece.end * hidden], &l.ffn_norm, shape.eps, normed);
        let format = match &l.ffn {
            LayerFfn::Dense([gate, ..]) => gate.spec.format,
            LayerFfn::Moe { record, .. } => record.gate.format,
        };
        act.prepared.resize(isa, act.hidden.len() / hidden, hidden, format);
        pool.each(act.prepared.pieces(isa, piece.start, normed, TASK_ROWS), Piece::fill);
        let LayerFfn::Moe { router, .. } = &l.ffn else { return None };
        let x = prepare((pool, isa), &mut scratch.prepared[0], normed, hidden, router.spec.format);
        let out = Cells::new(&mut scratch.routed);
        linear(pool, isa, piece.len(), &[Linear { w: router.view(trunk), x, out: &out, width: shape.experts, at: 0 }]);
        Some(&scratch.routed[..piece.len() * shape.experts])
    }

    /// Logits [rows, experts] of a later layer's router on today's residual: what that layer will probably choose
    /// (arXiv 2603.19289). For passes of at most [`PIECE_MAX`] rows; `None` for a dense layer.
    pub(crate) fn foresee(self, layer: usize, act: &Activations) -> Option<&'a [f32]> {
        let Self { decoder: Decoder { isa, shape, trunk, layers, .. }, team: Team { pool, scratch, .. }, .. } = self;
        let l = &layers[layer];
        let LayerFfn::Moe { router, .. } = &l.ffn else { return None };
        let rows = act.hidden.len() / shape.hidden;
        normalize(pool, &act.hidden, &l.ffn_norm, shape.eps, &mut scratch.normed);
        let x = prepare((pool, isa), &mut scratch.prepared[0], &scratch.normed[..rows * shape.hidden], shape.hidden, router.spec.format);
        let out = Cells::new(&mut scratch.routed);
        linear(pool, isa, rows, &[Linear { w: router.view(trunk), x, out: &out, width: shape.experts, at: 0 }]);
        Some(&scratch.routed[..rows * shape.experts])
    }

    /// The feed-forward of a dense layer over a piece of the rows, added to the residual.
    pub(crate) fn dense(self, layer: usize, act: &mut Activations, piece: Range<usize>) {
        let Self { decoder: Decoder { isa, shape, trunk, layers, .. }, team: Team { pool, scratch, .. }, .. } = self;
        let LayerFfn::Dense([gate, up, down]) = &layers[layer].ffn else { return };
        let hidden = shape.hidden;
        let mut rows = [0; PIECE_MAX];
        let rows = &mut rows[..piece.len()];
        rows.iter_mut().zip(piece.clone()).for_each(|(id, row)| *id = row as u32);
        let work = Work { gate: gate.view(trunk), up: up.view(trunk), down: down.view(trunk), tokens: rows, places: rows, first: 0 };
        let x = act.prepared.acts(&act.normed);
        experts::feed_forward(pool, isa, &[work], &x, &mut scratch.ffn, &mut act.out);
        add(&mut act.hidden[piece.start * hidden..piece.end * hidden], &act.out[piece.start * hidden..]);
    }

    /// Runs experts, whose slots' bytes `slot` gives, for all the rows routed to them; results wait for [`Cpu::combine`].
    pub(crate) fn experts<'b>(
        self,
        layer: usize,
        act: &mut Activations,
        plan: &Plan,
        ready: &[ExpertId],
        slot: &dyn Fn(ExpertId) -> &'b [u8],
    ) {
        let Self { decoder: Decoder { isa, layers, .. }, team: Team { pool, scratch, .. }, .. } = self;
        let LayerFfn::Moe { record, .. } = &layers[layer].ffn else { return };
        let x = act.prepared.acts(&act.normed);
        let mut works = Works::new_const();
        let mut places_taken = 0;
        for expert in ready {
            let bytes = slot(*expert);
            let (gate, up, down) = (record.gate.matrix(bytes), record.up.matrix(bytes), record.down.matrix(bytes));
            let (tokens, places) = plan.rows_of(*expert);
            for (tokens, places) in tokens.chunks(PLACES_MAX).zip(places.chunks(PLACES_MAX)) {
                if places_taken + places.len() > PLACES_MAX || works.is_full() {
                    experts::feed_forward(pool, isa, &works, &x, &mut scratch.ffn, &mut act.out);
                    works.clear();
                    places_taken = 0;
                }
                works.push(Work { gate, up, down, tokens, places, first: places_taken });
                places_taken += places.len();
            }
        }
        if !works.is_empty() {
            experts::feed_forward(pool, isa, &works, &x, &mut scratch.ffn, &mut act.out);
        }
    }

    /// Adds every row's weighted experts to the residual, in rank order; rows the plan left out stay as they are.
    pub(crate) fn combine(self, act: &mut Activations, plan: &Plan) {
        let Shape { hidden, top_k, .. } = self.decoder.shape;
        let of_rows = act.hidden.chunks_mut(TASK_ROWS * hidden).zip(act.out.chunks(TASK_ROWS * top_k * hidden)).enumerate();
        self.team.pool.each(of_rows, |(task, (hidden_of, out_of))| {
            let rows = hidden_of.chunks_exact_mut(hidden).zip(out_of.chunks_exact(top_k * hidden)).enumerate();
            for (row, (sum, out)) in rows.map(|(row, of)| (task * TASK_ROWS + row, of)) {
                for (weight, out) in plan.weights(row).iter().zip(out.chunks_exact(hidden)) {
                    for (sum, value) in sum.iter_mut().zip(out) {
                        *sum += weight * value;
                    }
                }
            }
        });
    }

    /// Logits [rows.len(), vocab] of some rows of a finished pass, at most [`PIECE_MAX`].
    pub(crate) fn logits(self, act: &Activations, rows: Range<usize>) -> &'a [f32] {
        let began = Instant::now();
        let Self { decoder: Decoder { isa, shape, trunk, embed, head, norm: weight, .. }, team: Team { pool, scratch, profile }, .. } =
            self;
        let hidden = shape.hidden;
        for (row, out) in rows.clone().zip(scratch.normed.chunks_exact_mut(hidden)) {
            norm::rms_norm(&act.hidden[row * hidden..][..hidden], weight, shape.eps, out);
        }
        scratch.logits.resize(rows.len().max(1) * shape.vocab, 0.0);
        let head = head.as_ref().unwrap_or(embed).view(trunk);
        let x = prepare((pool, isa), &mut scratch.prepared[0], &scratch.normed[..rows.len() * hidden], hidden, head.format);
        let out = Cells::new(&mut scratch.logits);
        linear(pool, isa, rows.len(), &[Linear { w: head, x, out: &out, width: shape.vocab, at: 0 }]);
        profile.add(Stage::Head, began);
        &scratch.logits[..rows.len() * shape.vocab]
    }
}

impl Scratch {
    fn new(Decoder { shape, layers, .. }: &Decoder, threads: usize, rows: usize, places: usize) -> Self {
        let mid = |layer: &Layer| match &layer.ffn {
            LayerFfn::Dense([gate, ..]) => rows * gate.spec.rows,
            LayerFfn::Moe { record, .. } => places * record.gate.rows,
        };
        let mid = layers.iter().map(mid).max().unwrap_or(0);
        let floats = |count: usize| vec![0.0f32; count];
        Self {
            normed: floats(rows * shape.hidden),
            qkv: floats(rows * (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
            attended: floats(rows * shape.heads * shape.head_dim),
            delta: floats(rows * shape.hidden),
            routed: floats(rows * shape.experts),
            attention: attention::Work::new(shape, attention::UNITS.min(2 * rows) * threads),
            ffn: Buffers { mid: floats(mid), prepared: Prepared::default() },
            logits: Vec::new(),
            prepared: Default::default(),
        }
    }
}

/// RMSNorm of every row of `x`.
fn normalize(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let hidden = weight.len();
    pool.each(x.chunks(TASK_ROWS * hidden).zip(out.chunks_mut(TASK_ROWS * hidden)), |(x, out)| {
        for (x, out) in x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden)) {
            norm::rms_norm(x, weight, eps, out);
        }
    });
}

/// As many as `to` has.
fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}
