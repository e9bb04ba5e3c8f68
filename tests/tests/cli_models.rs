//! flashctl's jobs as a user runs them: packing, verifying, measuring, writing and tracing models, with a real daemon. What
//! the formats and figures are is tested in the engine; here it is what arrives at the terminal and what is left on disk.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use flash_tests::{
    daemon::{Home, Output, bundled_model, finish, wait_until},
    tiny_model::{Spec, TinyModel},
};
use serde_json::Value;

fn check(output: &Output, code: i32, stderr: &[&str]) {
    assert_eq!(output.code, Some(code), "{output:?}");
    for word in stderr {
        assert!(output.stderr.contains(word), "no `{word}` in: {}", output.stderr);
    }
}

fn json(output: &Output) -> Result<Value> {
    serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))
}

/// One object per line.
fn events(output: &Output) -> Result<Vec<Value>> {
    output.stdout.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// A copy of the bundled model, to be changed.
fn copy_of_bundled(home: &Home, name: &str) -> Result<PathBuf> {
    let to = home.models().join(name);
    fs::create_dir_all(&to)?;
    for entry in fs::read_dir(bundled_model())?.flatten().filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(to)
}

fn tell(home: &Home, model: &str) -> Result<Output> {
    home.ctl(&["run", model, "Tell me a short story about a dog.", "-t", "0", "-n", "40", "--expert-cache", "25%"])
}

fn flip(store: &Path, at: u64) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(store)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[byte[0] ^ 0x40], at)?)
}

#[test]
fn a_packed_model_says_the_same_and_a_damaged_one_nothing() -> Result<()> {
    let home = Home::new()?;
    let folder = copy_of_bundled(&home, "pip")?;
    let expected = tell(&home, "pip")?;
    check(&expected, 0, &[]);
    check(&home.ctl(&["verify", "pip"])?, 1, &["flashctl convert"]);
    check(&home.ctl(&["convert", "pip", "--in-place"])?, 75, &["pip is loaded", "flashctl stop pip"]);
    let packed = home.ctl(&["convert", "pip"])?;
    check(&packed, 0, &["100%"]);
    assert!(packed.stdout.contains("512 experts"), "{packed:?}");
    check(&home.ctl(&["convert", "pip"])?, 1, &["packed already"]);
    check(&home.ctl(&["convert", "no-such-model"])?, 1, &["no-such-model"]);
    check(&home.ctl(&["stop"])?, 0, &[]);
    assert_eq!(tell(&home, "pip")?.stdout, expected.stdout);
    assert_eq!(json(&home.ctl(&["ps", "--json"])?)?["models"][0]["packed"], true);
    assert!(home.ctl(&["models"])?.stdout.contains("packed"));
    let disk_bytes = json(&home.ctl(&["show", "pip", "--json"])?)?["disk_bytes"].as_u64();
    let files = fs::read_dir(&folder)?.map(|entry| Ok(entry?.metadata()?.len())).sum::<std::io::Result<u64>>()?;
    assert_eq!(disk_bytes, Some(files), "the store and the checkpoint beside it");
    let verified = home.ctl(&["verify", "pip", "--json", "-q"])?;
    check(&verified, 0, &[]);
    assert_eq!((&json(&verified)?["records"], &json(&verified)?["ok"]), (&512.into(), &true.into()));

    // The first byte of a page in the middle is payload: records fill whole pages but for the end of their last.
    let store = folder.join("experts.flash");
    let middle = fs::metadata(&store)?.len() / 2 / 4096 * 4096;
    flip(&store, middle)?;
    let verified = home.ctl(&["verify", "pip"])?;
    check(&verified, 1, &["1 of 512 records", "hint:"]);
    assert!(verified.stdout.contains("layer") && verified.stdout.contains("expert "), "{verified:?}");
    // So many that every prompt needs some.
    (1..=1500).try_for_each(|page| flip(&store, middle + page * 4096))?;
    check(&home.ctl(&["stop"])?, 0, &[]);
    let pid = json(&home.ctl(&["daemon", "status", "--json"])?)?["pid"].clone();
    check(&tell(&home, "pip")?, 1, &["layer", "expert", "checksum", "flashctl verify"]);
    assert_eq!(json(&home.ctl(&["daemon", "status", "--json"])?)?["pid"], pid, "the daemon lives on");
    assert!(json(&home.ctl(&["stats", "--json"])?)?["experts"]["checksum_errors"].as_u64() > Some(0));
    assert_eq!(tell(&home, &bundled_model().display().to_string())?.stdout, expected.stdout);
    Ok(())
}

