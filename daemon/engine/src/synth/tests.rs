//! Synthetic models on small shapes: they load, speak, repeat themselves by seed, and route as their documentation says.

use super::{
    tensors::{Deviation, Matrix, Part},
    *,
};
use crate::{CacheBudget, Delivery, Done, Engine, Event, Io, Options, Request, Sampling, Step};

fn synth(routing: Routing, seed: u64) -> Synth {
    Synth { shape: "tiny".into(), layers: None, context: None, seed, routing }
}

fn written(synth: &Synth) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), synth, &mut |_| true).unwrap();
    dir
}

fn generate(dir: &Path, sampling: Sampling) -> Vec<u32> {
    let options = Options { expert_cache: CacheBudget::Share(0.5), threads: Some(1), io: Io::Buffered, ..Options::default() };
    let mut engine = Engine::load(dir, &options, &mut |_| ()).unwrap();
    let request = Request { max_tokens: Some(40), ignore_eos: true, sampling, ..Request::greedy((0..50).collect()) };
    engine.admit(request).unwrap();
    let mut done: Option<Done> = None;
    while engine.step(&mut |_, event| {
        match event {
            Event::Done(it) => done = Some(it),
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
        Delivery::Taken
    }) == Step::Worked
    {}
    done.unwrap().token_ids
}

#[test]
fn a_model_is_the_same_for_a_seed_and_generates() {
    for routing in [Routing::Uniform, Routing::Skewed] {
        let [one, same, other] = [1, 1, 2].map(|seed| written(&synth(routing, seed)));
        for name in [TRUNK, STORE] {
            let read = |dir: &tempfile::TempDir| fs::read(dir.path().join(name)).unwrap();
            assert!(read(&one) == read(&same) && read(&one) != read(&other), "{name}");
        }
        let verified = crate::verify(one.path(), &mut |_| true).unwrap();
        assert!(verified.bad.is_empty(), "{:?}", verified.bad);
        assert_eq!(verified.records, 16);
        let sampled = || Sampling { temperature: 1.0, seed: Some(3), ..Sampling::greedy() };
        // Logits that are not finite would fail the request.
        let ids = generate(one.path(), sampled());
        assert_eq!((ids.len(), &ids), (40, &generate(same.path(), sampled())));
        assert_ne!(ids, generate(other.path(), sampled()));
        let text = crate::Text::open(one.path()).unwrap();
        let message = crate::Message { role: "user".into(), content: "Hé\n".into(), ..Default::default() };
        let prompt = text.render(&crate::Chat::of(vec![message])).unwrap();
        let bytes: Vec<u8> = text.encode(&prompt).unwrap().iter().flat_map(|id| text.token_bytes(*id).to_vec()).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), "user\nHé\n\nassistant\n");
        assert_eq!(text.end_ids(), [258]);
        assert_eq!(text.token_bytes(300).first(), Some(&b' '));
    }
}

#[test]
fn layers_and_context_can_be_chosen() {
    let dir = written(&Synth { layers: Some(3), context: Some(777), ..synth(Routing::Uniform, 1) });
    let info = crate::hub::describe(dir.path()).unwrap();
    assert_eq!((info.layers, info.context_max, info.experts, info.top_k), (3, 777, 8, 2));
    for bad in [
        Synth { shape: "huge".into(), ..synth(Routing::Uniform, 1) },
        Synth { layers: Some(0), ..synth(Routing::Uniform, 1) },
        Synth { context: Some(usize::MAX), ..synth(Routing::Uniform, 1) },
    ] {
        let refused = write(dir.path(), &bad, &mut |_| true);
        assert!(matches!(refused, Err(Error::Setting { .. })), "{refused:?}");
    }
    assert!(shapes().iter().all(|shape| SHAPE_NAMES.contains(shape.name)));
}

#[test]
fn only_its_own_folders_are_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("a/b");
    let first = write(&model, &synth(Routing::Uniform, 1), &mut |_| true).unwrap();
    let on_disk: u64 = fs::read_dir(&model).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert_eq!((first.bytes, first.records), (on_disk, 16));
    write(&model, &synth(Routing::Skewed, 2), &mut |_| true).unwrap();
    assert!(fs::read_to_string(model.join(CONFIG)).unwrap().contains("skewed"));
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let refused = write(dir.path(), &synth(Routing::Uniform, 1), &mut |_| true).unwrap_err().to_string();
    assert!(refused.contains("a folder for a synthetic model"), "{refused}");
    assert_eq!(fs::read_to_string(dir.path().join("config.json")).unwrap(), "{}");
}

