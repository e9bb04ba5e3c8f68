//! One prompt, one answer: what goes out, what comes back, and every way it may end.

use std::{fs, io::Write, os::unix::fs::PermissionsExt, process::Stdio, sync::atomic::Ordering::SeqCst};

use flash_proto::v1::{Format, Infill, format, generate_request};
use rustix::process::Signal;
use serde_json::Value;

use crate::{Home, Ran, send, streaming};

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
    home.run(&["run", "local", "int f(", "--suffix", "}"]).expect(0, "Once upon a time.\n", "");
    home.run(&["run", "local", "hi", "-n", "-1", "--seed", "-1", "-k", "-1"]).expect(0, "Once upon a time.\n", "");
    let chat = home.run(&["run", "local", "hi", "--json"]).json();
    assert_eq!(chat["choices"][0]["message"]["content"], "Once upon a time.");
    assert_eq!(chat["usage"]["total_tokens"], 5);
    let streamed = home.run(&["run", "local", "hi", "--json", "--stream"]);
    let chunks: Vec<Value> = streamed.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!((text.as_str(), streamed.code, streamed.stderr.as_str()), ("Once upon a time.", Some(0), ""));
    assert!(chunks.len() > 2 && chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["model"] == chat["model"]));
    assert_eq!(chunks.last().expect("several")["usage"], chat["usage"]);
    home.run(&["run", "local", "hi", "--stream"]).expect(2, "", "--json");

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
    let whatever = (requests[8].max_tokens, requests[8].sampling.as_ref().and_then(|sampling| sampling.top_k));
    assert_eq!(whatever, (Some(u32::MAX), Some(0)));
    let gap = Infill { prefix: "int f(".into(), suffix: "}".into() };
    assert_eq!(requests[7].prompt, Some(generate_request::Prompt::Infill(gap)));
}

