//! Tests of `request.rs`: bodies as Anthropic's clients send them → requests or refusals.

use super::*;

fn with(extra: Value) -> Value {
    let mut body = json!({"model": "m", "max_tokens": 32000, "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// Whatever else stands in its places is refused or read, and never a panic.
fn accepted(body: &Value) -> Request {
    crate::json::mutate(body, |body| drop((read(body), counted(body))));
    read(body).unwrap_or_else(|failure| panic!("{body}: {failure:?}"))
}

fn chat(body: &Value) -> v1::Chat {
    let Some(Prompt::Chat(chat)) = accepted(body).generate.prompt else { panic!("a chat") };
    chat
}

fn said(chat: &v1::Chat) -> Vec<(&str, &str)> {
    chat.messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect()
}

#[test]
fn a_body_of_claude_codes_is_read_without_a_word() {
    let request = accepted(&with(json!({
        "stream": true, "temperature": 1, "stop_sequences": ["x"], "metadata": {"user_id": "u"}, "context_management": {"edits": []},
        "thinking": {"type": "adaptive", "display": "updates"}, "output_config": {"effort": "medium"}, "service_tier": "auto",
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cc_entrypoint=cli;"},
            {"type": "text", "text": "You are", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "helpful."},
        ],
        "tools": [{"name": "Read", "description": "R", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}],
        "safeguards": {}, "speed": "fast", "mcp_servers": [],
    })));
    assert!(request.unknown.is_empty() && request.stream && request.thinking, "{:?}", request.unknown);
    assert_eq!((request.generate.max_tokens, request.generate.stop.as_slice()), (Some(32000), ["x".to_owned()].as_slice()));
    let Some(Prompt::Chat(chat)) = request.generate.prompt else { panic!("a chat") };
    assert_eq!(said(&chat), [("system", "You are\nhelpful."), ("user", "hi")]);
    assert_eq!(chat.template_kwargs_json, r#"{"enable_thinking":true,"reasoning_effort":"medium"}"#);
    assert_eq!((chat.tools[0].name.as_str(), chat.tools[0].parameters_json.as_str()), ("Read", r#"{"type":"object"}"#));
    assert_eq!(accepted(&json!({"messages": [{"role": "user", "content": "hi"}]})).generate.max_tokens, Some(4096));
    let read_only = accepted(&with(json!({"max_tokens": 0})));
    assert_eq!((read_only.prompt_only, read_only.generate.max_tokens, read_only.generate.cache_prompt), (true, Some(1), true));
}

#[test]
fn text_and_blocks_are_one_prompt() {
    let text = chat(&with(json!({"system": "s", "messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
    ]})));
    let block = |text: &str| json!([{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]);
    let blocks = chat(&with(json!({"system": block("s"), "messages": [
        {"role": "user", "content": block("a")}, {"role": "assistant", "content": block("b")}, {"role": "user", "content": block("c")},
    ]})));
    assert_eq!(text, blocks);
    let header = "x-anthropic-billing-header: cc_version=1;";
    assert_eq!(said(&chat(&with(json!({"system": format!("{header}\ns")}))))[0], ("system", "s"));
    assert_eq!(said(&chat(&with(json!({"system": header})))), [("user", "hi")]);
}

#[test]
fn a_tool_loop_keeps_its_shape() {
    let chat = chat(&with(json!({"messages": [
        {"role": "user", "content": "go"},
        {"role": "system", "content": [{"type": "text", "text": "remember"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "Zmxhc2g="}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "1", "name": "Read", "input": {"z": 1, "a": [2]}}, {"type": "tool_use", "id": "2", "name": "Bash", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "one"}, {"type": "image", "source": {}}]},
            {"type": "tool_result", "tool_use_id": "2", "content": "two", "is_error": true}, {"type": "tool_result", "tool_use_id": "3"},
            {"type": "text", "text": "and?"},
        ]},
    ]})));
    let wanted = [
        ("user", "go"),
        ("system", "remember"),
        ("assistant", "I look."),
        ("tool", "one\n[image omitted]"),
        ("tool", "[the tool failed]\ntwo"),
        ("tool", ""),
        ("user", "and?"),
    ];
    assert_eq!(said(&chat), wanted);
    let calls: Vec<_> = chat.messages[2].tool_calls.iter().map(|call| (call.id.as_str(), call.arguments_json.as_str())).collect();
    assert_eq!(
        (calls.as_slice(), chat.messages[2].reasoning.as_deref()),
        ([("1", r#"{"z":1,"a":[2]}"#), ("2", "{}")].as_slice(), Some("hm"))
    );
    assert_eq!((chat.messages[4].tool_call_id.as_deref(), chat.messages[4].name.as_deref()), (Some("2"), Some("Bash")));
    assert!(!chat.continue_final_message);
}

#[test]
fn a_marked_end_is_kept() {
    let check = |extra: Value, wanted: bool| assert_eq!(accepted(&with(extra.clone())).generate.cache_prompt, wanted, "{extra}");
    let ephemeral = json!({"type": "ephemeral"});
    let said = |mark: &Value| json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": mark}]);
    check(json!({}), false);
    check(json!({"cache_control": ephemeral}), true);
    check(json!({"messages": [{"role": "user", "content": said(&ephemeral)}]}), true);
    check(json!({"messages": [{"role": "user", "content": said(&Value::Null)}]}), false);
    check(json!({"messages": [{"role": "user", "content": "a", "cache_control": ephemeral}]}), true);
    // The prompt goes on behind these.
    check(json!({"system": said(&ephemeral)}), false);
    check(json!({"messages": [{"role": "user", "content": said(&ephemeral)}, {"role": "user", "content": "c"}]}), false);
    let turned = json!([{"type": "text", "text": "a", "cache_control": ephemeral}, {"type": "text", "text": "b"}]);
    check(json!({"messages": [{"role": "user", "content": turned}]}), false);
}

#[test]
fn deferred_tools_appear_where_the_conversation_tells_of_them() {
    let tools = json!([
        {"name": "ToolSearch", "input_schema": {"type": "object"}},
        {"type": "custom", "name": "Later", "description": "L", "input_schema": {"type": "object", "z": 1, "a": 2}, "defer_loading": true},
        {"name": "Never", "input_schema": {}, "defer_loading": true},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}, {"type": "bash_20250124", "name": "bash"},
    ]);
    let before = chat(&with(json!({"tools": tools})));
    assert_eq!(before.tools.iter().map(|tool| tool.name.as_str()).collect::<Vec<_>>(), ["ToolSearch"]);
    let after = chat(&with(json!({"tools": tools, "messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "ToolSearch", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "tool_reference", "tool_name": "Later"}]}]},
    ]})));
    let found: Vec<_> = after.tools.iter().map(|tool| (tool.name.as_str(), tool.hidden)).collect();
    assert_eq!(found, [("ToolSearch", false), ("Later", true)]);
    assert_eq!(after.messages[2].content, r#"{"name":"Later","description":"L","parameters":{"type":"object","z":1,"a":2}}"#);
}

#[test]
fn thinking_is_what_the_client_wants_to_see() {
    let check = |extra: Value, shown: bool, wanted: &str| {
        let request = accepted(&with(extra));
        let Some(Prompt::Chat(chat)) = request.generate.prompt else { panic!("a chat") };
        assert_eq!((request.thinking, chat.template_kwargs_json.as_str()), (shown, wanted));
    };
    check(json!({}), false, r#"{"enable_thinking":false}"#);
    check(json!({"thinking": {"type": "disabled"}}), false, r#"{"enable_thinking":false}"#);
    check(json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}), true, r#"{"enable_thinking":true,"thinking_budget":1024}"#);
    check(json!({"thinking": {"type": "adaptive", "display": "omitted"}}), false, r#"{"enable_thinking":true}"#);
    check(json!({"thinking": {"type": "between_tools"}}), true, r#"{"enable_thinking":true}"#);
    check(json!({"output_config": {"effort": "max"}}), false, r#"{"enable_thinking":false,"reasoning_effort":"xhigh"}"#);
}

#[test]
fn choices_and_formats() {
    let tools = json!([{"name": "f", "input_schema": {}}, {"name": "g", "input_schema": {}}]);
    let check = |choice: Value, mode: Mode, names: &[&str], single: bool| {
        let choice = chat(&with(json!({"tools": tools, "tool_choice": choice}))).tool_choice.expect("a choice");
        assert_eq!((choice.mode(), choice.single), (mode, single));
        assert_eq!(choice.names, names);
    };
    check(json!({"type": "auto", "disable_parallel_tool_use": true}), Mode::Auto, &[], true);
    check(json!({"type": "any"}), Mode::Required, &[], false);
    check(json!({"type": "tool", "name": "g"}), Mode::Required, &["g"], false);
    check(json!({"type": "none"}), Mode::None, &[], false);
    // Tools of Anthropic's servers are left out, and so is the wish for one.
    for choice in [json!({"type": "any"}), json!({"type": "tool", "name": "web_search"})] {
        let hosted = json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}], "tool_choice": choice});
        assert_eq!(chat(&with(hosted)).tool_choice, None);
    }
    let both = json!({"tools": [{"type": "web_search_20250305", "name": "f"}, tools[0]], "tool_choice": {"type": "tool", "name": "f"}});
    assert_eq!(chat(&with(both)).tool_choice.expect("a choice").names, ["f"]);
    let format = json!({"type": "json_schema", "schema": {"z": 1, "a": 2}});
    let wanted = Some(ask::json_schema(r#"{"z":1,"a":2}"#.into(), false));
    assert_eq!(accepted(&with(json!({"output_config": {"format": format}}))).generate.format, wanted);
    assert_eq!(accepted(&with(json!({"output_format": format}))).generate.format, wanted);
}

#[test]
fn a_reply_that_was_begun_goes_on() {
    let begun = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "{"}]);
    assert!(chat(&with(json!({"messages": begun}))).continue_final_message);
}

#[test]
fn what_anthropics_servers_did_is_text() {
    let chat = chat(&with(json!({"messages": [
        {"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "page"}}, {"type": "text", "text": "read"}]},
        {"role": "assistant", "content": [
            {"type": "server_tool_use", "name": "web_search"},
            {"type": "web_search_tool_result", "content": [{"type": "text", "text": "found"}]},
        ]},
        {"role": "user", "content": "ok"},
    ]})));
    let wanted = [("user", "page\nread"), ("assistant", "{\"type\":\"server_tool_use\",\"name\":\"web_search\"}\nfound"), ("user", "ok")];
    assert_eq!(said(&chat), wanted);
}

#[test]
fn refusals_name_the_field() {
    let check = |body: Value, code: Code, param: Option<&str>| {
        let failure = read(&body).expect_err("a refusal");
        assert_eq!((failure.code, failure.param.as_deref()), (code, param), "{body}: {}", failure.message);
    };
    use Code::{InvalidValue, MissingParameter, ThreadNotFound, UnsupportedModality};
    let thread = json!({"type": "continue", "previous_message_id": "msg_1"});
    check(with(json!({"thread": thread})), ThreadNotFound, Some("thread.previous_message_id"));
    assert!(accepted(&with(json!({"thread": {"type": "create"}}))).unknown.is_empty());
    check(json!({}), MissingParameter, Some("messages"));
    check(json!({"messages": []}), InvalidValue, Some("messages"));
    check(with(json!({"messages": [{"role": "robot", "content": ""}]})), InvalidValue, Some("messages[0].role"));
    check(with(json!({"messages": [{"role": "user", "content": 1}]})), InvalidValue, Some("messages[0].content"));
    let image = json!({"type": "image", "source": {"type": "base64", "data": ""}});
    let seen = json!([{"role": "user", "content": [image]}, {"role": "user", "content": "and?"}]);
    assert_eq!(chat(&with(json!({"messages": seen}))).messages[0].content, "[image omitted]");
    check(with(json!({"messages": [{"role": "user", "content": [image]}]})), UnsupportedModality, Some("messages[0].content[0]"));
    check(with(json!({"max_tokens": -2})), InvalidValue, Some("max_tokens"));
    check(with(json!({"temperature": 3})), InvalidValue, Some("temperature"));
    check(with(json!({"tools": [{"input_schema": {}}]})), MissingParameter, Some("tools[0].name"));
    check(with(json!({"tool_choice": {"type": "any"}})), InvalidValue, Some("tool_choice"));
    check(with(json!({"thinking": {"type": 1}})), InvalidValue, Some("thinking.type"));
}

#[test]
fn unknown_fields_are_never_refused() {
    let body = with(json!({
        "brand_new": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}], "odd": 1}],
        "tools": [{"name": "f", "input_schema": {}, "novel": true}],
    }));
    assert_eq!(accepted(&body).unknown, ["tools[].novel", "messages[].content[].mood", "messages[].odd", "brand_new"]);
    let Counted { model, unknown, .. } = counted(&body).expect("a conversation");
    assert_eq!((model.as_str(), unknown.len()), ("m", 4));
}
