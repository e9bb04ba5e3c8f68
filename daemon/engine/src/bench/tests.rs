//! Bounds and medians by table, and whole benches on the tiny synthetic model.

use super::*;
use crate::synth::{self, Routing, Synth};

fn model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let synth = Synth { shape: "tiny".into(), layers: None, context: None, seed: 1, routing: Routing::Uniform };
    synth::write(dir.path(), &synth, &mut |_| true).unwrap();
    dir
}

fn rows(dir: &Path, bench: &BenchOptions) -> (Vec<Machine>, Vec<Row>) {
    let options = Options { threads: Some(1), available: Some(256 << 20), ..Options::default() };
    let (mut machines, mut rows) = (Vec::new(), Vec::new());
    run(dir, &options, bench, &mut |_| true, &mut |event| {
        match event {
            BenchEvent::Machine(machine) => machines.push(machine),
            BenchEvent::Row(row) => rows.push(*row),
            BenchEvent::Progress { .. } => {}
        }
        true
    })
    .unwrap();
    (machines, rows)
}

#[test]
fn bounds_follow_from_bytes_and_bandwidths() {
    let check = |memory, disk, expected: [f64; 3], io: Option<f64>| {
        let bounds = Bounds::new(memory, disk);
        let got = [bounds.memory, bounds.overlapped, bounds.serial];
        assert!(got.iter().zip(expected).all(|(got, expected)| (got / expected - 1.0).abs() < 1e-9), "{bounds:?}");
        assert_eq!(bounds.io.is_some(), io.is_some());
        assert!(bounds.io.zip(io).is_none_or(|(got, expected)| (got / expected - 1.0f64).abs() < 1e-9), "{bounds:?}");
    };
    check((2.0, 40.0), (0.0, 1.0), [20.0, 20.0, 20.0], None);
    check((2.0, 40.0), (0.5, 2.0), [20.0, 4.0, 10.0 / 3.0], Some(4.0));
    check((4.0, 4.0), (1.0, 4.0), [1.0, 1.0, 0.8], Some(4.0));
}

#[test]
fn a_token_needs_the_trunk_but_one_row_of_the_embedding_its_experts_and_its_context() {
    let dir = model();
    let need = Need::of(&Model::open(dir.path()).unwrap(), Kernels::Auto);
    // 4 bits with a scale and a bias of two bytes for 64 codes; a router of 8.
    let four = |rows: u64, cols: u64| rows * (cols / 2 + cols / 64 * 4);
    let layer = 2 * four(64, 64) + 2 * four(32, 64) + 8 * (64 + 4) + 2 * (2 * 64 + 2 * 16);
    let expected = Need {
        trunk: 2 * layer + 2 * 64 + four(512, 64) + four(1, 64),
        experts: 2 * 2 * 3 * four(64, 64),
        kv_per_position: 2 * 2 * 2 * 16 * 2,
    };
    assert_eq!(need, expected);
    assert_eq!(need.bytes(10.0), (expected.trunk + expected.experts + 10 * expected.kv_per_position) as f64);
}

#[test]
fn one_stall_does_not_decide_a_median() {
    let times = |millis: &[u64]| millis.iter().map(|millis| Duration::from_millis(*millis)).collect::<Vec<_>>();
    let check = |millis: &[u64], expected: f64| assert!((median_speed(&times(millis)) - expected).abs() < 1e-6, "{millis:?}");
    check(&[5, 15], 100.0);
    check(&[0, 10, 20, 1020], 100.0);
    let steady: Vec<u64> = (0..=16).map(|token| token * 10 + if token > 7 { 5000 } else { 0 }).collect();
    check(&steady, 100.0);
    let odd: Vec<u64> = (0..=10).map(|token| token * 20).collect();
    check(&odd, 50.0);
}

#[test]
fn what_the_page_cache_gave_is_not_the_disks() {
    let counted = |bytes_read, fetched| {
        let experts = flash_experts::Stats { bytes_read, ..Default::default() };
        Counted { report: Report { experts, ..Report::default() }, fetched }
    };
    let check = |io, fetched: [Option<Bytes>; 2], expected: Bytes| {
        assert_eq!(counted(900, fetched[1]).disk_bytes(&counted(100, fetched[0]), io), expected, "{io} {fetched:?}");
    };
    check(Io::Direct, [Some(0), Some(5000)], 800);
    check(Io::Uring, [None, None], 800);
    check(Io::Buffered, [Some(50), Some(350)], 300);
    check(Io::Mmap, [Some(50), Some(50)], 0);
    check(Io::Buffered, [None, None], 800);
}

