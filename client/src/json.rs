//! The JSON that flashctl prints: protobuf messages as snake_case objects whose keys stay. Written by hand, so that a field
//! renamed on the wire does not rename what scripts read.

use flash_proto::v1::{
    Accepted, Cache, DoctorResponse, LoadedModel, Model, Prefix, Snapshot, VersionResponse, done::Finish, loaded_model, model, pressure,
};
use serde_json::{Value, json};

use crate::{
    failure::Failure,
    render,
    reply::{Reply, Said},
};

pub(crate) fn failure(failure: &Failure) -> Value {
    json!({"error": {"code": failure.code, "message": failure.message, "hint": failure.hint}})
}

pub(crate) fn version(version: &VersionResponse) -> Value {
    json!({
        "version": version.version, "protocol": version.protocol, "pid": version.pid, "uptime_s": version.uptime_s,
        "kernels": version.kernels, "home": version.home, "log_path": version.log_path,
    })
}

pub(crate) fn model(model: &Model, fits: &str) -> Value {
    let state = match model.state() {
        model::State::NotLoaded => "not_loaded",
        model::State::Loading => "loading",
        model::State::Ready => "ready",
    };
    json!({
        "name": model.id, "aliases": model.aliases, "path": model.path, "state": state, "fits": fits,
        "problem": (!model.problem.is_empty()).then_some(&model.problem),
        "arch": model.arch, "params": model.params, "active_params": model.active_params, "quantization": model.quantization, "packed": model.packed,
        "size_bytes": model.size_bytes, "disk_bytes": model.disk_bytes, "expert_bytes": model.expert_bytes, "trunk_bytes": model.trunk_bytes,
        "context_length": model.context_length, "context_max": model.context_max, "layers": model.layers, "experts": model.experts,
        "top_k": model.top_k, "vocab_size": model.vocab_size, "modified": model.modified, "tools": model.tools, "reasoning": model.reasoning,
    })
}

pub(crate) fn loaded_state(model: &LoadedModel) -> &'static str {
    match model.state() {
        loaded_model::State::Loading => "loading",
        loaded_model::State::Ready => "ready",
        loaded_model::State::Busy => "busy",
        loaded_model::State::Benchmark => "benchmark",
    }
}

pub(crate) fn loaded(model: &LoadedModel) -> Value {
    json!({
        "name": model.id, "state": loaded_state(model), "progress": model.progress, "context_length": model.context_length,
        "context_used": model.context_used, "unload_in_s": model.unload_in_s, "packed": model.packed, "kernels": model.kernels, "threads": model.threads,
    })
}

pub(crate) fn cache(cache: &Cache) -> Value {
    json!({
        "slots_per_layer": cache.slots_per_layer, "slots_wanted": cache.slots_wanted, "slot_bytes": cache.slot_bytes,
        "budget_bytes": cache.budget_bytes, "resident_bytes": cache.resident_bytes, "working_set_bytes": cache.working_set_bytes,
    })
}

pub(crate) fn snapshot(snapshot: &Snapshot) -> Value {
    let requests = snapshot.requests.map(|r| {
        json!({
            "running": r.running, "waiting": r.waiting, "finished": r.finished, "cancelled": r.cancelled, "failed": r.failed,
            "refused": r.refused, "prompt_tokens": r.prompt_tokens, "completion_tokens": r.completion_tokens,
        })
    });
    let speed = snapshot.speed.map(|s| {
        json!({
            "decode_tok_s": s.decode_tok_s, "prefill_tok_s": s.prefill_tok_s, "ttft_ms_p50": s.ttft_ms_p50, "ttft_ms_p95": s.ttft_ms_p95,
        })
    });
    let experts = snapshot.experts.as_ref().map(|e| {
        let layers = e.layers.iter().map(|l| json!({"layer": l.layer, "hits": l.hits, "misses": l.misses, "resident": l.resident}));
        let prefetch = e
            .prefetch
            .as_ref()
            .map(|p| json!({"mode": p.mode, "issued": p.issued, "useful": p.useful, "wasted": p.wasted, "late": p.late}));
        let belady = e.belady.map(|b| json!({"tokens": b.tokens, "policy": b.policy, "belady": b.belady}));
        json!({
            "cache": e.cache.as_ref().map(cache), "hits": e.hits, "misses": e.misses, "joined": e.joined, "evictions": e.evictions,
            "loads": e.loads, "load_errors": e.load_errors, "bytes_read": e.bytes_read, "read_s": e.read_s, "wait_s": e.wait_s,
            "bad_records": e.bad_records, "checksum_errors": e.checksum_errors, "policy": e.policy, "io": e.io, "warm_loads": e.warm_loads,
            "prefetch": prefetch, "belady": belady, "layers": layers.collect::<Vec<_>>(),
        })
    });
    let prefix = snapshot.prefix.as_ref().map(prefix);
    let memory = snapshot.memory.map(|m| {
        let mlx = m.mlx.map(|mlx| {
            json!({
                "active_bytes": mlx.active_bytes, "peak_bytes": mlx.peak_bytes, "cached_bytes": mlx.cached_bytes, "host_syncs": mlx.host_syncs,
            })
        });
        json!({
            "process_bytes": m.process_bytes, "trunk_bytes": m.trunk_bytes, "slab_bytes": m.slab_bytes, "kv_bytes": m.kv_bytes,
            "kv_reserved_bytes": m.kv_reserved_bytes, "scratch_bytes": m.scratch_bytes, "cap_bytes": m.cap_bytes,
            "mlx": mlx,
        })
    });
    let pressure = snapshot.pressure.as_ref().map(|p| {
        let level = match p.level() {
            pressure::Level::Normal => "normal",
            pressure::Level::Warn => "warn",
            pressure::Level::Critical => "critical",
        };
        let readings = p.readings.iter().map(|r| json!({"name": r.name, "value": r.value}));
        let decisions = p.decisions.iter().map(|d| json!({"at_s": d.at_s, "what": d.what}));
        json!({
            "level": level, "budget_bytes": p.budget_bytes, "readings": readings.collect::<Vec<_>>(),
            "decisions": decisions.collect::<Vec<_>>(),
        })
    });
    json!({
        "uptime_s": snapshot.uptime_s, "model": snapshot.model.as_ref().map(loaded), "requests": requests, "speed": speed,
        "experts": experts, "prefix": prefix, "memory": memory, "pressure": pressure,
    })
}

