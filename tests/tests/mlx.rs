//! What only the MLX backend promises: how often the host waits for it, and what loading an expert costs. That it computes
//! the right thing is for the tests that every backend has to pass.
#![cfg(feature = "mlx")]

use anyhow::Result;
use flash_engine::{CacheBudget, Engine, Io, Kernels, Options};
use flash_tests::{
    daemon::bundled_model,
    drive::{Late, answered, greedy, run, run_with},
    golden,
};

fn engine(share: f64) -> Result<Engine> {
    // Past the page cache or through it, an unpacked record is its payload.
    let options = Options { kernels: Kernels::Mlx, expert_cache: CacheBudget::Share(share), io: Io::Buffered, ..Options::default() };
    Ok(Engine::load(&bundled_model(), &options, &mut |_| {})?)
}

/// One read-back of a layer's routing, one of the logits, and nothing more: not for misses either.
#[test]
fn the_host_waits_once_a_layer() -> Result<()> {
    let prompt = golden::read("mlx_4bit_f32")?.swap_remove(0).prompt;
    for share in [1.0, 0.25] {
        let mut engine = engine(share)?;
        assert!(engine.report().kernels.starts_with("mlx"), "{}", engine.report().kernels);
        let mut waited = Vec::new();
        let request = Late { at: 0, request: greedy(&prompt, 21) };
        answered(run_with(&mut engine, &[request], &mut |engine, _| waited.extend(engine.report().mlx.map(|mlx| mlx.host_syncs)))?)?;
        // What comes before is the prompt, which pauses by the clock.
        let decoding = &waited[waited.len() - 20..];
        let layers = engine.info().layers as u64;
        assert!(decoding.windows(2).all(|pair| pair[1] - pair[0] == layers + 1), "at {share}: {decoding:?}");
    }
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
