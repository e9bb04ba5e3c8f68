//! A model that says what it is told: flashd with a generated checkpoint whose logits are replaced by a script. What the script says goes
//! through the real template, tokenizer, sampler, grammars and parsers, so that real clients can be run against it. Used by the binary
//! `scripted` and by tests.
//!
//! The last directive in the prompt counts, wherever it stands:
//! - `SAY[[text]]END` answers with that text, of which `<think>` and `</think>` are thoughts;
//! - `CALL[[["tool",{"argument":1}]]]END` calls tools: a list of turns, each a list of calls. After the last turn the answer is the text
//!   of a `SAY` behind it, or `done`.
//! - `WAIT[[seconds]]END` before either: the first answer takes as long to begin, as one to a long prompt does.

use std::{ffi::OsString, fs, path::Path, sync::Arc, thread, time::Duration};

use anyhow::{Context, Result};
use flash_engine::{Script, Text};
use flashd::{Config, RawConfig};
use serde_json::{Value, json};

use crate::{
    daemon::checkout,
    tiny_model::{Float, Format, Router, Spec, TinyModel, write_json},
};

/// Far more than any client sends.
pub const CONTEXT: usize = 131_072;
/// Its name.
pub const MODEL: &str = "scripted";

const TEMPLATE: &str = r#"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- 'Tools:\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\n' }}
    {%- endfor %}
    {{- 'A call is written <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"#;

/// Writes the checkpoint: two layers of random experts behind the bundled model's tokenizer.
pub fn write_model(dir: &Path) -> Result<()> {
    let tokenizer = fs::read_to_string(checkout().join("models/flash-tiny-moe/tokenizer.json")).context("the bundled tokenizer")?;
    let vocab = 8192;
    let format = Format::Affine { bits: 4, group: 32, params: Float::Bf16 };
    let spec = Spec { format, router: Router::EightBits, experts: 8, top_k: 2, context: CONTEXT, vocab, ..Spec::default() };
    TinyModel::generate(spec).write(dir)?;
    fs::write(dir.join("tokenizer.json"), tokenizer)?;
    fs::write(dir.join("chat_template.jinja"), TEMPLATE)?;
    write_json(&dir.join("tokenizer_config.json"), &json!({"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}))?;
    write_json(&dir.join("generation_config.json"), &json!({"do_sample": false, "eos_token_id": [8191, 8189]}))
}

/// The script for a checkpoint that [`write_model`] has written.
pub fn script(dir: &Path) -> Result<Script> {
    let text = Text::open(dir)?;
    let starts = text.encode("<|im_start|>assistant")?;
    let end = *text.end_ids().last().context("a token that ends a turn")?;
    Ok(Script(Arc::new(move |tokens, prompt, logits| {
        let (prompt, said) = tokens.split_at(prompt);
        let bytes = |ids: &[u32]| -> String {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| text.token_bytes(*id)).copied().collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        // The turns since the directive: how often the assistant has been given the word behind it.
        let mut turns: Vec<&[u32]> = Vec::new();
        let mut from = 0;
        for at in 0..prompt.len() {
            if prompt[at..].starts_with(&starts) {
                turns.push(&prompt[from..at]);
                from = at;
            }
        }
        turns.push(&prompt[from..]);
        let told = turns.iter().enumerate().rev().find_map(|(index, turn)| Some((index, answers(&bytes(turn))?)));
        let wanted = match &told {
            Some((index, answers)) => answers.get(turns.len().saturating_sub(2 + index)).or(answers.last()).cloned().unwrap_or_default(),
            None => "ok".into(),
        };
        if let Some((index, _)) = &told
            && index + 2 == turns.len()
            && said.is_empty()
            && let Some(wait) = wait(&bytes(turns[*index]))
        {
            thread::sleep(wait);
        }
        let ids = text.encode(&wanted).unwrap_or_default();
        let next = ids.get(said.len()).copied().unwrap_or(end);
        logits.fill(0.0);
        logits[next as usize] = 100.0;
    })))
}

fn wait(text: &str) -> Option<Duration> {
    let (seconds, _) = text.rsplit_once("WAIT[[")?.1.split_once("]]END")?;
    seconds.parse().ok().map(Duration::from_secs)
}

/// What the last directive in a text says, turn by turn.
fn answers(text: &str) -> Option<Vec<String>> {
    let say = text.rfind("SAY[[").and_then(|at| Some((at, text[at + 5..].split_once("]]END")?.0.to_owned())));
    let calls = text.rfind("CALL[").and_then(|at| {
        let (turns, _) = text[at + 4..].split_once("END")?;
        Some((at, serde_json::from_str::<Vec<Vec<(String, Value)>>>(turns).ok()?))
    });
    match (calls, say) {
        (Some((at, turns)), say) => {
            let call = |(name, arguments): &(String, Value)| {
                format!("<tool_call>\n{{\"name\": {}, \"arguments\": {arguments}}}\n</tool_call>", json!(name))
            };
            let turn = |calls: &Vec<(String, Value)>| calls.iter().map(call).collect::<Vec<_>>().join("\n");
            let last = say.filter(|(said, _)| *said > at).map_or_else(|| "done".into(), |(_, text)| text);
            Some(turns.iter().map(turn).chain([last]).collect())
        }
        (None, say) => say.map(|(_, text)| vec![text]),
    }
}

/// Serves the model until `shutdown`, as flashd does; `ready` hears of the socket.
pub async fn serve(home: &Path, ready: impl FnOnce(&Path), shutdown: impl Future<Output = ()>) -> Result<()> {
    let dir = home.join("models").join(MODEL);
    write_model(&dir)?;
    let socket = home.join("run/flashd.sock");
    let env = |name: &str| -> Option<OsString> {
        match name {
            "FLASH_HOME" => Some(home.into()),
            "FLASH_SOCKET" => Some(socket.clone().into()),
            "FLASH_MODELS" => Some(home.join("models").into()),
            "FLASH_MODEL" => Some(MODEL.into()),
            _ => None,
        }
    };
    let flags = RawConfig { ctx: Some(CONTEXT.to_string().as_str().into()), ..RawConfig::default() };
    let mut config = Config::resolve(flags, &env)?;
    config.options.script = Some(script(&dir)?);
    let (listener, bound) = flash_proto::socket::bind(&socket)?;
    ready(bound.path());
    Ok(flashd::run(config, listener, shutdown).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_read() {
        let check = |text: &str, expected: Option<&[&str]>| {
            let found = answers(text);
            assert_eq!(found.as_ref().map(|found| found.iter().map(String::as_str).collect::<Vec<_>>()).as_deref(), expected, "{text}");
        };
        let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\":1}}\n</tool_call>";
        check("Hello", None);
        check("SAY[[Hi [you]]]END", Some(&["Hi [you]"]));
        check("SAY[[a]]END then SAY[[b]]END", Some(&["b"]));
        check(r#"CALL[[["f",{"a":1}]]]END"#, Some(&[call, "done"]));
        check(r#"CALL[[["f",{"a":1}],["f",{"a":1}]],[["f",{"a":1}]]]END SAY[[ok]]END"#, Some(&[&format!("{call}\n{call}"), call, "ok"]));
        check("CALL[nonsense]END", None);
    }
}
