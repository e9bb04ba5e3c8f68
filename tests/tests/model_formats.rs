//! Every checkpoint format that the engine reads, as a generated model: logits at each position against the f64 reference
//! decoder, the tokenizer and the chat template.

use anyhow::Result;
use flash_engine::{CacheBudget, Engine, Kernels, Message, Options};
use flash_tests::{
    drive::{SERVING, greedy, ids, options, run},
    reference,
    tiny_model::{Float, Format, IM_END, IM_START, Naming, Router, Spec, TinyModel},
};
use tempfile::TempDir;

const PROMPT: &[u8] = b"The quick brown fox, 42 dogs";

fn check(what: &str, spec: Spec) -> Result<()> {
    let dir = TempDir::new()?;
    let model = TinyModel::generate(spec);
    model.write(dir.path())?;
    let prompt: Vec<u32> = PROMPT.iter().map(|&byte| u32::from(byte)).collect();
    let expected = reference::logits(&model, &prompt);
    let largest = expected.iter().flatten().fold(0.0, |largest: f64, logit| largest.max(logit.abs()));
    for (kernels, tolerance) in [(Kernels::Reference, 1e-3), (SERVING, 1e-2)] {
        let options = Options { kernels, expert_cache: CacheBudget::Share(0.5), ..options() };
        let mut engine = Engine::load(dir.path(), &options, &mut |_| {})?;
        let mut positions = 0;
        engine.score(&prompt, 0, &mut |position, logits| {
            positions += 1;
            let off = expected[position].iter().zip(logits).map(|(e, &l)| (e - f64::from(l)).abs()).fold(0.0, f64::max);
            assert!(off <= tolerance * largest, "{what}, {kernels:?}, position {position}: off by {off} of {largest}");
        })?;
        assert_eq!(positions, prompt.len(), "{what}");
        if kernels == Kernels::Reference {
            let got = ids(run(&mut engine, &[greedy(&prompt, 3)])?)?.concat();
            let mut text = prompt.clone();
            for id in got {
                assert_eq!(id, reference::greedy(&model, &text), "{what}: token {}", text.len());
                text.push(id);
            }
        }
    }
    Ok(())
}

/// Rounding that changes what a model says is asked for, and every reply tells of it; otherwise none does.
#[test]
fn fast_math_tells_its_price() -> Result<()> {
    let dir = TempDir::new()?;
    TinyModel::generate(Spec::default()).write(dir.path())?;
    let prompt: Vec<u32> = PROMPT.iter().map(|&byte| u32::from(byte)).collect();
    for kernels in [Kernels::Cpu, Kernels::FastMath] {
        let mut engine = Engine::load(dir.path(), &Options { kernels, ..options() }, &mut |_| {})?;
        let rounds = engine.report().kernels.ends_with("-int8");
        assert!(!rounds || kernels == Kernels::FastMath);
        let outcome = run(&mut engine, &[greedy(&prompt, 3)])?.remove(0);
        assert_eq!((outcome.ids.len(), outcome.error), (3, None));
        assert_eq!(outcome.price.is_some_and(|price| price.contains("perplexity")), rounds);
    }
    Ok(())
}

#[test]
fn plain_floats_in_hugging_face_names() -> Result<()> {
    for float in [Float::F32, Float::F16, Float::Bf16] {
        check(&format!("{float:?}"), Spec { format: Format::Plain(float), naming: Naming::PerExpert, ..Spec::default() })?;
    }
    Ok(())
}

#[test]
fn every_width_and_group_of_affine_quantisation() -> Result<()> {
    for bits in [2, 3, 4, 6, 8] {
        for group in [32, 64, 128] {
            let params = [Float::Bf16, Float::F16, Float::F32][group / 64];
            let router = [Router::AsOthers, Router::EightBits, Router::Unquantised][usize::from(bits) % 3];
            let spec = Spec { format: Format::Affine { bits, group, params }, router, seed: u64::from(bits), ..Spec::default() };
            check(&format!("{bits} bits, groups of {group}, {router:?}"), spec)?;
        }
    }
    Ok(())
}

#[test]
fn layouts() -> Result<()> {
    let spec = Spec::default;
    check("sharded", Spec { shards: 3, ..spec() })?;
    check("values of more bits than queries and keys", Spec { value_bits: Some(6), ..spec() })?;
    check("tied head", Spec { tied: true, ..spec() })?;
    check("quantised, one tensor per expert", Spec { naming: Naming::PerExpert, ..spec() })?;
    check("plain, stacked", Spec { format: Format::Plain(Float::Bf16), ..spec() })?;
    check("plain, sharded, tied", Spec { format: Format::Plain(Float::F16), naming: Naming::PerExpert, shards: 4, tied: true, ..spec() })?;
    check("a dense layer first", Spec { dense: vec![0], layers: 3, ..spec() })?;
    check("a dense layer last", Spec { dense: vec![1], ..spec() })?;
    check("router weights as they come", Spec { norm_topk_prob: false, top_k: 3, ..spec() })?;
    check("one expert of two", Spec { experts: 2, top_k: 1, ..spec() })
}

#[test]
fn text_goes_in_and_out_unchanged() -> Result<()> {
    let dir = TempDir::new()?;
    TinyModel::generate(Spec::default()).write(dir.path())?;
    let engine = Engine::load(dir.path(), &options(), &mut |_| {})?;
    let text = engine.text();
    for sample in ["Hello, world", "naïve 🙂 日本", " two  spaces\n\ttab", ""] {
        let ids = text.encode(sample)?;
        assert_eq!(ids, sample.bytes().map(u32::from).collect::<Vec<_>>(), "{sample:?}");
        assert_eq!(ids.iter().flat_map(|&id| text.token_bytes(id).to_vec()).collect::<Vec<_>>(), sample.as_bytes());
    }
    let message = Message { role: "user".into(), content: "Hi".into(), ..Message::default() };
    let rendered = text.render(&flash_engine::Chat::of(vec![message]))?;
    assert_eq!(rendered, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    let ids = text.encode(&rendered)?;
    assert_eq!((ids[0], ids.iter().filter(|&&id| id == IM_START).count()), (IM_START, 2));
    assert!(text.end_ids().contains(&IM_END));
    Ok(())
}
