//! Tests of `reply.rs`: events → the accepted streams, what was collected → responses.

use flash_proto::v1::text::Channel;

use super::{super::request, *};
use crate::error::Code;

fn style(body: &Value) -> Style {
    let request = request::read(body, &|_| None).expect("a request");
    Style { id: "1".into(), created: 7, model: "m".into(), logprobs: false, names: request.names, echo: request.echo }
}

fn said(channel: Channel, text: &str) -> Event {
    Event::Text(v1::Text { text: text.into(), channel: channel.into(), ..Default::default() })
}

fn part(index: u32, name: &str, arguments: &str) -> Event {
    Event::ToolCall(v1::ToolCallPart { index, name: name.into(), arguments: arguments.into() })
}

fn done(finish: Finish) -> Event {
    let usage = v1::Usage { prompt_tokens: 11, cached_tokens: 3, completion_tokens: 7, reasoning_tokens: 2 };
    Event::Done(v1::Done { finish: finish.into(), usage: Some(usage), ..Default::default() })
}

fn start() -> Event {
    Event::Accepted(v1::Accepted::default())
}

/// The events of a stream, after a look at names and numbers.
fn told(out: &str) -> Vec<Value> {
    let events = out.split_terminator("\n\n").enumerate().map(|(number, event)| {
        let (name, data) = event.split_once('\n').expect("two lines");
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!((name.strip_prefix("event: "), data["sequence_number"].as_u64()), (data["type"].as_str(), Some(number as u64)));
        data
    });
    events.collect()
}

fn stream(body: &Value, events: &[Event]) -> Vec<Value> {
    let mut writer = Events::new(style(body));
    let mut out = String::new();
    events.iter().for_each(|event| drop(writer.write(Item::Event(0, event), &mut out)));
    told(&out)
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().expect("a type").strip_prefix("response.").expect("its prefix")).collect()
}

#[test]
fn who_asks_for_a_summary_is_told_the_thoughts_there() {
    let body = json!({"input": "x", "reasoning": {"summary": "auto"}});
    let events = stream(&body, &[start(), said(Channel::Reasoning, "h"), said(Channel::Reasoning, "m"), done(Finish::Stop)]);
    let wanted = [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "completed",
    ];
    assert_eq!(kinds(&events), wanted);
    assert_eq!((&events[4]["summary_index"], &events[4]["delta"], &events[6]["text"]), (&json!(0), &json!("h"), &json!("hm")));
    let item = &events[8]["item"];
    assert_eq!((&item["summary"], &item["content"]), (&json!([{"type": "summary_text", "text": "hm"}]), &json!([])));
}

#[test]
fn a_stream_has_the_recorded_order() {
    let events = stream(
        &json!({"input": "x"}),
        &[start(), said(Channel::Reasoning, "hm"), said(Channel::Content, "Hello "), said(Channel::Content, "there."), done(Finish::Stop)],
    );
    let wanted = [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ];
    assert_eq!(kinds(&events), wanted);
    let part = json!({"type": "output_text", "annotations": [], "logprobs": [], "text": "Hello there."});
    let message = json!({"id": "msg_1_1", "type": "message", "status": "completed", "role": "assistant", "content": [part]});
    assert_eq!(events[14], json!({"type": "response.output_item.done", "sequence_number": 14, "output_index": 1, "item": message}));
    let delta = json!({
        "type": "response.output_text.delta", "sequence_number": 10, "item_id": "msg_1_1", "output_index": 1, "content_index": 0,
        "delta": "Hello ", "logprobs": [],
    });
    assert_eq!(events[10], delta);
    let reasoning = json!({
        "id": "rs_1_0", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}],
        "encrypted_content": null, "status": "completed",
    });
    let response = &events[15]["response"];
    assert_eq!(response["output"], json!([reasoning, message]));
    let usage = json!({
        "input_tokens": 11, "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0}, "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 18,
    });
    assert_eq!((&response["usage"], &response["status"], &response["store"]), (&usage, &json!("completed"), &json!(false)));
    let keys: Vec<_> = response.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(
        keys.join(" "),
        concat!(
            "id object created_at status background error incomplete_details instructions max_output_tokens model output parallel_tool_calls ",
            "previous_response_id reasoning store temperature text tool_choice tools top_logprobs top_p truncation usage user metadata"
        )
    );
    assert_eq!(events[0]["response"]["text"], json!({"format": {"type": "text"}}));
}

