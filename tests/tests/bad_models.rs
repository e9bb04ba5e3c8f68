//! Broken and hostile checkpoints, given to a real daemon: each is an error that names the fault, within a second, and
//! the daemon serves the next request each time.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use flash_proto::v1::{Chat, GenerateRequest, Message, generate_request::Prompt};
use flash_tests::{
    daemon::{Client, Home, greedy},
    rng::Rng,
    tiny_model::{Spec, TinyModel, read_header, write_json},
};
use serde_json::{Value, json};

/// The bar is a second; unoptimised code on a busy machine gets more.
const ERROR_WITHIN: Duration = if cfg!(debug_assertions) { Duration::from_secs(5) } else { Duration::from_secs(1) };

/// A daemon, a good model, and copies of it to break.
struct Bench {
    home: Home,
    good: PathBuf,
    copies: usize,
}

impl Bench {
    fn new() -> Result<Self> {
        let home = Home::new()?;
        let good = home.path().join("good");
        // Two shards have an index, which one has not; the tests of one file write their own.
        TinyModel::generate(Spec::default()).write(&good)?;
        Ok(Self { home, good, copies: 0 })
    }

    fn copy(&mut self) -> Result<PathBuf> {
        let dir = self.home.path().join(format!("bad{}", self.copies));
        self.copies += 1;
        fs::create_dir(&dir)?;
        for entry in fs::read_dir(&self.good)? {
            let entry = entry?;
            fs::copy(entry.path(), dir.join(entry.file_name()))?;
        }
        Ok(dir)
    }
}

/// Breaks a copy, asks for it, and wants each of `words` in the error; then the good model must answer as before.
async fn check(bench: &mut Bench, client: &Client, what: &str, words: &[&str], breaking: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = bench.copy()?;
    breaking(&dir).with_context(|| what.to_owned())?;
    let model = dir.display().to_string();
    // A chat, so that the template and the tokenizer have their say too.
    let content = format!("{}!", "a".repeat(60));
    let chat = Chat { messages: vec![Message { role: "user".into(), content, ..Message::default() }], ..Default::default() };
    let request = GenerateRequest { prompt: Some(Prompt::Chat(chat)), ..greedy(&model, "", 4) };
    let started = Instant::now();
    let message = match client.ask(request).await {
        Err(status) => {
            assert!(flash_proto::code::of(&status).is_some(), "{what}: a status without a code: {status:?}");
            status.message().to_owned()
        }
        Ok(answer) => answer.failed.with_context(|| format!("{what}: it was answered: {:?}", answer.text))?.message,
    };
    let elapsed = started.elapsed();
    for word in words {
        assert!(message.contains(word), "{what}: no `{word}` in: {message}");
    }
    assert!(elapsed < ERROR_WITHIN, "{what}: the error took {elapsed:?}: {message}");
    fs::remove_dir_all(&dir)?;
    serves(bench, client).await.with_context(|| format!("after {what}"))
}

async fn serves(bench: &Bench, client: &Client) -> Result<()> {
    let ids = client.ids(greedy(&bench.good.display().to_string(), "Hello", 4)).await?;
    assert_eq!(ids.len(), 4);
    Ok(())
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) -> Result<()> {
    let mut value = serde_json::from_slice(&fs::read(path)?)?;
    edit(&mut value);
    write_json(path, &value)
}

fn weights(dir: &Path) -> PathBuf {
    dir.join("model.safetensors")
}

/// Rewrites the header; the data stay where they are relative to its end.
fn edit_header(dir: &Path, edit: impl FnOnce(&mut Value)) -> Result<()> {
    let path = weights(dir);
    let (mut header, data) = read_header(&path)?;
    edit(&mut header);
    let old = fs::read(&path)?;
    let header = header.to_string().into_bytes();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &old[usize::try_from(data)?..]].concat();
    Ok(fs::write(path, bytes)?)
}

const UP: &str = "model.layers.1.mlp.switch_mlp.up_proj.weight";
const NORM: &str = "model.layers.0.input_layernorm.weight";

