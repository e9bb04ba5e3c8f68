//! The real flashctl as a process: streams, exit codes, signals, files. Below it stands a scripted daemon ([`fake`]) or
//! none; the real daemon is met in the tests crate.

#![allow(missing_debug_implementations, unreachable_pub, reason = "test support")]

mod fake;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::Ordering::SeqCst,
};

use fake::Fake;
use flash_proto::v1::{Format, format, generate_request};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const FLASHCTL: &str = env!("CARGO_BIN_EXE_flashctl");

/// A home of its own, so that nothing of this machine is met.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn daemon(&self) -> Fake {
        Fake::ours(&self.path("run/sock"))
    }

    fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", self.dir.path());
        command.env("FLASH_HOME", self.path("home")).env("FLASH_SOCKET", self.path("run/sock")).stdin(Stdio::null());
        command
    }

    fn flashctl(&self, args: &[&str]) -> Command {
        self.command(Path::new(FLASHCTL), args)
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.flashctl(args).output().expect("flashctl runs"))
    }

    fn run_with(&self, args: &[&str], stdin: &str) -> Ran {
        let mut child =
            self.flashctl(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("flashctl starts");
        child.stdin.take().expect("piped").write_all(stdin.as_bytes()).expect("written");
        Ran::of(child.wait_with_output().expect("flashctl ends"))
    }

    /// A copy of flashctl with these scripts beside it, where it looks first.
    fn install(&self, scripts: &[(&str, &str)]) -> PathBuf {
        let bin = self.path("bin");
        fs::create_dir_all(&bin).expect("a folder");
        // Written by other processes: a file that this one has open for writing while another test forks cannot be executed.
        let copied = Command::new("cp").arg(FLASHCTL).arg(&bin).status().expect("cp runs");
        assert!(copied.success());
        for (name, body) in scripts {
            let mut write = Command::new("sh");
            write.args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"", "sh", body]).arg(bin.join(name));
            assert!(write.status().expect("sh runs").success());
        }
        bin.join("flashctl")
    }
}