#[test]
fn what_is_cancelled_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (new, old) = (dir.path().join("new"), dir.path().join("old"));
    fs::create_dir(&old).unwrap();
    let mut steps = 0;
    write(&new, &synth(Routing::Uniform, 1), &mut |progress| {
        assert!(progress.done <= progress.total);
        steps += 1;
        true
    })
    .unwrap();
    fs::remove_dir_all(&new).unwrap();
    for stop in 0..steps {
        for (path, left) in [(&new, false), (&old, true)] {
            let mut told = 0;
            let result = write(path, &synth(Routing::Uniform, 1), &mut |_| {
                told += 1;
                told <= stop
            });
            assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
            assert_eq!(path.exists(), left, "{}", path.display());
            assert!(!left || fs::read_dir(path).unwrap().count() == 0);
        }
    }
}

#[test]
fn records_are_as_long_as_their_meta_says() {
    for shape in shapes() {
        let plan = Plan::new(shape, Routing::Uniform, 0);
        assert_eq!(plan.experts(0).record(0).bytes(), shape.record(0).unwrap().payload() as usize, "{}", shape.name);
    }
}

/// A matrix widened to f32.
struct Dense {
    cols: usize,
    w: Vec<f32>,
}

impl Dense {
    fn new(matrix: &Matrix) -> Self {
        let part = |part| {
            let mut bytes = vec![0; matrix.bytes(part)];
            matrix.fill(part, 0, &mut bytes);
            bytes
        };
        let [codes, scales, biases] = Part::ALL.map(part);
        let float = |bytes: &[u8], i: usize| half::bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32();
        let code = |i: usize| if matrix.bits == 8 { codes[i] } else { codes[i / 2] >> (4 * (i % 2)) & 15 };
        let w = (0..matrix.rows * matrix.cols).map(|i| float(&scales, i / GROUP) * f32::from(code(i)) + float(&biases, i / GROUP));
        Self { cols: matrix.cols, w: w.collect() }
    }

    fn of(trunk: &[tensors::Tensor], name: &str) -> Self {
        let find = trunk.iter().find(|tensor| tensor.name == format!("{name}.weight"));
        match &find.unwrap_or_else(|| panic!("{name}")).data {
            tensors::Data::Matrix(matrix, _) => Self::new(matrix),
            tensors::Data::Vector(values) => Self { cols: 1, w: values.clone() },
        }
    }

    fn times(&self, x: &[f32]) -> Vec<f32> {
        self.w.chunks_exact(self.cols).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }
}

