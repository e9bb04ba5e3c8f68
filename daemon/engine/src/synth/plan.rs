//! Which tensors a synthetic model has, and how large their numbers are so that it behaves like a trained one at any depth.
//!
//! Every weight is zero-mean noise; what matters is what a layer adds to the residual. Adding independent noise of relative
//! size ρ turns the residual by cos = 1/√(1 + ρ²), and that alone decides how well the next layer's router, run on this
//! layer's residual, foresees its choice: 0.967 gives a top-8-of-128 recall near 0.78, inside the 60–90% of trained models.
//! ρ is kept at every depth by letting deeper layers write more, as the residual grows.
//!
//! *Uniform* routing: nothing but that. Tokens are independent, experts equally likely.
//! *Skewed* routing: experts differ in popularity (the rows of a layer's router fall off as rank^-0.4, in an order of
//! its own), and tokens of a topic share a quarter of the residual, which no block writes to, so that it lasts through all
//! layers. It carries half of what routers see, and the head prefers the topic of the last token: one lasts for
//! [`DWELL`] tokens on average when sampling at temperature 1.

use super::{
    Routing, Shape,
    noise::Noise,
    tensors::{Data, Deviation, Expert, Kinds, Matrix, Part, Tensor},
};

/// What the routed experts of a layer add, relative to the residual.
const EXPERTS_ADD: f32 = 0.25;
/// What attention adds where a position sees itself alone; about half of it further on, where it averages.
const ATTENTION_ADD: f32 = 0.15;
/// Deviation of attention scores: sharp enough that thousands of positions don't average to nothing.
const SCORES: f32 = 3.0;
/// E[silu(x)²] for a standard normal x: what is left of gate ⊙ up.
const SILU_SQUARE: f32 = 0.357;

const TOPICS: usize = 32;
/// Mean length of a topic, in sampled tokens.
const DWELL: f32 = 32.0;
/// What the topic's dimensions carry of the square of what routers and attention see.
const TOPIC_SHARE: f32 = 0.5;
/// Popularity of experts: between what trained models with coarse (OLMoE, 0.2) and with fine routing (Kimi, 0.45) show.
const POPULARITY: f32 = 0.4;

/// Streams of the noise; a layer's own are those after [`LAYER`].
const EMBED: u64 = 1;
const HEAD: u64 = 2;
const TOPIC: u64 = 3;
const LAYER: u64 = 1 << 20;

/// All figures of one model.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) shape: &'a Shape,
    routing: Routing,
    noise: Noise,
    /// Dimensions that carry the topic, the first of the residual; none when routing is uniform.
    topic_dims: usize,
}

impl<'a> Plan<'a> {
    pub(super) fn new(shape: &'a Shape, routing: Routing, seed: u64) -> Self {
        let topic_dims = if routing == Routing::Skewed { shape.hidden / 4 } else { 0 };
        Self { shape, routing, noise: Noise::new(seed), topic_dims }
    }

    fn layer_noise(&self, layer: usize) -> Noise {
        self.noise.of(LAYER + layer as u64)
    }

    /// RMS of the dimensions that blocks write to, before `layer`: 1 for the embedding.
    fn rms(&self, layer: usize) -> f32 {
        (1.0 + EXPERTS_ADD * EXPERTS_ADD).powf(layer as f32 / 2.0)
    }

    /// Weights of a norm before `layer` (after the last one: the head's): unit noise but for `topic`, the RMS that the
    /// topic's dimensions get.
    fn norm(&self, layer: usize, topic: f32) -> Vec<f32> {
        let (hidden, share) = (self.shape.hidden, self.topic_dims as f32 / self.shape.hidden as f32);
        let rms = self.rms(layer);
        let whole = (share + (1.0 - share) * rms * rms).sqrt();
        let rest = ((1.0 - share * topic * topic) / (1.0 - share)).max(0.0).sqrt() * whole / rms;
        (0..hidden).map(|dim| if dim < self.topic_dims { topic * whole } else { rest }).collect()
    }

