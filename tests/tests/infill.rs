//! Filling a gap: the same tokens as a client would send who knows the model's special ones, and a refusal where it has none.

use anyhow::{Context, Result};
use flash_engine::Text;
use flash_tests::{
    daemon::Home,
    http::{Stream, post},
    tiny_model::{FIM, Spec, TinyModel},
};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";

#[test]
fn a_gap_is_framed_by_the_models_own_tokens() -> Result<()> {
    let home = Home::new()?;
    for (name, infill) in [("coder", true), ("talker", false)] {
        TinyModel::generate(Spec { infill, ..Spec::default() }).write(&home.models().join(name))?;
    }
    let _daemon = home.daemon(&[])?;
    let gateway = home.gateway(&[])?;
    let address = &gateway.address;
    let ask = |edit: Value| -> Result<Value> {
        let mut body = json!({"model": "coder", "prompt": "int f(", "max_tokens": 6, "temperature": 0});
        edit.as_object().into_iter().flatten().for_each(|(key, value)| body[key] = value.clone());
        let answer = post(address, COMPLETIONS, &body)?;
        answer.json().with_context(|| format!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body)))
    };
    // The tokenizer's tokens are bytes.
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let ids = [vec![FIM[0]], bytes("int f("), vec![FIM[1]], bytes("; }"), vec![FIM[2]]].concat();
    let filled = ask(json!({"suffix": "; }"}))?;
    let same = ask(json!({"prompt": ids}))?;
    assert_eq!(filled["usage"]["prompt_tokens"], ids.len());
    assert_eq!(filled["choices"], same["choices"]);
    assert_ne!(filled["choices"], ask(json!({}))?["choices"], "without its end it is another text");
    let echoed = ask(json!({"suffix": "; }", "echo": true}))?;
    let text = |answer: &Value| answer["choices"][0]["text"].as_str().unwrap_or_default().to_owned();
    assert_eq!(text(&echoed), format!("int f({}", text(&filled)));
    let ollama =
        json!({"model": "coder", "prompt": "int f(", "suffix": "; }", "stream": false, "options": {"temperature": 0, "num_predict": 6}});
    assert_eq!(post(address, "/api/generate", &ollama)?.json()?["response"], filled["choices"][0]["text"]);
    let said = home.ctl(&["run", "coder", "int f(", "--suffix", "; }", "-t", "0", "-n", "6", "--json"])?;
    assert_eq!(serde_json::from_str::<Value>(&said.stdout)?["choices"][0]["text"], filled["choices"][0]["text"]);

    let refused = ask(json!({"model": "talker", "suffix": "; }"}))?;
    assert_eq!((&refused["error"]["code"], &refused["error"]["param"]), (&json!("fim_not_supported"), &json!("suffix")));
    let body = json!({"model": "talker", "prompt": "a", "suffix": "b", "stream": true}).to_string();
    let stream = Stream::open(address, "POST", COMPLETIONS, &[("Content-Type", "application/json")], body.as_bytes())?;
    assert_eq!(stream.finish()?.status, 422, "a stream is refused before it begins");
    let shown = |name: &str| -> Result<Value> { Ok(serde_json::from_str(&home.ctl(&["show", name, "--json"])?.stdout)?) };
    assert_eq!((&shown("coder")?["infills"], &shown("talker")?["infills"]), (&json!(true), &json!(false)));
    Ok(())
}

/// A coder that has filled a gap goes on with the next file of the repository unless that is an end, too.
#[test]
fn what_follows_a_filling_ends_it() -> Result<()> {
    let home = Home::new()?;
    let folder = home.models().join("coder");
    TinyModel::generate(Spec { infill: true, ..Spec::default() }).write(&folder)?;
    let text = Text::open(&folder)?;
    assert!(text.end_ids().contains(&FIM[3]) && !text.end_ids().contains(&FIM[0]), "{:?}", text.end_ids());
    Ok(())
}
