//! The routes of Ollama and LM Studio end to end, and that they can be left out.

use flash_gateway::config::Compat;
use flash_proto::{code, v1};
use serde_json::{Value, json};

use crate::{
    Gateway,
    client::{call, get, post},
    fake::{Fake, Step, calls, considered, reply},
};

#[tokio::test]
async fn ollama_lists_models_under_their_bare_ids() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let address = gateway.address;
    assert_eq!(get(address, "/api/version").await.json(), json!({"version": "0.13.4"}));
    let tags = get(address, "/api/tags").await.json();
    let names: Vec<_> = tags["models"].as_array().expect("models").iter().map(|model| model["name"].clone()).collect();
    assert_eq!(names, ["org/big", "flash-tiny-moe"]);
    assert_eq!(tags["models"][0]["digest"].as_str().map(str::len), Some(64));
    assert_eq!(tags["models"][0]["modified_at"], "2025-10-09T08:53:20Z");
    assert_eq!(get(address, "/api/ps").await.json(), json!({"models": []}));
    fake.snapshot(v1::Snapshot {
        model: Some(v1::LoadedModel {
            id: "flash-tiny-moe".into(),
            state: v1::loaded_model::State::Ready.into(),
            context_length: 2048,
            unload_in_s: Some(300.0),
            ..Default::default()
        }),
        memory: Some(v1::Memory { process_bytes: 77, ..Default::default() }),
        ..Default::default()
    });
    let running = &get(address, "/api/ps").await.json()["models"][0];
    assert_eq!((&running["name"], &running["size_vram"], &running["context_length"]), (&json!("flash-tiny-moe"), &json!(77), &json!(2048)));
    let shown = post(address, "/api/show", &json!({"name": "flash-tiny-moe:latest"})).await.json();
    assert_eq!(shown["capabilities"], json!(["completion", "tools", "insert", "thinking"]));
    assert_eq!(shown["template"], "{{ messages }}");
    assert_eq!(shown["parameters"], "temperature 0.5\ntop_k 20\ntop_p 0\nmin_p 0\nrepeat_penalty 0");
    let shown_big = post(address, "/api/show", &json!({"model": "org/big"})).await.json();
    assert_eq!(shown_big["capabilities"], json!(["completion"]));
    assert_eq!(shown["model_info"]["qwen3_moe.context_length"], 2048);
    let pulled = post(address, "/api/pull", &json!({"model": "flash-tiny-moe:latest"})).await;
    assert_eq!((pulled.text(), pulled.header("content-type")), ("{\"status\":\"success\"}\n", Some("application/x-ndjson")));
    for path in ["/api/show", "/api/pull", "/api/chat"] {
        let missing = post(address, path, &json!({"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]})).await;
        assert_eq!((missing.status, missing.json()["error"].is_string()), (404, true), "{path}");
    }
    let refused = post(address, "/api/embed", &json!({"model": "local", "input": "x"})).await;
    assert_eq!((refused.status, refused.json()), (422, json!({"error": "this model does not support embeddings"})));
}

#[tokio::test]
async fn ollama_streams_lines() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let ask = json!({"model": "flash-tiny-moe:latest", "messages": [{"role": "user", "content": "hi"}]});
    fake.script(considered());
    let answer = post(gateway.address, "/api/chat", &ask).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/x-ndjson")));
    let lines: Vec<Value> = answer.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let said: String = lines.iter().filter_map(|line| line["message"]["content"].as_str()).collect();
    assert_eq!((said.as_str(), &lines[0]["message"]["thinking"], &lines[3]["done"]), ("Hello there.", &json!("hmm ok"), &json!(true)));
    assert_eq!((&lines[3]["eval_count"], &lines[3]["prompt_eval_count"]), (&json!(5), &json!(11)));
    fake.script(calls());
    let mut whole = ask.clone();
    whole["stream"] = false.into();
    let answer = post(gateway.address, "/api/chat", &whole).await.json();
    assert_eq!(answer["message"]["tool_calls"][1]["function"]["arguments"], json!({"city": "Rome"}));
    // As Ollama's own examples and litellm ask.
    for headers in [&[("Content-Type", "")][..], &[("Content-Type", "application/x-www-form-urlencoded")]] {
        fake.script(reply(&["x"]));
        let answer = call(gateway.address, "POST", "/api/chat", headers, whole.to_string().as_bytes()).await;
        assert_eq!(answer.status, 200, "{headers:?}");
        let answer = call(gateway.address, "POST", "/v1/chat/completions", headers, whole.to_string().as_bytes()).await;
        assert_eq!(answer.status, 415, "{headers:?}");
    }
    fake.script(reply(&["x"]));
    let answer = post(gateway.address, "/api/generate", &json!({"prompt": "p", "stream": false})).await.json();
    assert_eq!((&answer["response"], &answer["done_reason"]), (&json!("x"), &json!("stop")));
    fake.script([Step::Refuse(code::status(code::QUEUE_FULL, "the queue is full"))]);
    let refused = post(gateway.address, "/api/chat", &ask).await;
    assert_eq!((refused.status, refused.json()), (429, json!({"error": "the queue is full"})));
    let mut broken = considered();
    *broken.last_mut().expect("steps") = Step::Refuse(code::status(code::ENGINE, "broken"));
    fake.script(broken);
    assert!(post(gateway.address, "/api/chat", &ask).await.text().ends_with("{\"error\":\"broken\"}\n"));
}

#[tokio::test]
async fn ollama_loads_and_unloads() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    for (path, ask, reason) in [
        ("/api/generate", json!({"model": "org/big", "keep_alive": "5m"}), "load"),
        ("/api/chat", json!({"model": "org/big", "messages": [], "keep_alive": 0}), "unload"),
    ] {
        let answer = post(gateway.address, path, &ask).await.json();
        assert_eq!((&answer["done"], &answer["done_reason"]), (&json!(true), &json!(reason)));
    }
    assert_eq!(fake.managed(), ["load org/big 5m", "unload org/big"]);
    assert!(fake.requests().is_empty());
}

