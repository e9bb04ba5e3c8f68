//! The gateway in the foreground, services, completions, doctor.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::Stdio,
};

use rustix::process::Signal;
use serde_json::Value;

use crate::{Home, Ran, send};

#[test]
fn serve_runs_the_gateway_and_forwards_signals() {
    let home = Home::new();
    let _daemon = home.daemon();
    let gateway = "[ \"$4\" = 7 ] && { echo 'error: taken'; echo 'hint: another'; } >&2 && exit 75; trap 'exit 0' TERM INT; echo \"$* key=$FLASH_API_KEY\" >&2; while :; do sleep 0.02; done";
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
    assert_eq!(String::from_utf8_lossy(&busy.stderr), "error: taken\nhint: another\n");
    let busy = Ran::of(home.command(&flashctl, &["serve", "--port", "7", "--json"]).output().expect("flashctl runs"));
    assert_eq!((busy.code, busy.stderr.as_str()), (Some(75), "error: taken\nhint: another\n"));
    assert_eq!(busy.json()["error"], serde_json::json!({"code": "gateway", "message": "taken", "hint": "another"}));
    let mute = home.install(&[("flash-gateway", "echo 'of its log' >&2; exit 70")]);
    let mute = Ran::of(home.command(&mute, &["serve", "--json"]).output().expect("flashctl runs"));
    assert!(mute.json()["error"]["message"].as_str().is_some_and(|text| text.contains("exit status: 70")), "{mute:?}");
    home.install(&[("flash-gateway", gateway)]);
    let run =
        |parallel| Ran::of(home.command(&flashctl, &["serve", "--port", "7", "--parallel", parallel]).output().expect("flashctl runs"));
    run("4").expect(64, "", "computes up to 2 requests together, not 4\nhint: `flashctl daemon stop` first");
    assert_eq!(run("2").code, Some(75), "as it runs already");
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
    assert!(ran.stdout.contains("memory    auto   default") && ran.stdout.contains("ok   config: "), "{ran:?}");
    let report = Ran::of(home.command(&flashctl, &["doctor", "--json"]).output().expect("flashctl runs")).json();
    assert_eq!((&report["ok"], &report["settings"][0]["origin"]), (&Value::Bool(false), &"default".into()));
    let flashctl = home.install(&[("flashd", "echo 'flashd: flash.toml: no such setting: memroy' >&2; exit 78"), ("flash-gateway", "")]);
    fs::write(home.path("home"), "").expect("written");
    let ran = Ran::of(home.command(&flashctl, &["doctor"]).output().expect("flashctl runs"));
    for bad in ["BAD  config: flash.toml: no such setting: memroy\n     fix: correct it", "is not a folder\n     fix: set FLASH_HOME"] {
        assert!(ran.code == Some(1) && ran.stdout.contains(bad), "{bad}: {ran:?}");
    }
}

#[test]
fn a_restart_that_would_fail_stops_nothing() {
    let home = Home::new();
    let _daemon = home.daemon();
    let flashd = "[ \"$*\" = --check-config ] && echo 'flashd: flash.toml: no such setting: memroy' >&2; exit 78";
    let flashctl = home.install(&[("flashd", flashd)]);
    let run = |args: &[&str]| Ran::of(home.command(&flashctl, args).output().expect("flashctl runs"));
    // A fake daemon that is told to stop goes on: that would exit 75, after a while.
    run(&["daemon", "restart", "--grace", "0"]).expect(78, "", "error: flash.toml: no such setting: memroy\nhint: no daemon was stopped");
}

#[test]
fn settings_are_changed_in_a_file_that_stays_good() {
    let home = Home::new();
    let _daemon = home.daemon();
    // As flashd does, as far as this test goes.
    let flashd = "[ \"$1\" = --check-config ] || exit 1; grep -q memroy \"$2\" && { echo \"flashd: $2: no such setting: memroy\" >&2; exit 78; }; exit 0";
    let flashctl = home.install(&[("flashd", flashd)]);
    let run = |args: &[&str]| Ran::of(home.command(&flashctl, args).output().expect("flashctl runs"));
    let file = home.path("home/flash.toml");
    run(&["config", "path"]).expect(0, &format!("{}\n", file.display()), "");
    run(&["config", "set", "ctx", "4096", "-q"]).expect(0, "", "");
    fs::write(&file, "# mine\nctx = 4096 # tokens\n").expect("written");
    run(&["config", "set", "expert-cache", "25%"]).expect(0, "", "hint: it takes effect");
    run(&["config", "set", "ctx", "8192", "-q"]).expect(0, "", "");
    run(&["config", "set", "socket", "/tmp/s"]).expect(64, "", "hint: set FLASH_SOCKET");
    run(&["config", "set", "memroy", "1GiB"]).expect(64, "", &format!("{}: no such setting: memroy", file.display()));
    assert_eq!(fs::read_to_string(&file).expect("a file"), "# mine\nctx = 8192\nexpert_cache = \"25%\"\n");
    run(&["config", "unset", "ctx", "-q"]).expect(0, "", "");
    run(&["config", "set", "model", "nope"]).expect(0, "", "warning: no model named `nope` is installed; available: tiny");
    run(&["config", "set", "model", "tiny", "-q"]).expect(0, "", "");
    run(&["config", "unset", "model", "-q"]).expect(0, "", "");
    run(&["config", "unset", "ctx"]).expect(64, "", "does not set ctx");
    fs::write(&file, "ctx = = 1\n").expect("written");
    run(&["config", "set", "ctx", "1"]).expect(78, "", "hint: mend it");
    assert_eq!(fs::read_to_string(&file).expect("a file"), "ctx = = 1\n");
    assert_eq!(fs::read_dir(home.path("home")).expect("a folder").count(), 1, "no draft is left");
    run(&["config", "get", "memory"]).expect(0, "auto\n", "");
    run(&["config", "get", "memroy"]).expect(64, "", "hint: there are memory");
    assert_eq!(run(&["config", "get", "--json"]).json()["settings"][0]["origin"], "default");
}
