//! `/v1/chat/completions` end to end: transcripts, statuses, in-band errors, heartbeats.

use std::time::Duration;

use flash_proto::{
    code,
    v1::{self, loaded_model::State},
};
use serde_json::{Value, json};
use tonic::Status;

use crate::{
    Gateway,
    client::{Client, Reply, chat, request},
    expect,
    fake::{Fake, Step, accepted, done, reply, text},
};

fn body(extra: Value) -> Value {
    let mut body = json!({"model": "local", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// The transcript with what differs from run to run put aside, after a look that all chunks agree on it.
fn transcript(reply: &Reply) -> String {
    let text = reply.text();
    let first: Value = serde_json::from_str(text.lines().find_map(|line| line.strip_prefix("data: ")).expect("a chunk")).expect("JSON");
    let (id, created) = (first["id"].as_str().expect("an id"), first["created"].as_u64().expect("a time"));
    assert!(id.starts_with("chatcmpl-") && created > 1_700_000_000);
    text.replace(id, "chatcmpl-1").replace(&format!("\"created\":{created}"), "\"created\":0")
}

#[tokio::test]
async fn a_stream_is_the_recorded_one() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let logprob = v1::TokenLogprob {
        id: 5,
        token: "!".into(),
        logprob: -0.5,
        top: vec![v1::Alternative { id: 6, token: "?".into(), logprob: -1.5 }],
    };
    let mut with_logprobs = reply(&["Hello"]);
    with_logprobs.insert(
        2,
        Step::Send(v1::generate_event::Event::Text(v1::Text { text: "!".into(), logprobs: vec![logprob], ..v1::Text::default() })),
    );
    let mut cut_short = reply(&["Hello"]);
    *cut_short.last_mut().expect("steps") = Step::Send(done(v1::done::Finish::Length));
    for (name, extra, script) in [
        ("text.sse", json!({}), reply(&["Hello ", "from r", "ecorde", "r."])),
        ("usage.sse", json!({"stream_options": {"include_usage": true}}), reply(&["Hello ", "", "Zoë"])),
        ("logprobs.sse", json!({"logprobs": true, "top_logprobs": 1}), with_logprobs),
        ("length.sse", json!({"max_tokens": 5}), cut_short),
    ] {
        fake.script(script);
        let mut body = body(extra);
        body["stream"] = true.into();
        let reply = chat(gateway.address, &body).await;
        assert_eq!(reply.status, 200);
        for (header, value) in [
            ("content-type", "text/event-stream; charset=utf-8"),
            ("cache-control", "no-cache, no-transform"),
            ("x-accel-buffering", "no"),
            ("x-flash-model", "flash-tiny-moe"),
        ] {
            assert_eq!(reply.header(header), Some(value));
        }
        assert!(reply.header("openai-model").is_none() && reply.header("openai-processing-ms").is_some());
        expect(name, &transcript(&reply));
    }
}

#[tokio::test]
async fn a_completion_has_the_documented_shape() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    fake.script(reply(&["Hello ", "world"]));
    let reply = chat(gateway.address, &body(json!({"model": "FLASH-tiny-moe:latest"}))).await;
    assert_eq!(
        (reply.status, reply.header("content-type"), reply.header("x-flash-model")),
        (200, Some("application/json"), Some("flash-tiny-moe"))
    );
    let mut body = reply.json();
    assert!(body["id"].as_str().expect("an id").starts_with("chatcmpl-"));
    (body["id"], body["created"]) = (json!("chatcmpl-1"), json!(0));
    expect("completion.json", &(serde_json::to_string_pretty(&body).expect("JSON") + "\n"));
    assert_eq!(fake.requests()[0].model, "flash-tiny-moe");
}

#[tokio::test]
async fn the_daemon_hears_who_asks_and_for_what() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    for (headers, client) in [(&[("x-request-id", "abc-1")][..], "127.0.0.1"), (&[("x-api-key", "secret")][..], "key-2bb80d53")] {
        fake.script(reply(&["x"]));
        let body = body(json!({"temperature": 0.5, "mystery": 1})).to_string();
        let reply = crate::client::call(gateway.address, "POST", "/v1/chat/completions", headers, body.as_bytes()).await;
        let heard = fake.requests().pop().expect("a request");
        assert_eq!((heard.client.as_str(), Some(heard.request_id.as_str())), (client, reply.header("x-request-id")));
        assert_eq!((heard.model.as_str(), heard.sampling.expect("sampling").temperature), ("", Some(0.5)));
    }
    let metrics = crate::client::get(gateway.address, "/metrics").await;
    assert!(metrics.text().contains("flash_unknown_fields_total{field=\"mystery\"} 2"), "{}", metrics.text());
}