#[test]
fn a_model_packed_in_place_says_the_same() -> Result<()> {
    let home = Home::new()?;
    let folder = copy_of_bundled(&home, "pip")?;
    let expected = tell(&home, "pip")?;
    let size = |folder: &Path| -> Result<u64> { fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len())).sum() };
    let before = size(&folder)?;
    check(&home.ctl(&["stop"])?, 0, &[]);
    check(&home.ctl(&["convert", "pip", "--in-place"])?, 0, &[]);
    assert_eq!(tell(&home, "pip")?.stdout, expected.stdout);
    let after = size(&folder)?;
    assert!(after < before + before / 10, "{before} bytes became {after}");
    check(&home.ctl(&["verify", "pip"])?, 0, &[]);
    Ok(())
}

#[test]
fn a_written_model_is_measured_and_answers() -> Result<()> {
    let home = Home::new()?;
    let wrong = home.ctl(&["bench", "synth", "--shape", "huge"])?;
    check(&wrong, 64, &["qwen3-30b-a3b", "tiny"]);
    check(&home.ctl(&["bench", "synth", "--shape", "tiny", "--routing", "skewed", "--seed", "7"])?, 0, &[]);
    assert!(home.models().join("synth-tiny/config.json").exists());
    let answer = home.ctl(&["run", "synth-tiny", "Hello", "-n", "5", "--json"])?;
    check(&answer, 0, &[]);
    assert_eq!(json(&answer)?["usage"]["completion_tokens"], 5);
    let table = home.ctl(&["bench", "synth-tiny", "--cache", "50%", "--prompt", "8", "--gen", "8", "-q"])?;
    check(&table, 0, &[]);
    for part in ["cache  slots", "50%", "none", "GB/s"] {
        assert!(table.stdout.contains(part), "no `{part}` in\n{}", table.stdout);
    }
    assert!(table.stdout.lines().all(|line| line.chars().count() <= 120), "{}", table.stdout);
    Ok(())
}

#[test]
fn a_benchmark_has_every_figure() -> Result<()> {
    let home = Home::new()?;
    let output = home.ctl(&["bench", "local", "--cache", "25%,100%", "--prompt", "16", "--gen", "16", "--json", "-q"])?;
    check(&output, 0, &[]);
    let events = events(&output)?;
    let machine = events.iter().find(|event| event["event"] == "machine").context("what the bounds are made of")?;
    assert!(machine["memory_bytes_s"].as_f64() > Some(0.0) && machine["disk_bytes_s"].as_f64() > Some(0.0), "{machine}");
    let rows: Vec<&Value> = events.iter().filter(|event| event["event"] == "row").collect();
    let named: Vec<_> = rows.iter().filter_map(|row| Some((row["cache"].as_str()?, row["state"].as_str()?))).collect();
    for row in [("25%", "cold"), ("25%", "warm"), ("100%", "cold"), ("100%", "warm")] {
        assert!(named.contains(&row), "{row:?} is not in {named:?}");
    }
    assert!(named.iter().any(|(cache, _)| *cache == "none"), "the baseline: {named:?}");
    for row in &rows {
        for field in ["prefill_tok_s", "ttft_s", "decode_tok_s", "decode_mean_tok_s", "memory_bound_tok_s", "overlapped_tok_s", "of_serial"]
        {
            assert!(row[field].as_f64() > Some(0.0), "{field} in {row}");
        }
        for field in ["hit_rate", "disk_bytes_per_token", "disk_bytes_s", "wait_share", "io_bound_tok_s", "lookahead_recall"] {
            assert!(row.get(field).is_some(), "{field} in {row}");
        }
        assert_eq!(row["decode_tokens"], 15, "the first token is the prompt's");
    }
    // Nothing is loaded afterwards, and the next request is served as ever.
    assert_eq!(json(&home.ctl(&["ps", "--json"])?)?["models"], Value::Array(vec![]));
    check(&tell(&home, "local")?, 0, &[]);
    Ok(())
}

