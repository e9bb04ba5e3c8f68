//! Talking to a model at a terminal: keys, Ctrl-C, what is kept when a chat ends badly. The daemon and the models are real.

#![cfg(target_os = "linux")]

use std::fs;

use anyhow::{Context, Result};
use flash_tests::{
    daemon::{Home, wait_until},
    terminal::{CTRL_C, CTRL_D, Terminal},
    tiny_model::{Spec, TinyModel},
};
use rustix::process::Signal;
use serde_json::Value;

/// A home whose only model is one that talks until it is stopped.
fn endless() -> Result<Home> {
    let home = Home::new()?;
    TinyModel::generate(Spec::default()).write(&home.models().join("tiny"))?;
    Ok(home)
}

fn start(home: &Home, args: &[&str]) -> Result<Terminal> {
    let mut command = home.command("flashctl");
    command.args(args);
    Terminal::start(&command)
}

/// What is kept of the conversation used last but for its answers.
fn kept(home: &Home, name: &str) -> Result<(Vec<String>, Option<String>)> {
    let saved: Value = serde_json::from_str(&fs::read_to_string(home.path().join("sessions").join(format!("{name}.json")))?)?;
    let turns = saved["turns"].as_array().context("turns")?;
    let said = turns.iter().map(|turn| turn["user"].as_str().unwrap_or_default().to_owned()).collect();
    Ok((said, saved["unsent"].as_str().map(str::to_owned)))
}

fn is_answering(home: &Home) -> bool {
    let stats = home.ctl(&["stats", "--json", "--no-autostart"]).ok();
    stats.and_then(|stats| serde_json::from_str::<Value>(&stats.stdout).ok()).is_some_and(|stats| stats["requests"]["running"] == 1)
}

#[test]
fn a_conversation() -> Result<()> {
    let home = Home::new()?;
    let mut chat = start(&home, &["chat", "local", "-t", "0", "-n", "12"])?;
    chat.expect(">>>")?;
    chat.press("/help\r")?;
    chat.expect("/clear")?;
    chat.press("/nonsense\r")?;
    chat.expect("/nonsense is not a command")?;
    // Tab completes a command, and what it takes.
    chat.press("/sho\tpar\t\r")?;
    chat.expect("temperature         0")?;
    chat.press("What is the name of the dog?\r")?;
    chat.expect("/2048")?;
    chat.press("/bye\r")?;
    assert_eq!(chat.process.code()?, Some(0));
    let history = home.path().join("history");
    assert!(fs::read_to_string(&history)?.contains("name of the dog"));
    let mode = |path: &std::path::Path| -> Result<u32> { Ok(std::os::unix::fs::MetadataExt::mode(&fs::metadata(path)?) & 0o777) };
    assert_eq!((mode(&history)?, mode(&home.path().join("sessions/chat-1.json"))?), (0o600, 0o600));
    Ok(())
}

#[test]
fn lines_are_pasted_and_begun_without_being_sent() -> Result<()> {
    let home = Home::new()?;
    let mut chat = start(&home, &["chat", "local", "-t", "0", "-n", "4"])?;
    chat.expect(">>>")?;
    // As a terminal brackets what is pasted; the first line looks like a command.
    chat.press("\u{1b}[200~/exit\r\n// a comment\u{1b}[201~")?;
    chat.press("\r")?;
    chat.expect("/2048")?;
    chat.expect(">>>")?;
    // Alt-Enter.
    chat.press("one\u{1b}\rtwo\r")?;
    chat.expect("/2048")?;
    chat.expect(">>>")?;
    chat.press("\"\"\"three\r")?;
    chat.expect("... ")?;
    chat.press("four\"\"\"\r")?;
    chat.expect("/2048")?;
    chat.expect(">>>")?;
    chat.press(CTRL_D)?;
    assert_eq!(chat.process.code()?, Some(0));
    assert_eq!(kept(&home, "chat-1")?.0, ["/exit\n// a comment", "one\ntwo", "three\nfour"]);
    Ok(())
}