#[tokio::test]
async fn refusals_are_statuses_for_streams_too() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let context = "This model's maximum context length is 2048 tokens. However, your messages resulted in 3000 tokens.";
    for (status, http, code, retry_after) in [
        (code::status(code::CONTEXT_LENGTH, context), 400, "context_length_exceeded", None),
        (code::with_param(code::status(code::INVALID_VALUE, "no"), "logit_bias"), 400, "invalid_value", None),
        (code::status(code::MODEL_NOT_FOUND, "no"), 404, "model_not_found", None),
        (code::status(code::CHAT_TEMPLATE, "no"), 422, "chat_template_error", None),
        (code::with_retry_after(code::status(code::QUEUE_FULL, "no"), 4), 429, "queue_full", Some("4")),
        (code::status(code::ENGINE, "no"), 500, "engine_error", None),
        (code::status(code::MODEL_LOADING, "no"), 503, "model_loading", Some("5")),
        (code::status(code::INSUFFICIENT_MEMORY, "no"), 503, "insufficient_memory", Some("10")),
    ] {
        for stream in [false, true] {
            fake.script([Step::Refuse(status.clone())]);
            let reply = chat(gateway.address, &body(json!({"stream": stream}))).await;
            assert_eq!(reply.error(), (http, code.to_owned()));
            assert_eq!(reply.header("retry-after"), retry_after);
            assert_eq!(reply.json()["error"]["message"], status.message());
        }
    }
    let reply = chat(gateway.address, &body(json!({"model": "gpt-9"}))).await;
    assert_eq!(reply.error(), (404, "model_not_found".to_owned()));
    assert_eq!(reply.json()["error"]["param"], "model");
    assert!(reply.text().contains("org/big, flash-tiny-moe"), "{}", reply.text());
}

