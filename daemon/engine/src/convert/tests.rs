//! Conversions of a small checkpoint, interrupted at every point. The tokens of a packed model are compared in
//! `tests/tests/packed.rs`; here it is bytes.

use std::{collections::BTreeMap, fs};

use tempfile::TempDir;

use super::*;
use crate::model::{tests::small, weights::Arena};

type Files = BTreeMap<String, Vec<u8>>;

fn files(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())).collect()
}

fn restored(files: &Files) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
    dir
}

/// What every tensor of the model holds, experts included.
fn contents(dir: &Path) -> Vec<Vec<u8>> {
    let model = Model::open(dir).unwrap();
    let mut specs = vec![&model.embed];
    specs.extend(&model.head);
    for layer in &model.layers {
        specs.extend([&layer.q, &layer.k, &layer.v, &layer.o]);
        match &layer.ffn {
            FfnSpec::Dense(ffn) => specs.extend(ffn.matrices()),
            FfnSpec::Moe { router, experts } => {
                specs.push(router);
                specs.extend(experts.iter().flat_map(Ffn::matrices));
            }
        }
    }
    let spans = specs.into_iter().flat_map(|spec| [Some(spec.weight), spec.scales, spec.biases]).flatten();
    let mut arena = Arena::default();
    let parts: Vec<_> = spans.map(|span| model.weights.read("test", span, &mut arena).unwrap()).collect();
    parts.into_iter().map(|part| arena.get(part).to_vec()).collect()
}

fn go_on(_: Progress) -> bool {
    true
}

#[test]
fn a_packed_checkpoint_holds_the_same_numbers() {
    for dir in [small().write(), small().write_sharded()] {
        let before = contents(dir.path());
        let (mut last, sources) = (None, files(dir.path()));
        let converted = convert(dir.path(), false, &mut |progress| {
            last = Some(progress);
            true
        })
        .unwrap();
        let last = last.unwrap();
        assert_eq!((converted.records, last.done), (2, last.total));
        assert_eq!(contents(dir.path()), before);
        let info = Model::open(dir.path()).unwrap().info;
        assert!(info.packed && info.size_bytes == info.trunk_bytes + converted.bytes);
        let verified = verify(dir.path(), &mut go_on).unwrap();
        assert_eq!((verified.records, verified.bad.len(), verified.bytes), (2, 0, converted.bytes));
        let again = convert(dir.path(), false, &mut go_on).unwrap_err().to_string();
        assert!(again.contains("packed already"), "{again}");
        let mut after = files(dir.path());
        after.remove(STORE);
        assert_eq!(after, sources, "the checkpoint is as it was");
    }
}

#[test]
fn stopping_a_conversion_leaves_nothing() {
    let dir = small().write_sharded();
    let before = files(dir.path());
    for in_place in [false, true] {
        let error = convert(dir.path(), in_place, &mut |_| false).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        assert_eq!(files(dir.path()), before);
    }
}

#[test]
fn a_conversion_in_place_survives_being_killed_after_every_step() {
    for dir in [small().write(), small().write_sharded()] {
        let before = files(dir.path());
        let expected = contents(dir.path());
        let whole = restored(&before);
        convert(whole.path(), true, &mut go_on).unwrap();
        let finished = files(whole.path());
        assert_eq!(contents(whole.path()), expected);
        assert!(finished.values().map(Vec::len).sum::<usize>() < before.values().map(Vec::len).sum::<usize>() + 16384, "moved, not copied");
        let beside = restored(&before);
        convert(beside.path(), false, &mut go_on).unwrap();
        assert_eq!(finished[STORE], files(beside.path())[STORE], "both ways make the same store");

        for killed_after in 0.. {
            let dir = restored(&before);
            let steps = in_place::interrupted(dir.path(), killed_after);
            if killed_after > 0 && killed_after == steps {
                assert_eq!(files(dir.path()), finished);
                break;
            }
            let error = Model::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("conversion was interrupted; run `flashctl convert --in-place"), "{error}");
            let error = convert(dir.path(), false, &mut go_on).unwrap_err().to_string();
            assert!(error.contains("conversion was interrupted"), "{error}");
            // What a step was writing when it was killed is there in part.
            let ours = |name: &&String| name.ends_with(".safetensors") || name.ends_with(".index.json");
            for name in before.keys().filter(ours).map(String::as_str).chain([JOURNAL]) {
                fs::write(dir.path().join(format!("{name}.part")), b"torn").unwrap();
            }
            convert(dir.path(), true, &mut go_on).unwrap();
            assert_eq!(files(dir.path()), finished, "killed after step {killed_after}");
        }
    }
}

