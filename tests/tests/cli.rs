//! flashctl as a user runs it: at a prompt, in a pipe, when the daemon dies; chat.rs has the terminal. Every test has a home of its
//! own and lets flashctl start the daemon.

use std::{
    fs::File,
    io::Read,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use flash_tests::{
    daemon::{Home, Output, Process, finish, wait_until},
    tiny_model::{Spec, TinyModel},
};
use rustix::process::Signal;
use serde_json::Value;

/// A home whose only model is one that talks until it is stopped.
fn home() -> Result<Home> {
    let home = Home::new()?;
    TinyModel::generate(Spec::default()).write(&home.models().join("tiny"))?;
    Ok(home)
}

fn check(output: &Output, code: i32, stderr: &[&str]) {
    assert_eq!(output.code, Some(code), "{output:?}");
    for word in stderr {
        assert!(output.stderr.contains(word), "no `{word}` in: {}", output.stderr);
    }
}

#[test]
fn a_prompt_is_answered_from_arguments_and_from_standard_input() -> Result<()> {
    let home = Home::new()?;
    let prompt = "Tell me a short story about a little dog named Pip.";
    let args = ["run", "local", prompt, "--expert-cache", "25%", "-t", "0", "-n", "40"];
    let answer = home.ctl(&args)?;
    check(&answer, 0, &[]);
    assert!(answer.stdout.contains("Pip"), "a story about Pip: {answer:?}");
    assert!(answer.stdout.ends_with('\n'));
    let empty = home.ctl_with(&args, Some(b""))?;
    assert_eq!(empty.stdout, answer.stdout, "an empty standard input counts as not given");
    let piped = home.ctl_with(&["run", "local", "-t", "0", "-n", "40"], Some(prompt.as_bytes()))?;
    assert_eq!(piped.stdout, answer.stdout);
    // The prompt, a blank line, standard input.
    let both = home.ctl_with(&["run", "local", "-t", "0", "-n", "20", "Say"], Some(b"hello"))?;
    let joined = home.ctl(&["run", "local", "-t", "0", "-n", "20", "Say\n\nhello"])?;
    check(&both, 0, &[]);
    assert_eq!(both.stdout, joined.stdout);
    Ok(())
}

#[test]
fn answers_as_json() -> Result<()> {
    let home = home()?;
    let answer = home.ctl(&["run", "tiny", "Hello", "-n", "5", "--json"])?;
    check(&answer, 0, &[]);
    let body: Value = serde_json::from_str(&answer.stdout)?;
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["usage"]["completion_tokens"], 5, "{body}");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    let failed = home.ctl(&["run", "no-such-model", "Hello", "--json"])?;
    check(&failed, 1, &[]);
    let body: Value = serde_json::from_str(&failed.stdout)?;
    assert_eq!(body["error"]["code"], "model_not_found", "{body}");
    for listing in ["models", "ps", "stats", "version"] {
        let output = home.ctl(&[listing, "--json"])?;
        check(&output, 0, &[]);
        serde_json::from_str::<Value>(&output.stdout).with_context(|| format!("{listing}: {}", output.stdout))?;
    }
    Ok(())
}

#[test]
fn mistakes_have_their_codes() -> Result<()> {
    let home = home()?;
    check(&home.ctl(&["run"])?, 2, &["MODEL"]);
    check(&home.ctl(&["run", "tiny", "Hello", "--no-such-flag"])?, 2, &["--no-such-flag"]);
    check(&home.ctl(&["run", "tiny", "Hello", "--temperature", "warm"])?, 2, &["warm"]);
    check(&home.ctl_with(&["run", "tiny"], Some(b""))?, 2, &[]);
    check(&home.ctl(&["run", "tiny", "Hello", "--no-autostart"])?, 69, &["hint:"]);
    check(&home.ctl(&["run", "tiny", "Hello", "-f", "no-such-file"])?, 66, &["no-such-file"]);
    check(&home.ctl(&["run", "no-such-model", "Hello"])?, 1, &["no-such-model", "tiny", "hint:"]);
    check(&home.ctl(&["run", "tiny", &"long ".repeat(9000)])?, 1, &["maximum context length"]);
    check(&home.ctl(&["run", "tiny", "Hello", "--timeout", "1"])?, 124, &[]);
    Ok(())
}

