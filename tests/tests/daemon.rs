//! flashd as a process: its socket, its queue, its memory, its end.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use flash_proto::{
    code,
    v1::{
        BenchRequest, GenerateRequest, ListRequest, ShutdownRequest, Snapshot, UnloadRequest, WatchStatsRequest, generate_event::Event,
        loaded_model::State,
    },
};
use flash_tests::{
    DEADLINE,
    daemon::{Home, bundled_model, collect, endless, finish, first_text, greedy, greedy_ids, wait_until},
    golden,
    tiny_model::{Spec, TinyModel},
};
use rustix::process::Signal;

/// A model that talks for 32,768 tokens: longer than any test waits.
fn tiny(home: &Home) -> Result<String> {
    let dir = home.models().join("tiny");
    TinyModel::generate(Spec::default()).write(&dir)?;
    Ok("tiny".into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_place_is_private_and_taken_once() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let mut daemon = home.daemon(&[])?;
    let mode = |path: &Path| fs::metadata(path).map(|found| found.permissions().mode() & 0o777);
    assert_eq!(mode(&home.socket())?, 0o600);
    assert_eq!(mode(home.socket().parent().context("a folder")?)?, 0o700);
    let refused = finish(home.command("flashd"), None)?;
    assert_eq!(refused.code, Some(75), "{}", refused.stderr);
    assert!(refused.stderr.contains("another flashd"), "{}", refused.stderr);

    // Killed without a chance to clean up: the socket stays, and is replaced.
    daemon.process.signal(Signal::KILL)?;
    daemon.process.code()?;
    assert!(home.socket().exists(), "nobody was left to remove it");
    let daemon = home.daemon(&[])?;
    assert_eq!(daemon.client().await?.ids(greedy(&model, "Hello", 3)).await?.len(), 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sigterm_lets_a_running_stream_finish() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let mut daemon = home.daemon(&[])?;
    let client = daemon.client().await?;
    let request = greedy(&model, "Once upon a time", 1500);
    let expected = client.ids(request.clone()).await?;
    for signal in [Signal::TERM, Signal::INT] {
        let mut stream = client.start(request.clone()).await?;
        first_text(&mut stream).await?;
        daemon.process.signal(signal)?;
        let answer = collect(stream).await?;
        assert_eq!(answer.done.context("an end")?.token_ids, expected);
        assert_eq!(daemon.process.code()?, Some(0), "{}", daemon.process.errors());
        assert!(!home.socket().exists(), "the socket is removed");
        daemon = home.daemon(&[])?;
    }
    // Shutdown over the wire is the same.
    let client = daemon.client().await?;
    let mut stream = client.start(request.clone()).await?;
    first_text(&mut stream).await?;
    client.admin.clone().shutdown(ShutdownRequest { grace_ms: 30_000 }).await?;
    assert_eq!(collect(stream).await?.done.context("an end")?.token_ids, expected);
    assert_eq!(daemon.process.code()?, Some(0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_drain_has_an_end() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let mut daemon = home.daemon(&[])?;
    let client = daemon.client().await?;
    let mut stream = client.start(endless(&model, "On and on")).await?;
    first_text(&mut stream).await?;
    client.admin.clone().shutdown(ShutdownRequest { grace_ms: 200 }).await?;
    let refused = client.ask(greedy(&model, "late", 1)).await;
    assert!(refused.is_err(), "a request during the drain: {refused:?}");
    daemon.process.code()?;
    // A second signal does not wait either.
    let mut daemon = home.daemon(&[])?;
    let mut stream = daemon.client().await?.start(endless(&model, "On and on")).await?;
    first_text(&mut stream).await?;
    daemon.process.signal(Signal::TERM)?;
    wait_until("the drain begins", || daemon.process.errors().contains("drain"))?;
    daemon.process.signal(Signal::TERM)?;
    assert_eq!(daemon.process.code()?, Some(143));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn clients_share_without_changing_each_others_tokens() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let daemon = home.daemon(&["--expert-cache", "25%"])?;
    let client = daemon.client().await?;
    let requests: Vec<GenerateRequest> = ["one", "another one", "a third"]
        .iter()
        .map(|text| GenerateRequest { client: (*text).into(), ..greedy(&model, text, 200) })
        .collect();
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(client.ids(request.clone()).await?);
    }
    let together: Vec<_> = requests
        .into_iter()
        .map(|request| {
            let client = client.clone();
            tokio::spawn(async move { client.ids(request).await })
        })
        .collect();
    for (answer, expected) in together.into_iter().zip(expected) {
        assert_eq!(answer.await??, expected);
    }
    let requests = client.stats().await?.requests.context("requests")?;
    assert_eq!((requests.running, requests.waiting, requests.finished, requests.failed), (0, 0, 6, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_queue_says_so_and_a_dropped_stream_makes_room() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let daemon = home.daemon(&["--parallel", "1", "--queue", "1"])?;
    let client = daemon.client().await?;
    let mut running = client.start(endless(&model, "first")).await?;
    first_text(&mut running).await?;
    let waiting = client.start(endless(&model, "second")).await?;
    client.wait_stats("one runs and one waits", DEADLINE, |stats| counts(stats) == (1, 1)).await?;
    let refused = client.ask(endless(&model, "third")).await.err().context("the queue is full")?;
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused:?}");
    assert_eq!(code::of(&refused), Some(code::QUEUE_FULL));
    assert!(code::retry_after(&refused).is_some_and(|seconds| (1..=60).contains(&seconds)), "{refused:?}");
    drop(running);
    client.wait_stats("the one that waited runs", DEADLINE, |stats| counts(stats) == (1, 0)).await?;
    drop(waiting);
    let stats = client.wait_stats("nothing runs", DEADLINE, |stats| counts(stats) == (0, 0)).await?;
    assert_eq!(stats.requests.context("requests")?.cancelled, 2);
    assert_eq!(stats.memory.context("memory")?.kv_reserved_bytes, 0, "its KV blocks are free again");
    Ok(())
}

fn counts(stats: &flash_proto::v1::Snapshot) -> (u32, u32) {
    stats.requests.as_ref().map_or((0, 0), |requests| (requests.running, requests.waiting))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_are_refused_before_they_are_accepted() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let daemon = home.daemon(&["--ctx", "256"])?;
    let client = daemon.client().await?;
    let sampling = |edit: &dyn Fn(&mut flash_proto::v1::Sampling)| {
        let mut request = greedy(&model, "Hello", 4);
        edit(request.sampling.as_mut().expect("greedy sets it"));
        request
    };
    let cases = [
        ("an unknown model", greedy("no-such-model", "Hello", 1), code::MODEL_NOT_FOUND),
        ("a long prompt", greedy(&model, &"word ".repeat(100), 1), code::CONTEXT_LENGTH),
        ("no prompt", greedy_ids(&model, &[], 1), code::INVALID_VALUE),
        ("a token out of range", greedy_ids(&model, &[1_000_000], 1), code::INVALID_VALUE),
        ("max_tokens 0", greedy(&model, "Hello", 0), code::INVALID_VALUE),
        ("a temperature of 3", sampling(&|s| s.temperature = Some(3.0)), code::INVALID_VALUE),
        ("a temperature that is no number", sampling(&|s| s.temperature = Some(f32::NAN)), code::INVALID_VALUE),
        ("top_p 0", sampling(&|s| s.top_p = Some(0.0)), code::INVALID_VALUE),
        ("a bias of 1000", sampling(&|s| s.logit_bias = [(1, 1000.0)].into()), code::INVALID_VALUE),
        ("17 stops", GenerateRequest { stop: vec!["x".into(); 17], ..greedy(&model, "Hello", 1) }, code::INVALID_VALUE),
        ("21 alternatives", GenerateRequest { top_logprobs: Some(21), ..greedy(&model, "Hello", 1) }, code::INVALID_VALUE),
    ];
    for (what, request, expected) in cases {
        let status = client.ask(request).await.err().with_context(|| format!("{what} was accepted"))?;
        assert_eq!(code::of(&status), Some(expected), "{what}: {status:?}");
        let loaded = client.stats().await?.model.is_some();
        assert!(!loaded || expected == code::INVALID_VALUE, "{what} is worth no load");
    }
    // The rest of the context, however much was asked for.
    let answer = client.ask(greedy(&model, "Hello", 1_000_000)).await?;
    assert_eq!(answer.done.context("an end")?.token_ids.len(), 256 - 5);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn models_come_and_go() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let daemon = home.daemon(&[])?;
    let mut client = daemon.client().await?;
    let listed = client.models.list(ListRequest {}).await?.into_inner();
    let found = listed.models.iter().find(|found| found.id == model).context("the tiny model is listed")?;
    assert_eq!((found.layers, found.experts, found.top_k, found.arch.as_str()), (2, 8, 2, "qwen3_moe"));
    assert_eq!(PathBuf::from(&found.path).canonicalize()?, home.models().join("tiny").canonicalize()?);
    let loaded = client.load(&model, Some("50%")).await?;
    assert!(loaded.loaded_now);
    assert_eq!(loaded.cache.context("a cache")?.slots_per_layer, 4);
    assert!(!client.load(&model, None).await?.loaded_now, "it was loaded already");
    assert!(client.load(&model, Some("1 slot, please")).await.is_err(), "a budget that is none");
    let warned = client.load(&model, Some("13%")).await?;
    assert_eq!(warned.cache.context("a cache")?.slots_per_layer, 1);
    assert!(!warned.warnings.is_empty(), "one slot is below a token's working set");
    assert!(client.models.unload(UnloadRequest::default()).await?.into_inner().was_loaded);
    assert!(!client.models.unload(UnloadRequest::default()).await?.into_inner().was_loaded);
    assert!(client.stats().await?.model.is_none());
    // The next request loads it again, another one takes its place.
    assert_eq!(client.ids(greedy(&model, "Hello", 2)).await?.len(), 2);
    let bundled = bundled_model().display().to_string();
    assert_eq!(client.ids(greedy(&bundled, "Hello", 2)).await?.len(), 2);
    let now = client.stats().await?.model.context("a model")?.id;
    assert_eq!(now, "flash-tiny-moe");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn stats_are_watched() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let daemon = home.daemon(&["--expert-cache", "50%"])?;
    let mut client = daemon.client().await?;
    client.ids(greedy(&model, "Hello", 50)).await?;
    let mut watch = client.admin.watch_stats(WatchStatsRequest { interval_ms: 100 }).await?.into_inner();
    for _ in 0..2 {
        let snapshot = watch.message().await?.context("a snapshot")?;
        let experts = snapshot.experts.context("experts")?;
        assert!(experts.hits > 0 && experts.misses > 0 && experts.bytes_read > 0, "{experts:?}");
        let by_layer: u64 = experts.layers.iter().map(|layer| layer.hits + layer.misses).sum();
        assert_eq!(by_layer, experts.hits + experts.misses, "the layers add up");
        assert_eq!(snapshot.requests.context("requests")?.completion_tokens, 50);
        let memory = snapshot.memory.context("memory")?;
        assert!(memory.trunk_bytes > 0 && memory.slab_bytes > 0 && memory.process_bytes > memory.slab_bytes, "{memory:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_benchmark_takes_the_engine_and_gives_it_back() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let daemon = home.daemon(&[])?;
    let client = daemon.client().await?;
    let request = || BenchRequest { model: model.clone(), cache: vec!["50%".into()], generate: Some(20_000), ..Default::default() };
    let mut running = client.start(GenerateRequest { request_id: "story-7".into(), ..endless(&model, "first") }).await?;
    first_text(&mut running).await?;
    let refused = client.admin.clone().bench(request()).await.err().context("a request runs")?;
    assert_eq!((refused.code(), code::of(&refused)), (tonic::Code::FailedPrecondition, Some(code::BUSY)));
    assert!(refused.message().contains("story-7") && refused.message().contains("flashctl stop"), "{}", refused.message());
    drop(running);
    client.wait_stats("nothing runs", DEADLINE, |stats| counts(stats) == (0, 0)).await?;

    let bench = client.admin.clone().bench(request()).await?.into_inner();
    let measuring = |stats: &Snapshot| stats.model.as_ref().is_some_and(|model| model.state() == State::Benchmark);
    client.wait_stats("the benchmark runs", DEADLINE, measuring).await?;
    let second = client.admin.clone().bench(request()).await;
    assert!(second.is_err(), "two at once");
    let waiting = {
        let (client, request) = (client.clone(), greedy(&model, "Hello", 5));
        tokio::spawn(async move { client.ids(request).await })
    };
    client.wait_stats("a request waits", DEADLINE, |stats| counts(stats) == (0, 1)).await?;
    drop(bench);
    assert_eq!(waiting.await??.len(), 5, "it is served when the benchmark has gone");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn routing_is_told_to_who_asks() -> Result<()> {
    let home = Home::new()?;
    let model = tiny(&home)?;
    let daemon = home.daemon(&[])?;
    let client = daemon.client().await?;
    let request = greedy(&model, &"x".repeat(700), 20);
    let expected = client.ids(request.clone()).await?;
    let mut stream = client.start(GenerateRequest { record_routing: true, ..request }).await?;
    let (mut positions, mut ids) = (0, Vec::new());
    while let Some(event) = stream.message().await? {
        match event.event.context("an event")? {
            Event::Routing(routing) => {
                assert_eq!((routing.layers, routing.ids.len()), (2, routing.tokens.len() * 2 * 2));
                assert!(routing.ids.iter().all(|id| *id < 8), "{routing:?}");
                positions += routing.tokens.len();
            }
            Event::Done(done) => ids = done.token_ids,
            _ => {}
        }
    }
    assert_eq!(ids, expected, "being watched changes nothing");
    // The last token is drawn and goes through no layer.
    assert_eq!(positions, 700 + 20 - 1);
    Ok(())
}

/// The budget changes while a stream runs, down to less than a token needs and up again; the tokens do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_live_budget_change_keeps_the_tokens() -> Result<()> {
    let home = Home::new()?;
    let daemon = home.daemon(&["--expert-cache", "100%", "--model", "flash-tiny-moe"])?;
    let client = daemon.client().await?;
    let prompt = &golden::read("mlx_4bit_f32")?[0].prompt;
    let request = greedy_ids("local", prompt, 400);
    let expected = client.ids(request.clone()).await?;
    let mut stream = client.start(request).await?;
    first_text(&mut stream).await?;
    let changes = async {
        for (budget, slots) in [("25%", 16), ("5%", 3), ("50%", 32), ("10%", 6)] {
            let cache = client.load("local", Some(budget)).await?.cache.context("a cache")?;
            assert_eq!(cache.slots_per_layer, slots, "{budget}");
        }
        anyhow::Ok(())
    };
    let (answer, changed) = tokio::join!(collect(stream), changes);
    changed?;
    assert_eq!(answer?.done.context("an end")?.token_ids, expected);
    Ok(())
}

#[cfg(target_os = "linux")]
mod memory {
    use flash_proto::v1::LoadRequest;

    use super::*;

    /// 70% of the bytes that are not cached must not be resident.
    const BAR: u64 = 22_300_000;

    async fn resident(budget: &str) -> Result<(u64, Vec<u32>)> {
        let home = Home::new()?;
        let daemon = home.daemon(&["--expert-cache", budget])?;
        let client = daemon.client().await?;
        let prompt = &golden::read("mlx_4bit_f32")?[1].prompt;
        let bundled = bundled_model().display().to_string();
        let ids = client.ids(greedy_ids(&bundled, prompt, 256)).await?;
        // The slab is populated in the background.
        let memory = client.stats().await?.memory.context("memory")?;
        wait_until("the slab is populated", || daemon.resident_bytes().is_ok_and(|bytes| bytes > memory.trunk_bytes + memory.slab_bytes))?;
        Ok((daemon.resident_bytes()?, ids))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_quarter_of_the_experts_takes_that_much_less() -> Result<()> {
        let (all, expected) = resident("100%").await?;
        let (quarter, ids) = resident("25%").await?;
        assert_eq!(ids, expected);
        assert!(all >= quarter + BAR, "{all} bytes with all experts, {quarter} with a quarter");
        Ok(())
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn an_idle_model_gives_its_memory_back() -> Result<()> {
        let home = Home::new()?;
        let daemon = home.daemon(&["--expert-cache", "100%"])?;
        let client = daemon.client().await?;
        let bundled = bundled_model().display().to_string();
        let slab = client.load(&bundled, None).await?.cache.context("a cache")?.budget_bytes;
        assert!(slab > 40_000_000);
        for keep_alive in ["1", "0"] {
            client.ids(GenerateRequest { keep_alive: Some(keep_alive.into()), ..greedy(&bundled, "Hello", 40) }).await?;
            client.wait_stats("the model is unloaded", DEADLINE, |stats| stats.model.is_none()).await?;
            wait_until("the memory is given back", || daemon.resident_bytes().is_ok_and(|bytes| bytes < slab / 2))?;
        }
        // Kept for ever when asked to.
        let mut models = client.models.clone();
        models.load(LoadRequest { model: bundled, keep_alive: Some("-1".into()), ..Default::default() }).await?;
        assert_eq!(client.stats().await?.model.context("a model")?.unload_in_s, None);
        Ok(())
    }
}
