//! Everything around a request: paths and methods, who may call, bodies, connections.

use std::{io::Write, time::Duration};

use flash_gateway::config::digest;
use serde_json::{Value, json};

use crate::{
    Gateway,
    client::{Client, call, chat, get, request},
    fake::{Fake, reply},
    soon,
};

#[tokio::test]
async fn paths_and_methods() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    for (method, path, status) in [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/api/hello", 200),
        ("HEAD", "/api/hello", 200),
        ("GET", "/livez", 200),
        ("GET", "/health", 200),
        ("GET", "/readyz/", 200),
        ("HEAD", "/health", 200),
        ("GET", "/metrics", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/models?limit=1000", 200),
        ("GET", "/v1/v1/models/", 200),
        ("HEAD", "/v1/models", 200),
        ("GET", "/v1/models/flash-tiny-moe", 200),
        ("GET", "/v1/models/org/big", 200),
        ("GET", "/v1/models/org%2Fbig", 200),
        ("HEAD", "/models/org%2Fbig/", 200),
        ("OPTIONS", "/v1/chat/completions", 204),
    ] {
        assert_eq!(call(gateway.address, method, path, &[], b"").await.status, status, "{method} {path}");
    }
    for (method, path, status, code) in [
        ("GET", "/v1", 404, "unknown_url"),
        ("GET", "/v1/v1/v1/models", 404, "unknown_url"),
        ("GET", "/V1/models", 404, "unknown_url"),
        ("POST", "/v1/audio/speech", 404, "unknown_url"),
        ("GET", "/v1/models/gpt-4", 404, "model_not_found"),
        ("GET", "/v1/models/..%2f..%2fetc", 404, "model_not_found"),
        ("GET", "/v1/models/%ff", 404, "model_not_found"),
        ("GET", "/v1/responses/%ff", 404, "response_not_found"),
        ("DELETE", "/v1/responses/%ff", 404, "response_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/org/big", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ] {
        let reply = call(gateway.address, method, path, &[], b"").await;
        assert_eq!(reply.error(), (status, code.to_owned()), "{method} {path}");
        let says = reply.json()["error"]["message"].as_str().expect("a message").to_owned();
        assert!(!matches!(code, "unknown_url" | "method_not_allowed") || says.contains(&format!(" {path}.")), "{path}: {says}");
        if status == 405 {
            assert_eq!(reply.header("allow"), Some(if path.ends_with("completions") { "POST" } else { "GET,HEAD" }), "{method} {path}");
        }
    }
    let upgrade = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Key", "x")];
    assert_eq!(call(gateway.address, "GET", "/v1/chat/completions", &upgrade, b"").await.status, 405);
}

#[tokio::test]
async fn models_are_listed_for_every_sdk() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let list = get(gateway.address, "/v1/models").await.json();
    assert_eq!((&list["object"], &list["has_more"], &list["first_id"]), (&json!("list"), &json!(false), &json!("flash-tiny-moe")));
    let first = &list["data"][0];
    assert_eq!(
        (&first["object"], &first["type"], &first["created_at"]),
        (&json!("model"), &json!("model"), &json!("2025-10-09T08:53:20Z"))
    );
    assert_eq!((&first["loaded"], &first["aliases"], &first["context_length"]), (&json!(true), &json!(["local"]), &json!(2048)));
    assert_eq!(get(gateway.address, "/v1/models/local").await.json(), *first);
    let able = |model: &Value| (model["capabilities"]["tools"].as_bool(), model["capabilities"]["reasoning"].as_bool());
    assert_eq!((able(first), able(&list["data"][1])), ((Some(true), Some(true)), (Some(false), Some(false))));
}