/// `flashctl run tiny … | head`: the reader goes away, and that is no error.
#[test]
fn a_reader_that_leaves_is_no_error() -> Result<()> {
    let home = home()?;
    let mut process = endless(&home, Stdio::piped())?;
    let mut stdout = process.child().stdout.take().context("a pipe")?;
    stdout.read_exact(&mut [0])?;
    drop(stdout);
    let code = process.code()?;
    assert_eq!(code, Some(0), "{}", process.errors());
    assert!(!process.errors().contains("panick"), "{}", process.errors());
    Ok(())
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() -> Result<()> {
    let home = home()?;
    let mut process = endless(&home, File::options().write(true).open("/dev/full")?.into())?;
    assert_eq!(process.code()?, Some(73), "{}", process.errors());
    assert!(process.errors().contains("space"), "{}", process.errors());
    Ok(())
}

#[test]
fn an_interrupt_ends_one_answer() -> Result<()> {
    let home = home()?;
    let mut process = endless(&home, Stdio::piped())?;
    let mut stdout = process.child().stdout.take().context("a pipe")?;
    stdout.read_exact(&mut [0])?;
    process.signal(Signal::INT)?;
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest)?;
    assert_eq!(process.code()?, Some(130), "{}", process.errors());
    // The daemon lives on and is free.
    check(&home.ctl(&["run", "tiny", "Hello", "-n", "3", "--no-autostart"])?, 0, &[]);
    Ok(())
}

/// The daemon is killed in mid-stream: the client says so and exits 69, and the next command starts a new one.
#[cfg(target_os = "linux")]
#[test]
fn a_killed_daemon_is_told_and_replaced() -> Result<()> {
    let home = home()?;
    let mut process = endless(&home, Stdio::piped())?;
    let mut stdout = process.child().stdout.take().context("a pipe")?;
    stdout.read_exact(&mut [0; 16])?;
    let killed = home.listener().context("a daemon")?;
    rustix::process::kill_process(killed, Signal::KILL)?;
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest)?;
    assert_eq!(process.code()?, Some(69), "{}", process.errors());
    let errors = process.errors();
    assert!(errors.contains("daemon") && errors.contains("hint:"), "{errors}");
    check(&home.ctl(&["run", "tiny", "Hello", "-n", "3"])?, 0, &[]);
    assert_ne!(home.listener().context("a new daemon")?, killed);
    Ok(())
}

#[test]
fn the_daemon_starts_and_stops_on_demand() -> Result<()> {
    let home = home()?;
    let status = |home: &Home| -> Result<Value> { Ok(serde_json::from_str(&home.ctl(&["daemon", "status", "--json"])?.stdout)?) };
    assert_eq!(status(&home)?["status"], "stopped");
    for _ in 0..2 {
        check(&home.ctl(&["daemon", "start"])?, 0, &[]);
        assert_eq!(status(&home)?["status"], "running");
    }
    check(&home.ctl(&["load", "tiny", "--expert-cache", "50%"])?, 0, &[]);
    let ps = home.ctl(&["ps"])?;
    assert!(ps.stdout.contains("tiny"), "{ps:?}");
    check(&home.ctl(&["stop", "tiny"])?, 0, &[]);
    assert!(!home.ctl(&["ps", "--json"])?.stdout.contains("\"tiny\""));
    for _ in 0..2 {
        check(&home.ctl(&["daemon", "stop"])?, 0, &[]);
    }
    assert_eq!(status(&home)?["status"], "stopped");
    Ok(())
}

