//! `/v1/messages` end to end: transcripts, Anthropic's errors, heartbeats, counting while everything is busy.

use std::time::Duration;

use flash_gateway::config::digest;
use flash_proto::{code, v1::generate_request::Prompt};
use serde_json::{Value, json};

use crate::{
    Gateway,
    client::{Client, Reply, call, post, request},
    expect,
    fake::{Fake, Step, accepted, calls, considered, reply, text},
    soon, timeless,
};

fn body(extra: Value) -> Value {
    let mut body = json!({"model": "claude-x", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]});
    body["model"] = "local".into();
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// Status and error type, after a look at the shape.
fn error(reply: &Reply) -> (u16, String) {
    let body = reply.json();
    assert_eq!(body.as_object().expect("an object").keys().collect::<Vec<_>>(), ["type", "error", "request_id"]);
    assert_eq!((body["request_id"].as_str(), reply.header("request-id")), (reply.header("request-id"), reply.header("x-request-id")));
    (reply.status, body["error"]["type"].as_str().expect("a type").to_owned())
}

#[tokio::test]
async fn a_stream_is_the_recorded_one() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    for (name, script) in
        [("messages_text.sse", reply(&["Hello ", "there."])), ("messages_thinking.sse", considered()), ("messages_tools.sse", calls())]
    {
        fake.script(script);
        let tools = json!([{"name": "get_weather", "input_schema": {"type": "object"}}]);
        let ask = body(json!({"stream": true, "thinking": {"type": "adaptive"}, "tools": tools}));
        let answer = post(gateway.address, "/v1/messages?beta=true", &ask).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/event-stream; charset=utf-8")));
        expect(name, &timeless(answer.text()));
    }
}

#[tokio::test]
async fn a_message_is_whole_without_a_stream() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    fake.script(considered());
    let answer = post(gateway.address, "/v1//v1/messages/", &body(json!({}))).await;
    let message = answer.json();
    assert_eq!((&message["type"], &message["stop_reason"]), (&json!("message"), &json!("end_turn")));
    // Thinking was not asked for.
    assert_eq!(message["content"], json!([{"type": "text", "text": "Hello there."}]));
    let usage = json!({"input_tokens": 8, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 5});
    assert_eq!((&message["usage"], answer.header("x-flash-model")), (&usage, Some("flash-tiny-moe")));
}

#[tokio::test]
async fn refusals_have_anthropics_shape() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let context = "This model's maximum context length is 2048 tokens. However, your messages resulted in 3000 tokens.";
    for (status, http, kind, retry_after) in [
        (code::status(code::CONTEXT_LENGTH, context), 400, "invalid_request_error", None),
        (code::status(code::MODEL_NOT_FOUND, "no"), 404, "not_found_error", None),
        (code::with_retry_after(code::status(code::QUEUE_FULL, "no"), 4), 429, "rate_limit_error", Some("4")),
        (code::status(code::MODEL_LOADING, "no"), 529, "overloaded_error", Some("5")),
        (code::status(code::DRAINING, "no"), 503, "overloaded_error", Some("2")),
        (code::status(code::ENGINE, "no"), 500, "api_error", None),
    ] {
        fake.script([Step::Refuse(status.clone())]);
        let refused = post(gateway.address, "/v1/messages", &body(json!({"stream": true}))).await;
        assert_eq!((error(&refused), refused.header("retry-after")), ((http, kind.to_owned()), retry_after));
        if http == 400 {
            assert_eq!(refused.json()["error"]["message"], "prompt is too long: 3000 tokens > 2048 maximum");
        }
    }
    let address = gateway.address;
    assert_eq!(error(&post(address, "/v1/messages", &body(json!({"model": "gpt-9"}))).await), (404, "not_found_error".to_owned()));
    assert_eq!(error(&post(address, "/v1/messages", &json!({})).await), (400, "invalid_request_error".to_owned()));
    assert_eq!(error(&call(address, "GET", "/v1/messages", &[], b"").await), (405, "invalid_request_error".to_owned()));
    let thread = json!({"type": "continue", "previous_message_id": "msg_1"});
    let lost = post(address, "/v1/messages", &body(json!({"thread": thread}))).await;
    assert_eq!(
        (error(&lost), &lost.json()["error"]["details"]),
        ((404, "not_found_error".to_owned()), &json!({"error_code": "thread_not_found"}))
    );
    let version = [("anthropic-version", "2023-06-01")];
    assert_eq!(error(&call(address, "GET", "/v1/models/gpt-9", &version, b"").await), (404, "not_found_error".to_owned()));
    let keyed = Gateway::with(&fake, |config| config.keys = vec![digest("one")]).await;
    assert_eq!(error(&post(keyed.address, "/v1/messages", &body(json!({}))).await), (401, "authentication_error".to_owned()));
}

