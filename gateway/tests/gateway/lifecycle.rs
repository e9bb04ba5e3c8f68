//! Comings and goings: clients that leave, a daemon that dies and returns, a gateway that stops; and the command itself.

use std::{process::Stdio, time::Duration};

use flash_proto::v1;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    time::sleep,
};

use crate::{
    Gateway,
    client::{Client, chat, get, request},
    fake::{Fake, Step, accepted, reply, text},
    soon,
};

fn ask(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "stream": stream})
}

fn post(body: &Value) -> Vec<u8> {
    request("POST", "/v1/chat/completions", &[], body.to_string().as_bytes())
}

/// Until the page shows it; answers are counted a moment after they were read.
async fn metric(gateway: &Gateway, line: &str) {
    soon(line, async {
        while !get(gateway.address, "/metrics").await.text().lines().any(|found| found == line) {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_request() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let send = |event| Step::Send(event);
    let mut gone = 0;
    for stream in [false, true] {
        for script in [vec![Step::Hang], vec![send(accepted()), Step::Hang], vec![send(accepted()), send(text("x")), Step::Hang]] {
            let answers = script.len() - 1;
            fake.script(script);
            let mut client = Client::open(gateway.address).await;
            client.write(&post(&ask(stream))).await;
            if stream && answers > 0 {
                client.until(if answers == 2 { r#""content":"x""# } else { r#""role":"assistant""# }).await;
            } else {
                soon("the request", async {
                    while fake.requests().len() <= gone {
                        sleep(Duration::from_millis(1)).await;
                    }
                })
                .await;
            }
            drop(client);
            gone += 1;
            fake.gone(gone).await;
        }
    }
    metric(&gateway, "flash_requests_cancelled_total{reason=\"client_gone\"} 6").await;
    metric(&gateway, "flash_http_requests_total{route=\"/chat/completions\",method=\"POST\",code=\"499\"} 6").await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_given_up() {
    let fake = Fake::start();
    let gateway = Gateway::with(&fake, |config| config.timing.write_stall = Duration::from_millis(50)).await;
    fake.script([Step::Send(accepted()), Step::Flood]);
    let mut client = Client::open(gateway.address).await;
    client.write(&post(&ask(true))).await;
    client.until("assistant").await;
    fake.gone(1).await;
    client.closed().await;
}

#[tokio::test]
async fn a_daemon_may_come_go_and_come_back() {
    let mut fake = Fake::absent();
    let gateway = Gateway::start(&fake).await;
    let down = (503, "daemon_unavailable".to_owned());
    let reply_down = chat(gateway.address, &ask(true)).await;
    assert_eq!((reply_down.error(), reply_down.header("retry-after")), (down.clone(), Some("2")));
    assert_eq!(get(gateway.address, "/v1/models").await.error(), down);
    let health = get(gateway.address, "/health").await;
    assert_eq!((health.status, &health.json()["status"], health.header("cache-control")), (503, &json!("down"), Some("no-store")));
    assert_eq!(get(gateway.address, "/livez").await.status, 200);
    assert_eq!(get(gateway.address, "/metrics").await.status, 200);
    for _ in 0..2 {
        fake.resume();
        fake.script(reply(&["ok"]));
        // The channel may notice the new daemon at the second try.
        soon("the daemon's return", async {
            while get(gateway.address, "/health").await.status != 200 {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert_eq!(chat(gateway.address, &ask(false)).await.status, 200);
        fake.script([Step::Send(accepted()), Step::Send(text("x")), Step::Hang]);
        let mut client = Client::open(gateway.address).await;
        client.write(&post(&ask(true))).await;
        client.until(r#""content":"x""#).await;
        fake.kill();
        let rest = client.until("[DONE]").await;
        assert!(rest.contains(r#""code":"daemon_unavailable""#), "{rest}");
        assert_eq!(chat(gateway.address, &ask(false)).await.error(), down);
        assert_eq!(get(gateway.address, "/v1/models").await.error(), down);
    }
}

#[tokio::test]
async fn health_and_metrics_show_the_daemon() {
    let fake = Fake::start();
    let gateway = Gateway::start(&fake).await;
    let health = get(gateway.address, "/readyz").await;
    assert_eq!(
        (health.status, health.json()),
        (200, json!({"status": "ok", "model": null, "daemon": "up", "queue": 0, "version": "9.9.9"}))
    );
    let mut snapshot = v1::Snapshot {
        model: Some(v1::LoadedModel { id: "m".into(), progress: 0.5, ..Default::default() }),
        requests: Some(v1::Requests { running: 2, waiting: 3, grammar_s: 0.5, relaxed: 6, ..Default::default() }),
        experts: Some(v1::Experts { hits: 30, misses: 10, bytes_read: 4096, ..Default::default() }),
        memory: Some(v1::Memory { slab_bytes: 77, kv_blocks: 9, kv_busy_blocks: 4, ..Default::default() }),
        pressure: Some(v1::Pressure { level: 1, ..Default::default() }),
        ..Default::default()
    };
    fake.snapshot(snapshot.clone());
    let health = get(gateway.address, "/health").await;
    assert_eq!((health.status, &health.json()["status"], &health.json()["progress"]), (503, &json!("loading"), &json!(0.5)));
    snapshot.model.as_mut().expect("a model").state = v1::loaded_model::State::Ready.into();
    fake.snapshot(snapshot);
    let health = get(gateway.address, "/health").await;
    assert_eq!((health.status, &health.json()["model"], &health.json()["queue"]), (200, &json!("m"), &json!(3)));
    fake.script(reply(&["a", "b"]));
    assert_eq!(chat(gateway.address, &ask(false)).await.status, 200);
    for line in [
        "flash_requests_running 2",
        "flash_requests_waiting 3",
        "flash_expert_cache_hits_total 30",
        "flash_expert_cache_misses_total 10",
        "flash_ssd_read_bytes_total 4096",
        "flash_memory_bytes{kind=\"slab\"} 77",
        "flash_kv_blocks{state=\"busy\"} 4",
        "flash_kv_blocks{state=\"idle\"} 5",
        "flash_grammar_compile_seconds_total 0.5",
        "flash_schemas_relaxed_total 6",
        "flash_memory_pressure 1",
        "flash_prompt_tokens_total 11",
        "flash_cached_prompt_tokens_total 3",
        "flash_generated_tokens_total 5",
        "flash_ttft_seconds_count 1",
        "flash_inter_token_seconds_count 1",
        "flash_http_requests_total{route=\"/chat/completions\",method=\"POST\",code=\"200\"} 1",
        "# TYPE flash_http_requests_total counter",
        concat!("flash_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
    ] {
        metric(&gateway, line).await;
    }
    assert_eq!(get(gateway.address, "/metrics").await.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
}

#[tokio::test]
async fn a_stop_lets_requests_finish_and_refuses_new_ones() {
    let fake = Fake::start();
    let mut gateway = Gateway::start(&fake).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    let mut script = reply(&["one", "two"]);
    script.insert(2, Step::Wait(gate));
    fake.script(script);
    let mut running = Client::open(gateway.address).await;
    running.write(&post(&ask(true))).await;
    running.until("one").await;
    let mut idle = Client::open(gateway.address).await;
    idle.write(&request("GET", "/livez", &[], b"")).await;
    assert_eq!(idle.reply(false).await.status, 200);
    gateway.stop();
    assert!(idle.closed().await.is_empty());
    let late = chat(gateway.address, &ask(false)).await;
    assert_eq!(
        (late.error(), late.header("connection"), late.header("retry-after")),
        ((503, "draining".to_owned()), Some("close"), Some("2"))
    );
    open.send(true).expect("the fake waits");
    let rest = running.until("[DONE]").await;
    assert!(rest.contains("two"), "{rest}");
    soon("the end of the gateway", gateway.task).await.expect("no panic").expect("no error");
}

#[tokio::test]
async fn a_stop_ends_what_does_not_finish() {
    let fake = Fake::start();
    let mut gateway = Gateway::with(&fake, |config| config.timing.drain = Duration::from_millis(20)).await;
    fake.script([Step::Send(accepted()), Step::Send(text("x")), Step::Hang]);
    let mut running = Client::open(gateway.address).await;
    running.write(&post(&ask(true))).await;
    running.until(r#""content":"x""#).await;
    gateway.stop();
    let rest = running.until("[DONE]").await;
    assert!(rest.contains(r#""code":"draining""#), "{rest}");
    soon("the end of the gateway", gateway.task).await.expect("no panic").expect("no error");
    fake.gone(1).await;
    // Where nothing has been said yet, by a status.
    let mut gateway = Gateway::with(&fake, |config| config.timing.drain = Duration::from_millis(20)).await;
    fake.script([Step::Send(accepted()), Step::Hang]);
    let mut running = Client::open(gateway.address).await;
    running.write(&post(&ask(false))).await;
    soon("the request", async {
        while fake.requests().len() < 2 {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    gateway.stop();
    assert_eq!(running.reply(false).await.error(), (503, "draining".to_owned()));
    soon("the end of the gateway", gateway.task).await.expect("no panic").expect("no error");
    fake.gone(2).await;
}

#[tokio::test]
async fn the_command_says_where_it_listens_and_stops_when_told() {
    let fake = Fake::absent();
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flash-gateway"));
        command.env_clear().arg("--socket").arg(fake.socket()).args(arguments).stderr(Stdio::piped()).kill_on_drop(true);
        command
    };
    let mut child = command(&["--port", "0"]).spawn().expect("the gateway");
    let mut lines = BufReader::new(child.stderr.take().expect("stderr")).lines();
    let line = soon("the ready line", lines.next_line()).await.expect("text").expect("a line");
    let address = line.strip_prefix("listening on http://").expect("the ready line").parse().expect("an address");
    assert_eq!(get(address, "/livez").await.status, 200);
    let port = address.port().to_string();
    let busy = soon("the refusal", command(&["--port", &port]).output()).await.expect("output");
    assert_eq!(busy.status.code(), Some(75));
    // What flashctl listens for.
    let said = |output: &std::process::Output| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let (error, hint) = text.strip_prefix("error: ").and_then(|rest| rest.trim_end().split_once("\nhint: ")).expect(&text);
        (error.to_owned(), hint.to_owned())
    };
    let (error, hint) = said(&busy);
    assert!(error.starts_with(&format!("{address} is in use by ")) && hint.contains("another --port"), "{busy:?}");
    let open = soon("the refusal", command(&["--host", "0.0.0.0", "--port", "0"]).output()).await.expect("output");
    assert_eq!(open.status.code(), Some(78));
    assert!(said(&open).1.contains("--insecure-no-auth"), "{open:?}");
    // An address for documentation, which no machine has.
    let elsewhere =
        soon("the refusal", command(&["--host", "192.0.2.1", "--port", "0", "--insecure-no-auth"]).output()).await.expect("output");
    assert!(said(&elsewhere).1.contains("--host"), "{elsewhere:?}");
    let kill = Command::new("kill").args(["-TERM", &child.id().expect("a pid").to_string()]).status().await.expect("kill");
    assert!(kill.success());
    assert_eq!(soon("the end", child.wait()).await.expect("a status").code(), Some(0));
}
