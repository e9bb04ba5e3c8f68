//! Tests of `request.rs`: bodies of Ollama's clients → requests or refusals.

use serde_json::json;

use super::*;

fn talk(request: &Request) -> &v1::Chat {
    let Some(Prompt::Chat(chat)) = &request.generate.prompt else { panic!("a chat") };
    chat
}

#[test]
fn a_chat_is_read() {
    let body = json!({
        "model": "m", "keep_alive": "5m", "think": "high", "format": {"type": "object"}, "stream": false, "truncate": true,
        "options": {"temperature": 0, "num_predict": 9, "repeat_penalty": 1.1, "repeat_last_n": -1, "stop": ["x"], "num_ctx": 4096, "seed": 1},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1}}}]},
            {"role": "tool", "tool_name": "f", "content": "42"},
        ],
    });
    // Whatever else stands in its places is refused or read, and never a panic.
    crate::json::mutate(&body, |body| drop((chat(body), generate(body))));
    let request = chat(&body).expect("a request");
    assert!(request.unknown.is_empty() && !request.stream && request.task == Task::Generate, "{:?}", request.unknown);
    let sampling = request.generate.sampling.clone().expect("sampling");
    assert_eq!(
        (sampling.temperature, sampling.repetition_penalty, sampling.repetition_window, sampling.seed),
        (Some(0.0), Some(1.1), Some(0), Some(1))
    );
    assert_eq!((request.generate.max_tokens, request.generate.stop.as_slice()), (Some(9), ["x".to_owned()].as_slice()));
    assert_eq!(request.generate.format, Some(ask::json_schema(r#"{"type":"object"}"#.into(), false)));
    let chat = talk(&request);
    assert_eq!(chat.template_kwargs_json, r#"{"enable_thinking":true,"reasoning_effort":"high"}"#);
    assert_eq!(chat.tools[0].parameters_json, r#"{"z":1,"a":2}"#);
    assert_eq!((chat.messages[1].tool_calls[0].arguments_json.as_str(), chat.messages[2].name.as_deref()), (r#"{"z":1}"#, Some("f")));
}

#[test]
fn a_prompt_is_a_chat_unless_it_is_raw() {
    let request = generate(&json!({"prompt": "p", "system": "s", "format": "json", "options": {"num_predict": -1}})).expect("a request");
    let said: Vec<_> = talk(&request).messages.iter().map(|message| (message.role.as_str(), message.content.as_str())).collect();
    assert_eq!((said.as_slice(), request.stream), ([("system", "s"), ("user", "p")].as_slice(), true));
    assert_eq!((request.generate.format, request.generate.max_tokens), (Some(ask::json_object()), None));
    let raw = generate(&json!({"prompt": "p", "raw": true, "think": false})).expect("a request");
    assert_eq!(raw.generate.prompt, Some(Prompt::Text("p".into())));
    let gap = generate(&json!({"prompt": "", "suffix": "s"})).expect("a request");
    let infill = v1::Infill { prefix: String::new(), suffix: "s".into() };
    assert_eq!((gap.generate.prompt, gap.task), (Some(Prompt::Infill(infill)), Task::Generate));
}

#[test]
fn a_request_that_says_nothing_loads_or_unloads() {
    let task = |body: Value| (chat(&body).expect("a request").task, generate(&body).expect("a request").task);
    assert_eq!(task(json!({"model": "m"})), (Task::Load, Task::Load));
    assert_eq!(task(json!({"model": "m", "messages": [], "prompt": "", "keep_alive": -1})), (Task::Load, Task::Load));
    assert_eq!(task(json!({"model": "m", "keep_alive": 0})), (Task::Unload, Task::Unload));
    assert_eq!(task(json!({"model": "m", "keep_alive": "0s"})), (Task::Unload, Task::Unload));
}

#[test]
fn options_out_of_range_are_the_nearest_that_can_be_used() {
    let options = json!({"temperature": 3, "top_p": 0, "min_p": 1, "repeat_penalty": 0, "presence_penalty": -9});
    let request =
        chat(&json!({"messages": [{"role": "user", "content": "hi"}], "options": options, "keep_alive": 2.5})).expect("a request");
    let sampling = request.generate.sampling.expect("sampling");
    assert_eq!((sampling.temperature, sampling.repetition_penalty, sampling.presence_penalty), (Some(2.0), None, Some(-2.0)));
    assert!(sampling.top_p.is_some_and(|p| p > 0.0) && sampling.min_p.is_some_and(|p| p < 1.0), "{sampling:?}");
    assert_eq!(request.generate.keep_alive.as_deref(), Some("2.5s"));
}

#[test]
fn refusals_name_the_field() {
    let check = |outcome: Result<Request, Failure>, code: Code, param: &str| {
        let failure = outcome.expect_err("a refusal");
        assert_eq!((failure.code, failure.param.as_deref()), (code, Some(param)));
    };
    use Code::{InvalidValue, UnsupportedModality, UnsupportedValue};
    check(chat(&json!({"messages": [{"role": "robot"}]})), InvalidValue, "messages[0].role");
    check(chat(&json!({"messages": [{"role": "user", "images": ["x"]}]})), UnsupportedModality, "messages[0].images");
    check(chat(&json!({"format": "yaml"})), InvalidValue, "format");
    check(chat(&json!({"options": {"temperature": "3"}})), InvalidValue, "options.temperature");
    check(chat(&json!({"think": "utmost"})), InvalidValue, "think");
    check(generate(&json!({"prompt": "a", "context": [1]})), UnsupportedValue, "context");
    check(generate(&json!({"prompt": "a", "template": "{{ . }}"})), UnsupportedValue, "template");
}
