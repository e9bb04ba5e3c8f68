//! What writes and measures on the wire: jobs, synthetic models, benchmarks, replays. Part of `convert.rs`.

use std::{path::PathBuf, str::FromStr};

use flash_engine::{
    CacheBudget, PolicyKind,
    bench::{self, BenchEvent, BenchOptions, Machine, Row, Variant},
    replay::{ReplayPolicy, Replayed, Trace},
    synth::Synth,
};
use flash_proto::v1;

use super::{bad, u32};
use crate::{Error, jobs};

pub(in crate::service) fn job(event: jobs::Event) -> v1::JobEvent {
    use v1::job_event::Event as E;
    let event = match event {
        jobs::Event::Progress(progress) => {
            E::Progress(v1::JobProgress { stage: progress.stage.into(), done: progress.done, total: progress.total })
        }
        jobs::Event::Done(done) => E::Done(v1::JobDone {
            model: done.model,
            path: done.path,
            records: done.records,
            bytes: done.bytes,
            seconds: done.seconds,
            bad: done.bad,
        }),
    };
    v1::JobEvent { event: Some(event) }
}

pub(in crate::service) fn synth(request: &v1::SynthRequest) -> Result<Synth, Error> {
    for (param, count) in [("layers", request.layers), ("context", request.context)] {
        if count == Some(0) {
            return Err(bad(param, "must be at least 1"));
        }
    }
    let routing = match request.routing.as_str() {
        "" => "uniform",
        routing => routing,
    };
    Ok(Synth {
        shape: request.shape.clone(),
        layers: request.layers.map(|n| n as usize),
        context: request.context.map(|n| n as usize),
        seed: request.seed,
        routing: routing.parse().map_err(|error: flash_engine::Error| bad("routing", error.to_string()))?,
    })
}

/// `routing` is what the request's trace file holds.
pub(in crate::service) fn bench(request: v1::BenchRequest, routing: Option<&Trace>) -> Result<BenchOptions, Error> {
    let defaults = BenchOptions::default();
    let caches = match (&request.cache[..], request.no_cache) {
        (_, true) => Vec::new(),
        ([], false) => defaults.caches,
        (sizes, false) => sizes.iter().map(|size| parsed("cache", size)).collect::<Result<_, _>>()?,
    };
    let variant = |variant: &v1::BenchVariant| {
        Ok(Variant {
            io: optional("io", &variant.io)?,
            policy: optional("policy", &variant.policy)?,
            lookahead: optional("lookahead", &variant.lookahead)?,
        })
    };
    let flat = |trace: &Trace| {
        let places = (0..trace.tokens()).flat_map(|token| (0..trace.layers).map(move |layer| (token, layer)));
        places.flat_map(|(token, layer)| trace.get(token, layer)).map(|expert| expert.0).collect()
    };
    Ok(BenchOptions {
        caches,
        prompt: request.prompt.map_or(defaults.prompt, |tokens| tokens as usize),
        generate: request.generate.map_or(defaults.generate, |tokens| tokens as usize),
        routing: routing.map(flat),
        variants: request.variants.iter().map(variant).collect::<Result<_, Error>>()?,
        repeat: request.repeat.max(1) as usize,
        seed: request.seed,
    })
}

fn parsed<T: FromStr<Err: ToString>>(param: &'static str, text: &str) -> Result<T, Error> {
    text.parse().map_err(|error: T::Err| bad(param, error.to_string()))
}

/// Empty: not said.
fn optional<T: FromStr<Err: ToString>>(param: &'static str, text: &str) -> Result<Option<T>, Error> {
    if text.is_empty() { Ok(None) } else { parsed(param, text).map(Some) }
}

pub(in crate::service) fn bench_event(event: BenchEvent) -> v1::BenchEvent {
    use v1::bench_event::Event as E;
    let event = match event {
        BenchEvent::Progress { stage, done, total } => E::Progress(v1::BenchProgress { stage, done, total }),
        BenchEvent::Machine(machine) => E::Machine(bench_machine(machine)),
        BenchEvent::Row(row) => E::Row(bench_row(*row)),
    };
    v1::BenchEvent { event: Some(event) }
}

fn bench_machine(machine: Machine) -> v1::BenchMachine {
    v1::BenchMachine {
        memory_bytes_s: machine.memory_bytes_s,
        threads: machine.threads as u32,
        disk_bytes_s: machine.disk_bytes_s,
        record_bytes: machine.expert_bytes,
        readers: machine.readers as u32,
        io: machine.io.to_string(),
        kernels: machine.kernels,
        notes: Vec::new(),
    }
}