#[tokio::test]
async fn lm_studio_lists_models_in_both_of_its_shapes() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let old = get(gateway.address, "/api/v0/models").await.json();
    let states: Vec<_> = old["data"].as_array().expect("data").iter().map(|model| (model["id"].clone(), model["state"].clone())).collect();
    assert_eq!(states, [(json!("org/big"), json!("not-loaded")), (json!("flash-tiny-moe"), json!("loaded"))]);
    assert_eq!((&old["data"][0]["capabilities"], &old["data"][1]["capabilities"]), (&json!([]), &json!(["tool_use"])));
    assert_eq!(get(gateway.address, "/api/v0/models/org/big").await.json(), old["data"][0]);
    assert_eq!(get(gateway.address, "/api/v0/models/gpt-9").await.error(), (404, "model_not_found".to_owned()));
    let new = get(gateway.address, "/api/v1/models").await.json();
    let first = &new["models"][0];
    assert_eq!((&first["key"], &first["publisher"], &first["max_context_length"]), (&json!("org/big"), &json!("org"), &json!(2048)));
    assert_eq!(first["quantization"], json!({"name": "4-bit g64", "bits_per_weight": 4}));
    assert_eq!(
        (first["loaded_instances"].as_array().map(Vec::len), new["models"][1]["loaded_instances"].as_array().map(Vec::len)),
        (Some(0), Some(1))
    );
}

#[tokio::test]
async fn other_servers_routes_can_be_left_out() {
    let fake = Fake::start();
    let gateway = Gateway::with(&fake, |config| config.compat = vec![Compat::None]).await;
    for path in ["/api/tags", "/api/v0/models"] {
        assert_eq!(get(gateway.address, path).await.status, 404, "{path}");
    }
}