#[tokio::test]
async fn weight_files() -> Result<()> {
    let mut bench = Bench::new()?;
    let daemon = bench.home.daemon(&[])?;
    let client = daemon.client().await?;
    let bench = &mut bench;
    let file = "model.safetensors";
    for (what, keep) in [("empty", 0), ("four bytes", 4), ("half a header", 900), ("half the data", 60_000)] {
        check(bench, &client, what, &[file], |dir| Ok(fs::write(weights(dir), &fs::read(weights(dir))?[..keep])?)).await?;
    }
    for (what, length) in [
        ("header length 2^63", 1u64 << 63),
        ("header length 2^64 - 1", u64::MAX),
        ("header length 0", 0),
        ("header beyond the file", 1 << 31),
    ] {
        check(bench, &client, what, &[file], |dir| {
            let mut bytes = fs::read(weights(dir))?;
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            Ok(fs::write(weights(dir), bytes)?)
        })
        .await?;
    }
    let offsets = |name: &'static str, offsets: Value| move |dir: &Path| edit_header(dir, |header| header[name]["data_offsets"] = offsets);
    check(bench, &client, "overlapping offsets", &[file], |dir| {
        edit_header(dir, |header| {
            let taken = header["lm_head.weight"]["data_offsets"].clone();
            let from = taken[0].as_u64().unwrap_or(0);
            header[NORM]["data_offsets"] = json!([from, from + 128]);
        })
    })
    .await?;
    check(bench, &client, "offsets out of range", &[file, NORM], offsets(NORM, json!([1u64 << 40, (1u64 << 40) + 128]))).await?;
    check(bench, &client, "offsets at the end of u64", &[file, NORM], offsets(NORM, json!([u64::MAX - 127, u64::MAX]))).await?;
    check(bench, &client, "offsets backwards", &[file, NORM], offsets(NORM, json!([256, 128]))).await?;
    check(bench, &client, "negative offsets", &[file], offsets(NORM, json!([-128, 0]))).await?;
    check(bench, &client, "a missing tensor", &[NORM], |dir| {
        edit_header(dir, |header| drop(header.as_object_mut().map(|map| map.remove(NORM))))
    })
    .await?;
    check(bench, &client, "missing scales", &["up_proj"], |dir| {
        edit_header(dir, |header| drop(header.as_object_mut().map(|map| map.remove("model.layers.1.mlp.switch_mlp.up_proj.scales"))))
    })
    .await?;
    let shape = |name: &'static str, shape: Value| move |dir: &Path| edit_header(dir, |header| header[name]["shape"] = shape);
    check(bench, &client, "a transposed shape", &[file, "up_proj"], shape(UP, json!([8, 8, 64]))).await?;
    check(bench, &client, "a shape that overflows", &[file, UP], shape(UP, json!([1u64 << 62, 1u64 << 62, 4]))).await?;
    check(bench, &client, "an unknown dtype", &[file, NORM], |dir| edit_header(dir, |header| header[NORM]["dtype"] = json!("Q7"))).await?;
    check(bench, &client, "an integer norm", &[file, NORM], |dir| edit_header(dir, |header| header[NORM]["dtype"] = json!("I16"))).await?;
    check(bench, &client, "a header that is no object", &[file], |dir| edit_header(dir, |header| *header = json!([1, 2, 3]))).await?;
    check(bench, &client, "a folder in place of the file", &[file], |dir| {
        fs::remove_file(weights(dir))?;
        Ok(fs::create_dir(weights(dir))?)
    })
    .await?;
    check(bench, &client, "no weights at all", &["safetensors"], |dir| Ok(fs::remove_file(weights(dir))?)).await?;
    #[cfg(target_os = "linux")]
    check(bench, &client, "a pipe in place of the file", &[file], |dir| {
        fs::remove_file(weights(dir))?;
        Ok(rustix::fs::mknodat(rustix::fs::CWD, weights(dir), rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)?)
    })
    .await?;
    Ok(())
}