/// With a daemon of its own, which has the settings that were asked for and ends with it.
#[test]
fn serving_starts_what_it_needs() -> Result<()> {
    let home = home()?;
    let mut command = home.command("flashctl");
    command.args(["serve", "--port", "0", "--parallel", "3"]);
    let mut process = Process::spawn(command, &home.path().join("serve.stderr"))?;
    wait_until("the gateway listens", || process.errors().contains("listening on http://"))?;
    let parallel = home.ctl(&["config", "get", "parallel", "--no-autostart"])?;
    assert_eq!(parallel.stdout, "3\n", "{parallel:?}");
    process.signal(Signal::TERM)?;
    assert_eq!(process.code()?, Some(0), "{}", process.errors());
    check(&home.ctl(&["config", "get", "parallel", "--no-autostart"])?, 69, &[]);
    Ok(())
}

/// In the gateway's own words, which this takes apart.
#[test]
fn serving_says_in_json_why_it_cannot() -> Result<()> {
    let home = home()?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    let busy = home.ctl(&["serve", "--port", &port, "--json"])?;
    check(&busy, 75, &["in use by"]);
    let error = serde_json::from_str::<Value>(&busy.stdout)?["error"].clone();
    let has = |field: &str, part: &str| error[field].as_str().is_some_and(|text| text.contains(part));
    assert!(has("message", &format!("127.0.0.1:{port} is in use by")) && has("hint", "another --port"), "{busy:?}");
    Ok(())
}

/// Its own was killed, and somebody has started another one since.
#[cfg(target_os = "linux")]
#[test]
fn serving_stops_no_daemon_but_its_own() -> Result<()> {
    let home = home()?;
    let mut command = home.command("flashctl");
    command.args(["serve", "--port", "0"]);
    let mut process = Process::spawn(command, &home.path().join("serve.stderr"))?;
    wait_until("the gateway listens", || process.errors().contains("listening on http://"))?;
    rustix::process::kill_process(home.listener().context("a daemon")?, Signal::KILL)?;
    wait_until("it is gone", || home.listener().is_none())?;
    check(&home.ctl(&["daemon", "start"])?, 0, &[]);
    let other = home.listener().context("another daemon")?;
    process.signal(Signal::TERM)?;
    assert_eq!(process.code()?, Some(0), "{}", process.errors());
    assert_eq!(home.listener(), Some(other));
    Ok(())
}

/// Many at once, none running before: one daemon, and all are answered.
#[cfg(target_os = "linux")]
#[test]
fn concurrent_commands_start_one_daemon() -> Result<()> {
    let home = home()?;
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let run = || home.ctl(&["run", "tiny", "Hello", "-n", "3", "-t", "0"]);
        let running: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        running.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Result<_>>()
    })?;
    for output in &outputs {
        check(output, 0, &[]);
        assert_eq!(output.stdout, outputs[0].stdout);
    }
    Ok(())
}

/// `flashctl run` on a model that does not end its turn.
fn endless(home: &Home, stdout: Stdio) -> Result<Process> {
    let mut command = home.command("flashctl");
    let stderr = home.path().join("flashctl.stderr");
    command.args(["run", "tiny", "Hello", "-t", "0"]);
    command.process_group(0).stdin(Stdio::null()).stdout(stdout).stderr(File::create(&stderr)?);
    Ok(Process::adopt(command.spawn()?, stderr))
}

/// The completions that a shell would load.
#[test]
fn completions_parse() -> Result<()> {
    let home = Home::new()?;
    for shell in ["bash", "zsh", "fish", "powershell"] {
        let output = home.ctl(&["completions", shell])?;
        check(&output, 0, &[]);
        assert!(output.stdout.contains("expert-cache"), "{shell}");
        if shell == "bash" {
            let mut command = Command::new("bash");
            command.arg("-n");
            check(&finish(command, Some(output.stdout.as_bytes()))?, 0, &[]);
        }
    }
    Ok(())
}
