//! Tests of `completions.rs`: bodies → requests or refusals, events → transcripts.

use super::*;

fn head(model: &str) -> Head {
    Head { id: "cmpl-1".into(), created: 7, model: model.into(), system_fingerprint: String::new() }
}

/// Whatever else stands in its places is refused or read, and never a panic.
fn accepted(body: &Value) -> Request {
    crate::json::mutate(body, |body| drop(read(body, head)));
    read(body, head).unwrap_or_else(|failure| panic!("{body}: {failure:?}"))
}

fn text(text: &str, logprobs: Vec<v1::TokenLogprob>) -> Event {
    Event::Text(v1::Text { text: text.into(), logprobs, ..Default::default() })
}

fn done(finish: Finish) -> Event {
    let usage = v1::Usage { prompt_tokens: 4, completion_tokens: 2, ..Default::default() };
    Event::Done(v1::Done { finish: finish.into(), usage: Some(usage), ..Default::default() })
}

#[test]
fn prompts_are_text_or_tokens_one_or_several() {
    let texts = |body: Value| -> Vec<_> {
        let prompt = |request: v1::GenerateRequest| match request.prompt {
            Some(Prompt::Text(text)) => text,
            Some(Prompt::Tokens(tokens)) => format!("{:?}", tokens.ids),
            Some(Prompt::Infill(gap)) => format!("{}…{}", gap.prefix, gap.suffix),
            _ => panic!("no chat"),
        };
        accepted(&body).requests.into_iter().map(prompt).collect()
    };
    assert_eq!(texts(json!({"prompt": "a"})), ["a"]);
    assert_eq!(texts(json!({"prompt": ["a", "b"], "n": 2})), ["a", "a", "b", "b"]);
    assert_eq!(texts(json!({"prompt": [1, 2]})), ["[1, 2]"]);
    assert_eq!(texts(json!({"prompt": [[1], [2, 3]]})), ["[1]", "[2, 3]"]);
    assert_eq!(texts(json!({"prompt": ["a", ""], "suffix": "z"})), ["a…z", "…z"]);
    assert!(accepted(&json!({"prompt": "a", "ignore_eos": true})).requests[0].ignore_eos);
    let request = accepted(&json!({"prompt": "a", "suffix": "z", "echo": true}));
    assert_eq!(request.style.echoed(0), "a");
    let request = accepted(&json!({"prompt": "a", "logprobs": 2, "best_of": 1, "user": "u", "stop": "x", "suffix": ""}));
    let generate = &request.requests[0];
    assert_eq!((generate.max_tokens, generate.top_logprobs, generate.stop.len(), request.unknown.len()), (Some(16), Some(2), 1, 0));
}

#[test]
fn refusals_name_the_field() {
    let check = |body: Value, code: Code, param: &str| {
        let failure = read(&body, head).expect_err("a refusal");
        assert_eq!((failure.code, failure.param.as_deref()), (code, Some(param)), "{body}");
    };
    use Code::{InvalidValue, MissingParameter, UnsupportedValue};
    check(json!({}), MissingParameter, "prompt");
    check(json!({"prompt": []}), InvalidValue, "prompt");
    check(json!({"prompt": [[]]}), InvalidValue, "prompt[0]");
    check(json!({"prompt": [1, "a"]}), InvalidValue, "prompt[1]");
    check(json!({"prompt": ["a", 1]}), InvalidValue, "prompt[1]");
    check(json!({"prompt": vec!["a"; 9]}), InvalidValue, "prompt");
    check(json!({"prompt": {}}), InvalidValue, "prompt");
    check(json!({"prompt": [1], "suffix": "b"}), UnsupportedValue, "suffix");
    check(json!({"prompt": "a", "suffix": 1}), InvalidValue, "suffix");
    check(json!({"prompt": "a", "n": 5}), InvalidValue, "n");
    check(json!({"prompt": "a", "best_of": 2}), UnsupportedValue, "best_of");
    check(json!({"prompt": "a", "logprobs": 6}), InvalidValue, "logprobs");
    check(json!({"prompt": "a", "max_tokens": 0}), InvalidValue, "max_tokens");
    check(json!({"prompt": "a", "max_tokens": -2, "echo": true}), InvalidValue, "max_tokens");
}

#[test]
fn events_become_chunks() {
    let request = accepted(&json!({"model": "m", "prompt": ["P", "Q"], "echo": true, "stream_options": {"include_usage": true}}));
    let mut chunks = Chunks::new(request.style, request.requests.len());
    let mut out = String::new();
    let start = || Event::Accepted(v1::Accepted { fingerprint: "fp".into(), ..Default::default() });
    for (choice, event) in [
        (0, start()),
        (1, start()),
        (1, text("b", Vec::new())),
        (0, text("", Vec::new())),
        (0, done(Finish::Stop)),
        (1, done(Finish::Length)),
    ] {
        chunks.event(choice, &event, &mut out);
    }
    let choice = |index: u32, text: &str, finish: &str| {
        format!("\"choices\":[{{\"index\":{index},\"text\":\"{text}\",\"logprobs\":null,\"finish_reason\":{finish}}}],\"usage\":null")
    };
    let usage = concat!(
        r#""choices":[],"usage":{"prompt_tokens":8,"completion_tokens":4,"total_tokens":12,"#,
        r#""prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}"#
    );
    let said = [
        choice(0, "P", "null"),
        choice(1, "Q", "null"),
        choice(1, "b", "null"),
        choice(0, "", "\"stop\""),
        choice(1, "", "\"length\""),
        usage.to_owned(),
    ];
    let head = r#"data: {"id":"cmpl-1","created":7,"model":"m","system_fingerprint":"fp","object":"text_completion","#;
    let wanted: String = said.iter().map(|rest| format!("{head}{rest}}}\n\n")).collect();
    assert_eq!(out, wanted + "data: [DONE]\n\n");
}

