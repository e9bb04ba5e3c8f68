//! The accuracy gate of the kernels that serve by default: on the bundled model's held-out text, the most likely token
//! must agree with the reference kernels' at 99.5% of the positions and the perplexity must lie within 0.1% of theirs.
//! Not a speed measurement. Run by hand and before a kernel becomes the default:
//! `cargo bench -p flash-engine --bench accuracy`. Two names replace the kernels: `--features mlx … -- cpu mlx` compares backends. Names
//! of texts leave out the others.
//!
//! Where two experts are as likely as each other, down to rounding, the kernels may choose differently and both be right; one such
//! choice changes every later logit of its text. So choices that differ are counted, and logits compared once more with the
//! reference's choices forced upon the others.

use std::{collections::BTreeMap, fs, path::Path, process::ExitCode};

use anyhow::{Context, Result, bail};
use flash_engine::{CacheBudget, Delivery, Engine, Event, Kernels, Options, Request, Step};

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
    /// The same where both were routed alike.
    alike: f32,
    /// Choices of `top_k` experts, and those that are other sets.
    choices: usize,
    other: usize,
}

impl Total {
    fn add(&mut self, reference: &Score, serving: &Score) {
        self.positions += reference.best.len();
        self.equal += reference.best.iter().zip(&serving.best).filter(|(a, b)| a == b).count();
        self.predicted += reference.best.len() - 1;
        self.reference_loss += reference.loss;
        self.serving_loss += serving.loss;
        self.apart = self.apart.max(reference.apart(serving));
    }

    fn route(&mut self, reference: &[Vec<u16>], serving: &[Vec<u16>]) {
        self.choices += reference.len();
        self.other += reference.iter().zip(serving).filter(|(a, b)| a != b).count();
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
        print!("{name:<14}{:>9}{agreement:>11.3}%{perplexity:>13.4}{change:>+12.4}%{:>12.1e}", self.positions, self.apart);
        println!("{:>12.1e}{:>11} of {}", self.alike, self.other, self.choices);
    }
}

impl Score {
    fn apart(&self, other: &Self) -> f32 {
        let difference = self.logits.iter().zip(&other.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        difference / self.logits.iter().map(|logit| logit.abs()).fold(0.0, f32::max)
    }
}

/// What a text's tokens are routed to, [tokens × MoE layers, top_k], and the number of those layers.
fn routing(engine: &mut Engine, tokens: &[u32]) -> Result<(Vec<u16>, usize)> {
    engine.admit(Request { record_routing: true, max_tokens: Some(1), ..Request::greedy(tokens.to_vec()) })?;
    let mut routing = (Vec::new(), 0);
    while engine.step(&mut |_, event| {
        if let Event::Routing { ids, layers, .. } = event {
            routing.0.extend(ids);
            routing.1 = layers;
        }
        Delivery::Taken
    }) == Step::Worked
    {}
    Ok(routing)
}

/// As sets.
fn choices(routing: &[u16], top_k: usize) -> Vec<Vec<u16>> {
    let sorted = |choice: &[u16]| {
        let mut choice = choice.to_vec();
        choice.sort_unstable();
        choice
    };
    routing.chunks_exact(top_k).map(sorted).collect()
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
    let (mut named, mut chosen) = (Vec::new(), Vec::new());
    for arg in std::env::args().skip(1).filter(|arg| !arg.starts_with('-')) {
        match arg.parse::<Kernels>() {
            Ok(kernels) => named.push(kernels),
            Err(_) if texts.contains_key(&arg) => chosen.push(arg),
            Err(error) => bail!("{error}; or a text: {}", texts.keys().map(String::as_str).collect::<Vec<_>>().join(", ")),
        }
    }
    let [reference, serving] = *named.first_chunk().unwrap_or(&[Kernels::Reference, Kernels::Auto]);
    let (mut reference, mut serving) = (engine(reference)?, engine(serving)?);
    println!("{} against {}", serving.report().kernels, reference.report().kernels);
    println!(
        "{:<14}{:>9}{:>12}{:>13}{:>13}{:>12}{:>12}  routed otherwise",
        "text", "tokens", "top-1 equal", "perplexity", "change", "logits", "same routes"
    );
    let top_k = reference.info().top_k;
    let mut total = Total::default();
    for (domain, tokens) in texts.iter().filter(|(domain, _)| chosen.is_empty() || chosen.contains(domain)) {
        let (expected, got) = (score(&mut reference, tokens)?, score(&mut serving, tokens)?);
        let mut text = Total::default();
        text.add(&expected, &got);
        let ((routes, layers), (others, _)) = (routing(&mut reference, tokens)?, routing(&mut serving, tokens)?);
        let (chosen, others) = (choices(&routes, top_k), choices(&others, top_k));
        text.route(&chosen, &others);
        serving.force_routing(Some(&routes))?;
        text.alike = expected.apart(&score(&mut serving, tokens)?);
        serving.force_routing(None)?;
        text.print(domain);
        // What comes after it may follow from it.
        if let Some(first) = chosen.iter().zip(&others).position(|(a, b)| a != b) {
            println!("  first routed otherwise: token {}, MoE layer {}", first / layers, first % layers);
        }
        total.add(&expected, &got);
        total.alike = total.alike.max(text.alike);
        (total.choices, total.other) = (total.choices + text.choices, total.other + text.other);
    }
    total.print("all");
    let passed = total.agreement() >= AGREEMENT_MIN && total.change().abs() <= PERPLEXITY_CHANGE_MAX;
    println!("{}", if passed { "within the gate" } else { "OUTSIDE the gate: 99.5% top-1, 0.1% perplexity" });
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
