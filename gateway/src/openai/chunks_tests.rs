//! Tests of `chunks.rs`: events → transcripts, what was collected → completions.

use serde_json::{Value, json};

use super::*;
use crate::{ask::tools::Tools, json::Node};

fn text(text: &str) -> Event {
    Event::Text(v1::Text { text: text.into(), ..v1::Text::default() })
}

fn done(finish: v1::done::Finish) -> Event {
    let usage = v1::Usage { prompt_tokens: 11, cached_tokens: 3, completion_tokens: 5, reasoning_tokens: 0 };
    let timing =
        v1::Timing { queue_ms: 1.0, prefill_ms: 100.0, ttft_ms: 110.0, decode_ms: 40.0, expert_hits: 3, expert_misses: 1, ssd_bytes: 4096 };
    Event::Done(v1::Done { finish: finish.into(), usage: Some(usage), timing: Some(timing), ..Default::default() })
}

fn head() -> Head {
    Head { id: "chatcmpl-1".into(), created: 1_795_394_228, model: "m".into(), system_fingerprint: String::new() }
}

fn start() -> Event {
    Event::Accepted(v1::Accepted { model: "canonical".into(), fingerprint: "fp_flash".into(), ..Default::default() })
}

fn style() -> Style {
    Style {
        head: head(),
        include_usage: false,
        logprobs: false,
        names: Names::default(),
        legacy: false,
        reasoning: ReasoningField::ReasoningContent,
    }
}

fn thought(text: &str) -> Event {
    Event::Text(v1::Text { text: text.into(), channel: Channel::Reasoning.into(), ..Default::default() })
}

fn part(index: u32, name: &str, arguments: &str) -> Event {
    Event::ToolCall(v1::ToolCallPart { index, name: name.into(), arguments: arguments.into() })
}

/// The deltas and finish reasons of a stream.
fn deltas(style: Style, n: u32, events: &[(usize, Event)]) -> Vec<Value> {
    let mut chunks = Chunks::new(style, n);
    let mut out = String::new();
    events.iter().for_each(|(choice, event)| chunks.event(*choice, event, &mut out));
    let lines = out.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|line| *line != "[DONE]");
    let chunk = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")["choices"][0].clone();
    lines.map(chunk).map(|choice| json!([choice["index"], choice["delta"], choice["finish_reason"]])).collect()
}

fn collected(events: &[Event]) -> Collected {
    let mut collected = Collected::default();
    for event in events {
        collected.add(event);
    }
    collected
}

#[test]
fn events_become_chunks() {
    let check = |include_usage: bool, wanted: &[&str]| {
        let mut chunks = Chunks::new(Style { include_usage, ..style() }, 1);
        let mut out = String::new();
        for event in [start(), Event::Progress(v1::Progress::default()), text("Hé"), text(""), done(v1::done::Finish::Length)] {
            chunks.event(0, &event, &mut out);
        }
        let usual = r#"data: {"id":"chatcmpl-1","created":1795394228,"model":"m","system_fingerprint":"fp_flash","object":"chat.completion.chunk","#;
        let wanted: String =
            wanted.iter().map(|rest| if *rest == "[DONE]" { "data: [DONE]\n\n".into() } else { format!("{usual}{rest}\n\n") }).collect();
        assert_eq!(out, wanted);
    };
    check(
        false,
        &[
            r#""choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#,
            r#""choices":[{"index":0,"delta":{"content":"Hé"},"logprobs":null,"finish_reason":null}]}"#,
            r#""choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}"#,
            "[DONE]",
        ],
    );
    check(
        true,
        &[
            r#""choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#""choices":[{"index":0,"delta":{"content":"Hé"},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#""choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}"#,
            concat!(
                r#""choices":[],"usage":{"prompt_tokens":11,"completion_tokens":5,"total_tokens":16,"prompt_tokens_details":{"cached_tokens":3},"#,
                r#""completion_tokens_details":{"reasoning_tokens":0}},"x_flash":{"ttft_ms":110.0,"prefill_tok_s":80.0,"decode_tok_s":100.0,"#,
                r#""queue_ms":1.0,"expert_cache_hit_rate":0.75,"bytes_from_ssd":4096}}"#
            ),
            "[DONE]",
        ],
    );
}

