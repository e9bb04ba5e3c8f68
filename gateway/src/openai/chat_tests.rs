//! Tests of `chat.rs`: bodies → requests or refusals, events → transcripts.

use serde_json::json;

use super::*;

fn with(extra: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

fn accepted(body: &Value) -> Request {
    read(body).unwrap_or_else(|failure| panic!("{body}: {failure:?}"))
}

#[test]
fn a_full_body_becomes_a_request() {
    let request = accepted(&with(json!({
        "temperature": 0, "top_p": 0.9, "top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1, "repeat_last_n": 64,
        "frequency_penalty": -0.5, "presence_penalty": 0.5, "seed": -1, "logit_bias": {"5": -100, "7": 1.5}, "stop": ["a", "", "b"],
        "max_tokens": 7, "max_completion_tokens": 5_000_000_000u64, "logprobs": true, "top_logprobs": 3, "stream": true,
        "stream_options": {"include_usage": true}, "keep_alive": 300, "reasoning_effort": "none", "chat_template_kwargs": {"k": [1]},
        "n": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "user": null, "store": false,
    })));
    let sampling = request.generate.sampling.expect("sampling");
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.repetition_window),
        (Some(0.0), Some(0.9), Some(0), Some(0.05), Some(1.1), Some(64))
    );
    assert_eq!((sampling.frequency_penalty, sampling.presence_penalty, sampling.seed), (Some(-0.5), Some(0.5), Some(u64::MAX)));
    assert_eq!(sampling.logit_bias, [(5, -100.0), (7, 1.5)].into());
    assert_eq!(request.generate.stop, ["a", "b"]);
    assert_eq!((request.generate.max_tokens, request.generate.top_logprobs), (Some(u32::MAX), Some(3)));
    assert_eq!(request.generate.keep_alive.as_deref(), Some("300s"));
    assert!(request.stream && request.include_usage && request.unknown.is_empty());
    let Some(Prompt::Chat(chat)) = request.generate.prompt else { panic!("a chat") };
    assert_eq!(chat.template_kwargs_json, r#"{"enable_thinking":false,"reasoning_effort":"none","k":[1]}"#);
}

#[test]
fn an_empty_body_takes_every_default() {
    let request = accepted(&json!({"messages": [{"role": "user", "content": "hi"}], "model": null, "stop": null, "temperature": null}));
    assert_eq!(request.generate.model, "");
    assert_eq!(request.generate.sampling, Some(v1::Sampling::default()));
    assert_eq!((request.generate.max_tokens, request.generate.top_logprobs, request.stream), (None, None, false));
}

#[test]
fn messages_are_read_leniently() {
    let check = |messages: Value, wanted: &[(&str, &str)], continues: bool| {
        let Some(Prompt::Chat(chat)) = accepted(&json!({"messages": messages})).generate.prompt else { panic!("a chat") };
        let found: Vec<_> = chat.messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect();
        assert_eq!((found.as_slice(), chat.continue_final_message), (wanted, continues));
    };
    let user = json!({"role": "user", "content": "u"});
    check(json!([{"role": "developer", "content": "d"}, user]), &[("system", "d"), ("user", "u")], false);
    check(
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b", "cache_control": {}}]}]),
        &[("user", "ab")],
        false,
    );
    check(json!([user, {"role": "assistant", "content": null, "refusal": "no"}]), &[("user", "u"), ("assistant", "no")], false);
    check(
        json!([user, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]),
        &[("user", "u"), ("assistant", "no")],
        false,
    );
    check(json!([user, {"role": "assistant", "tool_calls": []}]), &[("user", "u"), ("assistant", "")], false);
    check(json!([user, {"role": "assistant", "content": "Once", "prefix": true}]), &[("user", "u"), ("assistant", "Once")], true);
    check(json!([user, {"role": "tool", "tool_call_id": "x", "content": "42"}]), &[("user", "u"), ("tool", "42")], false);
    check(json!([user, {"role": "function", "name": "f", "content": "42"}]), &[("user", "u"), ("tool", "42")], false);
}

