//! `flashctl launch` with the real daemon and gateway; the agent is a script that waits to be told to end.

use std::{fs, net::TcpStream, process::Stdio};

use anyhow::{Context, Result};
use flash_tests::{
    daemon::{Home, Process, binary, wait_until},
    http::post,
    tiny_model::{Spec, TinyModel},
};
use serde_json::json;

#[test]
fn an_agent_talks_to_a_gateway_of_its_own() -> Result<()> {
    let home = Home::new()?;
    TinyModel::generate(Spec { context: 4096, ..Spec::default() }).write(&home.models().join("tiny"))?;
    let bin = home.path().join("bin");
    fs::create_dir(&bin)?;
    let script = "echo \"$ANTHROPIC_BASE_URL $CLAUDE_CODE_MAX_CONTEXT_TOKENS\" > \"$HOME/told.new\"; mv \"$HOME/told.new\" \"$HOME/told\"; \
                  while [ ! -e \"$HOME/enough\" ]; do sleep 0.02; done; exit 3";
    // Written by another process: a file that this one has open for writing while another test forks cannot be executed.
    let mut write = std::process::Command::new("sh");
    write.args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"", "sh", script]).arg(bin.join("claude"));
    assert!(write.status()?.success());
    let launch = |args: &[&str]| {
        let mut command = home.command("flashctl");
        // Nobody listens on the first port of this machine.
        command.arg("launch").args(args).env("PATH", format!("{}:/usr/bin:/bin", bin.display())).env("FLASH_HOST", "127.0.0.1:1");
        command.stdin(Stdio::null());
        command
    };
    let mut process = Process::spawn(launch(&["claude", "--model", "tiny"]), &home.path().join("launch.stderr"))?;
    let told = home.path().join("told");
    wait_until("the agent has begun", || told.exists())?;
    let told = fs::read_to_string(told)?;
    let (base, context) = told.trim().split_once(' ').context("two words")?;
    assert_eq!(context, "4096");
    let address = base.strip_prefix("http://").context("a URL")?;
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    assert_eq!(post(address, "/v1/messages", &body)?.status, 200);

    // A second one takes that gateway, which says as much of the model, and leaves it running.
    let printed = launch(&["claude", "--model", "tiny", "--print-env"]).env("FLASH_HOST", base).output()?;
    let printed = String::from_utf8(printed.stdout)?;
    assert!(printed.contains(&format!("ANTHROPIC_BASE_URL='{base}'")) && printed.contains("TOKENS='4096'"), "{printed}");

    fs::write(home.path().join("enough"), "")?;
    assert_eq!(process.code()?, Some(3), "the agent's own exit code");
    assert!(TcpStream::connect(address).is_err(), "the gateway is gone with it");
    assert_eq!(home.ctl(&["daemon", "status"])?.code, Some(0), "the daemon stays, as after a run");
    assert!(binary("flash-gateway").exists());
    Ok(())
}