/// As evaluation harnesses ask.
#[test]
fn a_prompt_is_repeated_with_its_logprobs() {
    let logprob = |token: &str, logprob| v1::TokenLogprob { token: token.into(), logprob, ..Default::default() };
    let prompt = || Event::Prompt(v1::PromptLogprobs { tokens: vec![logprob("One", f32::NAN), logprob(" day", -1.5)] });
    let mut reply = Collected::default();
    for event in [prompt(), text(".", vec![logprob(".", -0.5)]), done(Finish::Length)] {
        reply.add(&event);
    }
    let check = |body: Value, said: &str, completion_tokens: u32, logprobs: Value| {
        let mut request = accepted(&body);
        let generate = &request.requests[0];
        assert!(generate.prompt_logprobs && generate.max_tokens == Some(1), "{body}");
        let whole = serde_json::to_value(request.style.completion(std::slice::from_ref(&reply))).expect("JSON");
        assert_eq!((&whole["choices"][0]["text"], &whole["choices"][0]["logprobs"]), (&json!(said), &logprobs), "{body}");
        assert_eq!(
            (&whole["usage"]["completion_tokens"], &whole["choices"][0]["finish_reason"]),
            (&json!(completion_tokens), &json!("length"))
        );
        // Streamed, it says the same.
        let mut chunks = Chunks::new(accepted(&body).style, 1);
        let mut out = String::new();
        for event in [Event::Accepted(v1::Accepted::default()), prompt(), text(".", vec![logprob(".", -0.5)]), done(Finish::Length)] {
            chunks.event(0, &event, &mut out);
        }
        let chunks: Vec<Value> = out.split("data: ").filter_map(|data| serde_json::from_str(data).ok()).collect();
        let texts: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
        let offsets = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array()).flatten().cloned();
        let wanted = logprobs.get("text_offset").cloned().unwrap_or(json!([]));
        assert_eq!((texts.as_str(), Value::from_iter(offsets)), (said, wanted), "{body}");
    };
    let of_prompt = json!({
        "tokens": ["One", " day"], "token_logprobs": [null, -1.5], "top_logprobs": [null, {" day": -1.5}], "text_offset": [0, 3],
    });
    check(json!({"prompt": "One day", "echo": true, "logprobs": 0, "max_tokens": 0}), "One day", 0, of_prompt.clone());
    check(json!({"prompt": [1, 2], "echo": true, "logprobs": 1, "max_tokens": 0}), "One day", 0, of_prompt);
    let all = json!({
        "tokens": ["One", " day", "."], "token_logprobs": [null, -1.5, -0.5], "top_logprobs": [null, {" day": -1.5}, {".": -0.5}], "text_offset": [0, 3, 7],
    });
    check(json!({"prompt": [1, 2], "echo": true, "logprobs": 1, "max_tokens": 1}), "One day.", 2, all);
    check(json!({"prompt": [1, 2], "echo": true, "max_tokens": 1}), "One day.", 2, Value::Null);
}

#[test]
fn a_completion_has_logprobs_in_the_old_form() {
    let logprob = |token: &str| v1::TokenLogprob {
        token: token.into(),
        logprob: -0.5,
        top: vec![v1::Alternative { token: "x".into(), logprob: f32::NEG_INFINITY, id: 1 }],
        id: 0,
    };
    let mut reply = Collected::default();
    for event in [text("Zo", vec![logprob("Zo")]), text("ë!", vec![logprob("ë"), logprob("!")]), done(Finish::Stop)] {
        reply.add(&event);
    }
    let mut request = accepted(&json!({"prompt": "P", "logprobs": 1}));
    let body = serde_json::to_value(request.style.completion(&[reply])).expect("JSON");
    let top = |token: &str| json!({"x": -9999.0, token: -0.5});
    let logprobs = json!({
        "tokens": ["Zo", "ë", "!"], "token_logprobs": [-0.5, -0.5, -0.5], "top_logprobs": [top("Zo"), top("ë"), top("!")], "text_offset": [0, 2, 3],
    });
    assert_eq!(body["choices"], json!([{"index": 0, "text": "Zoë!", "logprobs": logprobs, "finish_reason": "stop"}]));
    assert_eq!((&body["object"], &body["usage"]["total_tokens"]), (&json!("text_completion"), &json!(6)));
}

#[test]
fn parts_of_a_character_are_where_it_is() {
    let check = |tokens: &[&[u8]], wanted: &[usize]| {
        let mut offset = Offset::default();
        assert_eq!(tokens.iter().map(|token| offset.of(token)).collect::<Vec<_>>(), wanted, "{tokens:?}");
    };
    check(&[b"a", "é".as_bytes(), b"b", b"", b"c"], &[0, 1, 2, 3, 3]);
    check(&[b"a", b"\xf0\x9f", b"\x98", b"\x80b", b"c"], &[0, 1, 1, 1, 3]);
    // What is no character is shown as one.
    check(&[b"\xf0\x9f", b"b", b"\xff\xfe", b"c"], &[0, 0, 2, 4]);
}