#[test]
fn refusals_name_the_field() {
    let check = |body: Value, code: Code, param: Option<&str>| {
        let failure = read(&body).expect_err("a refusal");
        assert_eq!((failure.code, failure.param.as_deref()), (code, param), "{body}: {}", failure.message);
    };
    use Code::{InvalidValue, MissingParameter, UnsupportedModality, UnsupportedValue};
    check(json!([]), InvalidValue, None);
    check(json!({}), MissingParameter, Some("messages"));
    check(json!({"messages": []}), InvalidValue, Some("messages"));
    check(json!({"messages": "hi"}), InvalidValue, Some("messages"));
    check(json!({"messages": [{"role": "user", "content": "x"}, 1]}), InvalidValue, Some("messages[1]"));
    check(json!({"messages": [{"content": "x"}]}), MissingParameter, Some("messages[0].role"));
    check(json!({"messages": [{"role": "robot", "content": "x"}]}), InvalidValue, Some("messages[0].role"));
    check(json!({"messages": [{"role": "user"}]}), MissingParameter, Some("messages[0].content"));
    check(json!({"messages": [{"role": "user", "content": {}}]}), InvalidValue, Some("messages[0].content"));
    check(
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}),
        InvalidValue,
        Some("messages[0].content[0].text"),
    );
    check(json!({"messages": [{"role": "user", "content": [{"type": "x"}]}]}), InvalidValue, Some("messages[0].content[0].type"));
    let image = json!([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}]);
    check(json!({"messages": [{"role": "user", "content": image}]}), UnsupportedModality, Some("messages[0].content[1]"));
    let called = json!([{"role": "assistant", "content": null, "tool_calls": [{"id": "x"}]}]);
    check(json!({"messages": called}), UnsupportedValue, Some("messages[0].tool_calls"));
    check(json!({"messages": vec![json!({"role": "user", "content": ""}); 4097]}), InvalidValue, Some("messages"));
    for (extra, code, param) in [
        (json!({"model": 1}), InvalidValue, "model"),
        (json!({"stream": "yes"}), InvalidValue, "stream"),
        (json!({"stream_options": {"include_usage": 1}}), InvalidValue, "stream_options.include_usage"),
        (json!({"temperature": 2.1}), InvalidValue, "temperature"),
        (json!({"temperature": "hot"}), InvalidValue, "temperature"),
        (json!({"top_p": 0}), InvalidValue, "top_p"),
        (json!({"top_k": -2}), InvalidValue, "top_k"),
        (json!({"min_p": 1}), InvalidValue, "min_p"),
        (json!({"repetition_penalty": 0}), InvalidValue, "repetition_penalty"),
        (json!({"frequency_penalty": 3}), InvalidValue, "frequency_penalty"),
        (json!({"seed": 1.5}), InvalidValue, "seed"),
        (json!({"max_tokens": 0}), InvalidValue, "max_tokens"),
        (json!({"max_completion_tokens": 0, "max_tokens": 5}), InvalidValue, "max_completion_tokens"),
        (json!({"stop": [1]}), InvalidValue, "stop[0]"),
        (json!({"stop": vec!["x"; 17]}), InvalidValue, "stop"),
        (json!({"stop": "x".repeat(257)}), InvalidValue, "stop"),
        (json!({"logit_bias": {"x": 1}}), InvalidValue, "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), InvalidValue, "logit_bias.1"),
        (json!({"top_logprobs": 2}), InvalidValue, "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), InvalidValue, "top_logprobs"),
        (json!({"logprobs": 5}), InvalidValue, "logprobs"),
        (json!({"n": 0}), InvalidValue, "n"),
        (json!({"n": 2}), UnsupportedValue, "n"),
        (json!({"n": 5}), InvalidValue, "n"),
        (json!({"tools": [{"type": "function"}]}), UnsupportedValue, "tools"),
        (json!({"functions": [{}]}), UnsupportedValue, "functions"),
        (json!({"tool_choice": "required"}), UnsupportedValue, "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), UnsupportedValue, "tool_choice"),
        (json!({"tool_choice": "sometimes"}), InvalidValue, "tool_choice"),
        (json!({"response_format": {"type": "json_object"}}), UnsupportedValue, "response_format.type"),
        (json!({"response_format": {"type": "yaml"}}), InvalidValue, "response_format.type"),
        (json!({"modalities": ["text", "audio"]}), UnsupportedModality, "modalities[1]"),
        (json!({"audio": {"voice": "x"}}), UnsupportedModality, "audio"),
        (json!({"reasoning_effort": "max"}), InvalidValue, "reasoning_effort"),
        (json!({"chat_template_kwargs": []}), InvalidValue, "chat_template_kwargs"),
        (json!({"continue_final_message": true}), InvalidValue, "continue_final_message"),
    ] {
        check(with(extra), code, Some(param));
    }
}

#[test]
fn unknown_fields_are_collected_at_every_level() {
    let body = json!({
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}], "colour": "red"}],
        "stream_options": {"a[7]": 1}, "typical_p": 0.5,
    });
    assert_eq!(accepted(&body).unknown, ["messages[].content[].mood", "messages[].colour", "stream_options.a[]", "typical_p"]);
}

#[test]
fn no_refusal_quotes_the_prompt() {
    let secret = "correct horse";
    for messages in [json!(secret), json!([secret]), json!([{"role": secret}]), json!([{"role": "user", "content": [{"type": secret}]}])] {
        let failure = read(&json!({"messages": messages})).expect_err("a refusal");
        assert!(!failure.openai().to_string().contains(secret), "{failure:?}");
    }
}

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

#[test]
fn events_become_chunks() {
    let check = |include_usage: bool, wanted: &[&str]| {
        let mut chunks = Chunks { head: head(), include_usage, logprobs: false };
        let mut out = String::new();
        for event in [start(), Event::Progress(v1::Progress::default()), text("Hé"), text(""), done(v1::done::Finish::Length)] {
            chunks.write(&event, &mut out);
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
    let mut collected = Collected::default();
    let mut head = head();
    let mut body = None;
    for event in [
        start(),
        text("H"),
        Event::Text(v1::Text { text: "é".into(), logprobs: vec![logprob], ..v1::Text::default() }),
        done(v1::done::Finish::Stop),
    ] {
        assert!(body.is_none());
        body = collected.add(event, &mut head, true);
    }
    let body: Value = serde_json::from_str(&body.expect("a body")).expect("JSON");
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
