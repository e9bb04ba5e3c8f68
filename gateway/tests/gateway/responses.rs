//! `/v1/responses` end to end: transcripts, typed heartbeats, failures in the stream, conversations that go on by id.

use std::time::Duration;

use flash_proto::{code, v1::generate_request::Prompt};
use serde_json::{Value, json};

use crate::{
    Gateway,
    client::{Client, call, get, post, request},
    expect,
    fake::{Fake, Step, accepted, calls, considered, reply, text},
    timeless,
};

const PATH: &str = "/v1/responses";

#[tokio::test]
async fn a_stream_is_the_recorded_one() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let tools = json!([{"type": "function", "name": "get_weather", "parameters": {}}]);
    for (name, script, tools) in [("responses_reasoning.sse", considered(), json!([])), ("responses_tools.sse", calls(), tools)] {
        fake.script(script);
        let answer = post(gateway.address, PATH, &json!({"model": "m:latest", "input": "hi", "stream": true, "tools": tools})).await;
        assert_eq!(answer.status, 404, "there is no such model");
        let answer = post(gateway.address, PATH, &json!({"model": "local", "input": "hi", "stream": true, "tools": tools})).await;
        assert_eq!(answer.status, 200);
        assert!(!answer.text().contains("[DONE]"));
        expect(name, &timeless(answer.text()));
    }
}

#[tokio::test]
async fn a_conversation_goes_on_by_its_id() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let address = gateway.address;
    let heard = || match fake.requests().pop().and_then(|heard| heard.prompt) {
        Some(Prompt::Chat(chat)) => chat.messages.into_iter().map(|message| message.content).collect::<Vec<_>>(),
        _ => panic!("a chat"),
    };
    for stream in [false, true] {
        fake.script(considered());
        let first = post(address, PATH, &json!({"input": "one", "instructions": "i", "stream": stream})).await;
        let first = match stream {
            false => first.json(),
            true => {
                let last = first.text().lines().rev().find_map(|line| line.strip_prefix("data: ")).expect("an event");
                serde_json::from_str::<Value>(last).expect("JSON")["response"].clone()
            }
        };
        let id = first["id"].as_str().expect("an id");
        assert_eq!(get(address, &format!("{PATH}/{id}")).await.json(), first);
        let items = get(address, &format!("{PATH}/{id}/input_items?limit=5")).await.json();
        assert_eq!((&items["data"][0]["content"][0]["text"], &items["has_more"]), (&json!("one"), &json!(false)), "{items}");
        let cancelled = call(address, "POST", &format!("{PATH}/{id}/cancel"), &[], b"").await;
        assert_eq!(cancelled.error(), (400, "unsupported_value".to_owned()));
        fake.script(reply(&["Two."]));
        let second = post(address, PATH, &json!({"input": "two", "previous_response_id": id})).await;
        assert_eq!((second.status, &second.json()["previous_response_id"]), (200, &json!(id)));
        assert_eq!(heard(), ["one", "Hello there.", "two"]);
        // Nobody else's.
        let other = call(address, "GET", &format!("{PATH}/{id}"), &[("x-api-key", "another")], b"").await;
        assert_eq!(other.error(), (404, "response_not_found".to_owned()));
        let deleted = call(address, "DELETE", &format!("{PATH}/{id}"), &[], b"").await;
        assert_eq!(deleted.json(), json!({"id": id, "object": "response", "deleted": true}));
        let gone = post(address, PATH, &json!({"input": "x", "previous_response_id": id})).await;
        assert_eq!(gone.error(), (400, "previous_response_not_found".to_owned()));
    }
    fake.script(considered());
    let unkept = post(address, PATH, &json!({"input": "one", "store": false})).await.json();
    let path = format!("{PATH}/{}", unkept["id"].as_str().expect("an id"));
    assert_eq!(get(address, &path).await.error(), (404, "response_not_found".to_owned()));
    for (method, path) in [("DELETE", path.clone()), ("GET", format!("{path}/input_items")), ("POST", format!("{path}/cancel"))] {
        assert_eq!(call(address, method, &path, &[], b"").await.error(), (404, "response_not_found".to_owned()), "{path}");
    }
    let compacted = post(address, &format!("{PATH}/compact"), &json!({"model": "local", "input": "x"})).await;
    assert_eq!(compacted.error(), (400, "unsupported_value".to_owned()));
}