    /// RMS of the topic's dimensions where they carry [`TOPIC_SHARE`].
    fn topic_rms(&self) -> f32 {
        if self.topic_dims == 0 { 0.0 } else { (TOPIC_SHARE * self.shape.hidden as f32 / self.topic_dims as f32).sqrt() }
    }

    /// The head's norm. Token and head rows of one topic begin alike, so their product over the topic's dimensions is
    /// dims × rms / √hidden; it outweighs the other topics by what [`DWELL`] asks for.
    fn last_norm(&self) -> Vec<f32> {
        let mut norm = self.norm(self.shape.layers, 0.0);
        let (hidden, rms) = (self.shape.hidden as f32, self.rms(self.shape.layers));
        let share = self.topic_dims as f32 / hidden;
        let whole = (share + (1.0 - share) * rms * rms).sqrt();
        let topic = (DWELL * (TOPICS - 1) as f32).ln() * hidden.sqrt() / self.topic_dims.max(1) as f32;
        norm[..self.topic_dims].fill(topic * whole);
        norm
    }

    /// Rows that write into the residual leave the topic's dimensions alone.
    fn writes(&self, deviation: f32) -> Deviation {
        match self.topic_dims {
            0 => Deviation::All(deviation),
            dims => Deviation::Each((0..self.shape.hidden).map(|dim| if dim < dims { 0.0 } else { deviation }).collect()),
        }
    }

    /// Deviation of each router row × √hidden: of each expert's logit.
    fn router(&self, layer: usize) -> Vec<f32> {
        let experts = self.shape.experts;
        match self.routing {
            Routing::Uniform => vec![1.0; experts],
            Routing::Skewed => {
                let noise = self.layer_noise(layer).of(10);
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by_key(|expert| noise.word(*expert as u64));
                let mut rows = vec![0.0; experts];
                for (rank, expert) in order.into_iter().enumerate() {
                    // Times 2: the likely experts' logits stay about as far apart as when routing is uniform.
                    rows[expert] = 2.0 * ((rank + 1) as f32).powf(-POPULARITY);
                }
                rows
            }
        }
    }

    /// √E[Σ weight²] of a token's routed experts: what of one expert's size their weighted sum has.
    fn weights_rms(&self) -> f32 {
        const SAMPLES: usize = 512;
        let noise = self.noise.of(TOPIC + 1);
        let (router, top_k) = (self.router(0), self.shape.top_k);
        let square = |sample: usize| {
            let draw = |(expert, row): (usize, &f32)| (row * noise.normal((sample * router.len() + expert) as u64)).exp();
            let mut likely: Vec<f32> = router.iter().enumerate().map(draw).collect();
            let all: f32 = likely.iter().sum();
            likely.sort_unstable_by(|a, b| b.total_cmp(a));
            let chosen = &likely[..top_k];
            let total = if self.shape.norm_topk_prob { chosen.iter().sum() } else { all };
            chosen.iter().map(|likely| (likely / total).powi(2)).sum::<f32>()
        };
        ((0..SAMPLES).map(square).sum::<f32>() / SAMPLES as f32).sqrt()
    }

    /// Everything but the routed experts.
    pub(super) fn trunk(&self) -> Vec<Tensor> {
        let Shape { hidden, vocab, .. } = *self.shape;
        let embedding = |number: u64, deviation: f32| Matrix {
            kinds: (self.topic_dims > 0).then(|| Kinds { noise: self.noise.of(TOPIC), kinds: TOPICS, bytes: self.topic_dims / 2 }),
            ..matrix(vocab, hidden, 4, self.noise.of(number), Deviation::All(deviation))
        };
        let mut tensors = Vec::new();
        push(&mut tensors, "model.embed_tokens", &embedding(EMBED, 1.0));
        for layer in 0..self.shape.layers {
            self.layer(layer, &mut tensors);
        }
        vector(&mut tensors, "model.norm", self.last_norm());
        push(&mut tensors, "lm_head", &embedding(HEAD, unit(hidden)));
        tensors
    }