#[test]
fn a_socket_may_be_a_host() {
    let home = Home::new();
    let _daemon = home.daemon();
    let mut command = home.flashctl(&["run", "local", "hi"]);
    command.env_remove("FLASH_SOCKET").env("FLASH_HOST", format!("unix:{}", home.path("run/sock").display()));
    Ran::of(command.output().expect("flashctl runs")).expect(0, "Once upon a time.\n", "");
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
fn a_format_is_json_or_a_schema() {
    let home = Home::new();
    let daemon = home.daemon();
    let schema = home.path("person.json");
    fs::write(&schema, r#"{"type":"object"}"#).expect("written");
    let schema = schema.display().to_string();
    home.run(&["run", "local", "x", "--format", "json"]).expect(0, "Once upon a time.\n", "");
    home.run(&["run", "local", "x", "--format", &schema]).expect(0, "Once upon a time.\n", "");
    home.run(&["run", "local", "x", "--format", r#" {"type": "array"}"#]).expect(0, "Once upon a time.\n", "");
    home.run(&["run", "local", "x", "--format", "missing.json"]).expect(66, "", "cannot read missing.json");
    home.run(&["run", "local", "x", "--format", "{bad"]).expect(64, "", "{bad is no JSON schema: key must be a string");
    let requests = daemon.seen.generate.lock().expect("no panic");
    let formats: Vec<_> = requests.iter().map(|request| request.format.clone().expect("a format")).collect();
    let schema = |text: &str| format::Kind::JsonSchema(text.into());
    let kinds = [format::Kind::JsonObject(true), schema(r#"{"type":"object"}"#), schema(r#" {"type": "array"}"#)];
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
    home.run(&["run", "local", "forever", "--timeout", "300ms", "--no-stream"]).expect(124, "", "no complete answer within 300 ms");
    let late = home.run(&["run", "local", "forever", "--timeout", "2s"]);
    assert!(late.stdout.ends_with("tick ") && late.stderr.starts_with("\nerror: no complete answer"), "{}", late.stderr);
    let ran = home.run(&["run", "local", "refuse", "--json"]);
    let error = &ran.json()["error"];
    assert_eq!((error["code"].as_str(), error["hint"].as_str()), (Some("queue_full"), Some("try again in 7 s")));
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(75), ""));
    let broken = home.run(&["run", "local", "fail", "--json", "--stream"]);
    assert_eq!(broken.code, Some(1));
    assert!(broken.stdout.lines().last().is_some_and(|last| last.starts_with(r#"{"error":{"code":"#)), "{broken:?}");
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
    for args in [&["run", "local", "hi"][..], &["models", "--json"], &["--help"], &["help", "run"], &["--version"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let output = home.flashctl(args).stdout(full).output().expect("flashctl runs");
        Ran::of(output).expect(73, "", "cannot write the output");
    }
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = home.flashctl(&["show", "nope", "--json"]).stdout(full).output().expect("flashctl runs");
    Ran::of(output).expect(1, "", "no model named `nope`");
    for args in [&["--help"][..], &["models", "--json"]] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = home.flashctl(args).stdout(writer).output().expect("flashctl runs");
        Ran::of(output).expect(0, "", "");
    }
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
    assert!(
        ran.stderr.contains("the daemon went away while it was answering")
            && ran.stderr.contains("why: on standard error, where it was started;"),
        "{ran:?}"
    );
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
fn a_chat_may_begin_with_a_file() {
    let home = Home::new();
    let daemon = home.daemon();
    fs::write(home.path("notes"), "a note\n").expect("written");
    let notes = home.path("notes").display().to_string();
    home.run_with(&["chat", "-f", &notes], "What is it?\nAnd now?\n").expect(0, &"Once upon a time.\n".repeat(2), "/40 tokens]");
    home.run(&["chat", "-f", "nope"]).expect(66, "", "cannot read nope");
    let requests = daemon.seen.generate.lock().expect("no panic");
    let last = |prompt: &Option<generate_request::Prompt>| match prompt {
        Some(generate_request::Prompt::Chat(chat)) => chat.messages.last().map(|message| message.content.clone()),
        other => panic!("{other:?}"),
    };
    let asked: Vec<_> = requests.iter().filter_map(|request| last(&request.prompt)).collect();
    assert_eq!(asked, ["What is it?\n\na note\n", "And now?"]);
}

#[test]
fn a_conversation_goes_on_where_it_was_left() {
    let home = Home::new();
    let daemon = home.daemon();
    home.run(&["chat", "-c"]).expect(66, "", "hint: `flashctl chat` begins one");
    home.run(&["chat", "--session", "../x"]).expect(64, "", "no name for a conversation");
    let begun = ["chat", "--session", "pip", "-s", "Be brief.", "-t", "0.5"];
    home.run_with(&begun, "one\nfail\n").expect(0, "Once upon a time.\nOnce\n", "read failed");
    let file = |name: &str| home.path(&format!("home/sessions/{name}.json"));
    let users = |name: &str| {
        let saved: Value = serde_json::from_str(&fs::read_to_string(file(name)).expect("a session")).expect("JSON");
        let turns = saved["turns"].as_array().expect("turns").iter().map(|turn| turn["user"].as_str().expect("text").to_owned());
        (turns.collect::<Vec<_>>().join(" "), saved["unsent"].as_str().map(str::to_owned))
    };
    assert_eq!(fs::metadata(file("pip")).expect("a file").permissions().mode() & 0o777, 0o600);
    assert_eq!(users("pip"), ("one".into(), Some("fail".into())), "what was not answered waits to be sent again");
    let on = home.run_with(&["chat", "-c"], "/undo\ntwo\n/save pip-2\nthree\n/load pip\n/load nobody\n/load\n/save pip-2\n");
    assert!(on.code == Some(0) && on.stdout.contains("LAST USED"), "{on:?}");
    for told in
        ["forgot: fail", "kept as pip-2;", "pip: 2 turns, the last: two", "no conversation nobody", "there is a conversation pip-2 already"]
    {
        assert!(on.stderr.contains(told), "{told} is not in {on:?}");
    }
    assert_eq!((users("pip"), users("pip-2")), (("one two".into(), None), ("one two three".into(), None)));
    let cleared = home.run_with(&["chat", "--session", "pip"], "/clear\nsomething else\n");
    assert!(cleared.stderr.contains("forgotten; pip stays as it was"), "{cleared:?}");
    assert_eq!(users("pip").0, "one two");
    fs::remove_file(file("chat-1")).expect("what was said next is another conversation");
    home.run_with(&["chat"], "nothing is kept of a script's\n").expect(0, "Once upon a time.\n", "/40 tokens]");
    assert_eq!(fs::read_dir(home.path("home/sessions")).expect("a folder").count(), 2);
    fs::write(file("bad"), "{").expect("written");
    home.run(&["chat", "--session", "bad"]).expect(64, "", "bad.json is no conversation");

    let requests = daemon.seen.generate.lock().expect("no panic");
    let Some(generate_request::Prompt::Chat(chat)) = &requests[2].prompt else { panic!("a chat") };
    let said: Vec<&str> = chat.messages.iter().map(|message| message.content.as_str()).collect();
    assert_eq!(said, ["Be brief.", "one", "Once upon a time.", "two"]);
    assert_eq!(requests[2].sampling.as_ref().and_then(|sampling| sampling.temperature), Some(0.5));
}

#[test]
fn a_chat_outlives_files_that_cannot_be_written() {
    let home = Home::new();
    let daemon = home.daemon();
    fs::write(home.path("home"), "in the way of its folder").expect("written");
    let ran = home.run_with(&["chat"], "one\n/save pip\n/edit\ntwo\n");
    ran.expect(0, &"Once upon a time.\n".repeat(2), "cannot write");
    assert!(ran.stderr.contains("sessions/pip.json") && ran.stderr.contains("message-"), "{ran:?}");
    let requests = daemon.seen.generate.lock().expect("no panic");
    let Some(generate_request::Prompt::Chat(chat)) = &requests[1].prompt else { panic!("a chat") };
    assert_eq!(chat.messages.len(), 3, "what was said before is still there");
}

#[test]
fn a_chat_takes_back_what_it_has_set_in_the_daemon() {
    let home = Home::new();
    let daemon = home.daemon();
    let typed = "/set ctx 16\n/set ctx default\n/set keep_alive 1h\n/set expert_cache 25%\n/set ctx many\n/set ctx auto\n/reset\n/reset\n/show params\n";
    let ran = home.run_with(&["chat"], typed);
    assert!(ran.code == Some(0) && ran.stderr.contains("`many` is no value for ctx"), "{ran:?}");
    assert!(ran.stdout.contains("expert_cache        default") && ran.stdout.contains("ctx                 default"), "{ran:?}");
    let loads = daemon.seen.load.lock().expect("no panic");
    let asked: Vec<_> =
        loads.iter().map(|load| [&load.context_length, &load.keep_alive, &load.expert_cache].map(Option::as_deref)).collect();
    let expected = [
        [None, None, None],
        [Some("16"), None, None],
        [Some("default"), None, None],
        [None, Some("1h"), None],
        [None, Some("1h"), Some("25%")],
        [Some("auto"), Some("1h"), Some("25%")],
        [Some("default"), Some("default"), Some("default")],
    ];
    assert_eq!(asked, expected);
}

#[test]
fn a_reset_goes_back_to_the_command_line() {
    let home = Home::new();
    let daemon = home.daemon();
    let typed = "/set seed 8\n/set temperature 1\n/format json\n/think high\n/set ctx 16\n/set expert_cache 25%\nbefore\n/reset\nafter\n";
    let ran = home.run_with(&["chat", "--seed", "7", "-n", "20", "--no-think", "--ctx", "32", "-s", "Be brief."], typed);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let requests = daemon.seen.generate.lock().expect("no panic");
    let sent = requests.iter().map(|request| {
        let Some(generate_request::Prompt::Chat(chat)) = &request.prompt else { panic!("a chat") };
        let sampling = request.sampling.clone().unwrap_or_default();
        (chat.messages.len(), chat.template_kwargs_json.contains("high"), request.format.is_some(), request.max_tokens, sampling)
    });
    let sent: Vec<_> = sent.map(|(n, high, format, tokens, s)| (n, high, format, tokens, s.seed, s.temperature)).collect();
    assert_eq!(sent, [(2, true, true, Some(20), Some(8), Some(1.0)), (1, false, false, Some(20), Some(7), None)]);
    let loads = daemon.seen.load.lock().expect("no panic");
    let last = loads.last().map(|load| [&load.context_length, &load.expert_cache, &load.keep_alive].map(Option::as_deref));
    assert_eq!(last, Some([Some("32"), Some("default"), None]));
}

#[test]
fn a_chat_has_ways_to_say_more() {
    let home = Home::new();
    let daemon = home.daemon();
    fs::write(home.path("notes.txt"), "a note\n").expect("written");
    fs::write(home.path("schema.json"), "{}").expect("written");
    let typed = "/file ~/notes.txt\nRead this\n/think high\n/format ~/schema.json\nnext\n/format off\n/think off\n/think\n/edit\n/file missing\n/model\n\
                 /show params\n/show template\n/copy\n/set ctx\n/think maybe\n";
    home.install(&[("fix", "[ \"$1\" = --now ] && sed s/next/edited/ \"$2\" > \"$2.new\" && mv \"$2.new\" \"$2\"")]);
    let mut command = home.flashctl(&["chat"]);
    // A command line, as in every other program.
    command
        .env("EDITOR", format!("{} --now", home.path("bin/fix").display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("flashctl starts");
    child.stdin.take().expect("piped").write_all(typed.as_bytes()).expect("written");
    let ran = Ran::of(child.wait_with_output().expect("flashctl ends"));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for told in [
        "~/notes.txt (7 B) goes with the next message",
        "thinking: high",
        "answers keep to the schema",
        "answers may be anything",
        "thinking: off",
        "cannot read missing",
        "no clipboard",
        "/set ctx takes a value",
        "/think takes one of on, off",
    ] {
        assert!(ran.stderr.contains(told), "{told} is not in {ran:?}");
    }
    assert!(ran.stdout.contains("tiny · 4-bit g64") && ran.stdout.contains("{{ messages }}") && ran.stdout.contains("top_k"), "{ran:?}");
    let requests = daemon.seen.generate.lock().expect("no panic");
    let sent: Vec<_> = requests
        .iter()
        .map(|request| match &request.prompt {
            Some(generate_request::Prompt::Chat(chat)) => {
                (chat.messages.last().expect("a message").content.as_str(), chat.template_kwargs_json.as_str(), request.format.is_some())
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let high = r#"{"enable_thinking":true,"reasoning_effort":"high"}"#;
    let off = r#"{"enable_thinking":false}"#;
    assert_eq!(sent, [("Read this\n\na note\n", "", false), ("next", high, true), ("edited", off, false)]);
    assert_eq!(fs::read_dir(home.path("home")).expect("a folder").count(), 0, "the edited draft is gone");
}