#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    #[track_caller]
    fn expect(&self, code: i32, stdout: &str, stderr_has: &str) -> &Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stdout, stdout, "{self:?}");
        assert!(self.stderr.contains(stderr_has), "{stderr_has:?} is not in {self:?}");
        if stderr_has.is_empty() {
            assert_eq!(self.stderr, "");
        }
        self
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Its first words are out, so it is in the middle of an answer.
fn streaming(home: &Home, args: &[&str]) -> Child {
    let mut child = home.flashctl(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("flashctl starts");
    let mut start = [0; 5];
    child.stdout.as_mut().expect("piped").read_exact(&mut start).expect("some text");
    assert_eq!(&start, b"tick ");
    child
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("still running");
}

#[test]
fn help_is_as_written() {
    let home = Home::new();
    let mut text = String::new();
    for command in [
        "",
        "run",
        "chat",
        "tokenize",
        "models",
        "load",
        "ps",
        "stop",
        "stats",
        "convert",
        "verify",
        "cache",
        "cache clear",
        "bench",
        "bench synth",
        "trace record",
        "trace replay",
        "serve",
        "daemon",
        "service",
        "doctor",
        "completions",
        "version",
    ] {
        let args: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let ran = home.run(&args);
        ran.expect(0, &ran.stdout, "");
        text += &format!("$ flashctl {}\n{}\n", args.join(" "), ran.stdout);
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help.txt");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&golden, &text).expect("the golden is written");
    }
    assert_eq!(text, fs::read_to_string(&golden).expect("the golden"), "UPDATE_EXPECT=1 rewrites it");
}

#[test]
fn usage_mistakes_exit_2() {
    let home = Home::new();
    home.run(&["run", "local", "hi", "--expert-cash", "25%"]).expect(2, "", "--expert-cache");
    home.run(&["run"]).expect(2, "", "hint: `flashctl models`");
    home.run(&["run", "local"]).expect(2, "", "there is no prompt");
    home.run_with(&["run", "local"], "").expect(2, "", "hint:");
    home.run(&["chat", "--json"]).expect(2, &home.run(&["chat", "--json"]).stdout, "");
    home.run(&[]).expect(2, "", "Talk to a model:");
    let _daemon = home.daemon();
    home.run(&["run"]).expect(2, "", "hint: installed models: tiny, broken");
}

#[test]
fn without_a_daemon() {
    let home = Home::new();
    home.run(&["run", "local", "hi", "--no-autostart"]).expect(69, "", "hint: start it with `flashctl daemon start`");
    let ran = home.run(&["run", "local", "hi", "--no-autostart", "--json"]);
    assert_eq!((ran.code, ran.json()["error"]["code"].as_str()), (Some(69), Some("daemon_unavailable")), "{ran:?}");
    home.run(&["ps", "--json"]).expect(0, "{\"models\":[]}\n", "");
    home.run(&["stop"]).expect(0, "nothing is loaded\n", "");
    home.run(&["daemon", "stop"]).expect(0, "was not running\n", "");
    home.run(&["daemon", "status", "--json"]).expect(69, "{\"status\":\"stopped\"}\n", "");
    let version = home.run(&["version", "--json"]).json();
    assert_eq!((&version["protocol"], &version["daemon"]), (&Value::from(flash_proto::PROTOCOL_VERSION), &Value::Null));
    let long = format!("/tmp/{}", "x".repeat(120));
    home.run(&["ps", "--socket", &long]).expect(78, "", "more than 103");
}

#[test]
fn a_daemon_that_dies_at_its_start_is_quoted() {
    let home = Home::new();
    let flashctl = home.install(&[("flashd", "echo starting; echo 'flash.toml: no such setting: memroy' >&2; exit 78")]);
    let ran = Ran::of(home.command(&flashctl, &["run", "local", "hi"]).output().expect("flashctl runs"));
    ran.expect(78, "", "no such setting: memroy");
    let log = home.path("home/log/flashd.log");
    assert!(ran.stderr.contains(&format!("hint: its log: {}", log.display())), "{ran:?}");
    assert_eq!(fs::metadata(log).expect("a log").permissions().mode() & 0o777, 0o600);
}

#[test]
fn another_protocol_is_refused() {
    let home = Home::new();
    let _daemon = Fake::start(&home.path("run/sock"), 99);
    let ran = home.run(&["models"]);
    ran.expect(69, "", "hint: `flashctl daemon restart`");
    assert!(
        ran.stderr.contains("speaks protocol 1, the daemon (flashd 9.9.9, pid") && ran.stderr.contains("speaks protocol 99"),
        "{ran:?}"
    );
    assert!(home.run(&["version"]).stdout.contains("flashd 9.9.9 (protocol 99"));
}

#[test]
fn one_prompt_one_answer() {
    let home = Home::new();
    let daemon = home.daemon();
    home.run(&["run", "local", "Tell", "me", "a story.", "--expert-cache", "25%", "-t", "0"]).expect(0, "Once upon a time.\n", "");
    home.run(&["run", "local", "hi", "--no-stream"]).expect(0, "Once upon a time.\n", "");
    home.run(&["run", "local", "hi", "--stats"]).expect(
        0,
        "Once upon a time.\n",
        "25% = 16 of 64 slots/layer · 75% hits · 1.0 MB from SSD",
    );
    home.run(&["run", "local", "hi", "--expert-cache", "1%"]).expect(0, "Once upon a time.\n", "warning: the cache is below a working set");
    home.run(&["run", "local", "hi", "--expert-cache", "1%", "-q"]).expect(0, "Once upon a time.\n", "");
    home.run_with(&["run", "local", "Shorten:", "-s", "Be brief."], "a diff\n").expect(0, "Once upon a time.\n", "");
    home.run_with(&["run", "local", "--raw"], "once\n").expect(0, "Once upon a time.\n", "");
    let chat = home.run(&["run", "local", "hi", "--json"]).json();
    assert_eq!(chat["choices"][0]["message"]["content"], "Once upon a time.");
    assert_eq!(chat["usage"]["total_tokens"], 5);

    let loads = daemon.seen.load.lock().expect("no panic");
    assert_eq!((loads[0].model.as_str(), loads[0].expert_cache.as_deref()), ("local", Some("25%")));
    let requests = daemon.seen.generate.lock().expect("no panic");
    let said = |n: usize| match requests[n].prompt.clone() {
        Some(flash_proto::v1::generate_request::Prompt::Chat(chat)) => {
            chat.messages.into_iter().map(|message| (message.role, message.content)).collect::<Vec<_>>()
        }
        Some(flash_proto::v1::generate_request::Prompt::Text(text)) => vec![("raw".into(), text)],
        other => panic!("{other:?}"),
    };
    let pair = |role: &str, content: &str| (role.to_owned(), content.to_owned());
    assert_eq!(said(0), [pair("user", "Tell me a story.")]);
    assert_eq!(requests[0].sampling.as_ref().and_then(|sampling| sampling.temperature), Some(0.0));
    assert_eq!(said(5), [pair("system", "Be brief."), pair("user", "Shorten:\n\na diff\n")]);
    assert_eq!(said(6), [pair("raw", "once\n")]);
}

#[test]
fn thoughts_are_kept_from_the_answer() {
    let home = Home::new();
    let daemon = home.daemon();
    home.run(&["run", "local", "think"]).expect(0, "Yes.\n", "");
    home.run(&["run", "local", "think", "--no-stream", "--hide-thinking"]).expect(0, "Yes.\n", "");
    let reply = home.run(&["run", "local", "think", "--json", "--think=low"]).json();
    let message = &reply["choices"][0]["message"];
    assert_eq!((&message["content"], &message["reasoning_content"]), (&Value::from("Yes."), &Value::from("Hm.")));
    let requests = daemon.seen.generate.lock().expect("no panic");
    let Some(generate_request::Prompt::Chat(chat)) = &requests[2].prompt else { panic!("a chat") };
    assert_eq!(chat.template_kwargs_json, r#"{"enable_thinking":true,"reasoning_effort":"low"}"#);
}

#[test]
fn a_format_is_json_or_a_schema_from_a_file() {
    let home = Home::new();
    let daemon = home.daemon();
    let schema = home.path("person.json");
    fs::write(&schema, r#"{"type":"object"}"#).expect("written");
    let schema = schema.display().to_string();
    home.run(&["run", "local", "x", "--format", "json"]).expect(0, "Once upon a time.\n", "");
    home.run(&["run", "local", "x", "--format", &schema]).expect(0, "Once upon a time.\n", "");
    home.run(&["run", "local", "x", "--format", "missing.json"]).expect(66, "", "cannot read missing.json");
    let requests = daemon.seen.generate.lock().expect("no panic");
    let formats: Vec<_> = requests.iter().map(|request| request.format.clone().expect("a format")).collect();
    let kinds = [format::Kind::JsonObject(true), format::Kind::JsonSchema(r#"{"type":"object"}"#.into())];
    assert_eq!(formats, kinds.map(|kind| Format { kind: Some(kind), strict: true }));
}

#[test]
fn failures_are_told_with_their_code() {
    let home = Home::new();
    let _daemon = home.daemon();
    home.run(&["run", "nope", "hi"]).expect(1, "", "hint: `flashctl models` lists");
    home.run(&["run", "local", "refuse"]).expect(75, "", "hint: try again in 7 s");
    home.run(&["run", "local", "fail"]).expect(1, "Once", "layer 3 expert 7: read failed");
    home.run(&["run", "local", "-f", "/nonexistent/file"]).expect(66, "", "/nonexistent/file");
    home.run(&["run", "local", "forever", "--timeout", "300ms", "--no-stream"]).expect(124, "", "no complete answer within 0.3 s");
    let ran = home.run(&["run", "local", "refuse", "--json"]);
    let error = &ran.json()["error"];
    assert_eq!((error["code"].as_str(), error["hint"].as_str()), (Some("queue_full"), Some("try again in 7 s")));
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(75), ""));
}

#[test]
fn a_reader_that_leaves_ends_it_quietly() {
    let home = Home::new();
    let daemon = home.daemon();
    let mut child = streaming(&home, &["run", "local", "forever"]);
    drop(child.stdout.take());
    Ran::of(child.wait_with_output().expect("flashctl ends")).expect(0, "", "");
    while !daemon.seen.cancelled.load(SeqCst) {
        std::thread::yield_now();
    }
}

/// A flood of tokens at a reader that has stopped once made h2 drop the connection ("too_many_data_frames").
#[test]
fn a_reader_that_pauses_loses_nothing() {
    let home = Home::new();
    let daemon = home.daemon();
    let child = streaming(&home, &["run", "local", "until I pause"]);
    while !daemon.seen.paused.load(SeqCst) {
        assert!(!daemon.seen.cancelled.load(SeqCst), "the connection broke");
        std::thread::yield_now();
    }
    let ran = Ran::of(child.wait_with_output().expect("flashctl ends"));
    assert_eq!((ran.code, ran.stderr.as_str(), ran.stdout.trim_end().ends_with("tick")), (Some(0), "", true));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    let home = Home::new();
    let _daemon = home.daemon();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = home.flashctl(&["run", "local", "hi"]).stdout(full).output().expect("flashctl runs");
    Ran::of(output).expect(73, "", "cannot write the output");
}

#[test]
fn ctrl_c_ends_a_run_with_130() {
    let home = Home::new();
    let _daemon = home.daemon();
    for (signal, code, stderr) in [(Signal::INT, 130, "\n"), (Signal::TERM, 143, "")] {
        let child = streaming(&home, &["run", "local", "forever"]);
        send(&child, signal);
        let ran = Ran::of(child.wait_with_output().expect("flashctl ends"));
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(code), stderr));
    }
}

#[test]
fn a_daemon_that_dies_mid_answer_is_told() {
    let home = Home::new();
    let daemon = home.daemon();
    let child = streaming(&home, &["run", "local", "forever"]);
    drop(daemon);
    let ran = Ran::of(child.wait_with_output().expect("flashctl ends"));
    assert_eq!(ran.code, Some(69), "{ran:?}");
    assert!(ran.stderr.contains("the daemon went away while it was answering") && ran.stderr.contains("flashd.log"), "{ran:?}");
}

#[test]
fn listings_have_json_and_tables() {
    let home = Home::new();
    let _daemon = home.daemon();
    let models = home.run(&["models", "--json"]).json();
    assert_eq!((&models["models"][0]["name"], &models["models"][1]["fits"]), (&"tiny".into(), &"no".into()));
    let table = home.run(&["ls"]);
    assert!(
        table.stdout.starts_with("NAME") && table.stdout.contains("broken  cannot be served: model.safetensors is truncated"),
        "{table:?}"
    );
    assert_eq!(home.run(&["ps", "--json"]).json()["models"][0]["state"], "ready");
    assert_eq!(home.run(&["ps", "--json"]).json()["models"][0]["prefix"]["bytes"], 3_000_000);
    assert_eq!(home.run(&["stats", "--json"]).json()["experts"]["hits"], 3);
    assert_eq!(home.run(&["stats", "--json"]).json()["prefix"]["disk"]["written_today_bytes"], 1_000_000);
    let stats = home.run(&["stats"]).stdout;
    for expected in
        ["25% of requests found theirs · 672 tokens from memory, 0 from disk", "1.0 MB of 5.0 MB in 2 files · 1.0 MB of", "1 bad files"]
    {
        assert!(stats.contains(expected), "no `{expected}` in: {stats}");
    }
    home.run(&["cache", "clear"]).expect(0, "cleared 3.0 MB of memory and 2 files, 1.0 MB, on disk\n", "");
    assert_eq!(home.run(&["cache", "clear", "--json"]).json()["files"], 2);
    home.run(&["stop", "tiny"]).expect(0, "unloaded tiny\n", "");
    home.run(&["load", "--expert-cache", "25%"]).expect(
        0,
        "tiny loaded in 12 ms · expert cache 25% = 16 of 64 slots/layer, 128.0 kB\n",
        "",
    );
    home.run(&["tokenize", "local", "three short words"]).expect(0, "0 1 2\n", "3 tokens of 40");
    assert_eq!(home.run(&["daemon", "start", "--json"]).json()["status"], "running");
}

#[test]
fn jobs_are_followed_to_their_end() {
    let home = Home::new();
    let daemon = home.daemon();
    let packed = "packed tiny: 16 experts, 4.0 kB, in 2.0 s into /m/experts.flash\n";
    home.run(&["convert", "tiny"]).expect(0, packed, "packing 0% of 4.0 kB\npacking 100% of 4.0 kB\n");
    home.run(&["convert", "tiny", "-q"]).expect(0, packed, "");
    let lines = home.run(&["convert", "tiny", "--json"]).stdout;
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((&events[0]["event"], &events[0]["total"], &events[3]["event"]), (&"progress".into(), &4000.into(), &"done".into()));
    home.run(&["convert", "busy"]).expect(75, "", "flashctl stop tiny");
    home.run(&["convert", "cut"]).expect(69, "", "went away while it was packing");
    home.run(&["verify", "tiny"]).expect(0, "tiny is as it was written: 16 records, 4.0 kB, in 2.0 s\n", "verifying 100%");
    home.run(&["verify", "bad"]).expect(1, "layer 1 expert 3: checksum\n", "1 of 16 records of tiny are bad");
    assert_eq!(home.run(&["verify", "bad", "--json", "-q"]).json()["bad"][0], "layer 1 expert 3: checksum");
    home.run(&["bench", "synth", "--shape", "tiny"]).expect(0, "wrote tiny: 16 experts, 4.0 kB, in 2.0 s to /m/experts.flash\n", "writing");
    home.run(&["bench", "synth", "--shape", "huge"]).expect(64, "", "none of tiny, olmoe");

    for (args, left) in
        [(&["convert", "endless"][..], "nothing is left behind"), (&["convert", "endless", "--in-place"], "--in-place endless` goes on")]
    {
        daemon.seen.cancelled.store(false, SeqCst);
        let mut child = home.flashctl(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("flashctl starts");
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        let mut text = String::new();
        stderr.read_line(&mut text).expect("a line of progress");
        send(&child, Signal::INT);
        stderr.read_to_string(&mut text).expect("the rest");
        assert_eq!(child.wait().expect("flashctl ends").code(), Some(130), "{text}");
        assert!(text.contains(left), "{text}");
        while !daemon.seen.cancelled.load(SeqCst) {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_bench_is_a_table_or_lines_of_json() {
    let home = Home::new();
    let _daemon = home.daemon();
    let ran = home.run(&["bench", "tiny", "--cache", "25%"]);
    ran.expect(0, &ran.stdout, "25% cold");
    for part in ["cache  slots", "io direct, policy lfru", "12.3", "memory 39.5 GB/s", "disk   1.70 GB/s in reads of 82.9 kB"] {
        assert!(ran.stdout.contains(part), "{part} is not in {}", ran.stdout);
    }
    assert!(!ran.stdout.contains("experts 75.0%"), "{}", ran.stdout);
    let profile = home.run(&["bench", "tiny", "--profile"]).stdout;
    assert!(profile.contains("80.0 ms: experts 75.0%, unaccounted 25.0%"), "{profile}");
    let lines = home.run(&["bench", "--json", "-q"]).stdout;
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((&events[0]["event"], &events[1]["decode_tok_s"]), (&"machine".into(), &12.3.into()));
    assert_eq!(events[1]["stages_s"]["experts"], 0.06);
    home.run(&["bench", "--routing", "skewed"]).expect(2, "", "--routing takes trace:FILE");
    home.run(&["bench", "--no-cache", "--cache", "25%"]).expect(2, "", "cannot be used with");
}

#[test]
fn a_trace_is_written_line_by_line_and_replayed() {
    let home = Home::new();
    let daemon = home.daemon();
    let file = home.path("trace.jsonl");
    let path = file.to_str().expect("UTF-8");
    let wrote = format!("wrote the routing of 3 tokens through 2 layers to {path}\n");
    home.run(&["trace", "record", "tiny", "Hello", "--raw", "--ignore-eos", "-o", path]).expect(0, &wrote, "");
    let text = fs::read_to_string(&file).expect("a trace");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((&lines[0]["flash_trace"], &lines[0]["model"], &lines[0]["layers"]), (&1.into(), &"tiny".into(), &2.into()));
    assert_eq!(lines[2], serde_json::json!({"tok": 9, "layers": [[0, 1], [4, 5]]}));
    assert!(daemon.seen.generate.lock().expect("no panic")[0].ignore_eos);
    let table = home.run(&["trace", "replay", path, "--policy", "lru,belady", "--slots", "8,25%"]);
    assert!(table.stdout.contains("16 (25%)     lru     75.0   5.0"), "{table:?}");
    assert_eq!(home.run(&["trace", "replay", path, "--json"]).json()["rows"][0]["hit_rate"], 0.75);
    home.run(&["trace", "replay", "no-such-file"]).expect(66, "", "no-such-file");
    home.run(&["trace", "record", "tiny", "Hello", "-o", "/nonexistent/x"]).expect(73, "", "/nonexistent/x");
}

#[test]
fn watching_without_a_terminal_is_a_line_each() {
    let home = Home::new();
    let _daemon = home.daemon();
    let mut child = home.flashctl(&["stats", "-w"]).stdout(Stdio::piped()).spawn().expect("flashctl starts");
    let lines: Vec<String> =
        BufReader::new(child.stdout.take().expect("piped")).lines().take(2).map(|line| line.expect("a line")).collect();
    for line in lines {
        assert_eq!(serde_json::from_str::<Value>(&line).expect("JSON")["model"]["name"], "tiny");
    }
    send(&child, Signal::INT);
    assert_eq!(child.wait().expect("flashctl ends").code(), Some(130));
}

#[test]
fn a_chat_keeps_the_conversation_and_never_shortens_it_unasked() {
    let home = Home::new();
    let daemon = home.daemon();
    let long = "word ".repeat(40);
    let typed = format!(
        "/system Be brief.\nHello there\n\"\"\"two\nlines\"\"\"\n/nonsense\n//slash\n/undo\n{long}\n/drop\n/set temperature 0.5\nlast\n/bye\nnever sent\n"
    );
    let ran = home.run_with(&["chat"], &typed);
    ran.expect(0, &"Once upon a time.\n".repeat(4), "/nonsense is not a command");
    // 2 of the system prompt, 2 said, 4 answered; then what the turns add.
    for told in [
        "[8/40 tokens]",
        "not sent: with this message the conversation has 54 tokens and the context holds 40",
        "forgot 1 turn, 1 turn left",
    ] {
        assert!(ran.stderr.contains(told), "{told:?} is not in {}", ran.stderr);
    }
    let requests = daemon.seen.generate.lock().expect("no panic");
    let said: Vec<Vec<String>> = requests
        .iter()
        .map(|request| match &request.prompt {
            Some(flash_proto::v1::generate_request::Prompt::Chat(chat)) => chat.messages.iter().map(|m| m.content.clone()).collect(),
            other => panic!("{other:?}"),
        })
        .collect();
    let answer = "Once upon a time.";
    assert_eq!(said[1], ["Be brief.", "Hello there", answer, "two\nlines"]);
    assert_eq!(said[2].last().map(String::as_str), Some("/slash"));
    assert_eq!(said[3], ["Be brief.", "two\nlines", answer, "last"], "the oldest turn was dropped, the undone one is gone");
    assert_eq!(requests[3].sampling.as_ref().and_then(|sampling| sampling.temperature), Some(0.5));
}

#[test]
fn serve_runs_the_gateway_and_forwards_signals() {
    let home = Home::new();
    let _daemon = home.daemon();
    let gateway = "[ \"$4\" = 7 ] && exit 75; trap 'exit 0' TERM INT; echo \"$* key=$FLASH_API_KEY\" >&2; while :; do sleep 0.02; done";
    let flashctl = home.install(&[("flash-gateway", gateway)]);
    let serve = ["serve", "--port", "0", "--api-key", "sesame", "--cors-origin", "*"];
    let mut child = home.command(&flashctl, &serve).stderr(Stdio::piped()).spawn().expect("flashctl starts");
    let mut ready = String::new();
    BufReader::new(child.stderr.take().expect("piped")).read_line(&mut ready).expect("a line");
    let socket = home.path("run/sock");
    assert_eq!(ready, format!("--host 127.0.0.1 --port 0 --socket {} --cors-origin * key=sesame\n", socket.display()));
    send(&child, Signal::TERM);
    assert_eq!(child.wait().expect("flashctl ends").code(), Some(0));
    let busy = home.command(&flashctl, &["serve", "--port", "7"]).output().expect("flashctl runs");
    assert_eq!(busy.status.code(), Some(75), "the gateway's exit code is passed on");
}

#[test]
fn services_are_installed_and_removed() {
    let home = Home::new();
    let record = "echo \"$(basename \"$0\") $*\" >> \"$HOME/calls\"; case $1 in bootout|bootstrap|unload) echo 'Bootstrap failed: 5' >&2; exit 5;; esac";
    let flashctl = home.install(&[("flashd", ""), ("flash-gateway", ""), ("systemctl", record), ("launchctl", record)]);
    let run = |args: &[&str]| {
        let path = format!("{}:/usr/bin:/bin", home.path("bin").display());
        Ran::of(home.command(&flashctl, args).env("PATH", path).output().expect("flashctl runs"))
    };
    let calls = || {
        let calls = fs::read_to_string(home.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(home.path("calls"));
        calls.lines().map(str::to_owned).collect::<Vec<_>>()
    };

    let dry = run(&["service", "install", "--manager", "systemd", "--dry-run"]);
    assert!(dry.stdout.contains("ExecStart=") && dry.stderr.contains("flash-gateway.service"), "{dry:?}");
    assert!(!home.path(".config").exists() && calls().is_empty(), "a dry run changes nothing");

    assert_eq!(run(&["service", "install", "--manager", "systemd", "--now"]).code, Some(0));
    assert_eq!(calls(), ["systemctl --user daemon-reload", "systemctl --user enable --now flashd.service flash-gateway.service"]);
    let unit = fs::read_to_string(home.path(".config/systemd/user/flashd.service")).expect("a unit");
    assert!(dry.stdout.starts_with(&unit), "what a dry run prints is what is written");
    assert!(home.path("home/log").is_dir(), "the manager can open the log");
    run(&["service", "status", "--manager", "systemd", "--daemon-only"]).expect(
        0,
        &format!("flashd: running ({})\n", home.path(".config/systemd/user/flashd.service").display()),
        "",
    );
    assert_eq!(run(&["service", "uninstall", "--manager", "systemd"]).code, Some(0));
    assert!(!home.path(".config/systemd/user/flashd.service").exists());
    run(&["service", "uninstall", "--manager", "systemd"]).expect(0, "not installed\n", "");
    calls();

    let gui = format!("gui/{}", rustix::process::getuid().as_raw());
    let agent = home.path("Library/LaunchAgents/dev.flash.flashd.plist");
    assert_eq!(run(&["service", "install", "--manager", "launchd", "--now", "--daemon-only"]).code, Some(0));
    let agent_text = agent.display();
    assert_eq!(
        calls(),
        [
            format!("launchctl bootout {gui}/dev.flash.flashd"),
            format!("launchctl bootstrap {gui} {agent_text}"),
            format!("launchctl load -w {agent_text}"),
        ],
        "load is the way when bootstrap fails"
    );
    let plist = plist::Value::from_file(&agent).expect("a property list");
    let program = plist.as_dictionary().and_then(|dict| dict.get("ProgramArguments")?.as_array()?.first()?.as_string());
    assert_eq!(program.map(PathBuf::from), Some(home.path("bin/flashd").canonicalize().expect("it exists")));
    assert_eq!(run(&["service", "uninstall", "--manager", "launchd"]).code, Some(0));
    assert!(!agent.exists());
}

#[test]
fn completions_are_written_for_every_shell() {
    let home = Home::new();
    for (shell, has) in
        [("bash", "_flashctl()"), ("zsh", "#compdef flashctl"), ("fish", "complete -c flashctl"), ("powershell", "flashctl")]
    {
        let ran = home.run(&["completions", shell]);
        assert!(ran.code == Some(0) && ran.stdout.contains(has) && ran.stdout.contains("expert-cache"), "{shell}");
    }
}

#[test]
fn doctor_says_what_is_wrong() {
    let home = Home::new();
    let _daemon = home.daemon();
    let flashctl = home.install(&[("flashd", "")]);
    let ran = Ran::of(home.command(&flashctl, &["doctor"]).output().expect("flashctl runs"));
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("BAD  flash-gateway: flash-gateway is neither beside flashctl nor on PATH\n     fix: "), "{ran:?}");
    assert!(ran.stdout.contains("memory   auto   default"), "{ran:?}");
    let report = Ran::of(home.command(&flashctl, &["doctor", "--json"]).output().expect("flashctl runs")).json();
    assert_eq!((&report["ok"], &report["settings"][0]["origin"]), (&Value::Bool(false), &"default".into()));
}
