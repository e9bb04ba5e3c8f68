//! Tests of `reply.rs`: events → the accepted streams, what was collected → messages.

use super::*;
use crate::error::{Code, Failure};

fn style(thinking: bool) -> Style {
    Style { id: "1".into(), model: "m".into(), request_id: "req_1".into(), thinking, prompt_only: false }
}

fn said(channel: Channel, text: &str) -> Event {
    Event::Text(v1::Text { text: text.into(), channel: channel.into(), ..Default::default() })
}

fn part(index: u32, name: &str, arguments: &str) -> Event {
    Event::ToolCall(v1::ToolCallPart { index, name: name.into(), arguments: arguments.into() })
}

fn done(finish: Finish, stop: Option<&str>) -> Event {
    let usage = v1::Usage { prompt_tokens: 11, cached_tokens: 3, completion_tokens: 7, reasoning_tokens: 2 };
    Event::Done(v1::Done { finish: finish.into(), stop: stop.map(str::to_owned), usage: Some(usage), ..Default::default() })
}

fn start() -> Event {
    Event::Accepted(v1::Accepted { prompt_tokens: 11, ..Default::default() })
}

fn stream(thinking: bool, events: &[Event]) -> String {
    let mut writer = Events::new(style(thinking));
    let mut out = String::new();
    events.iter().for_each(|event| writer.write(Item::Event(0, event), &mut out));
    out
}

/// What of a stream is compared: names and data without what every start and end says.
fn told(thinking: bool, events: &[Event]) -> Vec<String> {
    let out = stream(thinking, events);
    let data = out.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter(|line| line.contains("content_block")).map(|line| line.replace("content_block_", "")).collect()
}

#[test]
fn a_stream_begins_and_ends_as_the_recorded_one() {
    let out = stream(false, &[start(), said(Channel::Content, "Hello"), done(Finish::Stop, None)]);
    let wanted = concat!(
        "event: message_start\n",
        r#"data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"m","content":[],"#,
        r#""stop_reason":null,"stop_sequence":null,"#,
        r#""usage":{"input_tokens":11,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":1}}}"#,
        "\n\nevent: ping\ndata: {\"type\":\"ping\"}\n\nevent: content_block_start\n",
        r#"data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
        "\n\nevent: content_block_delta\n",
        r#"data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}"#,
        "\n\nevent: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\nevent: message_delta\n",
        r#"data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"#,
        r#""usage":{"input_tokens":8,"cache_creation_input_tokens":0,"cache_read_input_tokens":3,"output_tokens":7}}"#,
        "\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
    );
    assert_eq!(out, wanted);
}