#[test]
fn a_conversion_in_place_survives_being_stopped_at_every_report() {
    let dir = small().write_sharded();
    let before = files(dir.path());
    let whole = restored(&before);
    convert(whole.path(), true, &mut go_on).unwrap();
    let finished = files(whole.path());
    for reports in 0.. {
        let (dir, mut left) = (restored(&before), reports);
        let stopped = convert(dir.path(), true, &mut |_| {
            left -= i32::from(left >= 0);
            left >= 0
        });
        match stopped {
            Ok(_) => {
                assert!(reports > 12, "{reports}");
                break;
            }
            Err(Error::Cancelled) => assert_eq!(files(dir.path()), before),
            Err(error) => {
                assert!(error.to_string().contains("stopped half-way"), "{error}");
                convert(dir.path(), true, &mut go_on).unwrap();
                assert_eq!(files(dir.path()), finished);
            }
        }
    }
}

#[test]
fn what_cannot_be_packed_says_why() {
    let check = |in_place: bool, expected: &str, change: &dyn Fn(&Path)| {
        let dir = small().write();
        change(dir.path());
        let error = convert(dir.path(), in_place, &mut go_on).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(true, "is a link", &|dir| {
        fs::rename(dir.join("model.safetensors"), dir.join("blob")).unwrap();
        std::os::unix::fs::symlink("blob", dir.join("model.safetensors")).unwrap();
    });
    check(true, "was not written by this program", &|dir| {
        let journal = r#"{"layers": [], "experts": 1, "align": 4096, "files": [{"file": "../x.safetensors", "whole": 1, "stripped": 2, "pieces": [], "copied": null}]}"#;
        fs::write(dir.join(JOURNAL), journal).unwrap();
    });
    check(true, "was not written by this program", &|dir| {
        let journal = r#"{"layers": [], "experts": 1, "align": 4096, "files": [{"file": "x.safetensors", "whole": 1, "stripped": 2, "pieces": [[0, 0, 0, 0, 1]], "copied": null}]}"#;
        fs::write(dir.join(JOURNAL), journal).unwrap();
    });
    check(false, "config.json", &|dir| fs::remove_file(dir.join("config.json")).unwrap());
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let dir = small().write();
    for name in ["experts.flash.part", "experts.flash.journal.part", "model.safetensors.part"] {
        std::os::unix::fs::symlink(&victim, dir.path().join(name)).unwrap();
    }
    convert(dir.path(), true, &mut go_on).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"precious", "links that came with the model are not written through");
    fs::rename(dir.path().join(STORE), outside.path().join(STORE)).unwrap();
    std::os::unix::fs::symlink(outside.path().join(STORE), dir.path().join(STORE)).unwrap();
    assert!(Model::open(dir.path()).unwrap_err().to_string().contains("leads outside"));
    let dir = small().write();
    assert!(verify(dir.path(), &mut go_on).unwrap_err().to_string().contains("has no experts.flash"));
}

#[test]
fn a_damaged_store_is_found() {
    let dir = small().write();
    convert(dir.path(), false, &mut go_on).unwrap();
    let path = dir.path().join(STORE);
    let good = fs::read(&path).unwrap();
    let mut flipped = good.clone();
    flipped[4096 + 100] ^= 4;
    fs::write(&path, &flipped).unwrap();
    let verified = verify(dir.path(), &mut go_on).unwrap();
    assert!(verified.bad.len() == 1 && verified.bad[0].contains("layer 0 expert 0"), "{:?}", verified.bad);
    assert!(matches!(verify(dir.path(), &mut |_| false), Err(Error::Cancelled)));
    let check = |bytes: &[u8], expected: &str| {
        fs::write(&path, bytes).unwrap();
        let error = Model::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(STORE), "{error}");
    };
    check(&good[..good.len() - 1], "length");
    check(b"", "header");
    flipped[9] = 1;
    check(&flipped, "version");
    // Another model's: its shapes are not those of config.json.
    let store = |edit: &dyn Fn(&mut Meta)| {
        let reader = {
            fs::write(&path, &good).unwrap();
            StoreReader::open(&path, Io::Buffered).unwrap()
        };
        let mut meta: Meta = serde_json::from_slice(reader.meta()).unwrap();
        let payload = meta.layers[0].payload();
        edit(&mut meta);
        let writer = StoreWriter::create(&path, Plan { records: vec![vec![payload; 2]], align: 4096, meta: meta.to_bytes() }).unwrap();
        (0..2).for_each(|expert| writer.record(0, expert, &vec![0; payload as usize]).unwrap());
        writer.finish().unwrap();
        fs::read(&path).unwrap()
    };
    check(&store(&|meta| meta.layers[0].layer = 0), "layers of records");
    check(&store(&|meta| meta.layers[0].gate = meta.layers[0].down.clone()), "gate is [64, 32], but config.json asks for [32, 64]");
    check(&store(&|meta| meta.layers[0].up.weight[0] += 64), "do not lie where");
    check(&store(&|meta| meta.layers.clear()), "layers of records");
}
