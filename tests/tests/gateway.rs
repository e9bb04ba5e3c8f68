//! The real gateway before the real daemon: what an OpenAI client sees, down to the bytes, and what it must survive.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use flash_tests::{
    daemon::{Daemon, Gateway, Home, wait_until},
    http::{Stream, get, post, post_bytes, send},
    tiny_model::{Spec, TinyModel},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const JSON: (&str, &str) = ("Content-Type", "application/json");

struct Served {
    gateway: Gateway,
    daemon: Daemon,
    home: Home,
}

fn served(args: &[&str]) -> Result<Served> {
    let home = Home::new()?;
    TinyModel::generate(Spec::default()).write(&home.models().join("tiny"))?;
    let daemon = home.daemon(&[])?;
    let gateway = home.gateway(args)?;
    Ok(Served { gateway, daemon, home })
}

fn body(edit: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0});
    for (key, value) in edit.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    body
}

fn running(address: &str) -> Result<f64> {
    let metrics = String::from_utf8(get(address, "/metrics")?.body)?;
    let line = metrics.lines().find(|line| line.starts_with("flash_requests_running")).context("flash_requests_running")?;
    line.rsplit(' ').next().context("a value")?.parse().context("a number")
}

#[test]
fn a_completion_with_and_without_streaming() -> Result<()> {
    let served = served(&[])?;
    let address = &served.gateway.address;
    let whole = post(address, CHAT, &body(json!({})))?;
    assert_eq!(whole.status, 200, "{}", String::from_utf8_lossy(&whole.body));
    assert_eq!(whole.header("x-flash-model"), Some("tiny"));
    assert!(whole.header("x-request-id").is_some_and(|id| id.starts_with("req_")));
    let whole = whole.json()?;
    let choice = &whole["choices"][0];
    assert_eq!((whole["object"].as_str(), choice["finish_reason"].as_str()), (Some("chat.completion"), Some("length")));
    assert_eq!(whole["usage"]["completion_tokens"], 8);
    let text = choice["message"]["content"].as_str().context("content")?;

    let request = body(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let mut stream = Stream::open(address, "POST", CHAT, &[JSON], request.to_string().as_bytes())?;
    assert_eq!(stream.status, 200);
    let chunks = stream.events()?;
    assert_eq!(stream.event()?, None, "nothing after [DONE]");
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let streamed: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(streamed, text, "both ways give the same text");
    let last = chunks.last().context("chunks")?;
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(8)), "the usage chunk comes last");
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk"));
    let finishes: Vec<&Value> =
        chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).filter(|finish| !finish.is_null()).collect();
    assert_eq!(finishes, ["length"]);

    let models = get(address, "/v1/models")?.json()?;
    assert!(models["data"].as_array().context("data")?.iter().any(|model| model["id"] == "tiny"), "{models}");
    assert_eq!(get(address, "/v1/models/tiny")?.json()?["id"], "tiny");
    assert_eq!(get(address, "/readyz")?.status, 200);
    Ok(())
}

/// A client that goes away frees its slot, streaming or waiting for the whole.
#[test]
fn a_client_that_leaves_frees_its_slot() -> Result<()> {
    let served = served(&[])?;
    let address = &served.gateway.address;
    let mut endless = body(json!({"stream": true}));
    endless["max_tokens"] = Value::Null;
    let mut stream = Stream::open(address, "POST", CHAT, &[JSON], endless.to_string().as_bytes())?;
    for _ in 0..3 {
        stream.event()?.context("it streams")?;
    }
    wait_until("it runs", || running(address).is_ok_and(|running| running == 1.0))?;
    drop(stream);
    wait_until("the slot is free", || running(address).is_ok_and(|running| running == 0.0))?;

    endless["stream"] = json!(false);
    let bytes = endless.to_string();
    let mut connection = std::net::TcpStream::connect(address)?;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{bytes}",
        bytes.len()
    );
    std::io::Write::write_all(&mut connection, head.as_bytes())?;
    wait_until("it runs", || running(address).is_ok_and(|running| running == 1.0))?;
    drop(connection);
    wait_until("the slot is free", || running(address).is_ok_and(|running| running == 0.0))?;
    let stats = tokio::runtime::Runtime::new()?.block_on(async { served.daemon.client().await?.stats().await })?;
    let requests = stats.requests.context("requests")?;
    assert_eq!((requests.cancelled, requests.finished), (2, 0), "neither came to its own end");
    Ok(())
}