    fn layer(&self, layer: usize, tensors: &mut Vec<Tensor>) {
        let Shape { hidden, heads, kv_heads, head_dim, experts, .. } = *self.shape;
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let noise = self.layer_noise(layer);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let norm = self.norm(layer, self.topic_rms());
        let adds = ATTENTION_ADD * self.rms(layer) * unit(queries);
        vector(tensors, &name("input_layernorm"), norm.clone());
        push(tensors, &name("self_attn.q_proj"), &matrix(queries, hidden, 4, noise.of(0), Deviation::All(unit(hidden))));
        push(tensors, &name("self_attn.k_proj"), &matrix(keys, hidden, 4, noise.of(1), Deviation::All(unit(hidden))));
        push(tensors, &name("self_attn.v_proj"), &matrix(keys, hidden, 4, noise.of(2), Deviation::All(unit(hidden))));
        push(tensors, &name("self_attn.o_proj"), &matrix(hidden, queries, 4, noise.of(3), self.writes(adds)));
        vector(tensors, &name("self_attn.q_norm"), vec![SCORES; head_dim]);
        vector(tensors, &name("self_attn.k_norm"), vec![1.0; head_dim]);
        vector(tensors, &name("post_attention_layernorm"), norm);
        let rows = self.router(layer).into_iter().map(|row| row * unit(hidden)).collect();
        push(tensors, &name(ROUTER), &matrix(experts, hidden, ROUTER_BITS, noise.of(4), Deviation::Each(rows)));
    }

    /// The record of any expert of `layer`; [`Experts::record`] makes it one expert's.
    pub(super) fn experts(&self, layer: usize) -> Experts {
        let Shape { hidden, moe_width: width, .. } = *self.shape;
        let noise = self.layer_noise(layer);
        let adds = EXPERTS_ADD * self.rms(layer) * unit(width) / (SILU_SQUARE.sqrt() * self.weights_rms());
        let read = || matrix(width, hidden, 4, noise, Deviation::All(unit(hidden)));
        Experts { noise, expert: Expert { matrices: [read(), read(), matrix(hidden, width, 4, noise, self.writes(adds))] } }
    }
}

pub(super) const ROUTER: &str = "mlp.gate";
pub(super) const ROUTER_BITS: u8 = 8;

/// The experts of a layer, which differ in their noise only.
#[derive(Debug)]
pub(super) struct Experts {
    noise: Noise,
    expert: Expert,
}

impl Experts {
    pub(super) fn record(&mut self, expert: usize) -> &Expert {
        for (number, matrix) in (0..).zip(&mut self.expert.matrices) {
            matrix.noise = self.noise.of(LAYER + 3 * expert as u64 + number);
        }
        &self.expert
    }
}

/// Deviation of weights whose product with `cols` unit inputs has unit size.
fn unit(cols: usize) -> f32 {
    1.0 / (cols as f32).sqrt()
}

fn matrix(rows: usize, cols: usize, bits: u8, noise: Noise, deviation: Deviation) -> Matrix {
    Matrix { rows, cols, bits, noise, deviation, kinds: None }
}

fn push(tensors: &mut Vec<Tensor>, name: &str, matrix: &Matrix) {
    for (part, suffix) in Part::ALL.into_iter().zip(["weight", "scales", "biases"]) {
        tensors.push(Tensor { name: format!("{name}.{suffix}"), data: Data::Matrix(matrix.clone(), part) });
    }
}

fn vector(tensors: &mut Vec<Tensor>, name: &str, values: Vec<f32>) {
    tensors.push(Tensor { name: format!("{name}.weight"), data: Data::Vector(values) });
}
