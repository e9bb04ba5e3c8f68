//! The bundled model against figures that another implementation computed, and the fast kernels against the reference
//! ones. The whole held-out text is measured by `cargo bench -p flash-engine --bench accuracy`; here a part of it.

use anyhow::Result;
use flash_engine::{CacheBudget, Delivery, Engine, Event, Kernels, Options, Request, Step};
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

/// What the routers choose for a text, [tokens, MoE layers, top_k].
fn routing(engine: &mut Engine, tokens: &[u32]) -> Result<Vec<u16>> {
    engine.admit(Request { record_routing: true, ..greedy(tokens, 1) })?;
    let mut routing = Vec::new();
    let mut deliver = |_, event| {
        if let Event::Routing { ids, .. } = event {
            routing.extend(ids);
        }
        Delivery::Taken
    };
    while engine.step(&mut deliver) == Step::Worked {}
    Ok(routing)
}

/// Where two experts are as likely as each other, down to rounding, one choice is as good as the other and both change the text's later
/// logits: kernels are held to the gate with the reference's choices, and to less with their own, as a part of the text is a small sample.
#[test]
fn serving_kernels_agree_with_the_reference_on_held_out_text() -> Result<()> {
    let text = golden::held_out()?;
    let mut engines = [engine(Kernels::Reference)?, engine(SERVING)?];
    for (routed_alike, agreement_min, change_max) in [(false, 0.99, 5e-3), (true, 0.995, 1e-3)] {
        let (mut equal, mut positions, mut losses) = (0, 0, [0.0; 2]);
        for domain in ["books", "code_py"] {
            let tokens = &text[domain][..256];
            let routes = if routed_alike { Some(routing(&mut engines[0], tokens)?) } else { None };
            let mut scores = Vec::new();
            for (engine, total) in engines.iter_mut().zip(&mut losses) {
                engine.force_routing(routes.as_deref())?;
                let (best, loss) = score(engine, tokens)?;
                engine.force_routing(None)?;
                assert_eq!(best.len(), tokens.len(), "one row of logits for every position");
                *total += loss;
                scores.push(best);
            }
            equal += scores[0].iter().zip(&scores[1]).filter(|(expected, got)| expected == got).count();
            positions += scores[0].len();
        }
        let agreement = equal as f64 / positions as f64;
        assert!(
            agreement >= agreement_min,
            "routed alike: {routed_alike}: the most likely token agrees at {equal} of {positions} positions"
        );
        let change = ((losses[1] - losses[0]) / positions as f64).exp() - 1.0;
        assert!(change.abs() <= change_max, "routed alike: {routed_alike}: perplexity changes by {:.3}%", 100.0 * change);
    }
    Ok(())
}
