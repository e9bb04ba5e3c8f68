//! The decoder once more, in f64 and as plainly as it can be said: no cache, no batching, every position recomputed from
//! the first token on. Slow on purpose; the engine's logits for a [`TinyModel`] are compared with these.

use crate::tiny_model::{HEAD_DIM, HEADS, KV_HEADS, Matrix, RMS_EPS, ROPE_THETA, TinyModel};

/// Logits at every position of `tokens`.
pub fn logits(model: &TinyModel, tokens: &[u32]) -> Vec<Vec<f64>> {
    let weight = |path: &str| &model.weights[path];
    let embed = weight("model.embed_tokens");
    let mut residual: Vec<Vec<f64>> = tokens.iter().map(|&id| row(embed, id as usize).to_vec()).collect();
    for layer in 0..model.spec.layers {
        let path = format!("model.layers.{layer}");
        let normed: Vec<Vec<f64>> = residual.iter().map(|x| rms_norm(x, weight(&format!("{path}.input_layernorm")))).collect();
        for (x, update) in residual.iter_mut().zip(attention(model, &path, &normed)) {
            add(x, &update);
        }
        for x in &mut residual {
            let normed = rms_norm(x, weight(&format!("{path}.post_attention_layernorm")));
            let update = if model.spec.dense.contains(&layer) {
                swiglu(model, &format!("{path}.mlp"), &normed)
            } else {
                experts(model, &path, &normed)
            };
            add(x, &update);
        }
    }
    let head = if model.spec.tied { embed } else { weight("lm_head") };
    residual.iter().map(|x| product(head, &rms_norm(x, weight("model.norm")))).collect()
}

/// The first largest logit of the last position.
pub fn greedy(model: &TinyModel, tokens: &[u32]) -> u32 {
    let last = logits(model, tokens).pop().expect("a prompt");
    let best = (0..last.len()).fold(0, |best, id| if last[id] > last[best] { id } else { best });
    u32::try_from(best).expect("a small vocabulary")
}

fn attention(model: &TinyModel, path: &str, normed: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let weight = |name: &str| &model.weights[&format!("{path}.self_attn.{name}")];
    let heads = |projection: &str, norm: Option<&str>, count: usize| -> Vec<Vec<Vec<f64>>> {
        let position_heads = |(position, x): (usize, &Vec<f64>)| {
            let flat = product(weight(projection), x);
            let head = |h: usize| {
                let values = &flat[h * HEAD_DIM..(h + 1) * HEAD_DIM];
                norm.map_or_else(|| values.to_vec(), |norm| rope(&rms_norm(values, weight(norm)), position))
            };
            (0..count).map(head).collect()
        };
        normed.iter().enumerate().map(position_heads).collect()
    };
    let q = heads("q_proj", Some("q_norm"), HEADS);
    let k = heads("k_proj", Some("k_norm"), KV_HEADS);
    let v = heads("v_proj", None, KV_HEADS);
    let mix = |position: usize| {
        let mut mixed = Vec::new();
        for (head, query) in q[position].iter().enumerate() {
            let kv = head * KV_HEADS / HEADS;
            let scores: Vec<f64> = (0..=position).map(|p| dot(query, &k[p][kv]) / (HEAD_DIM as f64).sqrt()).collect();
            let mut out = vec![0.0; HEAD_DIM];
            for (p, share) in softmax(&scores).into_iter().enumerate() {
                add_scaled(&mut out, share, &v[p][kv]);
            }
            mixed.extend(out);
        }
        product(weight("o_proj"), &mixed)
    };
    (0..normed.len()).map(mix).collect()
}

fn experts(model: &TinyModel, path: &str, x: &[f64]) -> Vec<f64> {
    let probabilities = softmax(&product(&model.weights[&format!("{path}.mlp.gate")], x));
    let mut ranked: Vec<usize> = (0..probabilities.len()).collect();
    ranked.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]).then(a.cmp(&b)));
    ranked.truncate(model.spec.top_k);
    let chosen: f64 = ranked.iter().map(|&expert| probabilities[expert]).sum();
    let total = if model.spec.norm_topk_prob { chosen } else { 1.0 };
    let mut out = vec![0.0; x.len()];
    for expert in ranked {
        add_scaled(&mut out, probabilities[expert] / total, &swiglu(model, &format!("{path}.mlp.experts.{expert}"), x));
    }
    out
}

fn swiglu(model: &TinyModel, path: &str, x: &[f64]) -> Vec<f64> {
    let weight = |name: &str| &model.weights[&format!("{path}.{name}")];
    let (gate, up) = (product(weight("gate_proj"), x), product(weight("up_proj"), x));
    let inner: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    product(weight("down_proj"), &inner)
}

/// Rotates the pairs (i, i + half), as Hugging Face's Qwen3 does.
fn rope(x: &[f64], position: usize) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = vec![0.0; x.len()];
    for i in 0..half {
        let angle = position as f64 * ROPE_THETA.powf(-(2.0 * i as f64) / x.len() as f64);
        let (sin, cos) = angle.sin_cos();
        out[i] = x[i] * cos - x[i + half] * sin;
        out[i + half] = x[i + half] * cos + x[i] * sin;
    }
    out
}

fn rms_norm(x: &[f64], weight: &Matrix) -> Vec<f64> {
    let mean = dot(x, x) / x.len() as f64;
    x.iter().zip(&weight.values).map(|(x, w)| x / (mean + RMS_EPS).sqrt() * w).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = x.iter().map(|x| (x - top).exp()).sum();
    x.iter().map(|x| (x - top).exp() / total).collect()
}

fn product(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
    assert_eq!(matrix.cols, x.len());
    (0..matrix.rows).map(|r| dot(row(matrix, r), x)).collect()
}

fn row(matrix: &Matrix, index: usize) -> &[f64] {
    &matrix.values[index * matrix.cols..(index + 1) * matrix.cols]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    add_scaled(x, 1.0, y);
}

fn add_scaled(x: &mut [f64], scale: f64, y: &[f64]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += scale * y;
    }
}
