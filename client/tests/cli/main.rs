//! The real flashctl as a process: streams, exit codes, signals, files. Below it stands a scripted daemon ([`fake`]) or
//! none; the real daemon is met in the tests crate.

#![allow(missing_debug_implementations, unreachable_pub, reason = "test support")]

mod fake;
mod launch;
mod models;
mod serving;
mod talk;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use fake::Fake;
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
        "show",
        "cp",
        "rm",
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
        "launch",
        "daemon",
        "service",
        "config",
        "config set",
        "doctor",
        "completions",
        "version",
    ] {
        let args: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let ran = home.run(&args);
        ran.expect(0, &ran.stdout, "");
        text += &format!("$ flashctl {}\n{}\n", args.join(" "), ran.stdout);
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/help.txt");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&golden, &text).expect("the golden is written");
    }
    assert_eq!(text, fs::read_to_string(&golden).expect("the golden"), "UPDATE_EXPECT=1 rewrites it");
}

#[test]
fn usage_mistakes_exit_2() {
    let home = Home::new();
    let misspelt = home.run(&["run", "local", "hi", "--expert-cash", "25%"]);
    misspelt.expect(2, "", "--expert-cache");
    assert!(misspelt.stderr.ends_with("\n\nhint: `flashctl help run` explains what it takes\n"), "{misspelt:?}");
    home.run(&["rum", "local"]).expect(2, "", "hint: `flashctl help` explains what it takes");
    home.run(&["run"]).expect(2, "", "hint: `flashctl models`");
    home.run(&["run", "local"]).expect(2, "", "there is no prompt");
    home.run_with(&["run", "local"], "").expect(2, "", "hint:");
    home.run(&["chat", "--json"]).expect(2, &home.run(&["chat", "--json"]).stdout, "");
    home.run(&[]).expect(2, "", "Talk to a model:");
    let told = home.run(&["run", "local", "hi", "-n", "some", "--json"]);
    assert_eq!((told.code, told.json()["error"]["code"].as_str()), (Some(2), Some("usage")), "{told:?}");
    home.run(&["pull", "a/b"]).expect(2, "", &format!("into {}, or run it by its path", home.path("home/models").display()));
    let pull = home.run(&["--json", "pull", "a/b"]).json();
    assert!(pull["error"]["hint"].as_str().is_some_and(|hint| hint.starts_with("flashctl downloads nothing")), "{pull}");
    home.run(&["run", "local", "hi", "--think=hard"]).expect(2, "", "low, medium or high");
    home.run(&["bench", "--repeat", "0"]).expect(2, "", "--repeat");
    home.run(&["load", "--ctx", "0"]).expect(2, "", "a number of tokens, or auto");
    assert_eq!(told.json()["error"]["hint"], "`flashctl help run` explains what it takes");
    let _daemon = home.daemon();
    home.run(&["run"]).expect(2, "", "hint: installed models: tiny, broken");
    home.run(&["run", "local", "hi", "--stream"]).expect(2, "", "hint: `flashctl help run` explains");
    home.run(&["daemon", "logs", "-n", "-1"]).expect(2, "", "hint: `flashctl help daemon logs` explains");
    home.run(&["daemon"]).expect(2, "", "Usage: flashctl daemon");
    for (args, message, hint) in [
        (&["--json", "run"][..], "the following required arguments were not provided: <MODEL>", "installed models: tiny, broken"),
        (&["cp", "--json"], "the following required arguments were not provided: <MODEL> <NAME>", "installed models: tiny, broken"),
        (&["daemon", "--json"], "'flashctl daemon' requires a subcommand", "`flashctl help daemon` explains what it takes"),
        (&["--json", "daemon"], "`flashctl daemon` takes a subcommand", "`flashctl help daemon` explains what it takes"),
        (&["--json", "cache"], "`flashctl cache` takes a subcommand", "`flashctl help cache` explains what it takes"),
    ] {
        let refused = home.run(args);
        let error = refused.json()["error"].clone();
        let begins = error["message"].as_str().is_some_and(|said| said.starts_with(message));
        assert!(begins && error["hint"] == hint && refused.code == Some(2) && refused.stderr.is_empty(), "{args:?}: {refused:?}");
    }
}

#[test]
fn an_error_says_what_to_do() {
    let home = Home::new();
    let _daemon = home.daemon();
    fs::write(home.path("bytes"), [0xff]).expect("written");
    let bytes = home.path("bytes").display().to_string();
    let check = |args: &[&str], code: i32, hint: &str| {
        home.run(args).expect(code, "", &format!("\nhint: {hint}"));
    };
    check(&["cp", "tiny", "bad/name"], 64, "`flashctl help cp` explains");
    check(&["bench", "synth", "--shape", "huge"], 64, "`flashctl help bench synth` explains");
    check(&["stats", "--watch", "0"], 2, "`flashctl help stats` explains");
    check(&["bench", "--routing", "nope"], 2, "`flashctl help bench` explains");
    check(&["bench", "--routing", "trace:nope"], 66, "check the path");
    fs::write(home.path("schema"), "{").expect("written");
    check(&["run", "tiny", "hi", "--format", &home.path("schema").display().to_string()], 64, "correct it");
    check(&["trace", "replay", "nope"], 66, "check the path");
    check(&["run", "tiny", "-f", "nope"], 66, "check the path");
    check(&["run", "tiny", "-f", &bytes], 64, "convert it first");
    check(&["run", "tiny", "hi", "--host", "h:1", "--socket", "s"], 2, "leave one of them out");
    check(&["trace", "record", "tiny", "hi", "--out", "nowhere/trace"], 73, "check that the folder is there");
    check(&["run", "nope", "hi"], 1, "`flashctl models` lists");
    check(&["ps", "--socket", &format!("/tmp/{}", "x".repeat(120))], 78, "correct it where it is set");
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
fn a_daemon_that_was_started_by_hand_has_no_file_for_its_log() {
    let home = Home::new();
    fs::create_dir_all(home.path("home/log")).expect("a folder");
    fs::write(home.path("home/log/flashd.log"), "of another daemon\n").expect("written");
    home.run(&["daemon", "logs"]).expect(0, "of another daemon\n", "");
    let refused = home.run(&["daemon", "logs", "--json"]);
    assert_eq!((refused.code, refused.json()["error"]["code"].as_str()), (Some(2), Some("usage")), "{refused:?}");
    let _daemon = home.daemon();
    home.run(&["daemon", "logs"]).expect(66, "", "writes its log on standard error, where it was started\nhint: `flashctl daemon restart`");
    assert!(home.run(&["daemon", "status"]).stdout.ends_with("log on standard error, where it was started\n"));
}

#[test]
fn another_protocol_is_refused() {
    let home = Home::new();
    let _daemon = Fake::start(&home.path("run/sock"), 99);
    let ran = home.run(&["models"]);
    ran.expect(69, "", "hint: `flashctl daemon restart`");
    assert!(
        ran.stderr.contains(&format!("speaks protocol {}, the daemon (flashd 9.9.9, pid", flash_proto::PROTOCOL_VERSION))
            && ran.stderr.contains("speaks protocol 99"),
        "{ran:?}"
    );
    assert!(home.run(&["version"]).stdout.contains("flashd 9.9.9 (protocol 99"));
}