#[test]
fn ctrl_c_stops_the_answer_then_clears_the_line_then_leaves() -> Result<()> {
    let home = endless()?;
    let mut chat = start(&home, &["chat", "tiny", "-t", "0"])?;
    chat.expect(">>>")?;
    chat.press("Talk\r")?;
    wait_until("the answer is on its way", || is_answering(&home))?;
    chat.press(CTRL_C)?;
    chat.expect("/32768 tokens] stopped")?;
    chat.expect(">>>")?;
    wait_until("the request is cancelled", || !is_answering(&home))?;
    assert_eq!(kept(&home, "chat-1")?, (vec!["Talk".into()], None), "what came is kept");
    chat.press("half a line")?;
    chat.expect("half a line")?;
    chat.press(CTRL_C)?;
    chat.expect(">>>")?;
    chat.press(CTRL_C)?;
    chat.expect("Ctrl-C again")?;
    chat.expect(">>>")?;
    chat.press(CTRL_C)?;
    assert_eq!(chat.process.code()?, Some(130));
    Ok(())
}

#[test]
fn ctrl_c_ends_a_run_with_its_last_line_ended() -> Result<()> {
    let home = endless()?;
    let mut run = start(&home, &["run", "tiny", "Hello", "-t", "0"])?;
    wait_until("the answer is on its way", || is_answering(&home))?;
    run.press(CTRL_C)?;
    assert_eq!(run.process.code()?, Some(130));
    wait_until("the newline is seen", || run.screen().ends_with('\n'))
}

#[test]
fn a_run_that_no_chat_can_stand_for_wants_a_prompt() -> Result<()> {
    let home = Home::new()?;
    for flags in [&["--raw"][..], &["--no-stream"], &["--suffix", "x"], &["--timeout", "9"]] {
        let mut run = start(&home, &[&["run", "local"], flags].concat())?;
        run.expect("there is no prompt")?;
        assert_eq!(run.process.code()?, Some(2), "{flags:?}");
    }
    Ok(())
}

#[test]
fn a_chat_that_is_told_to_end_leaves_the_terminal_as_it_was() -> Result<()> {
    let home = Home::new()?;
    let mut chat = start(&home, &["chat", "local"])?;
    chat.expect(">>>")?;
    wait_until("it reads keys", || chat.is_cooked().is_ok_and(|cooked| !cooked))?;
    assert_eq!(chat.end_by(Signal::TERM)?, Some(143));
    assert!(chat.is_cooked()?);
    Ok(())
}

/// Killed between two turns, then within an answer: the next chat has what was said.
#[test]
fn a_killed_chat_goes_on() -> Result<()> {
    let home = endless()?;
    let mut chat = start(&home, &["chat", "tiny", "-t", "0", "-n", "3"])?;
    chat.expect(">>>")?;
    chat.press("one\r")?;
    chat.expect("/32768")?;
    chat.end_by(Signal::KILL)?;
    assert_eq!(kept(&home, "chat-1")?, (vec!["one".into()], None));
    let mut chat = start(&home, &["chat", "-c", "-n", "30000"])?;
    chat.expect("chat-1: 1 turn, the last: one")?;
    chat.expect(">>>")?;
    chat.press("two\r")?;
    wait_until("the answer is on its way", || is_answering(&home))?;
    chat.end_by(Signal::KILL)?;
    assert_eq!(kept(&home, "chat-1")?, (vec!["one".into()], Some("two".into())));
    let mut chat = start(&home, &["chat", "-c", "-n", "3"])?;
    chat.expect("the last: two (not answered; /retry sends it)")?;
    chat.expect(">>>")?;
    chat.press("/retry\r")?;
    chat.expect("/32768")?;
    chat.expect(">>>")?;
    chat.press("/save pip\r")?;
    chat.expect("kept as pip")?;
    chat.press(CTRL_D)?;
    assert_eq!(chat.process.code()?, Some(0));
    assert_eq!(kept(&home, "pip")?, (vec!["one".into(), "two".into()], None));
    assert!(kept(&home, "chat-1").is_err(), "it has a name now");
    Ok(())
}

#[test]
fn nothing_is_kept_of_a_chat_that_says_so() -> Result<()> {
    let home = Home::new()?;
    let mut chat = start(&home, &["chat", "local", "-t", "0", "-n", "4", "--no-history"])?;
    chat.expect(">>>")?;
    chat.press("A secret\r")?;
    chat.expect("/2048")?;
    chat.expect(">>>")?;
    chat.press(CTRL_D)?;
    assert_eq!(chat.process.code()?, Some(0));
    assert!(!home.path().join("history").exists() && !home.path().join("sessions").exists());
    Ok(())
}
