//! `/v1/chat/completions` with tools, reasoning, formats and several choices; `/v1/completions` and `/v1/embeddings`.

use flash_proto::{
    code,
    v1::{self, generate_request::Prompt},
};
use serde_json::{Value, json};

use crate::{
    Gateway,
    client::{chat, post},
    expect,
    fake::{Fake, Step, accepted, calls, considered, reply, text},
    timeless,
};

fn body(extra: Value) -> Value {
    let mut body = json!({"model": "local", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

fn weather() -> Value {
    let parameters = json!({"type": "object", "properties": {"unit": {}, "city": {"type": "string"}}, "required": ["city"]});
    json!([{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": parameters}}])
}

#[tokio::test]
async fn calls_and_reasoning_are_streamed_as_recorded() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    for (name, script) in [("tools.sse", calls()), ("reasoning.sse", considered())] {
        fake.script(script);
        let reply = chat(gateway.address, &body(json!({"stream": true, "tools": weather()}))).await;
        assert_eq!(reply.status, 200);
        expect(name, &timeless(reply.text()));
    }
    let Some(Prompt::Chat(heard)) = fake.requests().remove(0).prompt else { panic!("a chat") };
    assert_eq!(
        heard.tools[0].parameters_json,
        r#"{"type":"object","properties":{"unit":{},"city":{"type":"string"}},"required":["city"]}"#
    );
    assert_eq!(heard.tool_choice.expect("a choice").mode(), v1::tool_choice::Mode::Auto);
}

#[tokio::test]
async fn a_tool_loop_goes_round() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    fake.script(calls());
    let first = chat(gateway.address, &body(json!({"tools": weather(), "tool_choice": "required"}))).await.json();
    let message = first["choices"][0]["message"].clone();
    assert_eq!((&first["choices"][0]["finish_reason"], &message["content"]), (&json!("tool_calls"), &Value::Null));
    assert_eq!(message["tool_calls"][1]["function"], json!({"name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}));
    fake.script(considered());
    let result = json!({"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"});
    let messages = json!([{"role": "user", "content": "hi"}, message, result]);
    let second = chat(gateway.address, &body(json!({"tools": weather(), "messages": messages}))).await.json();
    let answer = &second["choices"][0]["message"];
    assert_eq!((&answer["content"], &answer["reasoning_content"]), (&json!("Hello there."), &json!("hmm ok")));
    let Some(Prompt::Chat(heard)) = fake.requests().remove(1).prompt else { panic!("a chat") };
    assert_eq!(heard.messages[1].tool_calls[0].arguments_json, "{\"city\": \"Paris\"}");
    assert_eq!((heard.messages[2].name.as_deref(), heard.messages[2].content.as_str()), (Some("get_weather"), "sunny"));
}

#[tokio::test]
async fn a_schema_that_cannot_be_kept_is_refused() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    fake.script([Step::Refuse(code::status(code::SCHEMA_NOT_SUPPORTED, "propertyNames is not supported"))]);
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {"propertyNames": {}}}});
    let refused = chat(gateway.address, &body(json!({"response_format": format, "stream": true}))).await;
    assert_eq!(refused.error(), (422, "schema_not_supported".to_owned()));
    assert!(fake.requests()[0].format.as_ref().is_some_and(|format| format.strict));
}

#[tokio::test]
async fn choices_are_requests_of_their_own() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    for stream in [false, true] {
        for _ in 0..3 {
            fake.script(reply(&["a", "b"]));
        }
        let answer = chat(gateway.address, &body(json!({"n": 3, "seed": 7, "stream": stream}))).await;
        assert_eq!(answer.status, 200);
        if stream {
            for index in 0..3 {
                let said = format!("{{\"index\":{index},\"delta\":{{\"content\":\"b\"}}");
                assert_eq!(answer.text().matches(&said).count(), 1, "{}", answer.text());
            }
            assert_eq!(answer.text().matches("[DONE]").count(), 1);
        } else {
            let choices = answer.json()["choices"].clone();
            let said: Vec<_> = choices.as_array().expect("choices").iter().map(|choice| choice["message"]["content"].clone()).collect();
            assert_eq!((said, &answer.json()["usage"]["completion_tokens"]), (vec![json!("ab"); 3], &json!(15)));
        }
    }
    let mut seeds: Vec<_> = fake.requests().iter().map(|heard| heard.sampling.as_ref().and_then(|sampling| sampling.seed)).collect();
    seeds.sort();
    assert_eq!(seeds, [7, 7, 8, 8, 9, 9].map(Some));
    assert!(fake.requests().iter().any(|heard| heard.request_id.ends_with("-2")));
    assert!(fake.requests().iter().all(|heard| heard.together == 3));
}

#[tokio::test]
async fn one_choice_that_fails_ends_them_all() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    fake.script([Step::Send(accepted()), Step::Send(text("x")), Step::Hang]);
    fake.script([Step::Refuse(code::status(code::QUEUE_FULL, "full"))]);
    assert_eq!(chat(gateway.address, &body(json!({"n": 2}))).await.error(), (429, "queue_full".to_owned()));
    fake.gone(1).await;
}

#[tokio::test]
async fn completions_take_raw_text() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    fake.script(reply(&[" upon", " a time"]));
    let answer = post(gateway.address, "/v1/completions", &json!({"prompt": "Once", "echo": true})).await;
    let said = answer.json();
    assert_eq!((&said["object"], &said["choices"][0]["text"]), (&json!("text_completion"), &json!("Once upon a time")));
    assert_eq!((fake.requests()[0].prompt.clone(), fake.requests()[0].max_tokens), (Some(Prompt::Text("Once".into())), Some(16)));
    fake.script(reply(&["x"]));
    let options = json!({"prompt": [1, 2], "stream": true, "stream_options": {"include_usage": true}});
    let streamed = post(gateway.address, "/completions", &options).await;
    assert!(streamed.text().contains(r#""text":"x""#) && streamed.text().ends_with("data: [DONE]\n\n"), "{}", streamed.text());
    // Whether a gap can be filled is the model's to say.
    fake.script([Step::Refuse(code::with_param(code::status(code::FIM_NOT_SUPPORTED, "no such tokens"), "suffix"))]);
    let refused = post(gateway.address, "/v1/completions", &json!({"prompt": "a", "suffix": "b"})).await;
    assert_eq!(refused.error(), (422, "fim_not_supported".to_owned()));
    let gap = v1::Infill { prefix: "a".into(), suffix: "b".into() };
    assert_eq!(fake.requests()[2].prompt, Some(Prompt::Infill(gap)));
}

#[tokio::test]
async fn embeddings_are_not_made() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let ask = json!({"model": "local", "input": "x", "encoding_format": "base64"});
    assert_eq!(post(gateway.address, "/v1/embeddings", &ask).await.error(), (422, "embeddings_not_supported".to_owned()));
    let ask = json!({"model": "gpt-9", "input": "x"});
    assert_eq!(post(gateway.address, "/v1/embeddings", &ask).await.error(), (404, "model_not_found".to_owned()));
}
