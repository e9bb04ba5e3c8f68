//! Embedding the engine: load a model with a bounded expert cache, stream a reply, print what it cost.
//!
//! `cargo run --release -p flash-engine --example generate -- models/flash-tiny-moe "What is 17 + 25?" 25%`

use std::{io::Write, path::Path};

use flash_engine::{Chat, Delivery, Engine, Event, Message, Options, Part, Request, Step};

fn main() -> anyhow::Result<()> {
    let [dir, prompt, cache] = &std::env::args().skip(1).collect::<Vec<_>>()[..] else {
        anyhow::bail!("usage: generate MODEL_DIR PROMPT CACHE (for example 25%, 512MiB, auto)");
    };
    let options = Options { expert_cache: cache.parse()?, ..Options::default() };
    let mut engine = Engine::load(Path::new(dir), &options, &mut |_| ())?;
    let text = engine.text();
    let message = Message { role: "user".into(), content: prompt.clone(), ..Message::default() };
    let prompt = text.encode(&text.render(&Chat::of(vec![message]))?)?;
    engine.admit(Request { sampling: text.sampling().clone(), ..Request::greedy(prompt) })?;
    let mut outcome = None;
    while engine.step(&mut |_, event| {
        match event {
            Event::Token { parts, .. } => parts.iter().for_each(|part| {
                if let Part::Content(text) = part {
                    print!("{text}");
                }
            }),
            Event::Done(done) => outcome = Some(Ok(done)),
            Event::Failed(error) => outcome = Some(Err(error)),
            Event::Prefill { .. } | Event::Prompt(_) | Event::Routing { .. } => {}
        }
        if std::io::stdout().flush().is_ok() { Delivery::Taken } else { Delivery::Gone }
    }) == Step::Worked
    {}
    let done = outcome.ok_or_else(|| anyhow::anyhow!("nobody reads the reply"))??;
    let (tokens, timing, experts) = (done.token_ids.len(), done.timing, engine.report().experts);
    eprintln!("\n{tokens} tokens, first after {:.0?}, then {:.0}/s", timing.ttft, (tokens - 1) as f64 / timing.decode.as_secs_f64());
    eprintln!(
        "experts: {} slots a layer, {} hits, {} misses, {} bytes read",
        experts.slots_per_layer, experts.hits, experts.misses, experts.bytes_read
    );
    Ok(())
}