#[test]
fn bad_bodies_are_answered_and_the_next_request_is_served() -> Result<()> {
    let served = served(&[])?;
    let address = &served.gateway.address;
    let valid = body(json!({})).to_string();
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let huge = format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"{}\"}}]}}", "x".repeat(33 << 20));
    let tool = |i| json!({"type": "function", "function": {"name": format!("f{i}"), "parameters": {"type": "object"}}});
    let tools = |count: usize| body(json!({"tools": (0..count).map(tool).collect::<Vec<_>>()}));
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        ("nothing", Vec::new(), 400, "invalid_json"),
        ("half an object", valid.as_bytes()[..20].to_vec(), 400, "invalid_json"),
        ("trailing bytes", format!("{valid}]").into_bytes(), 400, "invalid_json"),
        (
            "invalid UTF-8",
            valid.replace("Hello", "H\u{1}llo").into_bytes().into_iter().map(|b| if b == 1 { 0xff } else { b }).collect(),
            400,
            "invalid_json",
        ),
        ("10,000 deep", deep.into_bytes(), 400, "invalid_json"),
        ("33 MiB", huge.into_bytes(), 413, "request_too_large"),
        ("an array", b"[]".to_vec(), 400, "invalid_value"),
        ("no messages", b"{\"model\":\"tiny\"}".to_vec(), 400, "missing_required_parameter"),
        ("a number for messages", body(json!({"messages": 3})).to_string().into_bytes(), 400, "invalid_value"),
        ("a temperature of 9", body(json!({"temperature": 9})).to_string().into_bytes(), 400, "invalid_value"),
        ("no tokens", body(json!({"max_tokens": 0})).to_string().into_bytes(), 400, "invalid_value"),
        ("a model that is not there", body(json!({"model": "gpt-9"})).to_string().into_bytes(), 404, "model_not_found"),
        (
            "more than the context",
            body(json!({"messages": [{"role": "user", "content": "x".repeat(40_000)}]})).to_string().into_bytes(),
            400,
            "context_length_exceeded",
        ),
        ("tools of a model that has none", tools(1).to_string().into_bytes(), 422, "chat_template_error"),
        // As an agent does, which knows what to make of it.
        ("more of them than the context", tools(500).to_string().into_bytes(), 400, "context_length_exceeded"),
    ];
    for (what, bytes, status, code) in cases {
        let started = Instant::now();
        let response = post_bytes(address, CHAT, &bytes).with_context(|| what.to_owned())?;
        let text = String::from_utf8_lossy(&response.body).into_owned();
        assert_eq!(response.status, status, "{what}: {text}");
        assert_eq!(response.code()?, code, "{what}: {text}");
        let error = &response.json()?["error"];
        assert!(["message", "type", "param", "code"].iter().all(|key| error.get(key).is_some()), "{what}: {text}");
        assert!(started.elapsed() < Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 1 }), "{what} took {:?}", started.elapsed());
        assert_eq!(post(address, CHAT, &body(json!({})))?.status, 200, "after {what}");
    }
    let status =
        |method, path, headers: &[(&str, &str)], body: &str| send(address, method, path, headers, body.as_bytes()).map(|r| r.status);
    assert_eq!(status("POST", CHAT, &[("Content-Type", "text/plain")], &valid)?, 415);
    assert_eq!(status("POST", "/v1/nowhere", &[JSON], &valid)?, 404);
    assert_eq!(status("GET", CHAT, &[], "")?, 405);
    assert_eq!(status("POST", CHAT, &[JSON, ("Origin", "https://evil.example")], &valid)?, 403);
    Ok(())
}

#[test]
fn keys_are_wanted_when_one_is_set() -> Result<()> {
    let served = served(&["--api-key", "sesame"])?;
    let address = &served.gateway.address;
    let bytes = body(json!({})).to_string();
    let ask = |headers: &[(&str, &str)]| send(address, "POST", CHAT, &[&[JSON], headers].concat(), bytes.as_bytes());
    assert_eq!(ask(&[])?.status, 401);
    let wrong = ask(&[("Authorization", "Bearer tahini")])?;
    assert_eq!((wrong.status, wrong.code()?.as_str(), wrong.header("www-authenticate")), (401, "invalid_api_key", Some("Bearer")));
    assert_eq!(ask(&[("Authorization", "Bearer sesame")])?.status, 200);
    assert_eq!(ask(&[("x-api-key", "sesame")])?.status, 200);
    assert_eq!(get(address, "/health")?.status, 200);
    Ok(())
}

#[test]
fn the_daemon_may_go_and_come_back() -> Result<()> {
    let mut served = served(&[])?;
    let address = served.gateway.address.clone();
    assert_eq!(post(&address, CHAT, &body(json!({})))?.status, 200);
    // In mid-stream: an error in the stream, then its end.
    let mut endless = body(json!({"stream": true}));
    endless["max_tokens"] = Value::Null;
    let mut stream = Stream::open(&address, "POST", CHAT, &[JSON], endless.to_string().as_bytes())?;
    stream.event()?.context("it streams")?;
    served.daemon.process.signal(Signal::KILL)?;
    served.daemon.process.code()?;
    let chunks = stream.events()?;
    assert!(chunks.last().is_some_and(|last| last["error"]["code"].is_string()), "{:?}", chunks.last());
    let down = post(&address, CHAT, &body(json!({})))?;
    assert_eq!((down.status, down.code()?.as_str()), (503, "daemon_unavailable"));
    assert!(down.header("retry-after").is_some());
    assert_eq!(get(&address, "/livez")?.status, 200);
    assert_eq!(get(&address, "/readyz")?.status, 503);
    served.daemon = served.home.daemon(&[])?;
    assert_eq!(post(&address, CHAT, &body(json!({})))?.status, 200);
    served.gateway.process.signal(Signal::TERM)?;
    assert_eq!(served.gateway.process.code()?, Some(0));
    Ok(())
}

/// A closed terminal, or whoever read its log and went: nothing is logged any more, and all else goes on.
#[test]
fn a_log_that_nobody_reads_ends_nothing() -> Result<()> {
    let home = Home::new()?;
    let mut gateway = home.command("flash-gateway").args(["--port", "0"]).env("FLASH_LOG", "debug").stderr(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(gateway.stderr.take().context("standard error")?).lines();
    let line = said.find(|line| line.as_ref().is_ok_and(|line| line.starts_with("listening on "))).context("it listens")??;
    drop(said);
    let address = line.trim_start_matches("listening on http://");
    let answered = (0..3).map(|_| get(address, "/livez").map(|response| response.status)).collect::<Result<Vec<_>>>();
    let pid = Pid::from_child(&gateway);
    kill_process(pid, Signal::TERM)?;
    assert_eq!((gateway.wait()?.code(), answered?), (Some(0), vec![200; 3]));
    Ok(())
}