fn bench_row(row: Row) -> v1::BenchRow {
    let Row { cache, slots, state, variant, prompt_tokens, ttft, prefill_tok_s, prefill_disk_bytes, decode } = row;
    let said = |text: Option<String>| text.unwrap_or_default();
    let prompt = v1::BenchRow {
        cache: cache.map_or_else(|| "none".into(), |cache| cache.to_string()),
        slots: slots as u32,
        state: if state == bench::State::Cold { "cold" } else { "warm" }.into(),
        variant: Some(v1::BenchVariant {
            io: said(variant.io.map(|io| io.to_string())),
            policy: said(variant.policy.map(|policy| policy.to_string())),
            lookahead: said(variant.lookahead.map(|lookahead| lookahead.to_string())),
        }),
        prompt_tokens: prompt_tokens as u32,
        prefill_tok_s: Some(prefill_tok_s),
        prefill_disk_bytes,
        ttft_s: Some(ttft.as_secs_f64()),
        ..v1::BenchRow::default()
    };
    let Some(decode) = decode else { return prompt };
    v1::BenchRow {
        decode_tokens: decode.tokens as u32,
        decode_tok_s: Some(decode.tok_s),
        decode_mean_tok_s: Some(decode.mean_tok_s),
        hit_rate: Some(decode.hit_rate),
        disk_bytes_per_token: Some(decode.disk_bytes_per_token),
        disk_bytes_s: Some(decode.disk_bytes_s),
        wait_share: Some(decode.wait_share),
        memory_bound_tok_s: Some(decode.bounds.memory),
        io_bound_tok_s: decode.bounds.io,
        overlapped_tok_s: Some(decode.bounds.overlapped),
        serial_tok_s: Some(decode.bounds.serial),
        of_overlapped: Some(decode.of_overlapped()),
        of_serial: Some(decode.of_serial()),
        lookahead_recall: decode.lookahead_recall,
        prefetch_useful: decode.prefetch_useful,
        prefetch_wasted: decode.prefetch_wasted,
        stages: decode.stages().map(|(name, seconds)| v1::BenchStage { name: name.into(), seconds }).collect(),
        ..prompt
    }
}

pub(in crate::service) fn replayed(trace: &Trace) -> v1::ReplayResponse {
    v1::ReplayResponse {
        tokens: trace.tokens() as u32,
        layers: trace.layers as u32,
        experts: trace.experts as u32,
        top_k: trace.top_k() as u32,
        rows: Vec::new(),
    }
}

/// A path on the wire: relative ones would mean the daemon's working directory.
pub(in crate::service) fn absolute(param: &'static str, text: &str) -> Result<PathBuf, Error> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(bad(param, format!("`{text}` is not an absolute path"))) }
}

/// The policies of a replay, by name.
const REPLAYED: [(&str, ReplayPolicy); 4] = [
    ("lfru", ReplayPolicy::Live(PolicyKind::Lfru)),
    ("lru", ReplayPolicy::Live(PolicyKind::Lru)),
    ("lcp", ReplayPolicy::Live(PolicyKind::Lcp)),
    ("belady", ReplayPolicy::Belady),
];

pub(in crate::service) fn replay_policies(names: &[String]) -> Result<Vec<(&'static str, ReplayPolicy)>, Error> {
    let find = |name: &String| {
        let found = REPLAYED.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.ok_or_else(|| bad("policy", format!("`{name}` is none of lfru, lru, lcp and belady")))
    };
    if names.is_empty() { Ok(REPLAYED.into()) } else { names.iter().map(find).collect() }
}

pub(in crate::service) fn replay_slots(wanted: &[String], experts: usize) -> Result<Vec<usize>, Error> {
    let read = |text: &str| {
        let slots = match text.parse() {
            Ok(CacheBudget::Share(share)) => Some(((experts as f64 * share) as usize).max(1)),
            _ => text.parse().ok(),
        };
        let slots = slots.filter(|slots| (1..=experts).contains(slots));
        slots.ok_or_else(|| bad("slots", format!("`{text}` is neither a number from 1 to {experts} nor a share such as 25%")))
    };
    if wanted.is_empty() { ["12.5%", "25%", "50%"].into_iter().map(read).collect() } else { wanted.iter().map(|text| read(text)).collect() }
}

pub(in crate::service) fn replay_row(policy: &str, slots: usize, found: &Replayed, best: &Replayed) -> v1::ReplayRow {
    let share = |replayed: &Replayed| replayed.hits as f64 / (replayed.hits + replayed.misses).max(1) as f64;
    v1::ReplayRow { policy: policy.into(), slots: u32(slots), hits: found.hits, misses: found.misses, gap: share(best) - share(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replays_are_asked_for_by_name_and_size() {
        let check = |wanted: &[&str], expected: Option<&[usize]>| {
            let wanted: Vec<String> = wanted.iter().map(|text| (*text).into()).collect();
            assert_eq!(replay_slots(&wanted, 64).ok().as_deref(), expected, "{wanted:?}");
        };
        check(&[], Some(&[8, 16, 32]));
        check(&["8", "25%", "0.1%", "64"], Some(&[8, 16, 1, 64]));
        for wrong in ["0", "65", "101%", "1MiB", "auto", ""] {
            check(&[wrong], None);
        }
        assert_eq!(replay_policies(&["LRU".into()]).expect("known"), [("lru", ReplayPolicy::Live(PolicyKind::Lru))]);
        assert_eq!(replay_policies(&[]).expect("all").len(), 4);
        assert!(replay_policies(&["fifo".into()]).is_err());
    }
}