#[tokio::test]
async fn nothing_to_say_is_answered() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    for input in [json!(""), json!([])] {
        fake.script(reply(&["ok"]));
        assert_eq!(post(gateway.address, PATH, &json!({"input": input, "mystery": 1})).await.status, 200);
    }
    let counted = post(gateway.address, "/responses/input_tokens", &json!({"input": "x", "instructions": "i"})).await;
    assert_eq!(counted.json(), json!({"object": "response.input_tokens", "input_tokens": 2}));
}

#[tokio::test]
async fn heartbeats_are_typed_and_failures_are_responses() {
    let fake = Fake::start();
    let brief = Duration::from_millis(20);
    let gateway = Gateway::with(&fake, |config| (config.timing.commit, config.timing.heartbeat) = (brief, brief)).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    let context = "This model's maximum context length is 2048 tokens. However, your messages resulted in 3000 tokens.";
    fake.script([Step::Wait(gate), Step::Refuse(code::status(code::CONTEXT_LENGTH, context))]);
    let mut client = Client::open(gateway.address).await;
    client.write(&request("POST", PATH, &[], json!({"input": "hi", "stream": true}).to_string().as_bytes())).await;
    let start = client.until("event: response.in_progress").await;
    assert!(start.contains("event: response.created") && !start.contains(": keepalive"), "{start}");
    client.until("event: response.in_progress").await;
    open.send(true).expect("the fake waits");
    let rest = client.until("data: {\"type\":\"response.failed\"").await;
    assert!(rest.contains("event: response.failed") && rest.contains("\"code\":\"context_length_exceeded\""), "{rest}");
    // In time, it is a status.
    let gateway = Gateway::start(&fake).await;
    fake.script([Step::Refuse(code::status(code::CONTEXT_LENGTH, context))]);
    let refused = post(gateway.address, PATH, &json!({"input": "hi", "stream": true})).await;
    assert_eq!(refused.json()["error"]["param"], "input");
    assert_eq!(refused.error(), (400, "context_length_exceeded".to_owned()));
}

#[tokio::test]
async fn what_fails_is_not_kept() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    fake.script([Step::Send(accepted()), Step::Send(text("x")), Step::Refuse(code::status(code::ENGINE, "broken"))]);
    let answer = post(gateway.address, PATH, &json!({"input": "hi", "stream": true})).await;
    let last = answer.text().lines().rev().find_map(|line| line.strip_prefix("data: ")).expect("an event");
    let last: Value = serde_json::from_str(last).expect("JSON");
    assert_eq!((&last["type"], &last["response"]["error"]["code"]), (&json!("response.failed"), &json!("engine_error")));
    let path = format!("{PATH}/{}", last["response"]["id"].as_str().expect("an id"));
    assert_eq!(get(gateway.address, &path).await.status, 404);
}

#[tokio::test]
async fn a_long_conversation_is_shortened_when_asked() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let heard = async |truncation: &str, count: usize| {
        fake.script(reply(&["ok"]));
        let input: Vec<Value> = (0..count).map(|at| json!({"role": "user", "content": at.to_string()})).collect();
        let body = json!({"input": input, "instructions": "i", "truncation": truncation});
        let answer = post(gateway.address, PATH, &body).await;
        assert_eq!((answer.status, &answer.json()["truncation"]), (200, &json!(truncation)));
        let Some(Prompt::Chat(chat)) = fake.requests().pop().and_then(|heard| heard.prompt) else { panic!("a chat") };
        chat.messages.into_iter().map(|message| message.content).collect::<Vec<_>>()
    };
    assert_eq!(heard("auto", 6).await.len(), 7);
    assert_eq!(heard("disabled", 9).await.len(), 10);
    // To a context of eight, of which a quarter is for the reply.
    assert_eq!(heard("auto", 9).await, ["i", "4", "5", "6", "7", "8"]);
}
