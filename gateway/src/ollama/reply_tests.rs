//! Tests of `reply.rs`: events → lines, what was collected → objects.

use super::*;

fn said(channel: Channel, text: &str) -> Event {
    Event::Text(v1::Text { text: text.into(), channel: channel.into(), ..Default::default() })
}

fn part(index: u32, name: &str, arguments: &str) -> Event {
    Event::ToolCall(v1::ToolCallPart { index, name: name.into(), arguments: arguments.into() })
}

fn events() -> [Event; 7] {
    let usage = v1::Usage { prompt_tokens: 4, completion_tokens: 2, ..Default::default() };
    let timing = v1::Timing { prefill_ms: 1.5, ttft_ms: 2.0, decode_ms: 3.0, ..Default::default() };
    [
        said(Channel::Reasoning, "hm"),
        said(Channel::Content, "Hi"),
        part(0, "f", r#"{"z":"#),
        part(0, "", r#"1}"#),
        part(1, "g", ""),
        part(1, "", "{}"),
        Event::Done(v1::Done { finish: Finish::ToolCalls.into(), usage: Some(usage), timing: Some(timing), ..Default::default() }),
    ]
}

/// Lines without what all of them say.
fn lines(chat: bool) -> Vec<Value> {
    let mut lines = Lines::new(Style { model: "m".into(), chat, arrived: Instant::now() });
    let mut out = String::new();
    events().iter().for_each(|event| lines.write(Item::Event(0, event), &mut out));
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).expect("JSON");
        let fields = line.as_object_mut().expect("an object");
        assert_eq!(fields.shift_remove("model"), Some(json!("m")));
        // How long it took differs from run to run.
        let told = ["total_duration", "load_duration"].map(|key| fields.shift_remove(key).is_some());
        assert_eq!(told, [fields["done"] == true; 2]);
        for call in fields.get_mut("message").and_then(|message| message.get_mut("tool_calls")?.as_array_mut()).into_iter().flatten() {
            let id = call.as_object_mut().expect("an object").shift_remove("id");
            assert!(id.is_some_and(|id| id.as_str().is_some_and(|id| id.starts_with("call_"))));
        }
        assert!(fields.shift_remove("created_at").is_some_and(|time| time.as_str().is_some_and(|time| time.ends_with('Z'))));
        line
    };
    out.lines().map(line).collect()
}

fn ending() -> Value {
    json!({
        "done_reason": "stop", "prompt_eval_count": 4, "prompt_eval_duration": 1_500_000,
        "eval_count": 2, "eval_duration": 3_000_000,
    })
}

#[test]
fn events_become_lines() {
    let message = |content: &str| json!({"role": "assistant", "content": content});
    let call = |index: u32, name: &str, arguments: Value| {
        let call = json!({"function": {"index": index, "name": name, "arguments": arguments}});
        json!({"message": {"role": "assistant", "content": "", "tool_calls": [call]}, "done": false})
    };
    let mut last = json!({"message": message(""), "done": true});
    last.as_object_mut().expect("an object").extend(ending().as_object().expect("an object").clone());
    let wanted = [
        json!({"message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": false}),
        json!({"message": message("Hi"), "done": false}),
        call(0, "f", json!({"z": 1})),
        call(1, "g", json!({})),
        last,
    ];
    assert_eq!(lines(true), wanted);
    let generated = lines(false);
    assert_eq!(generated[0], json!({"response": "", "thinking": "hm", "done": false}));
    assert_eq!(generated[1], json!({"response": "Hi", "done": false}));
}

#[test]
fn a_whole_answer_is_one_object() {
    let mut reply = Collected::default();
    for event in events() {
        reply.add(&event);
    }
    let whole = Style { model: "m".into(), chat: true, arrived: Instant::now() }.whole(&reply);
    assert_eq!((&whole["done"], &whole["done_reason"], &whole["eval_count"]), (&json!(true), &json!("stop"), &json!(2)));
    let message = &whole["message"];
    assert_eq!(
        (&message["content"], &message["thinking"], message["tool_calls"].as_array().map(Vec::len)),
        (&json!("Hi"), &json!("hm"), Some(2))
    );
}

#[test]
fn texts_around_a_call_are_not_glued() {
    let mut lines = Lines::new(Style { model: "m".into(), chat: true, arrived: Instant::now() });
    let mut out = String::new();
    for event in [said(Channel::Content, "Look."), part(0, "f", "{}"), said(Channel::Content, "Done.")] {
        lines.write(Item::Event(0, &event), &mut out);
    }
    assert!(out.contains(r#""content":"\nDone.""#), "{out}");
    assert_eq!(lines.collected.content(), "Look.\nDone.");
}

#[test]
fn the_wait_is_part_of_the_time() {
    let [.., Event::Done(done)] = events() else { panic!("the last one") };
    let line = ended(json!({}), &done, Duration::from_millis(100));
    let found = ["total_duration", "load_duration", "prompt_eval_duration", "eval_duration"].map(|key| line[key].as_u64());
    assert_eq!(found, [100_000_000, 95_500_000, 1_500_000, 3_000_000].map(Some));
    assert_eq!(ended(json!({}), &done, Duration::ZERO)["load_duration"], 0);
}
