//! What only the MLX backend promises: how often the host waits for it, that it is asked for the same operations whatever is in
//! memory, and what loading an expert costs. That it computes the right thing is for the tests that every backend has to pass.
#![cfg(feature = "mlx")]

use std::{cell::RefCell, io::Write, sync::Once};

use anyhow::Result;
use flash_engine::{CacheBudget, Engine, Io, Kernels, Options, Report};
use flash_tests::{
    daemon::bundled_model,
    drive::{Late, answered, greedy, run, run_with},
    golden,
    tiny_model::{Spec, TinyModel},
};
use tempfile::TempDir;

/// Tokens until the cache and what is expected of it have settled, and tokens to look at.
const SETTLE: usize = 100;
const WATCH: usize = 40;

fn engine(share: f64) -> Result<Engine> {
    // Past the page cache or through it, an unpacked record is its payload.
    let options = Options { kernels: Kernels::Mlx, expert_cache: CacheBudget::Share(share), io: Io::Buffered, ..Options::default() };
    Ok(Engine::load(&bundled_model(), &options, &mut |_| {})?)
}

/// Hands `each` what the engine reports before and after every one of the last [`WATCH`] tokens.
fn watch(mut engine: Engine, prompt: &[u32], each: &mut dyn FnMut(&Report, &Report)) -> Result<()> {
    assert!(engine.report().kernels.starts_with("mlx"), "{}", engine.report().kernels);
    let mut reports = Vec::new();
    let request = Late { at: 0, request: greedy(prompt, SETTLE + WATCH) };
    answered(run_with(&mut engine, &[request], &mut |engine, _| reports.push(engine.report()))?)?;
    reports[reports.len() - WATCH..].windows(2).for_each(|pair| each(&pair[0], &pair[1]));
    Ok(())
}

fn syncs(before: &Report, after: &Report) -> u64 {
    let count = |report: &Report| report.mlx.map_or(0, |mlx| mlx.host_syncs);
    count(after) - count(before)
}

/// Layers in which an expert was not in memory.
fn missed(before: &Report, after: &Report) -> u64 {
    let layers = before.experts.layers.iter().zip(&after.experts.layers);
    layers.filter(|(before, after)| before.misses < after.misses).count() as u64
}

/// Everything is in memory after a while, because there are few experts.
#[test]
fn the_host_waits_once_a_token() -> Result<()> {
    let dir = TempDir::new()?;
    TinyModel::generate(Spec::default()).write(dir.path())?;
    let options = Options { kernels: Kernels::Mlx, expert_cache: CacheBudget::Share(1.0), ..Options::default() };
    watch(Engine::load(dir.path(), &options, &mut |_| {})?, &[1, 2, 3], &mut |before, after| {
        assert_eq!((syncs(before, after), missed(before, after)), (1, 0));
    })
}

/// Where most layers miss, nothing is computed in vain: their routing is waited for one by one.
#[test]
fn the_host_waits_once_a_layer_at_most() -> Result<()> {
    let engine = engine(0.25)?;
    let (layers, prompt) = (engine.info().layers as u64, golden::read("mlx_4bit_f32")?.swap_remove(0).prompt);
    watch(engine, &prompt, &mut |before, after| {
        let (syncs, missed) = (syncs(before, after), missed(before, after));
        assert!(missed > 0 && syncs <= layers + 1, "{syncs} for {missed} layers that missed");
    })
}

/// A layer's attention or experts, or the head, and its operations with their shapes.
type Block = (String, Vec<String>);

thread_local! {
    static LOG: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.with_borrow_mut(|log| log.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What MLX was asked for since the last call, block by block.
fn logged() -> Vec<Block> {
    let text = String::from_utf8(LOG.take()).expect("text");
    let mut blocks: Vec<Block> = Vec::new();
    for line in text.lines().filter_map(|line| line.split_once("flash_engine::mlx: ")).map(|(_, line)| line.to_owned()) {
        match (line.split(' ').next(), blocks.last_mut()) {
            (Some("attention" | "experts" | "foresight" | "head"), _) | (_, None) => blocks.push((line, Vec::new())),
            (_, Some((_, operations))) => operations.push(line),
        }
    }
    // One more router, where the cache is too small for all experts.
    blocks.retain(|(block, _)| !block.starts_with("foresight"));
    blocks
}

/// Per token, what MLX was asked for.
fn asked(share: f64) -> Result<Vec<Vec<Block>>> {
    static SUBSCRIBED: Once = Once::new();
    // For all threads, each of which has a log of its own: what a thread subscribes to alone depends on what others do.
    SUBSCRIBED
        .call_once(|| tracing_subscriber::fmt().with_env_filter("flash_engine::mlx=trace").with_ansi(false).with_writer(|| Log).init());
    let prompt = golden::read("mlx_4bit_f32")?.swap_remove(0).prompt;
    let mut engine = engine(share)?;
    let mut tokens = Vec::new();
    let request = Late { at: 0, request: greedy(&prompt, SETTLE + WATCH) };
    answered(run_with(&mut engine, &[request], &mut |_, _| tokens.push(logged()))?)?;
    Ok(tokens.split_off(tokens.len() - WATCH))
}

/// Without what is void because a layer was computed again, and how many blocks that are.
fn valid(blocks: &[Block]) -> (Vec<&Block>, usize) {
    let (mut valid, mut void) = (Vec::<&Block>::new(), 0);
    for block in blocks {
        if let Some(at) = valid.iter().position(|(name, _)| *name == block.0) {
            void += valid.len() - at;
            valid.truncate(at);
        }
        valid.push(block);
    }
    (valid, void)
}

/// No operation, no shape and no order depends on what is in memory, but that layers are computed again after one that missed.
#[test]
fn mlx_is_asked_for_the_same_whatever_is_in_memory() -> Result<()> {
    let (all, layers) = (asked(1.0)?, engine(1.0)?.info().layers);
    // The first is one token's working set.
    let void = [0.125, 0.6, 0.85].map(|share| {
        let some = asked(share)?;
        all.iter().zip(&some).try_fold(0, |total, (expected, got)| {
            let ((expected, _), (got, void)) = (valid(expected), valid(got));
            assert_eq!(expected.len(), 2 * layers + 1);
            assert_eq!(got, expected, "at {share}");
            Ok::<_, anyhow::Error>(total + void)
        })
    });
    let void = void.into_iter().collect::<Result<Vec<_>>>()?;
    assert!(void[2] > 0, "{void:?}: nothing was computed in vain, which is no test");
    Ok(())
}

#[test]
fn a_load_is_the_payload_read_once() -> Result<()> {
    let mut engine = engine(0.25)?;
    answered(run(&mut engine, &[greedy(&[72, 101, 108], 20)])?)?;
    let (stats, payload) = (engine.report().experts, engine.info().expert_bytes);
    assert!(stats.evictions > 0);
    assert_eq!(stats.bytes_read, stats.loads * payload);
    Ok(())
}