#[test]
fn blocks_follow_each_other() {
    let events = [
        start(),
        said(Channel::Reasoning, "hm"),
        said(Channel::Content, ""),
        said(Channel::Content, "I look."),
        part(0, "f", r#"{"a":"#),
        part(0, "", "1}"),
        part(1, "g", ""),
        done(Finish::ToolCalls, None),
    ];
    let thinking = [
        r#"{"type":"start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}"#,
        r#"{"type":"delta","index":0,"delta":{"type":"thinking_delta","thinking":"hm"}}"#,
        r#"{"type":"delta","index":0,"delta":{"type":"signature_delta","signature":"Zmxhc2g="}}"#,
        r#"{"type":"stop","index":0}"#,
    ];
    let rest = |first: u32| {
        [
            format!(r#"{{"type":"start","index":{first},"content_block":{{"type":"text","text":""}}}}"#),
            format!(r#"{{"type":"delta","index":{first},"delta":{{"type":"text_delta","text":"I look."}}}}"#),
            format!(r#"{{"type":"stop","index":{first}}}"#),
            format!(
                r#"{{"type":"start","index":{},"content_block":{{"type":"tool_use","id":"toolu_1_0","name":"f","input":{{}}}}}}"#,
                first + 1
            ),
            format!(r#"{{"type":"delta","index":{},"delta":{{"type":"input_json_delta","partial_json":"{{\"a\":"}}}}"#, first + 1),
            format!(r#"{{"type":"delta","index":{},"delta":{{"type":"input_json_delta","partial_json":"1}}"}}}}"#, first + 1),
            format!(r#"{{"type":"stop","index":{}}}"#, first + 1),
            format!(
                r#"{{"type":"start","index":{},"content_block":{{"type":"tool_use","id":"toolu_1_1","name":"g","input":{{}}}}}}"#,
                first + 2
            ),
            format!(r#"{{"type":"stop","index":{}}}"#, first + 2),
        ]
    };
    assert_eq!(told(true, &events), [thinking.map(str::to_owned).as_slice(), &rest(1)].concat());
    assert_eq!(told(false, &events), rest(0));
}

#[test]
fn a_message_is_its_blocks() {
    let mut reply = Collected::default();
    for event in [said(Channel::Reasoning, "hm"), said(Channel::Content, "Hi"), part(0, "f", r#"{"z":1,"a":2}"#), part(1, "g", r#"{"cut"#)]
    {
        reply.add(&event);
    }
    reply.add(&done(Finish::Length, None));
    let message = style(true).message(&reply);
    let wanted = json!([
        {"type": "thinking", "thinking": "hm", "signature": "Zmxhc2g="}, {"type": "text", "text": "Hi"},
        {"type": "tool_use", "id": "toolu_1_0", "name": "f", "input": {"z": 1, "a": 2}},
        {"type": "tool_use", "id": "toolu_1_1", "name": "g", "input": {"input": "{\"cut"}},
    ]);
    assert_eq!(
        (&message["content"], &message["stop_reason"], &message["usage"]["input_tokens"]),
        (&wanted, &json!("max_tokens"), &json!(8))
    );
    assert_eq!(style(false).message(&reply)["content"].as_array().map(Vec::len), Some(3));
}

#[test]
fn why_it_stopped() {
    for (finish, stop, reason) in [
        (Finish::Stop, None, "end_turn"),
        (Finish::Stop, Some("END"), "stop_sequence"),
        (Finish::Length, None, "max_tokens"),
        (Finish::ToolCalls, None, "tool_use"),
    ] {
        let out = stream(false, &[done(finish, stop)]);
        let delta = json!({"stop_reason": reason, "stop_sequence": stop});
        assert!(out.contains(&format!("\"delta\":{delta}")), "{out}");
    }
}

#[test]
fn heartbeats_and_failures_have_names() {
    let mut writer = Events::new(style(false));
    let mut out = String::new();
    writer.write(Item::Heartbeat, &mut out);
    assert_eq!(out, ": keepalive\n\n");
    writer.write(Item::Event(0, &start()), &mut out);
    out.clear();
    writer.write(Item::Heartbeat, &mut out);
    assert_eq!(out, "event: ping\ndata: {\"type\":\"ping\"}\n\n");
    out.clear();
    writer.write(Item::Failed(&Failure::new(Code::Engine, "broken")), &mut out);
    let body = r#"{"type":"error","error":{"type":"api_error","message":"broken"},"request_id":"req_1"}"#;
    assert_eq!(out, format!("event: error\ndata: {body}\n\n"));
}

#[test]
fn a_prompt_may_only_be_read() {
    let events = [start(), said(Channel::Content, "x"), part(0, "f", "{}"), done(Finish::Stop, None)];
    let style = || Style { prompt_only: true, ..style(true) };
    let mut reply = Collected::default();
    events.iter().for_each(|event| _ = reply.add(event));
    let message = style().message(&reply);
    assert_eq!((&message["content"], &message["stop_reason"]), (&json!([]), &json!("max_tokens")));
    let usage = json!({"input_tokens": 8, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 0});
    assert_eq!(message["usage"], usage);
    let (mut writer, mut out) = (Events::new(style()), String::new());
    events.iter().for_each(|event| writer.write(Item::Event(0, event), &mut out));
    let names: Vec<_> = out.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert_eq!(names, ["message_start", "ping", "message_delta", "message_stop"]);
    assert!(out.contains(&format!(r#""stop_reason":"max_tokens","stop_sequence":null}},"usage":{usage}"#)), "{out}");
}
