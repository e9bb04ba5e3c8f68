//! Listings, jobs and measurements, as tables and as JSON.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::Stdio,
    sync::atomic::Ordering::SeqCst,
};

use rustix::process::Signal;
use serde_json::Value;

use crate::{Home, send};

#[test]
fn listings_have_json_and_tables() {
    let home = Home::new();
    let _daemon = home.daemon();
    let models = home.run(&["models", "--json"]).json();
    assert_eq!((&models["models"][0]["name"], &models["models"][1]["fits"]), (&"tiny".into(), &"no".into()));
    let table = home.run(&["ls"]);
    assert!(
        table.stdout.starts_with("NAME")
            && table.stdout.contains("61.0 MB")
            && table.stdout.contains("broken  cannot be served: model.safetensors is truncated"),
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
    home.run(&["show", "tiny", "--template"]).expect(0, "{{ messages }}\n", "");
    home.run(&["show", "nope"]).expect(1, "", "hint: `flashctl models`");
    let shown = home.run(&["show", "--json"]).json();
    assert_eq!((&shown["name"], &shown["reasoning"], &shown["chat_template"]), (&"tiny".into(), &true.into(), &"{{ messages }}\n".into()));
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
fn models_are_copied_and_deleted() {
    let home = Home::new();
    let daemon = home.daemon();
    home.run(&["cp", "tiny", "tiny-2"]).expect(0, "copied tiny to /m/experts.flash, 4.0 kB\n", "copying 100%");
    home.run(&["cp", "tiny", "bad/name"]).expect(64, "", "no name for a model");
    home.run(&["rm", "tiny"]).expect(64, "", "tiny (61.0 MB, /m/tiny) is not deleted");
    home.run(&["rm", "TINY", "-y"]).expect(1, "", "hint: installed: tiny, broken");
    home.run(&["rm", "local", "--yes"]).expect(1, "", "no model is named exactly `local`");
    assert!(daemon.seen.removed.lock().expect("no panic").is_empty(), "nothing is deleted unasked or by half a name");
    home.run(&["rm", "tiny", "-y"]).expect(0, "deleted tiny, 61.0 MB\n", "");
    assert_eq!(*daemon.seen.removed.lock().expect("no panic"), ["/m/tiny"]);
}
