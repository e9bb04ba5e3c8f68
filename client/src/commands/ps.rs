//! `flashctl ps`: what is loaded now. Never starts a daemon: without one nothing is loaded.

use flash_proto::v1::{Snapshot, StatsRequest};
use serde_json::json;

use crate::{
    args::Global,
    connect,
    failure::Failure,
    json, render,
    term::{self, Paint},
};

pub(crate) async fn run(global: &Global) -> Result<(), Failure> {
    let snapshot = match connect::running(global).await? {
        Some(daemon) => daemon.admin().stats(StatsRequest {}).await.map_err(|status| daemon.failure(&status, "answering"))?.into_inner(),
        None => Snapshot::default(),
    };
    if global.json {
        return term::print_json(&listing(&snapshot));
    }
    let rows: Vec<_> = row(&snapshot).into_iter().collect();
    let header = ["NAME", "STATE", "RAM", "EXPERT CACHE", "HIT", "PREFIXES", "CTX", "SLOTS", "QUEUE", "IDLE UNLOAD"];
    term::println(&render::table(header, &rows, Paint::stdout()))
}

fn row(snapshot: &Snapshot) -> Option<[String; 10]> {
    let model = snapshot.model.as_ref()?;
    let requests = snapshot.requests.unwrap_or_default();
    let experts = snapshot.experts.as_ref();
    let cache = experts.and_then(|experts| experts.cache.as_ref());
    Some([
        if model.packed { format!("{} · packed", model.id) } else { model.id.clone() },
        render::state(model),
        snapshot.memory.map_or("–".into(), |memory| render::bytes(memory.process_bytes)),
        cache.map_or("–".into(), |cache| format!("{} slots/layer, {}", cache.slots_per_layer, render::bytes(cache.resident_bytes))),
        experts.and_then(|experts| render::ratio(experts.hits, experts.misses)).map_or("–".into(), render::percent),
        snapshot.prefix.as_ref().map_or("–".into(), |prefix| render::bytes(prefix.bytes)),
        format!("{}/{}", model.context_used, model.context_length),
        format!("{}/{}", requests.running, requests.parallel),
        requests.waiting.to_string(),
        model.unload_in_s.map_or("never".into(), |s| format!("in {}", render::seconds(s))),
    ])
}

fn listing(snapshot: &Snapshot) -> serde_json::Value {
    let model = snapshot.model.as_ref().map(|model| {
        let requests = snapshot.requests.unwrap_or_default();
        let experts = snapshot.experts.as_ref();
        let mut value = json::loaded(model);
        value["process_bytes"] = json!(snapshot.memory.map(|memory| memory.process_bytes));
        value["expert_cache"] = json!(experts.and_then(|experts| experts.cache.as_ref()).map(json::cache));
        value["hit_rate"] = json!(experts.and_then(|experts| render::ratio(experts.hits, experts.misses)));
        value["prefix"] = json!(snapshot.prefix.as_ref().map(json::prefix));
        value["slots"] = json!(requests.parallel);
        value["running"] = json!(requests.running);
        value["waiting"] = json!(requests.waiting);
        value
    });
    json!({"models": model.into_iter().collect::<Vec<_>>()})
}