pub(crate) fn prefix(p: &Prefix) -> Value {
    let disk = p.disk.map(|d| {
        json!({
            "files": d.files, "bytes": d.bytes, "budget_bytes": d.budget_bytes, "written_today_bytes": d.written_today_bytes,
            "daily_bytes": d.daily_bytes, "read": d.read, "written": d.written, "bad": d.bad, "failed_writes": d.failed_writes,
            "over_budget": d.over_budget,
        })
    });
    json!({
        "hits": p.hits, "misses": p.misses, "memory_tokens": p.memory_tokens, "disk_tokens": p.disk_tokens, "tokens": p.tokens,
        "bytes": p.bytes, "idle_bytes": p.idle_bytes, "budget_bytes": p.budget_bytes, "evicted": p.evicted, "disk": disk,
        "disk_error": p.disk_error,
    })
}

pub(crate) fn doctor(report: &DoctorResponse) -> Value {
    let settings = report.settings.iter().map(|s| json!({"name": s.name, "value": s.value, "origin": s.origin}));
    let checks = report.checks.iter().map(|c| json!({"name": c.name, "ok": c.ok, "finding": c.finding, "fix": c.fix}));
    json!({
        "ok": report.checks.iter().all(|check| check.ok), "checks": checks.collect::<Vec<_>>(), "settings": settings.collect::<Vec<_>>(),
    })
}

/// The object that the gateway's /v1/chat/completions answers (/v1/completions for a raw prompt), and the cache beside its figures.
pub(crate) fn completion(reply: &Reply, raw: bool, created: u64, cache_now: Option<&Cache>) -> Value {
    let (object, key, said) = match raw {
        true => ("text_completion", "text", json!(reply.text)),
        false => {
            let mut message = json!({"role": "assistant", "content": reply.text});
            if !reply.reasoning.is_empty() {
                message["reasoning_content"] = json!(reply.reasoning);
            }
            ("chat.completion", "message", message)
        }
    };
    let choice = json!({"index": 0, key: said, "logprobs": null, "finish_reason": finish(reply)});
    with_figures(head(object, created, &reply.accepted.clone().unwrap_or_default(), &choice), reply, cache_now)
}

fn head(object: &str, created: u64, accepted: &Accepted, choice: &Value) -> Value {
    json!({
        "id": format!("flashctl-{created}-{}", std::process::id()), "object": object, "created": created, "model": accepted.model,
        "system_fingerprint": accepted.fingerprint, "choices": [choice],
    })
}

fn finish(reply: &Reply) -> &'static str {
    if reply.done.as_ref().is_some_and(|done| done.finish() == Finish::Length) { "length" } else { "stop" }
}

fn with_figures(mut object: Value, reply: &Reply, cache_now: Option<&Cache>) -> Value {
    let done = reply.done.clone().unwrap_or_default();
    let (usage, timing) = (done.usage.unwrap_or_default(), done.timing.unwrap_or_default());
    let prefill =
        (timing.prefill_ms > 0.0).then(|| f64::from(usage.prompt_tokens.saturating_sub(usage.cached_tokens)) / timing.prefill_ms * 1000.0);
    object["usage"] = json!({
        "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens, "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    });
    object["x_flash"] = json!({
        "ttft_ms": timing.ttft_ms, "prefill_tok_s": prefill, "decode_tok_s": render::decode_tok_s(usage.completion_tokens, timing.decode_ms),
        "queue_ms": timing.queue_ms, "expert_cache_hit_rate": render::ratio(timing.expert_hits, timing.expert_misses),
        "bytes_from_ssd": timing.ssd_bytes, "expert_cache": cache_now.map(cache),
        "price": Some(&done.price).filter(|price| !price.is_empty()),
    });
    object
}

