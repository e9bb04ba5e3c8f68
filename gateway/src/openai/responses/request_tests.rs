//! Tests of `request.rs`: bodies as Codex and the SDKs send them → requests or refusals.

use super::*;

/// Whatever else stands in its places is refused or read, and never a panic.
fn accepted(body: &Value) -> Request {
    crate::json::mutate(body, |body| drop(read(body, &|_| None)));
    read(body, &|_| None).unwrap_or_else(|failure| panic!("{body}: {failure:?}"))
}

fn chat(request: &Request) -> &v1::Chat {
    let Some(Prompt::Chat(chat)) = &request.generate.prompt else { panic!("a chat") };
    chat
}

fn said(request: &Request) -> Vec<(&str, &str)> {
    chat(request).messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect()
}

#[test]
fn a_body_of_codexs_is_read_without_a_word() {
    let request = accepted(&json!({
        "model": "m", "instructions": "Be brief.", "stream": true, "store": false, "include": ["reasoning.encrypted_content"],
        "parallel_tool_calls": false, "prompt_cache_key": "k", "client_metadata": {}, "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "strict": true, "schema": {"z": 1, "a": 2}}},
        "max_output_tokens": 50, "tool_choice": "auto",
        "tools": [
            {"type": "function", "name": "exec_command", "strict": false, "parameters": {"type": "object"}},
            {"type": "namespace", "name": "agents", "description": "d", "tools": [{"type": "function", "name": "spawn", "parameters": {}}]},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}},
            {"type": "web_search", "external_web_access": false},
        ],
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"role": "user", "content": "go"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}], "encrypted_content": null},
            {"type": "message", "role": "assistant", "phase": "final", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "1", "namespace": "agents", "name": "spawn", "arguments": "{\"z\": 1}", "status": "completed"},
            {"type": "custom_tool_call", "call_id": "2", "name": "apply_patch", "input": "x\ny"},
            {"type": "function_call_output", "call_id": "1", "output": "one"},
            {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}, {"type": "input_image", "image_url": ""}]},
            {"type": "web_search_call", "id": "ws", "status": "completed"},
        ],
    }));
    assert!(request.unknown.is_empty() && request.stream && request.kept.is_none(), "{:?}", request.unknown);
    let wanted = [
        ("system", "Be brief."),
        ("system", "rules"),
        ("user", "go"),
        ("assistant", "I look."),
        ("tool", "one"),
        ("tool", "two\n[image omitted]"),
    ];
    assert_eq!(said(&request), wanted);
    let assistant = &chat(&request).messages[3];
    let calls: Vec<_> = assistant.tool_calls.iter().map(|call| (call.name.as_str(), call.arguments_json.as_str())).collect();
    assert_eq!(
        (calls.as_slice(), assistant.reasoning.as_deref()),
        ([("agents__spawn", r#"{"z": 1}"#), ("apply_patch", r#"{"input":"x\ny"}"#)].as_slice(), Some("hm"))
    );
    assert_eq!(chat(&request).messages[4].name.as_deref(), Some("agents__spawn"));
    let tools: Vec<_> = chat(&request).tools.iter().map(|tool| tool.name.as_str()).collect();
    assert_eq!(tools, ["exec_command", "agents__spawn", "apply_patch"]);
    let name = request.names.of("agents__spawn");
    assert_eq!((name.namespace.as_deref(), name.name.as_str(), name.custom), (Some("agents"), "spawn", false));
    assert!(request.names.of("apply_patch").custom && chat(&request).tool_choice.as_ref().is_some_and(|choice| choice.single));
    assert_eq!(request.generate.format, Some(ask::json_schema(r#"{"z":1,"a":2}"#.into(), true)));
    assert_eq!(request.generate.max_tokens, Some(50));
    assert_eq!((&request.echo.tools[1]["name"], &request.echo.text["verbosity"]), (&json!("agents"), &json!("low")));
}

#[test]
fn names_in_a_namespace_are_apart_from_those_outside() {
    let [custom, function] = ["custom", "function"].map(|kind| json!({"type": kind, "name": "x"}));
    let within = |tool: &Value| json!({"type": "namespace", "name": "n", "description": "", "tools": [tool]});
    for (tools, outside, inside) in [
        (json!([custom, within(&function)]), true, false),
        (json!([custom, within(&custom)]), true, true),
        (json!([within(&custom), function]), false, true),
        (json!([function, within(&custom)]), false, true),
    ] {
        let names = accepted(&json!({"input": "go", "tools": tools})).names;
        assert_eq!(
            (names.of("x").custom, names.of("n__x").custom, names.of("n__x").namespace.as_deref()),
            (outside, inside, Some("n")),
            "{tools}"
        );
    }
}

#[test]
fn nothing_is_something_to_warm_up_with() {
    for input in [json!(""), json!([]), Value::Null] {
        assert_eq!(said(&accepted(&json!({"input": input}))), [("user", "")]);
    }
    assert_eq!(said(&accepted(&json!({"input": [], "instructions": "i"}))), [("system", "i"), ("user", "")]);
    assert_eq!(accepted(&json!({"input": "hi"})).kept.map(|kept| kept.len()), Some(1));
}

#[test]
fn a_conversation_goes_on_where_it_was() {
    let earlier = v1::Message { role: "assistant".into(), content: "before".into(), ..Default::default() };
    let response = json!({"id": "resp_1", "output": [
        {"id": "rs_1_0", "type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"id": "msg_1_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "before"}]},
    ]});
    let asked =
        json!([{"id": "msg_1_in_0", "type": "message", "role": "user", "content": "first"}, {"type": "item_reference", "id": "x_1_in_1"}]);
    let stored = Arc::new(Stored::new("c".into(), &response, vec![earlier], &asked.to_string()));
    let find = |id: &str| (id == "resp_1").then(|| stored.clone());
    let body = json!({"previous_response_id": "resp_1", "input": "and?", "instructions": "i"});
    let request = read(&body, &find).expect("a request");
    assert_eq!(said(&request), [("system", "i"), ("assistant", "before"), ("user", "and?")]);
    assert_eq!(request.kept.map(|kept| kept.len()), Some(2));
    let failure = read(&body, &|_| None).expect_err("a refusal");
    assert_eq!((failure.code, failure.param.as_deref()), (Code::PreviousResponseNotFound, Some("previous_response_id")));
    assert_eq!(said(&accepted(&json!({"previous_response_id": "", "input": "x"}))), [("user", "x")]);
    // The AI SDK sends what is kept by its ids.
    let refer = |id: &str| json!({"input": [{"type": "item_reference", "id": "msg_1_in_0"}, {"id": "rs_1_0"}, {"type": "item_reference", "id": id}]});
    let request = read(&refer("msg_1_1"), &find).expect("a request");
    assert_eq!(said(&request), [("user", "first"), ("assistant", "before")]);
    assert_eq!(chat(&request).messages[1].reasoning.as_deref(), Some("hm"));
    for gone in ["msg_1_2", "msg_2_1", "x_1_in_1", "x", ""] {
        let failure = read(&refer(gone), &find).expect_err(gone);
        assert_eq!((failure.code, failure.param.as_deref()), (Code::InvalidValue, Some("input[2]")), "{gone}");
    }
}

#[test]
fn logprobs_may_be_asked_for_in_two_ways() {
    let asked = |body: Value| (accepted(&body).generate.top_logprobs, accepted(&body).echo.top_logprobs);
    assert_eq!(asked(json!({"input": "x"})), (None, json!(0)));
    assert_eq!(asked(json!({"input": "x", "top_logprobs": 2})), (Some(2), json!(2)));
    let include = json!(["reasoning.encrypted_content", "message.output_text.logprobs"]);
    assert_eq!(asked(json!({"input": "x", "top_logprobs": 0, "include": include})), (Some(0), json!(0)));
}

#[test]
fn refusals_name_the_field() {
    let check = |body: Value, code: Code, param: &str| {
        let failure = read(&body, &|_| None).expect_err("a refusal");
        assert_eq!((failure.code, failure.param.as_deref()), (code, Some(param)), "{body}: {}", failure.message);
    };
    use Code::{InvalidValue, MissingParameter, UnsupportedModality, UnsupportedValue};
    check(json!({"input": 1}), InvalidValue, "input");
    check(json!({"input": [{"role": "user"}]}), MissingParameter, "input[0].content");
    check(json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), UnsupportedModality, "input[0].content[0]");
    check(json!({"background": true}), UnsupportedValue, "background");
    check(json!({"conversation": "c"}), UnsupportedValue, "conversation");
    check(json!({"prompt": {"id": "p"}}), UnsupportedValue, "prompt");
    check(json!({"max_output_tokens": 0}), InvalidValue, "max_output_tokens");
    check(json!({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}), UnsupportedValue, "tool_choice.type");
    check(json!({"tools": [{"type": "web_search"}], "tool_choice": "required"}), InvalidValue, "tool_choice");
    check(
        json!({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]}),
        MissingParameter,
        "tools[0].tools[0].name",
    );
    check(json!({"text": {"format": {"type": "json_schema", "name": "n"}}}), MissingParameter, "text.format.schema");
    let unknown = accepted(&json!({"input": "x", "brand_new": 1, "text": {"mood": 1}})).unknown;
    assert_eq!(unknown, ["text.mood", "brand_new"]);
}
