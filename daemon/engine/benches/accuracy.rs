//! The accuracy gate of the kernels that serve by default: on the bundled model's held-out text, the most likely token
//! must agree with the reference kernels' at 99.5% of the positions and the perplexity must lie within 0.1% of theirs.
//! Not a speed measurement. Run by hand and before a kernel becomes the default:
//! `cargo bench -p flash-engine --bench accuracy`. Two names replace the kernels: `--features mlx … -- cpu mlx` compares backends.

use std::{collections::BTreeMap, fs, path::Path, process::ExitCode};

use anyhow::{Context, Result};
use flash_engine::{CacheBudget, Engine, Kernels, Options};

const AGREEMENT_MIN: f64 = 0.995;
const PERPLEXITY_CHANGE_MAX: f64 = 0.001;

/// Of one text: logits and the most likely token at every position, and the loss over the predicted ones.
struct Score {
    logits: Vec<f32>,
    best: Vec<usize>,
    loss: f64,
}

/// Sums over texts.
#[derive(Default)]
struct Total {
    positions: usize,
    equal: usize,
    predicted: usize,
    reference_loss: f64,
    serving_loss: f64,
    /// The largest difference of two logits, of the largest logit.
    apart: f32,
}

impl Total {
    fn add(&mut self, reference: &Score, serving: &Score) {
        self.positions += reference.best.len();
        self.equal += reference.best.iter().zip(&serving.best).filter(|(a, b)| a == b).count();
        self.predicted += reference.best.len() - 1;
        self.reference_loss += reference.loss;
        self.serving_loss += serving.loss;
        let difference = reference.logits.iter().zip(&serving.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let largest = reference.logits.iter().map(|logit| logit.abs()).fold(0.0, f32::max);
        self.apart = self.apart.max(difference / largest);
    }

    fn agreement(&self) -> f64 {
        self.equal as f64 / self.positions as f64
    }

    /// Relative, of the perplexity.
    fn change(&self) -> f64 {
        ((self.serving_loss - self.reference_loss) / self.predicted as f64).exp() - 1.0
    }

    fn print(&self, name: &str) {
        let perplexity = (self.reference_loss / self.predicted as f64).exp();
        let (agreement, change) = (100.0 * self.agreement(), 100.0 * self.change());
        println!("{name:<14}{:>9}{agreement:>11.3}%{perplexity:>13.4}{change:>+12.4}%{:>12.1e}", self.positions, self.apart);
    }
}

fn score(engine: &mut Engine, tokens: &[u32]) -> Result<Score> {
    let mut score = Score { logits: Vec::new(), best: Vec::new(), loss: 0.0 };
    engine.score(tokens, 0, &mut |position, logits| {
        let top = (0..logits.len()).fold(0, |top, id| if logits[id] > logits[top] { id } else { top });
        score.best.push(top);
        score.logits.extend_from_slice(logits);
        if let Some(&next) = tokens.get(position + 1) {
            let sum: f64 = logits.iter().map(|&logit| f64::from(logit - logits[top]).exp()).sum();
            score.loss += sum.ln() - f64::from(logits[next as usize] - logits[top]);
        }
    })?;
    Ok(score)
}

fn main() -> Result<ExitCode> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flash-tiny-moe");
    let path = model.join("golden/heldout_tokens.json");
    let texts: BTreeMap<String, Vec<u32>> = serde_json::from_str(&fs::read_to_string(&path).with_context(|| path.display().to_string())?)?;
    let engine = |kernels| {
        let options = Options { kernels, expert_cache: CacheBudget::Share(1.0), ..Options::default() };
        Engine::load(&model, &options, &mut |_| {})
    };
    let named: Vec<Kernels> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).map(|name| name.parse()).collect::<Result<_, _>>()?;
    let [reference, serving] = *named.first_chunk().unwrap_or(&[Kernels::Reference, Kernels::Auto]);
    let (mut reference, mut serving) = (engine(reference)?, engine(serving)?);
    println!("{} against {}", serving.report().kernels, reference.report().kernels);
    println!("{:<14}{:>9}{:>12}{:>13}{:>13}{:>12}", "text", "tokens", "top-1 equal", "perplexity", "change", "logits");
    let mut total = Total::default();
    for (domain, tokens) in &texts {
        let (expected, got) = (score(&mut reference, tokens)?, score(&mut serving, tokens)?);
        let mut text = Total::default();
        text.add(&expected, &got);
        text.print(domain);
        total.add(&expected, &got);
    }
    total.print("all");
    let passed = total.agreement() >= AGREEMENT_MIN && total.change().abs() <= PERPLEXITY_CHANGE_MAX;
    println!("{}", if passed { "within the gate" } else { "OUTSIDE the gate: 99.5% top-1, 0.1% perplexity" });
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
