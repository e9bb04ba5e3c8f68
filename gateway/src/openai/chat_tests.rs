//! Tests of `chat.rs`: bodies → requests or refusals.

use serde_json::json;

use super::*;

fn with(extra: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// Whatever else stands in its places is refused or read, and never a panic.
fn accepted(body: &Value) -> Request {
    crate::json::mutate(body, |body| drop(read(body)));
    read(body).unwrap_or_else(|failure| panic!("{body}: {failure:?}"))
}

#[test]
fn a_full_body_becomes_a_request() {
    let request = accepted(&with(json!({
        "temperature": 0, "top_p": 0.9, "top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1, "repeat_last_n": 64,
        "frequency_penalty": -0.5, "presence_penalty": 0.5, "seed": -1, "logit_bias": {"5": -100, "7": 1.5}, "stop": ["a", "", "b"],
        "max_tokens": 7, "max_completion_tokens": 5_000_000_000u64, "logprobs": true, "top_logprobs": 3, "stream": true,
        "stream_options": {"include_usage": true}, "keep_alive": 300, "ignore_eos": true, "reasoning_effort": "none", "chat_template_kwargs": {"k": [1]},
        "n": 3, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "user": null, "store": false,
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
    assert_eq!((request.generate.keep_alive.as_deref(), request.generate.ignore_eos), (Some("300s"), true));
    assert!(request.stream && request.include_usage && request.unknown.is_empty() && request.n == 3);
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
fn a_schema_may_stand_beside_json_object() {
    let format = |format: Value| accepted(&with(json!({"response_format": format}))).generate.format;
    assert_eq!(format(json!({"type": "json_object"})), Some(ask::json_object()));
    let schema = json!({"type": "object", "required": ["a"]});
    assert_eq!(format(json!({"type": "json_object", "schema": schema})), Some(ask::json_schema(schema.to_string(), false)));
}

#[test]
fn seeds_are_of_64_bits() {
    let seed = |seed: Value| read(&with(json!({"seed": seed}))).ok().and_then(|request| request.generate.sampling?.seed);
    assert_eq!(
        [seed(json!(i64::MAX)), seed(json!(i64::MIN)), seed(json!(u64::MAX)), seed(json!(7.0))],
        [Some(i64::MAX as u64), Some(1 << 63), None, Some(7)]
    );
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
    for nothing in [json!({"tool_calls": []}), json!({"content": null}), json!({"content": "", "prefix": true}), json!({"content": []})] {
        let mut last = json!({"role": "assistant"});
        last.as_object_mut().expect("an object").extend(nothing.as_object().expect("an object").clone());
        check(json!([user, last]), &[("user", "u")], false);
        check(json!([last]), &[("assistant", "")], false);
        let body = json!({"messages": [user, last], "continue_final_message": true});
        assert!(!chat(&body).continue_final_message);
        check(json!([last, user]), &[("assistant", ""), ("user", "u")], false);
    }
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
    check(with(json!({"seed": 1e300})), InvalidValue, Some("seed"));
    check(with(json!({"seed": 9_223_372_036_854_775_808_u64})), InvalidValue, Some("seed"));
    check(with(json!({"chat_template_kwargs": {"messages": []}})), InvalidValue, Some("chat_template_kwargs"));
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
    check(json!({"messages": called}), MissingParameter, Some("messages[0].tool_calls[0].function"));
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
        (json!({"n": 5}), InvalidValue, "n"),
        (json!({"tools": [{"type": "function"}]}), MissingParameter, "tools[0].function"),
        (json!({"tools": [{"function": {"name": "a b"}}]}), InvalidValue, "tools[0].function.name"),
        (json!({"tools": [{"function": {"name": "x".repeat(129)}}]}), InvalidValue, "tools[0].function.name"),
        (json!({"tools": [{"function": {"name": "f", "parameters": []}}]}), InvalidValue, "tools[0].function.parameters"),
        (
            json!({"tools": [{"function": {"name": "f", "parameters": {"x": "y".repeat(1 << 18)}}}]}),
            InvalidValue,
            "tools[0].function.parameters",
        ),
        (json!({"tools": vec![json!({"type": "web_search"}); 513]}), InvalidValue, "tools"),
        (
            json!({"tools": [{"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": {"syntax": "bnf", "definition": ""}}}}]}),
            InvalidValue,
            "tools[0].custom.format.grammar.syntax",
        ),
        (json!({"functions": [{}]}), MissingParameter, "functions[0].name"),
        (json!({"tool_choice": "required"}), InvalidValue, "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), MissingParameter, "tool_choice.name"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}), InvalidValue, "tool_choice"),
        (json!({"tool_choice": {"type": "web_search"}}), UnsupportedValue, "tool_choice.type"),
        (json!({"tool_choice": "sometimes"}), InvalidValue, "tool_choice"),
        (json!({"response_format": {"type": "json_schema"}}), MissingParameter, "response_format.json_schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
            MissingParameter,
            "response_format.json_schema.schema",
        ),
        (json!({"response_format": {"type": "yaml"}}), InvalidValue, "response_format.type"),
        (json!({"modalities": ["text", "audio"]}), UnsupportedModality, "modalities[1]"),
        (json!({"audio": {"voice": "x"}}), UnsupportedModality, "audio"),
        (json!({"reasoning_effort": "utmost"}), InvalidValue, "reasoning_effort"),
        (json!({"chat_template_kwargs": []}), InvalidValue, "chat_template_kwargs"),
        (json!({"continue_final_message": true}), InvalidValue, "continue_final_message"),
    ] {
        check(with(extra), code, Some(param));
    }
}

fn chat(body: &Value) -> v1::Chat {
    let Some(Prompt::Chat(chat)) = accepted(body).generate.prompt else { panic!("a chat") };
    chat
}

#[test]
fn tools_keep_their_order_and_their_keys() {
    let tools = json!([
        {"type": "function", "function": {"name": "b", "description": "B", "strict": true,
            "parameters": {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}, "required": ["z"]}}},
        {"type": "web_search_preview"},
        {"function": {"name": "a", "parameters": null}},
        {"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: \"x\""}}}},
        {"type": "custom", "custom": {"name": "d"}},
    ]);
    let request = accepted(&with(json!({"tools": tools})));
    assert!(request.unknown.is_empty() && request.names.of("c").custom && !request.names.of("a").custom);
    let tools = chat(&with(json!({"tools": tools}))).tools;
    assert_eq!(tools.iter().map(|tool| tool.name.as_str()).collect::<Vec<_>>(), ["b", "a", "c", "d"]);
    assert_eq!(
        (tools[0].parameters_json.as_str(), tools[0].strict, tools[0].description.as_str()),
        (r#"{"type":"object","properties":{"z":{"type":"string"},"a":{"type":"integer"}},"required":["z"]}"#, true, "B")
    );
    let lark = v1::Format { kind: Some(v1::format::Kind::Lark("start: \"x\"".into())), strict: false };
    assert_eq!((&tools[1].input, &tools[2].input, &tools[3].input), (&None, &Some(lark), &Some(v1::Format::default())));
}

#[test]
fn choices_of_tools_become_modes_and_names() {
    let check = |extra: Value, mode: Mode, names: &[&str], single: bool| {
        let mut body = with(json!({"tools": [{"function": {"name": "f"}}, {"function": {"name": "g"}}]}));
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        let choice = chat(&body).tool_choice.expect("a choice");
        assert_eq!(
            (choice.mode(), choice.names.as_slice(), choice.single),
            (mode, names.iter().map(ToString::to_string).collect::<Vec<_>>().as_slice(), single)
        );
    };
    check(json!({}), Mode::Auto, &[], false);
    check(json!({"tool_choice": "none"}), Mode::None, &[], false);
    check(json!({"tool_choice": "required", "parallel_tool_calls": false}), Mode::Required, &[], true);
    check(json!({"tool_choice": {"type": "function", "function": {"name": "g"}}}), Mode::Required, &["g"], false);
    let allowed = json!({"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}, {"type": "mcp"}]});
    check(json!({"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}), Mode::Required, &["f"], false);
    let hosted = json!({"tools": [{"function": {"name": "f"}}], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp"}]}});
    assert_eq!(read(&with(hosted)).expect_err("nothing to call").code, Code::UnsupportedValue);
    let legacy = with(json!({"functions": [{"name": "h"}], "function_call": {"name": "h"}}));
    let choice = chat(&legacy).tool_choice.expect("a choice");
    assert_eq!((choice.mode(), choice.names, choice.single, accepted(&legacy).legacy), (Mode::Required, vec!["h".to_owned()], true, true));
}

#[test]
fn calls_and_results_are_remembered() {
    let messages = chat(&json!({"messages": [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": 2}"}},
            {"id": "2", "type": "custom", "custom": {"name": "c", "input": "raw"}},
            {"id": "3", "type": "function", "function": {"name": "f", "arguments": {"b": 1}}},
        ]},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "tool", "tool_call_id": "nobody", "content": [{"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "", "function_call": {"name": "g", "arguments": ""}},
        {"role": "function", "name": "g", "content": "three"},
    ]}))
    .messages;
    let calls: Vec<_> =
        messages[1].tool_calls.iter().map(|call| (call.id.as_str(), call.name.as_str(), call.arguments_json.as_str())).collect();
    assert_eq!(calls, [("1", "f", r#"{"z": 1, "a": 2}"#), ("2", "c", r#"{"input":"raw"}"#), ("3", "f", r#"{"b":1}"#)]);
    assert_eq!(messages[1].reasoning.as_deref(), Some("hm"));
    let results: Vec<_> = [2, 3, 5].map(|at| (messages[at].tool_call_id.as_deref(), messages[at].name.as_deref())).into();
    assert_eq!(results, [(Some("2"), Some("c")), (Some("nobody"), None), (None, Some("g"))]);
    assert_eq!(messages[4].tool_calls[0].arguments_json, "{}");
}

#[test]
fn formats_are_strict_only_when_asked() {
    let check = |format: Value, wanted: Option<v1::Format>| {
        assert_eq!(accepted(&with(json!({"response_format": format}))).generate.format, wanted);
    };
    let schema = json!({"type": "object", "properties": {"z": {}, "a": {}}});
    check(json!({"type": "text"}), None);
    check(json!({"type": "json_object"}), Some(ask::json_object()));
    check(
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}),
        Some(ask::json_schema(schema.to_string(), false)),
    );
    let strict = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}});
    check(strict.clone(), Some(ask::json_schema(schema.to_string(), true)));
    // A call that must come has a form of its own.
    let forced = with(json!({"response_format": strict, "tools": [{"function": {"name": "f"}}], "tool_choice": "required"}));
    assert_eq!(accepted(&forced).generate.format, None);
}

#[test]
fn reasoning_is_asked_of_the_template() {
    let check = |extra: Value, wanted: &str| assert_eq!(chat(&with(extra)).template_kwargs_json, wanted);
    check(json!({}), "");
    check(json!({"reasoning_effort": "high"}), r#"{"enable_thinking":true,"reasoning_effort":"high"}"#);
    check(json!({"reasoning": {"enabled": false}}), r#"{"enable_thinking":false}"#);
    check(
        json!({"reasoning": {"effort": "low", "max_tokens": 100}}),
        r#"{"enable_thinking":true,"reasoning_effort":"low","thinking_budget":100}"#,
    );
    check(
        json!({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": true}}),
        r#"{"enable_thinking":true,"reasoning_effort":"none"}"#,
    );
}

#[test]
fn choices_have_seeds_of_their_own() {
    let seeds = |extra: Value| -> Vec<_> {
        let request = accepted(&with(extra));
        ask::choices(request.generate, request.n).iter().map(|one| one.sampling.as_ref().and_then(|sampling| sampling.seed)).collect()
    };
    assert_eq!(seeds(json!({"n": 3, "seed": -1})), [Some(u64::MAX), Some(0), Some(1)]);
    assert_eq!(seeds(json!({"n": 2})), [None, None]);
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