#[test]
fn events_become_a_completion_with_logprobs() {
    let other = v1::Alternative { id: 2, token: vec![0xff], logprob: f32::NEG_INFINITY };
    let logprob = v1::TokenLogprob { id: 1, token: "é".into(), logprob: -0.25, top: vec![other] };
    let logprobs = Event::Text(v1::Text { text: "é".into(), logprobs: vec![logprob], ..v1::Text::default() });
    let reply = collected(&[start(), text("H"), logprobs, done(v1::done::Finish::Stop)]);
    let body = completion(Style { logprobs: true, ..style() }, &[reply], |body| serde_json::to_value(body).expect("JSON"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["system_fingerprint"], "fp_flash");
    assert_eq!(
        body["choices"],
        json!([{
            "index": 0, "message": {"role": "assistant", "content": "Hé", "refusal": null}, "finish_reason": "stop",
            "logprobs": {"refusal": null, "content": [{
                "token": "é", "logprob": -0.25, "bytes": [195, 169],
                "top_logprobs": [{"token": "\u{fffd}", "logprob": -9999.0, "bytes": [255]}],
            }]},
        }])
    );
    assert_eq!((&body["usage"]["total_tokens"], &body["x_flash"]["expert_cache_hit_rate"]), (&json!(16), &json!(0.75)));
}

#[test]
fn calls_are_told_as_in_the_recorded_stream() {
    let events = [
        start(),
        part(0, "get_weather", ""),
        part(0, "", r#"{"city": "#),
        part(0, "", r#""Paris"}"#),
        part(1, "get_weather", r#"{"city": "Rome"}"#),
        done(Finish::ToolCalls),
    ];
    let events: Vec<_> = events.into_iter().map(|event| (0, event)).collect();
    let begun = |index: u32| {
        let function = json!({"name": "get_weather", "arguments": ""});
        json!([0, {"tool_calls": [{"index": index, "id": format!("call_1_0_{index}"), "type": "function", "function": function}]}, null])
    };
    let more = |index: u32, arguments: &str| json!([0, {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}, null]);
    let wanted = [
        json!([0, {"role": "assistant", "content": ""}, null]),
        begun(0),
        more(0, r#"{"city": "#),
        more(0, r#""Paris"}"#),
        begun(1),
        more(1, r#"{"city": "Rome"}"#),
        json!([0, {}, "tool_calls"]),
    ];
    assert_eq!(deltas(style(), 1, &events), wanted);
}

#[test]
fn functions_of_before_are_told_in_their_form() {
    let events = [(0, part(0, "f", r#"{"a":1}"#)), (0, done(Finish::ToolCalls))];
    let wanted = [
        json!([0, {"function_call": {"name": "f", "arguments": ""}}, null]),
        json!([0, {"function_call": {"arguments": r#"{"a":1}"#}}, null]),
        json!([0, {}, "function_call"]),
    ];
    assert_eq!(deltas(Style { legacy: true, ..style() }, 1, &events), wanted);
    let reply = collected(&events.map(|(_, event)| event));
    let body = completion(Style { legacy: true, ..style() }, &[reply], |body| serde_json::to_value(body).expect("JSON"));
    assert_eq!(
        (&body["choices"][0]["message"], &body["choices"][0]["finish_reason"]),
        (
            &json!({"role": "assistant", "content": null, "refusal": null, "function_call": {"name": "f", "arguments": r#"{"a":1}"#}}),
            &json!("function_call")
        )
    );
}

#[test]
fn reasoning_and_custom_calls_have_fields_of_their_own() {
    let mut tools = Tools::default();
    let custom = json!({"name": "patch"});
    tools.custom(Node::root(&custom).object().expect("an object"), &mut Vec::new()).expect("a tool");
    let styled = || Style { names: tools.names.clone(), ..style() };
    let events = [thought("hm"), text("Yes."), part(0, "patch", r#"{"input":"a"#), part(0, "", r#"\nb"}"#), done(Finish::ToolCalls)];
    let told: Vec<_> = events.iter().cloned().map(|event| (0, event)).collect();
    let wanted = [
        json!([0, {"reasoning_content": "hm"}, null]),
        json!([0, {"content": "Yes."}, null]),
        json!([0, {"tool_calls": [{"index": 0, "id": "call_1_0_0", "type": "custom", "custom": {"name": "patch", "input": ""}}]}, null]),
        json!([0, {"tool_calls": [{"index": 0, "custom": {"input": "a"}}]}, null]),
        json!([0, {"tool_calls": [{"index": 0, "custom": {"input": "\nb"}}]}, null]),
        json!([0, {}, "tool_calls"]),
    ];
    assert_eq!(deltas(styled(), 1, &told), wanted);
    let body = completion(styled(), &[collected(&events)], |body| serde_json::to_value(body).expect("JSON"));
    let call = json!({"id": "call_1_0_0", "type": "custom", "custom": {"name": "patch", "input": "a\nb"}});
    let wanted = json!({"role": "assistant", "content": "Yes.", "refusal": null, "reasoning_content": "hm", "tool_calls": [call]});
    assert_eq!(body["choices"][0]["message"], wanted);
}

#[test]
fn several_choices_share_a_prompt_and_an_end() {
    let mut chunks = Chunks::new(Style { include_usage: true, ..style() }, 2);
    let mut out = String::new();
    let mut write = |choice, event: Event| {
        chunks.event(choice, &event, &mut out);
        out.matches("[DONE]").count()
    };
    assert_eq!([write(0, start()), write(1, start()), write(1, text("b")), write(0, text("a")), write(1, done(Finish::Stop))], [0; 5]);
    assert_eq!(write(0, done(Finish::Length)), 1);
    assert!(out.contains(r#""choices":[{"index":1,"delta":{"content":"b"}"#), "{out}");
    assert!(out.contains(r#""usage":{"prompt_tokens":11,"completion_tokens":10,"total_tokens":21"#), "{out}");
    let replies = [collected(&[text("a"), done(Finish::Stop)]), collected(&[text("b"), done(Finish::Length)])];
    let body = completion(style(), &replies, |body| serde_json::to_value(body).expect("JSON"));
    let choices = body["choices"].as_array().expect("choices").iter();
    let found: Vec<_> = choices.map(|choice| json!([choice["index"], choice["message"]["content"], choice["finish_reason"]])).collect();
    assert_eq!(found, [json!([0, "a", "stop"]), json!([1, "b", "length"])]);
    assert_eq!(body["usage"]["completion_tokens"], 10);
}

#[test]
fn reasoning_goes_where_the_client_looks_for_it() {
    let events = [thought("a"), thought("b"), text("c"), done(Finish::Stop)];
    let check = |reasoning: ReasoningField, stream: &[Value], message: Value| {
        let told: Vec<_> = events.iter().cloned().map(|event| (0, event)).collect();
        let found: Vec<_> = deltas(Style { reasoning, ..style() }, 1, &told).into_iter().map(|delta| delta[1].clone()).collect();
        assert_eq!(found, [stream, &[json!({})]].concat());
        let body = completion(Style { reasoning, ..style() }, &[collected(&events)], |body| serde_json::to_value(body).expect("JSON"));
        assert_eq!(body["choices"][0]["message"], message);
    };
    let message = |extra: Value| {
        let mut message = json!({"role": "assistant", "content": "c", "refusal": null});
        message.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        message
    };
    let content = |text: &str| json!({"content": text});
    let of = |text: &str| json!({"reasoning": text});
    check(ReasoningField::Reasoning, &[of("a"), of("b"), content("c")], message(of("ab")));
    let of = |text: &str| json!({"reasoning_content": text, "reasoning": text});
    check(ReasoningField::Both, &[of("a"), of("b"), content("c")], message(of("ab")));
    check(
        ReasoningField::Inline,
        &[content("<think>\n"), content("a"), content("b"), content("\n</think>\n\n"), content("c")],
        message(content("<think>\nab\n</think>\n\nc")),
    );
}

#[test]
fn texts_around_a_call_are_not_glued() {
    let events = [text("Look."), text(""), part(0, "f", "{}"), text(""), text("Done"), text(" now."), done(Finish::ToolCalls)];
    let told: Vec<_> = events.iter().cloned().map(|event| (0, event)).collect();
    let streamed: String = deltas(style(), 1, &told).iter().filter_map(|delta| delta[1]["content"].as_str()).collect();
    let body = completion(style(), &[collected(&events)], |body| serde_json::to_value(body).expect("JSON"));
    assert_eq!((streamed.as_str(), &body["choices"][0]["message"]["content"]), ("Look.\nDone now.", &json!("Look.\nDone now.")));
    let after = [part(0, "f", "{}"), text("Done"), done(Finish::ToolCalls)];
    assert_eq!(deltas(style(), 1, &after.map(|event| (0, event)))[2][1]["content"], "Done");
}
