//! Packed checkpoints against the same model unpacked: the same tokens, bit for bit, in every format, however the store was
//! made and however it is read. What a damaged one does is in `faults.rs`.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use flash_engine::{CacheBudget, Engine, Io, Kernels, Options, Request, convert, verify};
use flash_tests::{
    daemon::bundled_model,
    drive::{SERVING, answered, drawn, greedy, ids, options, run},
    golden,
    tiny_model::{Float, Format, Naming, Spec, TinyModel},
};
use tempfile::TempDir;

fn engine(dir: &Path, io: Io, kernels: Kernels) -> Result<Engine> {
    let options = Options { kernels, io, expert_cache: CacheBudget::Share(0.5), parallel: 5, ..options() };
    Ok(Engine::load(dir, &options, &mut |_| {})?)
}

fn copy(from: &Path) -> Result<TempDir> {
    let dir = TempDir::new()?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), dir.path().join(entry.file_name()))?;
        }
    }
    Ok(dir)
}

/// What this system can read with; buffered it can always.
fn kinds(dir: &Path) -> Vec<Io> {
    let file = dir.join("config.json");
    Io::ALL.iter().map(|(_, io)| *io).filter(|io| flash_experts::open(&file, *io).is_ok()).collect()
}

#[test]
fn the_bundled_model_packed_gives_the_golden_tokens() -> Result<()> {
    let goldens = golden::read("mlx_4bit_f32")?;
    let requests: Vec<Request> = goldens.iter().map(|golden| greedy(&golden.prompt, 64)).collect();
    for (in_place, io) in [(false, Io::Direct), (true, Io::Auto)] {
        let dir = copy(&bundled_model())?;
        let converted = convert(dir.path(), in_place, &mut |_| true)?;
        assert_eq!(converted.records, 8 * 64);
        let shard = fs::metadata(dir.path().join("model.safetensors"))?.len();
        assert_eq!(shard < 4_000_000, in_place, "{shard}");
        // A tempdir may lie on a file system without direct I/O.
        let io = if kinds(dir.path()).contains(&io) { io } else { Io::Auto };
        let mut engine = engine(dir.path(), io, Kernels::Reference)?;
        assert!(engine.info().packed);
        for (index, (ids, golden)) in ids(run(&mut engine, &requests)?)?.into_iter().zip(&goldens).enumerate() {
            assert_eq!(ids, golden.greedy, "prompt {index}, in place: {in_place}");
        }
        let stats = engine.report().experts;
        assert!(stats.loads > 0 && stats.load_errors == 0 && stats.checksum_errors == 0, "{stats:?}");
        assert!(verify(dir.path(), &mut |_| true)?.bad.is_empty());
    }
    Ok(())
}

#[test]
fn every_format_and_way_of_reading_gives_the_same_bits() -> Result<()> {
    let spec = Spec::default;
    let affine = |bits, group, params| Spec { format: Format::Affine { bits, group, params }, ..spec() };
    let specs = [
        spec(),
        affine(3, 32, Float::F16),
        affine(6, 64, Float::F32),
        Spec { format: Format::Plain(Float::F16), naming: Naming::PerExpert, shards: 4, tied: true, ..spec() },
        Spec { naming: Naming::PerExpert, shards: 3, dense: vec![1], layers: 4, ..spec() },
    ];
    let prompt: Vec<u32> = b"The quick brown fox".iter().map(|byte| u32::from(*byte)).collect();
    let mut request = drawn(&prompt, 12, 3);
    request.top_logprobs = Some(3);
    for (number, spec) in specs.into_iter().enumerate() {
        let model = TinyModel::generate(spec);
        let answer = |dir: &Path, io: Io| -> Result<_> {
            let mut engine = engine(dir, io, SERVING)?;
            let outcome = answered(run(&mut engine, std::slice::from_ref(&request))?)?.pop().context("an answer")?;
            assert!(engine.report().io == io || io == Io::Auto);
            Ok((outcome.ids, outcome.bits))
        };
        let mut expected = None;
        for in_place in [None, Some(false), Some(true)] {
            let dir = TempDir::new()?;
            model.write(dir.path())?;
            if let Some(in_place) = in_place {
                convert(dir.path(), in_place, &mut |_| true)?;
            }
            for io in kinds(dir.path()) {
                let got = answer(dir.path(), io)?;
                assert_eq!(expected.get_or_insert(got.clone()), &got, "model {number}, in place: {in_place:?}, {io}");
            }
        }
    }
    Ok(())
}

#[test]
fn half_a_conversion_is_refused_and_finished() -> Result<()> {
    let dir = TempDir::new()?;
    TinyModel::generate(Spec { shards: 3, ..Spec::default() }).write(dir.path())?;
    let request = greedy(&[72, 105], 8);
    let expected = ids(run(&mut engine(dir.path(), Io::Auto, SERVING)?, std::slice::from_ref(&request))?)?;
    // Stopped when the last stage begins: the files have given their experts.
    let stopped = convert(dir.path(), true, &mut |progress| progress.stage == "writing experts");
    let error = stopped.err().context("it was stopped")?.to_string();
    assert!(error.contains("run `flashctl convert --in-place` again"), "{error}");
    let error = engine(dir.path(), Io::Auto, SERVING).err().context("half a model")?.to_string();
    assert!(error.contains("conversion was interrupted; run `flashctl convert --in-place"), "{error}");
    convert(dir.path(), true, &mut |_| true)?;
    assert_eq!(ids(run(&mut engine(dir.path(), Io::Auto, SERVING)?, std::slice::from_ref(&request))?)?, expected);
    let error = convert(dir.path(), true, &mut |_| true).err().context("twice")?.to_string();
    assert!(error.contains("packed already"), "{error}");
    Ok(())
}