/// A reply as it comes: the objects that those routes stream; the last one has the figures, too.
#[derive(Debug)]
pub(crate) struct Chunks {
    raw: bool,
    created: u64,
    accepted: Accepted,
}

impl Chunks {
    pub(crate) fn new(raw: bool, created: u64) -> Self {
        Self { raw, created, accepted: Accepted::default() }
    }

    pub(crate) fn next(&mut self, said: Said<'_>) -> Option<Value> {
        let delta = match said {
            Said::Accepted(accepted) => {
                self.accepted.clone_from(accepted);
                (!self.raw).then(|| json!({"role": "assistant", "content": ""}))?
            }
            Said::Text(text) if self.raw => json!(text),
            Said::Text(text) => json!({"content": text}),
            Said::Reasoning(text) => json!({"reasoning_content": text}),
            Said::Routing(_) => return None,
        };
        Some(self.chunk(&delta, None))
    }

    pub(crate) fn last(&self, reply: &Reply, cache_now: Option<&Cache>) -> Value {
        let nothing = if self.raw { json!("") } else { json!({}) };
        with_figures(self.chunk(&nothing, Some(finish(reply))), reply, cache_now)
    }

    fn chunk(&self, delta: &Value, finish: Option<&str>) -> Value {
        let (object, key) = if self.raw { ("text_completion", "text") } else { ("chat.completion.chunk", "delta") };
        head(object, self.created, &self.accepted, &json!({"index": 0, key: delta, "logprobs": null, "finish_reason": finish}))
    }
}

#[cfg(test)]
mod tests {
    use flash_proto::v1::{Done, Usage};

    use super::*;

    #[test]
    fn a_completion_has_the_shape_that_clients_know() {
        let reply = Reply {
            text: "Hi.".into(),
            reasoning: "They greet.".into(),
            accepted: Some(Accepted { model: "tiny".into(), ..Accepted::default() }),
            done: Some(Done {
                finish: Finish::Length.into(),
                usage: Some(Usage { prompt_tokens: 5, cached_tokens: 2, completion_tokens: 3, ..Usage::default() }),
                ..Done::default()
            }),
        };
        let chat = completion(&reply, false, 7, None);
        let check = |pointer: &str, expected: Value| assert_eq!(chat.pointer(pointer), Some(&expected), "{pointer}");
        check("/object", json!("chat.completion"));
        check("/choices/0/message/content", json!("Hi."));
        check("/choices/0/message/reasoning_content", json!("They greet."));
        check("/choices/0/finish_reason", json!("length"));
        check("/usage/total_tokens", json!(8));
        check("/usage/prompt_tokens_details/cached_tokens", json!(2));
        check("/x_flash/expert_cache", Value::Null);
        assert_eq!(completion(&reply, true, 7, None).pointer("/choices/0/text"), Some(&json!("Hi.")));
        let said = |raw: bool| {
            let mut chunks = Chunks::new(raw, 7);
            let accepted = reply.accepted.as_ref().expect("above");
            let mut said: Vec<_> = [Said::Accepted(accepted), Said::Text("Hi.")].into_iter().filter_map(|said| chunks.next(said)).collect();
            said.push(chunks.last(&reply, None));
            assert!(said.iter().all(|chunk| chunk["model"] == "tiny" && chunk["id"] == chat["id"]), "{said:?}");
            assert_eq!(said.iter().filter(|chunk| chunk.get("usage").is_some()).count(), 1);
            assert_eq!(said.last().map(|last| (&last["usage"], &last["x_flash"])), Some((&chat["usage"], &chat["x_flash"])));
            said.into_iter().map(|mut chunk| chunk["choices"][0].take()).collect::<Vec<_>>()
        };
        let choice =
            |key: &str, said: Value, finish: Option<&str>| json!({"index": 0, key: said, "logprobs": null, "finish_reason": finish});
        let head = choice("delta", json!({"role": "assistant", "content": ""}), None);
        assert_eq!(said(false), [head, choice("delta", json!({"content": "Hi."}), None), choice("delta", json!({}), Some("length"))]);
        assert_eq!(said(true), [choice("text", json!("Hi."), None), choice("text", json!(""), Some("length"))]);
    }

    #[test]
    fn what_is_unknown_is_null() {
        let empty = snapshot(&Snapshot::default());
        for key in ["model", "requests", "speed", "experts", "memory", "pressure"] {
            assert_eq!(empty[key], Value::Null, "{key}");
        }
        assert_eq!(failure(&Failure::new(69, "daemon_gone", "it went"))["error"]["hint"], Value::Null);
    }
}