#[tokio::test]
async fn an_error_after_the_first_byte_is_in_the_stream() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let failed = v1::Failed { code: code::ENGINE.into(), message: "an expert could not be read".into() };
    for last in [
        vec![Step::Send(v1::generate_event::Event::Failed(failed))],
        vec![Step::Refuse(code::status(code::ENGINE, "an expert could not be read"))],
    ] {
        let script = |first: &[v1::generate_event::Event]| [first.iter().cloned().map(Step::Send).collect(), last.clone()].concat();
        fake.script(script(&[accepted(), text("Hel")]));
        let reply = chat(gateway.address, &body(json!({"stream": true}))).await;
        assert_eq!(reply.status, 200);
        let ending = concat!(
            r#"data: {"error":{"message":"an expert could not be read","type":"server_error","param":null,"code":"engine_error"}}"#,
            "\n\ndata: [DONE]\n\n"
        );
        assert!(reply.text().contains(r#"{"content":"Hel"}"#) && reply.text().ends_with(ending), "{}", reply.text());
        fake.script(script(&[accepted(), text("Hel")]));
        assert_eq!(chat(gateway.address, &body(json!({}))).await.error(), (500, "engine_error".to_owned()));
    }
}

#[tokio::test]
async fn a_long_wait_is_committed_and_kept_alive() {
    let fake = Fake::start();
    let brief = Duration::from_millis(20);
    let gateway = Gateway::with(&fake, |config| (config.timing.commit, config.timing.heartbeat) = (brief, brief)).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    fake.script([vec![Step::Wait(gate)], reply(&["x"])].concat());
    let mut client = Client::open(gateway.address).await;
    client.write(&request("POST", "/v1/chat/completions", &[], body(json!({"stream": true})).to_string().as_bytes())).await;
    let head = client.until(": keepalive").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    client.until(": keepalive").await;
    open.send(true).expect("the fake waits");
    let rest = client.until("[DONE]").await;
    assert!(rest.contains(r#""delta":{"role":"assistant","content":""}"#) && rest.contains(r#"{"content":"x"}"#), "{rest}");
    // What fails after the 200 fails in the stream; the first sign of life comes with it, however long the next one takes.
    let gateway = Gateway::with(&fake, |config| config.timing.commit = brief).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    fake.script([Step::Wait(gate), Step::Refuse(Status::unavailable("gone"))]);
    let mut client = Client::open(gateway.address).await;
    client.write(&request("POST", "/v1/chat/completions", &[], body(json!({"stream": true})).to_string().as_bytes())).await;
    client.until(": keepalive").await;
    open.send(true).expect("the fake waits");
    let rest = client.until("[DONE]").await;
    assert!(rest.contains(r#""code":"daemon_unavailable""#), "{rest}");
}

#[tokio::test]
async fn patience_with_queue_and_loading_ends() {
    let fake = Fake::start();
    let brief = Duration::from_millis(20);
    let gateway =
        Gateway::with(&fake, |config| (config.timing.load_wait, config.timing.queue_wait) = (Duration::from_secs(30), brief)).await;
    fake.script([Step::Send(accepted()), Step::Send(v1::generate_event::Event::Progress(v1::Progress::default())), Step::Hang]);
    assert_eq!(chat(gateway.address, &body(json!({}))).await.error(), (504, "queue_timeout".to_owned()));
    fake.gone(1).await;
    // Before the daemon accepts it, a request waits for its model to be loaded, or for what others ask of another one.
    for (model, state, patient, expected) in [
        ("flash-tiny-moe", State::Loading, "queue", (503, "model_loading")),
        ("flash-tiny-moe", State::Busy, "load", (504, "queue_timeout")),
        ("another", State::Loading, "load", (504, "queue_timeout")),
    ] {
        let gateway = Gateway::with(&fake, |config| match patient {
            "queue" => config.timing.load_wait = brief,
            _ => config.timing.queue_wait = brief,
        })
        .await;
        let model = v1::LoadedModel { id: model.into(), state: state.into(), ..Default::default() };
        fake.snapshot(v1::Snapshot { model: Some(model), ..Default::default() });
        fake.script([Step::Hang]);
        let reply = chat(gateway.address, &body(json!({"model": "flash-tiny-moe"}))).await;
        assert_eq!(reply.error(), (expected.0, expected.1.to_owned()));
        assert_eq!(reply.header("x-flash-model"), Some("flash-tiny-moe"), "whatever became of it");
        let asked = fake.requests().len();
        fake.gone(asked).await;
    }
}

#[tokio::test]
async fn fast_text_arrives_whole_when_joined() {
    let fake = Fake::start();
    let gateway = Gateway::with(&fake, |config| config.timing.coalesce = Duration::from_millis(20)).await;
    let words: Vec<String> = (0..200).map(|number| format!("{number} ")).collect();
    fake.script(reply(&words.iter().map(String::as_str).collect::<Vec<_>>()));
    let reply = chat(gateway.address, &body(json!({"stream": true}))).await;
    let mut joined = String::new();
    for line in reply.text().lines().filter_map(|line| line.strip_prefix("data: {")) {
        let chunk: Value = serde_json::from_str(&format!("{{{line}")).expect("JSON");
        joined.push_str(chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
    }
    assert_eq!(joined, words.concat());
    assert!(reply.text().ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn strict_fields_refuse_what_is_unknown() {
    let fake = Fake::start();
    let gateway = Gateway::with(&fake, |config| config.strict_fields = true).await;
    let reply = chat(gateway.address, &body(json!({"mystery": 1}))).await;
    assert_eq!((reply.error(), &reply.json()["error"]["param"]), ((400, "unsupported_value".to_owned()), &json!("mystery")));
    fake.script(reply_ok());
    assert_eq!(chat(gateway.address, &body(json!({"user": "u"}))).await.status, 200);
}

fn reply_ok() -> Vec<Step> {
    reply(&["ok"])
}
