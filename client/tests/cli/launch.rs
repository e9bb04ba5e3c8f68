//! Agents as scripts that write down what they were given, and gateways that say what the real one does.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use rustix::process::Signal;
use serde_json::Value;

use crate::{Home, Ran, send};

/// What an agent was started with, line by line; its standard output is ours.
const AGENT: &str = "env | grep -E '^(ANTHROPIC|CLAUDE|CODEX|FLASH_API)' | sort; for arg in \"$@\"; do echo \"arg $arg\"; done; exit 7";

/// Answers as flash-gateway does; the second is how often it was asked with which key.
fn gateway(key: &'static str) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut lines =
                BufReader::new(stream.try_clone().expect("a handle")).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            let first = lines.next().unwrap_or_default();
            let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
            let sent = lines.find_map(|line| line.strip_prefix("Authorization: Bearer ").map(str::to_owned)).unwrap_or_default();
            seen.lock().expect("no panic").push(format!("{path} {sent}"));
            let (status, body) = match path.as_str() {
                "/health" => ("200 OK", r#"{"status":"ok","daemon":"up"}"#),
                _ if sent != key => ("401 Unauthorized", r#"{"error":{"message":"Incorrect API key provided."}}"#),
                "/v1/models/it%27s" | "/v1/models/local" => ("200 OK", r#"{"id":"x","context_length":131072}"#),
                _ => ("404 Not Found", r#"{"error":{"message":"The model does not exist. Installed: tiny."}}"#),
            };
            let answer = format!("HTTP/1.0 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (address, asked)
}

struct Launch {
    home: Home,
    host: String,
}

impl Launch {
    /// `host` is FLASH_HOST.
    fn new(host: String, scripts: &[(&str, &str)]) -> Self {
        let home = Home::new();
        home.install(scripts);
        Self { home, host }
    }

    fn command(&self, args: &[&str]) -> Command {
        let bin = self.home.path("bin");
        let mut command = self.home.command(&bin.join("flashctl"), &["launch"]);
        command.args(args).env("PATH", format!("{}:/usr/bin:/bin", bin.display())).env("FLASH_HOST", &self.host);
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).output().expect("flashctl runs"))
    }

    fn with_key(&self, key: &str, args: &[&str]) -> Ran {
        Ran::of(self.command(args).env("FLASH_API_KEY", key).output().expect("flashctl runs"))
    }
}

#[test]
fn a_gateway_that_listens_is_used() {
    let (address, asked) = gateway("");
    let launch = Launch::new(address.to_string(), &[("claude", AGENT), ("codex", AGENT), ("cn", AGENT)]);
    let base = format!("http://{address}");
    let claude = launch.run(&["claude", "-m", "it's", "--", "-p", "a b"]);
    assert_eq!((claude.code, claude.stderr.as_str()), (Some(7), ""), "{claude:?}");
    for line in [
        format!("ANTHROPIC_BASE_URL={base}\n"),
        "ANTHROPIC_MODEL=it's\n".into(),
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS=131072\n".into(),
        "arg -p\narg a b\n".into(),
    ] {
        assert!(claude.stdout.contains(&line), "{line} is not in {claude:?}");
    }
    let codex = launch.run(&["codex", "--", "exec", "hello"]);
    assert!(codex.stdout.contains(&format!("base_url = \"{base}/v1\"")) && codex.stdout.ends_with("arg exec\narg hello\n"), "{codex:?}");
    assert!(codex.stdout.contains("arg model_context_window=131072\n") && !codex.stdout.contains("CODEX_HOME"), "{codex:?}");
    let cn = launch.run(&["continue"]);
    let config = launch.home.path("home/launch/cn/config.yaml");
    assert_eq!(cn.stdout, format!("arg --config\narg {}\n", config.display()));
    assert!(fs::read_to_string(config).expect("a file").contains(&format!("apiBase: \"{base}/v1\"")));
    launch.run(&["claude", "--model", "nope"]).expect(1, "", "Installed: tiny.");
    launch.with_key("wrong", &["claude"]).expect(77, "", "hint: FLASH_API_KEY");
    assert!(asked.lock().expect("no panic").contains(&"/v1/models/local ".to_owned()));

    let (address, asked) = gateway("sesame");
    let launch = Launch { host: format!("http://{address}/v1"), ..launch };
    let codex = launch.with_key("sesame", &["codex"]);
    assert!(codex.stdout.contains("FLASH_API_KEY=sesame\n") && codex.stdout.contains("env_key = \"FLASH_API_KEY\""), "{codex:?}");
    assert!(asked.lock().expect("no panic").contains(&"/v1/models/local sesame".to_owned()));
}

#[test]
fn what_is_printed_can_be_evaluated() {
    let (address, _) = gateway("");
    let launch = Launch::new(address.to_string(), &[]);
    let evaluated = |agent: &str, then: &str| {
        let printed = launch.run(&[agent, "--model", "it's", "--print-env"]);
        assert_eq!((printed.code, printed.stderr.as_str()), (Some(0), ""), "{printed:?}");
        let script = format!("{}\n{then}", printed.stdout);
        Ran::of(Command::new("sh").args(["-c", &script]).env("ANTHROPIC_API_KEY", "elsewhere").output().expect("sh runs"))
    };
    let seen = evaluated("claude", "echo \"$ANTHROPIC_BASE_URL $ANTHROPIC_DEFAULT_HAIKU_MODEL ${ANTHROPIC_API_KEY-none}\"");
    seen.expect(0, &format!("http://{address} it's none\n"), "");
    let config = evaluated("codex", "cat \"$CODEX_HOME/config.toml\"").stdout;
    assert_eq!(launch.run(&["codex", "--model", "it's", "--print-config"]).stdout, config);
    let table: toml::Table = config.parse().expect("TOML");
    assert_eq!((table["model"].as_str(), table["model_context_window"].as_integer()), (Some("it's"), Some(131_072)));
    let json: Value = serde_json::from_str(&launch.run(&["claude", "--print-config"]).stdout).expect("JSON");
    assert_eq!(json["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"], "131072");
    launch.run(&["continue", "--print-env"]).expect(2, "", "--print-config > flash.yaml");
    assert!(launch.run(&["continue", "--print-config"]).stdout.contains("contextLength: 131072"));
    launch.run(&["codex", "--print-env", "--", "exec"]).expect(2, "", "cannot be used with");
    launch.run(&["emacs"]).expect(2, "", "claude, codex, continue");
}

#[test]
fn without_a_gateway_one_lives_as_long_as_the_agent() {
    let gateway = "trap 'echo gone >> \"$HOME/gateway\"; exit 0' TERM
echo \"$* \" > \"$HOME/gateway\"; echo 'listening on http://127.0.0.1:4711' >&2; echo 'a line of its log' >&2; while :; do sleep 0.02; done";
    // Nobody listens on the first port of this machine.
    let launch = Launch::new("127.0.0.1:1".into(), &[("flash-gateway", gateway), ("claude", AGENT)]);
    launch.run(&["claude", "--print-env", "--no-autostart"]).expect(69, "", "no daemon is listening");
    let daemon = launch.home.daemon();
    let ran = launch.run(&["claude", "--ctx", "40", "--", "x"]);
    ran.expect(7, &ran.stdout, "warning: this model's context holds 40 tokens");
    assert!(ran.stdout.contains("ANTHROPIC_BASE_URL=http://127.0.0.1:4711\n"), "{ran:?}");
    assert!(ran.stdout.contains("CLAUDE_CODE_MAX_CONTEXT_TOKENS=40\n"), "{ran:?}");
    let told = fs::read_to_string(launch.home.path("gateway")).expect("it ran");
    assert!(told.starts_with("--host 127.0.0.1 --port 0 --socket") && told.ends_with("gone\n"), "{told}");
    assert!(fs::read_to_string(launch.home.path("home/log/gateway.log")).expect("a log").contains("a line of its log"));
    assert_eq!(daemon.seen.load.lock().expect("no panic")[0].context_length.as_deref(), Some("40"));
    let printed = launch.run(&["claude", "--print-env"]);
    printed.expect(0, &printed.stdout, "hint: no gateway listens on http://127.0.0.1:1 yet");
    assert!(printed.stdout.contains("CLAUDE_CODE_MAX_CONTEXT_TOKENS='40'\n"), "{printed:?}");
}

#[test]
fn signals_are_the_agents() {
    let gateway = "echo 'listening on http://127.0.0.1:4711' >&2; trap 'exit 0' TERM; while :; do sleep 0.02; done";
    let agent = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.02; done";
    let launch = Launch::new("127.0.0.1:1".into(), &[("flash-gateway", gateway), ("claude", agent)]);
    let _daemon = launch.home.daemon();
    let mut child = launch.command(&["claude", "-q"]).stdout(Stdio::piped()).spawn().expect("flashctl starts");
    let mut ready = [0; 6];
    child.stdout.as_mut().expect("piped").read_exact(&mut ready).expect("the agent runs");
    // A terminal would send it to the agent, too, which decides.
    send(&child, Signal::INT);
    send(&child, Signal::TERM);
    assert_eq!(child.wait().expect("flashctl ends").code(), Some(5));
}

#[test]
fn what_is_missing_is_named() {
    let launch = Launch::new("127.0.0.1:1".into(), &[]);
    launch.run(&["claude"]).expect(69, "", "hint: npm install -g @anthropic-ai/claude-code");
    launch.run(&["continue"]).expect(69, "", "there is no `cn` on PATH");
    let broken = Launch::new("127.0.0.1:1".into(), &[("claude", AGENT), ("flash-gateway", "echo 'flash-gateway: no luck' >&2; exit 78")]);
    let _daemon = broken.home.daemon();
    broken.run(&["claude", "-q"]).expect(1, "", "flash-gateway: no luck");
    Launch::new("ftp://x".into(), &[("claude", AGENT)]).run(&["claude"]).expect(78, "", "FLASH_HOST is `ftp://x`");
    let stranger = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = stranger.local_addr().expect("an address");
    thread::spawn(move || {
        for stream in stranger.incoming() {
            let mut stream = stream.expect("a connection");
            let _ = stream.read(&mut [0; 1000]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"status\":\"ok\"}");
        }
    });
    Launch::new(address.to_string(), &[("claude", AGENT)]).run(&["claude"]).expect(69, "", "is no flash-gateway");
}