/// One bit of the header is wrong: an error, or a model that answers, and always a daemon that lives.
#[tokio::test]
async fn flipped_bits_in_the_header() -> Result<()> {
    let mut bench = Bench::new()?;
    let daemon = bench.home.daemon(&[])?;
    let client = daemon.client().await?;
    let bytes = fs::read(weights(&bench.good))?;
    let (_, data) = read_header(&weights(&bench.good))?;
    let mut rng = Rng::new(2);
    let mut errors = 0;
    for round in 0..60 {
        // The eight bytes of the length first.
        let position = if round < 8 { round } else { 8 + rng.below(usize::try_from(data)? - 8) };
        let bit = rng.below(8);
        let dir = bench.copy()?;
        let mut flipped = bytes.clone();
        flipped[position] ^= 1 << bit;
        fs::write(weights(&dir), flipped)?;
        match client.ask(greedy(&dir.display().to_string(), "Hello", 2)).await {
            Err(status) => {
                errors += 1;
                assert_eq!(
                    flash_proto::code::of(&status),
                    Some(flash_proto::code::MODEL_INVALID),
                    "bit {bit} of byte {position}: {status:?}"
                );
            }
            Ok(answer) => assert!(answer.done.is_some(), "bit {bit} of byte {position}: {:?}", answer.failed),
        }
        fs::remove_dir_all(&dir)?;
        serves(&bench, &client).await.with_context(|| format!("after bit {bit} of byte {position}"))?;
    }
    assert!(errors > 30, "only {errors} of 60 flipped bits were noticed");
    Ok(())
}