fn normed(x: &[f32], weight: &Dense) -> Vec<f32> {
    let rms = (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
    x.iter().zip(&weight.w).map(|(x, w)| x / rms * w).collect()
}

fn top(logits: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    order.truncate(k);
    order
}

/// What routing does with tokens that see themselves alone: the plainest decoder that can be.
struct Observed {
    /// Of the next layer's router on this layer's residual, layer by layer.
    recall: Vec<f32>,
    /// Times each expert was chosen, layer by layer.
    chosen: Vec<Vec<usize>>,
    /// Choices of each token, layer by layer.
    tokens: Vec<Vec<Vec<usize>>>,
    rms_last: f32,
}

fn observe(shape: &Shape, routing: Routing, tokens: usize) -> Observed {
    let plan = Plan::new(shape, routing, 5);
    let trunk = plan.trunk();
    let k = shape.top_k;
    let embed = Dense::of(&trunk, "model.embed_tokens");
    let mut residual: Vec<Vec<f32>> = (0..tokens).map(|token| embed.w[token * shape.hidden..][..shape.hidden].to_vec()).collect();
    let mut foreseen: Vec<Vec<usize>> = Vec::new();
    let (mut recall, mut chosen, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for layer in 0..shape.layers {
        let part = |name: &str| Dense::of(&trunk, &format!("model.layers.{layer}.{name}"));
        let (norm, values, out) = (part("input_layernorm"), part("self_attn.v_proj"), part("self_attn.o_proj"));
        for x in &mut residual {
            let seen = values.times(&normed(x, &norm));
            let heads: Vec<f32> = seen.chunks(shape.head_dim).flat_map(|head| head.repeat(shape.heads / shape.kv_heads)).collect();
            x.iter_mut().zip(out.times(&heads)).for_each(|(x, add)| *x += add);
        }
        let (norm, router) = (part("post_attention_layernorm"), part(plan::ROUTER));
        let next = (layer + 1 < shape.layers).then(|| Dense::of(&trunk, &format!("model.layers.{}.{}", layer + 1, plan::ROUTER)));
        let (mut choices, mut counts, mut found) = (Vec::new(), vec![0; shape.experts], 0);
        let mut experts = plan.experts(layer);
        let dense: Vec<[Dense; 3]> = (0..shape.experts).map(|expert| experts.record(expert).matrices.each_ref().map(Dense::new)).collect();
        let mut ahead = Vec::new();
        for (token, x) in residual.iter_mut().enumerate() {
            let input = normed(x, &norm);
            let logits = router.times(&input);
            let choice = top(&logits, k);
            let total: f32 = choice.iter().map(|expert| logits[*expert].exp()).sum();
            if let Some(foreseen) = foreseen.get(token) {
                found += choice.iter().filter(|expert| foreseen.contains(expert)).count();
            }
            ahead.extend(next.as_ref().map(|next| top(&next.times(&input), k)));
            for expert in &choice {
                counts[*expert] += 1;
                let [gate, up, down] = &dense[*expert];
                let mid: Vec<f32> =
                    gate.times(&input).into_iter().zip(up.times(&input)).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
                let weight = logits[*expert].exp() / total;
                x.iter_mut().zip(down.times(&mid)).for_each(|(x, add)| *x += weight * add);
            }
            choices.push(choice);
        }
        if layer > 0 {
            recall.push(found as f32 / (tokens * k) as f32);
        }
        foreseen = ahead;
        chosen.push(counts);
        all.push(choices);
    }
    let squares: f32 = residual.iter().flatten().map(|x| x * x).sum();
    Observed { recall, chosen, tokens: all, rms_last: (squares / (tokens * shape.hidden) as f32).sqrt() }
}

/// A real model's proportions, small: many experts of which a few run, enough layers that errors would pile up.
fn small() -> Shape {
    let tiny = SHAPES.iter().find(|shape| shape.name == "tiny").unwrap();
    Shape { layers: 12, hidden: 256, experts: 32, top_k: 4, moe_width: 64, ..*tiny }
}

#[test]
fn uniform_routing_is_even_and_foreseeable_at_every_depth() {
    let shape = small();
    let seen = observe(&shape, Routing::Uniform, 96);
    assert!(seen.recall.iter().all(|recall| (0.6..0.9).contains(recall)), "{:?}", seen.recall);
    for layer in &seen.chosen {
        let mean = 96.0 * 4.0 / 32.0;
        assert!((*layer.iter().max().unwrap() as f32) < 3.0 * mean, "{layer:?}");
    }
    // 12 layers add 1/4 of the residual each: 1.44 times its size, a little more for attention.
    assert!((1.3..1.8).contains(&seen.rms_last), "{}", seen.rms_last);
}

#[test]
fn skewed_routing_has_favourites_and_follows_topics() {
    let shape = small();
    let seen = observe(&shape, Routing::Skewed, 96);
    let popular = |layer: &Vec<usize>| {
        let mut counts = layer.clone();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts[..8].iter().sum::<usize>() as f32 / counts.iter().sum::<usize>() as f32
    };
    let share = seen.chosen.iter().map(popular).sum::<f32>() / 12.0;
    assert!(share > 0.4, "the most popular quarter of experts serves {share}");
    // Token t is of topic t mod 32: t and t + 32 share it, t and t + 33 don't.
    let common = |layer: &Vec<Vec<usize>>, apart: usize| {
        let shared = |t: usize| layer[t].iter().filter(|expert| layer[t + apart].contains(expert)).count();
        (0..60).map(shared).sum::<usize>() as f32 / (60.0 * 4.0)
    };
    for layer in [&seen.tokens[0], &seen.tokens[11]] {
        let (same, other) = (common(layer, 32), common(layer, 33));
        assert!(same > other + 0.1, "experts shared within a topic {same}, across topics {other}");
    }
}

#[test]
fn deviations_stay_finite_at_any_depth() {
    let deepest = Shape { layers: LAYERS_MAX.min(200), ..SHAPES[4] };
    for routing in [Routing::Uniform, Routing::Skewed] {
        let plan = Plan::new(&deepest, routing, 1);
        let finite = |deviation: &Deviation| match deviation {
            Deviation::All(deviation) => deviation.is_finite(),
            Deviation::Each(rows) => rows.iter().all(|row| row.is_finite()),
        };
        for tensor in plan.trunk() {
            match tensor.data {
                tensors::Data::Matrix(matrix, _) => assert!(finite(&matrix.deviation), "{}", tensor.name),
                tensors::Data::Vector(values) => assert!(values.iter().all(|value| value.is_finite()), "{}", tensor.name),
            }
        }
        assert!(plan.experts(199).record(7).matrices.iter().all(|matrix| finite(&matrix.deviation)));
    }
}