#[tokio::test]
async fn heartbeats_are_pings_and_errors_are_events() {
    let fake = Fake::start();
    let brief = Duration::from_millis(20);
    let gateway = Gateway::with(&fake, |config| (config.timing.commit, config.timing.heartbeat) = (brief, brief)).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    let (fail, failing) = tokio::sync::watch::channel(false);
    fake.script([
        Step::Wait(gate),
        Step::Send(accepted()),
        Step::Send(text("x")),
        Step::Wait(failing),
        Step::Refuse(code::status(code::ENGINE, "an expert could not be read")),
    ]);
    let mut client = Client::open(gateway.address).await;
    client.write(&request("POST", "/v1/messages", &[], body(json!({"stream": true})).to_string().as_bytes())).await;
    client.until(": keepalive").await;
    open.send(true).expect("the fake waits");
    let start = client.until("text_delta").await;
    assert!(start.contains("event: message_start") && start.matches("event: ping").count() >= 1, "{start}");
    client.until("event: ping").await;
    fail.send(true).expect("the fake waits");
    let rest = client.until("api_error").await;
    assert!(rest.contains("event: error\n") && rest.contains("an expert could not be read"), "{rest}");
}

#[tokio::test]
async fn counting_does_not_wait_for_generations() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    fake.script([Step::Hang]);
    let mut busy = Client::open(gateway.address).await;
    busy.write(&request("POST", "/v1/messages", &[], body(json!({"stream": true})).to_string().as_bytes())).await;
    let mut counting = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let address = gateway.address;
        counting.spawn(async move {
            let ask = json!({"model": "local", "system": "s", "tools": [], "messages": [{"role": "user", "content": "x"}]});
            post(address, "/v1/messages/count_tokens?beta=true", &ask).await.json()
        });
    }
    assert_eq!(soon("all counts", counting.join_all()).await, vec![json!({"input_tokens": 2}); 24]);
    assert_eq!(fake.counted().len(), 24);
    let ask = json!({"model": "FLASH-tiny-moe", "messages": [{"role": "user", "content": "x"}]});
    let counted = post(gateway.address, "/v1/messages/count_tokens", &ask).await;
    assert_eq!((counted.json(), counted.header("x-flash-model")), (json!({"input_tokens": 1}), Some("flash-tiny-moe")));
}

#[tokio::test]
async fn claude_codes_billing_does_not_reach_the_prompt() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let mut heard = Vec::new();
    for version in ["1", "2"] {
        fake.script(reply(&["ok"]));
        let header = format!("x-anthropic-billing-header: cc_version=2.1.330.{version}; cc_entrypoint=cli;");
        let system = json!([{"type": "text", "text": header}, {"type": "text", "text": "Be brief."}]);
        let ask = body(json!({"system": system, "mystery": {"new": true}, "context_management": {}}));
        assert_eq!(post(gateway.address, "/v1/messages", &ask).await.status, 200);
        let Some(Prompt::Chat(chat)) = fake.requests().pop().and_then(|heard| heard.prompt) else { panic!("a chat") };
        heard.push(chat);
    }
    assert_eq!((&heard[0], heard[0].messages[0].content.as_str()), (&heard[1], "Be brief."));
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_request() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    for (path, shown) in [("/v1/messages", "text_delta"), ("/v1/responses", "output_text.delta"), ("/v1/completions", "\"x\"")] {
        fake.script([Step::Send(accepted()), Step::Send(text("x")), Step::Hang]);
        let mut client = Client::open(gateway.address).await;
        let ask = body(json!({"stream": true, "input": "hi", "prompt": "hi"}));
        let ask = if path == "/v1/responses" { json!({"stream": true, "input": "hi"}) } else { ask };
        client.write(&request("POST", path, &[], ask.to_string().as_bytes())).await;
        client.until(shown).await;
    }
    fake.gone(3).await;
}