#[tokio::test]
async fn hosts_and_origins() {
    let fake = Fake::start();
    let gateway = Gateway::with(&fake, |config| config.hosts.push("box.lan".into())).await;
    let preflight = [("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "x-stainless-os, authorization")];
    for (method, headers, status) in [
        ("GET", vec![("Host", "127.0.0.1:9")], 200),
        ("GET", vec![("Host", "[::1]:9")], 200),
        ("GET", vec![("Host", "BOX.lan")], 200),
        ("GET", vec![("Host", "evil.com")], 403),
        ("GET", vec![("Host", "localhost"), ("Host", "evil.com")], 403),
        ("OPTIONS", vec![("Host", "evil.com")], 403),
        ("GET", vec![("Origin", "http://localhost:3000")], 200),
        ("GET", vec![("Origin", "https://evil.com")], 200),
        ("POST", vec![("Origin", "https://evil.com")], 403),
        ("POST", vec![("Origin", "null")], 403),
        ("POST", vec![("Origin", "app://obsidian.md")], 405),
        ("OPTIONS", [&[("Origin", "https://evil.com")][..], &preflight].concat(), 403),
        ("OPTIONS", [&[("Origin", "http://localhost:3000")][..], &preflight].concat(), 204),
    ] {
        let reply = call(gateway.address, method, "/v1/models", &headers, b"").await;
        assert_eq!(reply.status, status, "{method} {headers:?}");
        let welcome = headers.iter().find(|(name, value)| *name == "Origin" && !value.contains("evil") && *value != "null");
        assert_eq!(reply.header("access-control-allow-origin"), welcome.map(|(_, origin)| *origin), "{method} {headers:?}");
        if status == 204 {
            assert_eq!(reply.header("access-control-allow-headers"), Some("x-stainless-os, authorization"));
            assert_eq!(reply.header("access-control-allow-methods"), Some("GET, POST, HEAD, DELETE, OPTIONS"));
            assert_eq!((reply.header("access-control-max-age"), reply.header("vary")), (Some("600"), Some("Origin")));
        }
    }
    for (line, status) in [
        ("GET /livez HTTP/1.0\r\n\r\n", 200),
        ("GET /livez HTTP/1.1\r\n\r\n", 403),
        ("GET http://evil.com/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 403),
    ] {
        let mut client = Client::open(gateway.address).await;
        client.write(line.as_bytes()).await;
        assert_eq!(client.reply(false).await.status, status, "{line:?}");
    }
}

#[tokio::test]
async fn keys() {
    let fake = Fake::start();
    let gateway = Gateway::with(&fake, |config| config.keys = vec![digest("one"), digest("two")]).await;
    for (method, path, headers, status) in [
        ("GET", "/v1/models", vec![], 401),
        ("GET", "/v1/models", vec![("Authorization", "Bearer three")], 401),
        ("GET", "/v1/models", vec![("Authorization", "Basic one")], 401),
        ("GET", "/v1/models", vec![("Authorization", "Bearer ")], 401),
        ("GET", "/v1/models", vec![("Authorization", "Bearer one")], 200),
        ("GET", "/v1/models", vec![("Authorization", "bearer two")], 200),
        ("GET", "/v1/models", vec![("x-api-key", "one")], 200),
        ("GET", "/v1/models", vec![("api-key", "two")], 200),
        ("GET", "/v1/models", vec![("x-api-key", "on")], 401),
        ("GET", "/v1/models", vec![("Authorization", "Bearer three"), ("api-key", "two")], 200),
        ("GET", "/v1/models", vec![("Authorization", "Bearer three"), ("x-api-key", "four")], 401),
        ("POST", "/v1/chat/completions", vec![], 401),
        ("GET", "/nowhere", vec![], 401),
        ("GET", "/", vec![], 401),
        ("HEAD", "/", vec![], 200),
        ("HEAD", "/api/hello", vec![], 200),
        ("OPTIONS", "/", vec![], 204),
        ("GET", "/health", vec![], 200),
        ("GET", "/livez", vec![], 200),
        ("GET", "/readyz", vec![], 200),
        ("GET", "/metrics", vec![], 200),
        ("OPTIONS", "/v1/models", vec![], 204),
    ] {
        let reply = call(gateway.address, method, path, &headers, b"").await;
        assert_eq!(reply.status, status, "{method} {path} {headers:?}");
        if status == 401 {
            assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
            let wanted =
                json!({"message": "Incorrect API key provided.", "type": "authentication_error", "param": null, "code": "invalid_api_key"});
            assert_eq!(reply.json()["error"], wanted);
        }
    }
    // A page that is welcome can read what is wrong.
    let reply = call(gateway.address, "GET", "/v1/models", &[("Origin", "http://localhost:3000")], b"").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (401, Some("http://localhost:3000")));
}

#[tokio::test]
async fn bad_bodies_are_refused_and_the_next_request_served() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let good = json!({"messages": [{"role": "user", "content": "hi"}]}).to_string().into_bytes();
    let gzip = {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        writer.write_all(&good).expect("compress");
        writer.finish().expect("compress")
    };
    let bom = [b"\xef\xbb\xbf", &good[..]].concat();
    let large = [b"\"", &vec![b'x'; 33 << 20][..], b"\""].concat();
    let chunked = [format!("{:x}\r\n", large.len()).as_bytes(), &large, b"\r\n0\r\n\r\n"].concat();
    let deep = [vec![b'['; 10_000], vec![b']'; 10_000]].concat();
    let invalid = |bytes: &[u8]| (vec![], bytes.to_vec(), Some((400, "invalid_json")));
    for (headers, body, refused) in [
        invalid(b""),
        invalid(b"{"),
        invalid(b"{} {}"),
        invalid(b"{\"messages\": \"\xff\"}"),
        invalid(&deep),
        (vec![], b"[]".to_vec(), Some((400, "invalid_value"))),
        (vec![], b"{}".to_vec(), Some((400, "missing_required_parameter"))),
        (vec![], large, Some((413, "request_too_large"))),
        (vec![("Transfer-Encoding", "chunked")], chunked, Some((413, "request_too_large"))),
        (vec![("Content-Type", "text/plain")], good.clone(), Some((415, "unsupported_media_type"))),
        (vec![("Content-Encoding", "br")], good.clone(), Some((415, "unsupported_media_type"))),
        (vec![("Content-Encoding", "gzip")], good.clone(), Some((400, "invalid_json"))),
        (vec![("Content-Encoding", "gzip")], gzip, None),
        (vec![("Content-Type", "application/vnd.api+json; charset=utf-8")], good.clone(), None),
        (vec![], bom, None),
        (vec![("Expect", "100-continue")], good.clone(), None),
    ] {
        if refused.is_none() {
            fake.script(reply(&["ok"]));
        }
        let mut client = Client::open(gateway.address).await;
        client.write(&request("POST", "/v1/chat/completions", &headers, &body)).await;
        if headers.iter().any(|(name, _)| *name == "Expect") {
            assert_eq!((client.line().await.trim(), client.line().await.trim()), ("HTTP/1.1 100 Continue", ""));
        }
        let answer = client.reply(false).await;
        match refused {
            Some((status, code)) => assert_eq!(answer.error(), (status, code.to_owned()), "{headers:?}"),
            None => assert_eq!(answer.status, 200, "{headers:?} {}", answer.text()),
        }
        assert_eq!(get(gateway.address, "/livez").await.status, 200);
    }
}

#[tokio::test]
async fn a_connection_carries_many_requests() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let mut client = Client::open(gateway.address).await;
    let body = json!({"stream": true, "messages": [{"role": "user", "content": "hi"}]}).to_string();
    let ask = request("POST", "/v1/chat/completions", &[("x-request-id", "first")], body.as_bytes());
    fake.script(reply(&["one"]));
    fake.script(reply(&["two"]));
    // All at once, answered in order.
    client.write(&[ask.clone(), request("GET", "/livez", &[("x-request-id", "bad id")], b""), ask].concat()).await;
    let first = client.reply(false).await;
    assert!(first.text().contains(r#"{"content":"one"}"#), "{}", first.text());
    assert_eq!(first.header("x-request-id"), Some("first"));
    let second = client.reply(false).await;
    assert!(second.header("x-request-id").expect("an id").starts_with("req_"), "{second:?}");
    assert!(client.reply(false).await.text().contains(r#"{"content":"two"}"#));
    client.write(&request("GET", "/livez", &[], b"")).await;
    assert_eq!(client.reply(false).await.status, 200);
}

#[tokio::test]
async fn slow_clients_are_dropped() {
    let fake = Fake::start();
    let brief = Duration::from_millis(50);
    let gateway = Gateway::with(&fake, |config| config.timing.header = brief).await;
    for start in ["", "GET /livez HT", "GET /livez HTTP/1.1\r\nHost: local"] {
        let mut client = Client::open(gateway.address).await;
        client.write(start.as_bytes()).await;
        client.closed().await;
    }
    // The second request of a connection has no more time than its first.
    let mut client = Client::open(gateway.address).await;
    client.write(&request("GET", "/livez", &[], b"")).await;
    assert_eq!(client.reply(false).await.status, 200);
    client.write(b"GET ").await;
    client.closed().await;
    let gateway = Gateway::with(&fake, |config| config.timing.keep_alive = brief).await;
    let mut client = Client::open(gateway.address).await;
    client.write(&request("GET", "/livez", &[], b"")).await;
    assert_eq!(client.reply(false).await.status, 200);
    client.closed().await;
    let gateway = Gateway::with(&fake, |config| config.timing.body_idle = brief).await;
    let mut client = Client::open(gateway.address).await;
    client
        .write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        .await;
    assert_eq!(client.reply(false).await.error(), (400, "invalid_json".to_owned()));
}

#[tokio::test]
async fn http_2_is_spoken_to_those_who_begin_with_it() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let stream = tokio::net::TcpStream::connect(gateway.address).await.expect("the gateway listens");
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io).await.expect("h2");
    tokio::spawn(connection);
    for (uri, status) in [("http://localhost/v1/models/", 200), ("http://evil.com/v1/models", 403)] {
        let request = hyper::Request::get(uri).body(http_body_util::Empty::<axum::body::Bytes>::new()).expect("a request");
        assert_eq!(soon("an answer", sender.send_request(request)).await.expect("an answer").status(), status, "{uri}");
    }
}

#[tokio::test]
async fn many_ask_at_once() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let body = json!({"messages": [{"role": "user", "content": "hi"}]});
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..32 {
        fake.script(reply(&["ok"]));
        let (address, body) = (gateway.address, body.clone());
        asking.spawn(async move { chat(address, &body).await.status });
    }
    assert_eq!(soon("all answers", asking.join_all()).await, [200; 32]);
}