#[test]
fn every_size_has_a_cold_and_a_warm_row() {
    let dir = model();
    let caches = vec![CacheBudget::Share(0.5), CacheBudget::Share(1.0)];
    let bench = BenchOptions { caches: caches.clone(), prompt: 40, generate: 12, ..BenchOptions::default() };
    let (machines, rows) = rows(dir.path(), &bench);
    assert_eq!(machines.len(), 3, "measured with every engine");
    assert!(machines.iter().all(|machine| machine.io == Io::Buffered), "a small model is read through the page cache");
    assert!(machines[0].memory_bytes_s > 0.0 && machines[0].disk_bytes_s > 0.0);
    let named: Vec<_> = rows.iter().map(|row| (row.cache, row.slots, row.state)).collect();
    let [half, all] = [caches[0], caches[1]].map(Some);
    use State::{Cold, Warm};
    assert_eq!(named, [(half, 4, Cold), (half, 4, Warm), (all, 8, Cold), (all, 8, Warm), (None, 2, Cold), (None, 2, Warm)]);
    let decodes: Vec<&Decode> = rows.iter().map(|row| row.decode.as_ref().unwrap()).collect();
    assert!(decodes.iter().all(|decode| decode.tokens == 11 && decode.tok_s > 0.0 && decode.mean_tok_s > 0.0));
    assert!(rows.iter().all(|row| row.prompt_tokens == 40 && row.ttft > Duration::ZERO));
    let warm = decodes[3];
    assert_eq!((warm.hit_rate, warm.loaded_bytes_per_token), (1.0, 0.0));
    for without in &decodes[4..] {
        assert_eq!(without.hit_rate, 0.0, "nothing stays without a cache");
        // Records are read by whole pages: two layers, two experts of 6,912 bytes each.
        assert_eq!(without.loaded_bytes_per_token, (2 * 2 * 8192) as f64);
    }
}

#[test]
fn variants_multiply_rows_and_repeats_do_not() {
    let dir = model();
    let variants: Vec<_> = [PolicyKind::Lru, PolicyKind::Lfru]
        .into_iter()
        .flat_map(|policy| [Io::Buffered, Io::Mmap].map(|io| Variant { io: Some(io), policy: Some(policy), lookahead: None }))
        .collect();
    let caches = vec![CacheBudget::Share(0.5)];
    let bench = BenchOptions { caches, prompt: 8, generate: 0, variants: variants.clone(), repeat: 3, ..BenchOptions::default() };
    let (machines, rows) = rows(dir.path(), &bench);
    let ios: Vec<_> = machines[..4].iter().map(|machine| machine.io).collect();
    assert_eq!((ios, machines.len()), (vec![Io::Buffered, Io::Mmap, Io::Buffered, Io::Mmap], 3 * (4 + 1)));
    assert_eq!(rows.len(), 2 + 2 * 4);
    assert!(rows.iter().all(|row| row.decode.is_none() && row.prefill_tok_s > 0.0));
    assert_eq!(rows[..8].iter().step_by(2).map(|row| Variant { lookahead: None, ..row.variant }).collect::<Vec<_>>(), variants);
}

#[test]
fn forced_routing_decides_what_is_read() {
    let dir = model();
    let bench = BenchOptions {
        caches: vec![CacheBudget::Share(0.25)],
        prompt: 8,
        generate: 9,
        routing: Some(vec![0, 1, 2, 3]),
        ..BenchOptions::default()
    };
    let (_, rows) = rows(dir.path(), &bench);
    assert_eq!(rows[0].slots, 2);
    assert_eq!(rows[0].decode.as_ref().unwrap().hit_rate, 1.0, "the same two experts of each layer, again and again");
}

#[test]
fn a_bench_ends_when_told_to_and_refuses_what_cannot_be() {
    let dir = model();
    let options = Options { threads: Some(1), available: Some(256 << 20), ..Options::default() };
    let bench = BenchOptions { caches: Vec::new(), prompt: 8, generate: 4, ..BenchOptions::default() };
    let stopped = run(dir.path(), &options, &bench, &mut |_| true, &mut |_| false);
    assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
    let stopped = run(dir.path(), &options, &bench, &mut |_| false, &mut |_| true);
    assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
    let refused = |bench| run(dir.path(), &options, &bench, &mut |_| true, &mut |_| true);
    assert!(matches!(refused(BenchOptions { prompt: 0, ..bench.clone() }), Err(Error::EmptyPrompt)));
    assert!(matches!(refused(BenchOptions { prompt: 40_000, ..bench.clone() }), Err(Error::ContextLength { .. })));
    assert!(matches!(refused(BenchOptions { routing: Some(vec![9, 1, 2, 3]), ..bench }), Err(Error::Setting { .. })));
}