#[tokio::test]
async fn settings_files() -> Result<()> {
    let mut bench = Bench::new()?;
    let daemon = bench.home.daemon(&[])?;
    let client = daemon.client().await?;
    let bench = &mut bench;
    let absurd = [
        ("num_experts", json!(1_000_000_000)),
        ("num_experts", json!(-1)),
        ("num_experts", json!(0)),
        ("num_experts_per_tok", json!(9)),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("hidden_size", json!(1u64 << 60)),
        ("hidden_size", json!("many")),
        ("vocab_size", json!(u64::MAX)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(0)),
        ("max_position_embeddings", json!(0)),
        ("architectures", json!(["LlamaForCausalLM"])),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
        ("hidden_act", json!("gelu")),
        ("quantization", json!({"group_size": 0, "bits": 4})),
        ("quantization", json!({"group_size": 64, "bits": 77})),
    ];
    for (key, value) in absurd {
        check(bench, &client, &format!("{key} = {value}"), &["config.json"], |dir| {
            edit_json(&dir.join("config.json"), |config| config[key] = value)
        })
        .await?;
    }
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        check(bench, &client, &format!("invalid UTF-8 in {file}"), &[file], |dir| {
            let mut bytes = fs::read(dir.join(file))?;
            let middle = bytes.iter().position(|&byte| byte == b'"').context("a string")? + 1;
            bytes[middle] = 0xff;
            Ok(fs::write(dir.join(file), bytes)?)
        })
        .await?;
        check(bench, &client, &format!("{file} nested 10,000 deep"), &[file], |dir| {
            Ok(fs::write(dir.join(file), format!("{{\"a\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000)))?)
        })
        .await?;
        check(bench, &client, &format!("{file} cut short"), &[file], |dir| Ok(fs::write(dir.join(file), "{\"architectures\": [")?)).await?;
    }
    check(bench, &client, "no config.json", &["no model named"], |dir| Ok(fs::remove_file(dir.join("config.json"))?)).await?;
    check(bench, &client, "no tokenizer.json", &["tokenizer.json"], |dir| Ok(fs::remove_file(dir.join("tokenizer.json"))?)).await
}

#[tokio::test]
async fn templates_and_tokenizers() -> Result<()> {
    let mut bench = Bench::new()?;
    let daemon = bench.home.daemon(&[])?;
    let client = daemon.client().await?;
    let bench = &mut bench;
    let templates = [
        ("a loop", "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"),
        ("a gigabyte by repetition", "{{ 'x' * 1000000000 }}"),
        (
            "a gigabyte by a loop",
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ messages[0]['content'] }}{% endfor %}{% endfor %}",
        ),
        (
            "a gigabyte by doubling",
            "{% set n = namespace(s='xxxxxxxxxxxxxxxx') %}{% for a in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        ),
        ("a macro without end", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        ("a syntax error", "{% for message in %}"),
        ("its own error", "{{ raise_exception('roles must alternate') }}"),
    ];
    for (what, template) in templates {
        check(bench, &client, &format!("a template with {what}"), &["chat"], |dir| {
            edit_json(&dir.join("tokenizer_config.json"), |config| config["chat_template"] = json!(template))
        })
        .await?;
    }
    // Sixty times `a` and no end of a word: every split is tried. Without the look-around a linear engine would do it.
    for pattern in [r"(a+)+$(?!b)", r"((?:a*)*)\1b", r"^(a+)+$(?!b)|x(?=y)|(a+)+$(?!c)"] {
        check(bench, &client, &format!("the tokenizer pattern {pattern}"), &["tokenizer"], |dir| {
            edit_json(&dir.join("tokenizer.json"), |tokenizer| {
                tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(pattern)
            })
        })
        .await?;
    }
    check(bench, &client, "a pattern that is none", &["tokenizer.json"], |dir| {
        edit_json(&dir.join("tokenizer.json"), |tokenizer| {
            tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("(unclosed")
        })
    })
    .await?;
    check(bench, &client, "token ids beyond the vocabulary", &["tokenizer"], |dir| {
        edit_json(&dir.join("tokenizer.json"), |tokenizer| tokenizer["model"]["vocab"]["a"] = json!(99_999))
    })
    .await
}

#[tokio::test]
async fn shard_names_that_lead_outside() -> Result<()> {
    let home = Home::new()?;
    let good = home.path().join("good");
    TinyModel::generate(Spec { shards: 2, ..Spec::default() }).write(&good)?;
    let mut bench = Bench { good, copies: 0, home };
    let daemon = bench.home.daemon(&[])?;
    let client = daemon.client().await?;
    let bench = &mut bench;
    let shard = "model-00001-of-00002.safetensors";
    let index = "model.safetensors.index.json";
    let outside = bench.home.path().join("outside.safetensors");
    fs::copy(bench.good.join(shard), &outside)?;
    let absolute = outside.display().to_string();
    for name in ["../outside.safetensors", "x/../../outside.safetensors", absolute.as_str(), "", "..", "."] {
        check(bench, &client, &format!("the shard name {name:?}"), &[index], |dir| {
            edit_json(&dir.join(index), |index| {
                for file in index["weight_map"].as_object_mut().into_iter().flat_map(|map| map.values_mut()) {
                    if file == shard {
                        *file = json!(name);
                    }
                }
            })
        })
        .await?;
    }
    check(bench, &client, "a shard that is a link to the outside", &[shard], |dir| {
        fs::remove_file(dir.join(shard))?;
        Ok(std::os::unix::fs::symlink(&outside, dir.join(shard))?)
    })
    .await?;
    check(bench, &client, "a shard that is not there", &[shard], |dir| Ok(fs::remove_file(dir.join(shard))?)).await?;
    check(bench, &client, "a tensor in the wrong shard", &["model-00002-of-00002.safetensors"], |dir| {
        edit_json(&dir.join(index), |index| {
            for file in index["weight_map"].as_object_mut().into_iter().flat_map(|map| map.values_mut()) {
                *file = json!("model-00002-of-00002.safetensors");
            }
        })
    })
    .await?;
    check(bench, &client, "an index that is no object", &[index], |dir| {
        edit_json(&dir.join(index), |index| index["weight_map"] = json!([]))
    })
    .await
}
