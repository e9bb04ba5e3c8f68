//! What four clients of one daemon get together against one alone, of the bundled model with all its experts in memory: tokens per second
//! over raw gRPC and through flash-gateway's streams, from the first text to the last end, in turn. `cargo bench -p flash-tests --bench clients`; the engine without daemon and clients: `cargo bench -p flash-engine
//! --bench streams -- together`.

use std::{ops::Range, thread, time::Instant};

use anyhow::{Result, ensure};
use flash_tests::{
    daemon::{Client, Home, bundled_model, greedy, timed},
    http::Stream,
};
use serde_json::json;

const ROUNDS: usize = 25;
const CLIENTS: usize = 4;
const TOKENS: u32 = 160;
/// One story each.
const PROMPTS: [&str; CLIENTS] = ["Tom and his red kite", "The sky was dark and", "Lily had a small cat that", "In the garden there was a"];

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let home = Home::new()?;
    let daemon = home.daemon(&["--expert-cache", "100%", "--keep-alive=-1", "--parallel", &CLIENTS.to_string()])?;
    let gateway = home.gateway(&[])?;
    let client = daemon.client().await?;
    let mut speeds = [const { Vec::new() }; 4];
    for round in 0..ROUNDS {
        let one = &PROMPTS[round % CLIENTS..][..1];
        for (of, prompts) in if round % 2 == 0 { [(0, one), (1, &PROMPTS[..])] } else { [(1, &PROMPTS[..]), (0, one)] } {
            let asked: Vec<_> = prompts.iter().map(|prompt| tokio::spawn(raw(client.clone(), prompt))).collect();
            let mut answers = Vec::new();
            for asked in asked {
                answers.push(asked.await??);
            }
            speeds[of].push(speed(&answers));
            let asked: Vec<_> = prompts
                .iter()
                .map(|prompt| {
                    let address = gateway.address.clone();
                    thread::spawn(move || through_gateway(&address, prompt))
                })
                .collect();
            let answers: Vec<_> = asked.into_iter().map(|asked| asked.join().expect("no panic")).collect::<Result<_>>()?;
            speeds[2 + of].push(speed(&answers));
        }
    }
    println!("medians of {ROUNDS} rounds, {TOKENS} tokens a client: tok/s of {CLIENTS} clients together, and of one");
    for (way, [one, four]) in ["raw gRPC           ", "flash-gateway, SSE "].iter().zip(speeds.as_chunks().0) {
        let median = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let ratios = one.iter().zip(four).map(|(one, four)| four / one).collect();
        println!("{way} {:>6.0} {:>6.0}   x{:.2}", median(four.clone()), median(one.clone()), median(ratios));
    }
    Ok(())
}

fn speed(answers: &[Range<Instant>]) -> f64 {
    let (first, last) = (answers.iter().map(|answer| answer.start).min(), answers.iter().map(|answer| answer.end).max());
    let time = first.zip(last).map_or(f64::NAN, |(first, last)| (last - first).as_secs_f64());
    // The first token of each is its prompt's.
    answers.len() as f64 * f64::from(TOKENS - 1) / time
}

async fn raw(client: Client, prompt: &str) -> Result<Range<Instant>> {
    let stream = client.start(greedy(&bundled_model().display().to_string(), prompt, TOKENS)).await?;
    whole(timed(stream).await?)
}

fn through_gateway(address: &str, prompt: &str) -> Result<Range<Instant>> {
    let body = json!({
        "model": bundled_model(), "prompt": prompt, "stream": true, "max_tokens": TOKENS, "temperature": 0, "repetition_penalty": 1,
        "ignore_eos": true, "stream_options": {"include_usage": true},
    });
    let json = ("Content-Type", "application/json");
    whole(Stream::open(address, "POST", "/v1/completions", &[json], body.to_string().as_bytes())?.timed()?)
}

fn whole((span, tokens): (Range<Instant>, u32)) -> Result<Range<Instant>> {
    ensure!(tokens == TOKENS, "{tokens} tokens");
    Ok(span)
}
