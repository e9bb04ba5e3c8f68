//! What a form costs: the time of a decoded token with and without a grammar, on the bundled model, and how long a grammar takes to compile.
//!
//! `cargo bench -p flash-engine --bench grammars`

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;
use flash_engine::{CacheBudget, Chat, Delivery, Engine, Event, Format, Message, Options, Request, Sampling, Step};
use serde_json::json;

const TOKENS: usize = 200;
const RUNS: u64 = 8;

fn main() -> Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flash-tiny-moe");
    let options = Options { expert_cache: CacheBudget::Share(1.0), ..Options::default() };
    let mut engine = Engine::load(&dir, &options, &mut |_| ())?;
    let item = json!({"type": "object", "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}}, "n": {"type": "integer"}}, "required": ["name", "tags", "n"], "additionalProperties": false});
    let schema = json!({"type": "object", "properties": {"items": {"type": "array", "items": item, "minItems": 50}}, "required": ["items"], "additionalProperties": false});
    let forms = [
        ("free", None),
        ("any JSON object", Some(Format::JsonObject)),
        ("a schema", Some(Format::JsonSchema { schema, strict: true })),
        ("a pattern", Some(Format::Regex("([a-z]+ ){300}".into()))),
    ];
    let mut times = vec![Vec::new(); forms.len()];
    let mut compiled = vec![Duration::ZERO; forms.len()];
    // Interleaved, so that the machine's moods fall on all alike.
    for seed in 0..RUNS {
        for (index, (_, format)) in forms.iter().enumerate() {
            let began = Instant::now();
            let request = request(&engine, format.as_ref(), seed)?;
            compiled[index] = compiled[index].max(began.elapsed());
            times[index].extend(run(&mut engine, request)?);
        }
    }
    println!("{:16} {:>12} {:>12} {:>14}", "form", "median", "90%", "compiled in");
    for (((name, _), times), compiled) in forms.iter().zip(&mut times).zip(compiled) {
        times.sort_unstable();
        let at = |share: f64| times[(times.len() as f64 * share) as usize].as_secs_f64() * 1e6;
        println!("{name:16} {:>9.1} us {:>9.1} us {:>11.2} ms", at(0.5), at(0.9), compiled.as_secs_f64() * 1e3);
    }
    Ok(())
}

fn request(engine: &Engine, format: Option<&Format>, seed: u64) -> Result<Request> {
    let text = engine.text();
    let chat = Chat::of(vec![Message { role: "user".into(), content: "Tell me of your toys.".into(), ..Message::default() }]);
    let prompt = text.render(&chat)?;
    let reply = text.reply(&chat, &prompt, format)?;
    let sampling = Sampling { temperature: 1.0, seed: Some(seed), ..Sampling::greedy() };
    Ok(Request { sampling, reply, max_tokens: Some(TOKENS), ignore_eos: true, ..Request::greedy(text.encode(&prompt)?) })
}

/// The times between a request's tokens.
fn run(engine: &mut Engine, request: Request) -> Result<Vec<Duration>> {
    engine.admit(request)?;
    let (mut times, mut last) = (Vec::with_capacity(TOKENS), None);
    let mut deliver = |_, event| {
        if let Event::Token { .. } = event {
            times.extend(last.replace(Instant::now()).map(|last: Instant| last.elapsed()));
        }
        Delivery::Taken
    };
    while engine.step(&mut deliver) == Step::Worked {}
    Ok(times)
}
