//! The bundled model against figures that another implementation computed, and the fast kernels against the reference
//! ones. The whole held-out text is measured by `cargo bench -p flash-engine --bench accuracy`; here a part of it.

use anyhow::Result;
use flash_engine::{CacheBudget, Engine, Kernels, Options};
use flash_tests::{
    daemon::bundled_model,
    drive::{SERVING, greedy, ids, options, run},
    golden,
};

/// Half of the experts, so that they stream while the golden figures are made.
fn engine(kernels: Kernels) -> Result<Engine> {
    let options = Options { kernels, expert_cache: CacheBudget::Share(0.5), parallel: 5, ..options() };
    Ok(Engine::load(&bundled_model(), &options, &mut |_| {})?)
}

#[test]
fn reference_kernels_give_the_golden_tokens_and_logits() -> Result<()> {
    golden_tokens_and_logits(Kernels::Reference)
}

#[test]
#[cfg(all(feature = "mlx", not(target_os = "macos")))] // Metal computes in the model's own type
fn mlx_gives_the_golden_tokens_and_logits() -> Result<()> {
    golden_tokens_and_logits(Kernels::Mlx)
}

fn golden_tokens_and_logits(kernels: Kernels) -> Result<()> {
    let mut engine = engine(kernels)?;
    let goldens = golden::read("mlx_4bit_f32")?;
    assert_eq!(goldens.len(), 5);
    for (index, golden) in goldens.iter().enumerate() {
        let mut logits = Vec::new();
        engine.score(&golden.prompt, golden.prompt.len() - 1, &mut |_, last| logits = last.to_vec())?;
        assert_eq!(logits.len(), golden.logits.len());
        let worst = logits.iter().zip(&golden.logits).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f32::max);
        let largest = golden.logits.iter().fold(0.0, |largest: f32, logit| largest.max(logit.abs()));
        assert!(worst <= 1e-3f32.min(1e-4 * largest), "prompt {index}: a logit is off by {worst}, the largest is {largest}");
    }
    let requests: Vec<_> = goldens.iter().map(|golden| greedy(&golden.prompt, 64)).collect();
    for (index, (ids, golden)) in ids(run(&mut engine, &requests)?)?.into_iter().zip(&goldens).enumerate() {
        assert_eq!(ids, golden.greedy, "prompt {index}");
    }
    Ok(())
}

/// The most likely token at every position, and the loss.
fn score(engine: &mut Engine, tokens: &[u32]) -> Result<(Vec<usize>, f64)> {
    let (mut best, mut loss) = (Vec::new(), 0.0);
    engine.score(tokens, 0, &mut |position, logits| {
        let top = (0..logits.len()).fold(0, |top, id| if logits[id] > logits[top] { id } else { top });
        best.push(top);
        if let Some(&next) = tokens.get(position + 1) {
            let total: f64 = logits.iter().map(|&logit| f64::from(logit - logits[top]).exp()).sum();
            loss += total.ln() - f64::from(logits[next as usize] - logits[top]);
        }
    })?;
    Ok((best, loss))
}

#[test]
fn serving_kernels_agree_with_the_reference_on_held_out_text() -> Result<()> {
    let text = golden::held_out()?;
    let (mut reference, mut serving) = (engine(Kernels::Reference)?, engine(SERVING)?);
    let (mut equal, mut positions, mut losses) = (0, 0, [0.0; 2]);
    // A part of every text: with fewer positions, how many near ties there are is chance.
    for tokens in text.values().map(|tokens| &tokens[..256]) {
        let (expected, expected_loss) = score(&mut reference, tokens)?;
        let (got, loss) = score(&mut serving, tokens)?;
        assert_eq!(expected.len(), tokens.len(), "one row of logits for every position");
        equal += expected.iter().zip(&got).filter(|(expected, got)| expected == got).count();
        positions += expected.len();
        losses[0] += expected_loss;
        losses[1] += loss;
    }
    let agreement = equal as f64 / positions as f64;
    assert!(agreement >= 0.995, "the most likely token agrees at {equal} of {positions} positions");
    let change = ((losses[1] - losses[0]) / positions as f64).exp() - 1.0;
    assert!(change.abs() <= 1e-3, "perplexity changes by {:.3}%", 100.0 * change);
    Ok(())
}