#[test]
fn calls_have_namespaces_and_custom_ones_text() {
    let body = json!({"input": "x", "tools": [
        {"type": "namespace", "name": "agents", "tools": [{"type": "function", "name": "spawn"}]}, {"type": "custom", "name": "patch"},
    ]});
    let events = stream(
        &body,
        &[
            start(),
            part(0, "agents__spawn", ""),
            part(0, "", r#"{"a":1}"#),
            part(1, "patch", r#"{"input":"x"#),
            part(1, "", r#"\ny"}"#),
            done(Finish::ToolCalls),
        ],
    );
    let wanted = [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
        "completed",
    ];
    assert_eq!(kinds(&events), wanted);
    let call = json!({
        "id": "fc_1_0", "type": "function_call", "status": "completed", "call_id": "call_1_0", "namespace": "agents", "name": "spawn",
        "arguments": r#"{"a":1}"#,
    });
    let custom = json!({"id": "ctc_1_1", "type": "custom_tool_call", "status": "completed", "call_id": "call_1_1", "name": "patch", "input": "x\ny"});
    assert_eq!((&events[5]["item"], &events[10]["item"]), (&call, &custom));
    assert_eq!(events[11]["response"]["output"], json!([call, custom]));
    assert_eq!((&events[7]["delta"], &events[8]["delta"], &events[9]["input"]), (&json!("x"), &json!("\ny"), &json!("x\ny")));
    assert_eq!((&events[2]["item"]["status"], &events[2]["item"]["arguments"]), (&json!("in_progress"), &json!("")));
}

#[test]
fn what_was_cut_short_says_so() {
    let events =
        stream(&json!({"input": "x"}), &[start(), said(Channel::Reasoning, "a"), said(Channel::Content, "b"), done(Finish::Length)]);
    let last = events.last().expect("events");
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.incomplete"), &json!("incomplete")));
    assert_eq!(last["response"]["incomplete_details"], json!({"reason": "max_output_tokens"}));
    let output = &last["response"]["output"];
    assert_eq!((&output[0]["status"], &output[1]["status"]), (&json!("completed"), &json!("incomplete")));
    assert_eq!(stream(&json!({"input": ""}), &[start(), done(Finish::Stop)])[2]["response"]["output"], json!([]));
}

#[test]
fn heartbeats_are_events_and_failures_the_last_one() {
    let mut writer = Events::new(style(&json!({"input": "x"})));
    let mut out = String::new();
    for item in [Item::Heartbeat, Item::Heartbeat, Item::Event(0, &start()), Item::Failed(&Failure::new(Code::ContextLength, "too long"))] {
        assert!(writer.write(item, &mut out).is_none());
    }
    let events = told(&out);
    assert_eq!(kinds(&events), ["created", "in_progress", "in_progress", "failed"]);
    let response = &events[3]["response"];
    let error = json!({"code": "context_length_exceeded", "message": "too long"});
    assert_eq!((&response["status"], &response["error"]), (&json!("failed"), &error));
}

#[test]
fn the_conversation_goes_on_with_what_was_said() {
    let mut reply = Collected::default();
    for event in [said(Channel::Reasoning, "hm"), said(Channel::Content, "I look."), part(0, "f", "{}"), done(Finish::ToolCalls)] {
        reply.add(&event);
    }
    let said = style(&json!({"input": "x"})).said(&reply);
    assert_eq!((said.len(), said[0].content.as_str(), said[0].reasoning.as_deref()), (1, "I look.", Some("hm")));
    assert_eq!((said[0].tool_calls[0].id.as_str(), said[0].tool_calls[0].name.as_str()), ("call_1_2", "f"));
}