#[test]
fn a_trace_is_recorded_and_replayed() -> Result<()> {
    let home = Home::new()?;
    TinyModel::generate(Spec::default()).write(&home.models().join("tiny"))?;
    let file = home.path().join("trace.jsonl");
    let path = file.to_str().context("UTF-8")?;
    let record = home.ctl(&["trace", "record", "tiny", "Once", "--raw", "--ignore-eos", "-t", "0", "-n", "32", "--out", path])?;
    check(&record, 0, &[]);
    let text = fs::read_to_string(&file)?;
    let head: Value = serde_json::from_str(text.lines().next().context("a header")?)?;
    assert_eq!((&head["layers"], &head["experts"], &head["top_k"]), (&2.into(), &8.into(), &2.into()));
    assert!(text.lines().count() > 32, "{text}");
    let replay = home.ctl(&["trace", "replay", path, "--policy", "lru,belady", "--slots", "2,100%", "--json"])?;
    check(&replay, 0, &[]);
    let replay = json(&replay)?;
    let row = |policy: &str, slots: u64| {
        let rows = replay["rows"].as_array().into_iter().flatten();
        rows.into_iter()
            .find(|row| row["policy"] == policy && row["slots"] == slots)
            .cloned()
            .with_context(|| format!("{policy} {slots}: {replay}"))
    };
    assert!(row("lru", 2)?["hits"].as_u64() <= row("belady", 2)?["hits"].as_u64());
    assert_eq!((&row("belady", 2)?["gap"], &row("lru", 8)?["gap"]), (&0.0.into(), &0.0.into()));
    check(&home.ctl(&["trace", "replay", path, "--policy", "fifo"])?, 64, &["fifo"]);
    fs::write(&file, "{\"tok\": 1, \"layers\": [[0, 1], 7]}\n")?;
    check(&home.ctl(&["trace", "replay", path])?, 64, &["trace.jsonl", "flashctl help trace replay"]);
    Ok(())
}

#[test]
fn a_model_starts_as_warm_as_it_was_left() -> Result<()> {
    let home = Home::new()?;
    check(&tell(&home, "local")?, 0, &[]);
    check(&home.ctl(&["stop"])?, 0, &[]);
    assert_eq!(fs::read_dir(home.path().join("state"))?.count(), 1);
    // Whether the model or the whole daemon went makes no difference.
    for stop in [&["stop"][..], &["daemon", "stop"]] {
        check(&home.ctl(&["load", "local"])?, 0, &[]);
        let warm = || {
            let stats = home.ctl(&["stats", "--json"]).ok().and_then(|stats| json(&stats).ok());
            stats.is_some_and(|stats| stats["experts"]["warm_loads"].as_u64() > Some(0) && stats["experts"]["misses"] == 0)
        };
        wait_until("experts are read back", warm)?;
        check(&home.ctl(stop)?, 0, &[]);
    }
    Ok(())
}

#[test]
fn settings_say_where_they_come_from() -> Result<()> {
    let home = Home::new()?;
    fs::write(home.path().join("flash.toml"), "io = 'buffered'\nlookahead = 'on'\n")?;
    let mut command = home.command("flashctl");
    command.args(["doctor", "--json"]).env("FLASH_POLICY", "lru").env("FLASH_LOOKAHEAD", "off");
    let report = json(&finish(command, None)?)?;
    let setting = |name: &str| {
        let found = report["settings"].as_array().into_iter().flatten().find(|setting| setting["name"] == name);
        found.map(|setting| (setting["value"].clone(), setting["origin"].as_str().unwrap_or_default().to_owned())).context(name.to_owned())
    };
    assert_eq!(setting("policy")?, ("lru".into(), "FLASH_POLICY".into()));
    assert_eq!(setting("lookahead")?, ("off".into(), "FLASH_LOOKAHEAD".into()));
    let (value, origin) = setting("io")?;
    assert!(value == "buffered" && origin.ends_with("flash.toml"), "{value} from {origin}");
    // flashctl has started this daemon where it looks for one itself.
    let unset = |args: &[&str]| {
        let mut command = home.command("flashctl");
        command.args(args).env_remove("FLASH_SOCKET");
        finish(command, None)
    };
    check(&unset(&["daemon", "stop"])?, 0, &[]);
    let socket = json(&unset(&["config", "get", "socket", "--json"])?)?;
    assert_eq!((&socket["value"], &socket["origin"]), (&home.socket().display().to_string().into(), &"default".into()));
    check(&unset(&["daemon", "stop"])?, 0, &[]);
    fs::write(home.path().join("flash.toml"), "socket = '/elsewhere'\n")?;
    assert_eq!(unset(&["config", "get", "socket"])?.stdout, format!("{}\n", home.socket().display()), "clients do not look into the file");
    // What a service is installed with.
    let mut command = home.command("flashctl");
    command.args(["service", "install", "--manager", "systemd", "--daemon-only", "--dry-run"]).env("FLASH_API_KEY", "sesame");
    let names: Vec<_> = report["settings"].as_array().into_iter().flatten().filter_map(|setting| setting["name"].as_str()).collect();
    for name in &names {
        command.env(format!("FLASH_{}", name.to_ascii_uppercase()), "/given");
    }
    let unit = finish(command, None)?;
    for name in &names {
        let line = format!("Environment=\"FLASH_{}=/given\"", name.to_ascii_uppercase());
        assert!(unit.stdout.contains(&line) && !unit.stdout.contains("sesame"), "{line} is not in {unit:?}");
    }
    let storage =
        report["checks"].as_array().into_iter().flatten().find(|check| check["name"] == "storage").context("what the disk does")?;
    assert!(storage["finding"].as_str().is_some_and(|finding| finding.contains("GB/s")), "{storage}");
    Ok(())
}

#[test]
fn a_model_is_shown_copied_and_deleted() -> Result<()> {
    let home = Home::new()?;
    TinyModel::generate(Spec::default()).write(&home.models().join("tiny"))?;
    let shown = home.ctl(&["show", "tiny"])?;
    check(&shown, 0, &[]);
    for part in ["8 in each of 2 layers, 2 for a token", "a chat template", "temperature"] {
        assert!(shown.stdout.contains(part), "{part} is not in {shown:?}");
    }
    assert!(home.ctl(&["show", "tiny", "--template"])?.stdout.contains("<|im_start|>"));
    check(&home.ctl(&["cp", "tiny", "copy"])?, 0, &[]);
    check(&home.ctl(&["cp", "tiny", "copy"])?, 64, &["exists already"]);
    // In another folder too.
    check(&home.ctl(&["cp", "tiny", "flash-tiny-moe"])?, 64, &["exists already", "choose another name"]);
    check(&home.ctl(&["cp", "tiny", "../x"])?, 64, &["no name for a model"]);
    let answer = |model: &str| home.ctl(&["run", model, "Hello", "-n", "4", "-t", "0"]);
    assert_eq!(answer("copy")?.stdout, answer("tiny")?.stdout);
    // `tiny` is loaded now.
    check(&home.ctl(&["rm", "tiny", "--yes"])?, 75, &["flashctl stop tiny"]);
    check(&home.ctl(&["rm", "copy", "--yes"])?, 0, &[]);
    assert!(!home.models().join("copy").exists() && home.models().join("tiny").exists());
    check(&answer("copy")?, 1, &["copy"]);
    // One in no folder that is searched.
    let elsewhere = home.path().join("elsewhere/other");
    TinyModel::generate(Spec::default()).write(&elsewhere)?;
    let (path, changed) = (elsewhere.display().to_string(), fs::metadata(elsewhere.join("config.json"))?.modified()?);
    let changed = changed.duration_since(std::time::SystemTime::UNIX_EPOCH)?.as_secs();
    check(&home.ctl(&["load", &path])?, 0, &[]);
    let listed = json(&home.ctl(&["models", "--json"])?)?;
    let listed = listed["models"].as_array().into_iter().flatten().find(|model| model["path"] == *path).context("it is listed")?;
    assert_eq!((&listed["modified"], &listed["state"]), (&changed.into(), &"ready".into()));
    assert_eq!(json(&home.ctl(&["show", &path, "--json"])?)?["modified"], changed);
    // The bundled model lies in the checkout.
    check(&home.ctl(&["rm", "flash-tiny-moe", "--yes"])?, 64, &["no folder of flashd's own"]);
    assert!(bundled_model().join("config.json").exists());
    Ok(())
}

#[test]
fn settings_that_cannot_be_are_not_written() -> Result<()> {
    let home = Home::new()?;
    TinyModel::generate(Spec::default()).write(&home.models().join("tiny"))?;
    check(&home.ctl(&["config", "set", "expert_cache", "25%"])?, 0, &[]);
    check(&home.ctl(&["config", "set", "ctx", "2048"])?, 0, &[]);
    check(&home.ctl(&["config", "set", "expert_cache", "a lot"])?, 64, &["flash.toml", "a share such as 25%"]);
    check(&home.ctl(&["config", "set", "memroy", "1GiB"])?, 64, &["memroy"]);
    assert_eq!(fs::read_to_string(home.path().join("flash.toml"))?, "expert_cache = \"25%\"\nctx = 2048\n");
    assert_eq!(home.ctl(&["config", "get", "expert_cache"])?.stdout, "25%\n");
    assert_eq!(json(&home.ctl(&["config", "get", "ctx", "--json"])?)?["value"], "2048");
    check(&home.ctl(&["config", "set", "ctx", "1024"])?, 0, &["flashctl daemon restart"]);
    let mut command = home.command("flashd");
    command.args(["--check-config", "/nonexistent/flash.toml"]);
    check(&finish(command, None)?, 66, &["/nonexistent/flash.toml"]);
    Ok(())
}
