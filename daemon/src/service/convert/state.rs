//! What there is, on the wire: models, and the daemon with its engine as they stand. Part of `convert.rs`.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Instant, SystemTime},
};

use flash_engine::{Cleared, DiskReport, ModelInfo, Options, Report, Text};
use flash_proto::v1;

use super::u32;
use crate::{
    catalog::Entry,
    config::{self, context_length},
    pressure::{self, Finding, Level},
    service::gap,
    stats::Totals,
    worker::{Model, Phase, Ready, State},
};

pub(in crate::service) fn model(entry: &Entry, default_model: &str, state: &State) -> v1::Model {
    let mut model = match &entry.info {
        Ok(info) => loaded_model(&entry.model, info, state),
        Err(problem) => v1::Model {
            id: entry.model.id.clone(),
            path: entry.model.path.display().to_string(),
            problem: problem.clone(),
            ..v1::Model::default()
        },
    };
    model.disk_bytes = entry.disk_bytes;
    model.modified = entry.modified.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs());
    if entry.model.id == default_model {
        model.aliases.push("local".into());
    }
    model
}

/// A model with what its text side says of it.
pub(in crate::service) fn shown(model: v1::Model, text: &Text) -> v1::ShowResponse {
    let sampling = text.sampling();
    v1::ShowResponse {
        model: Some(model),
        chat_template: text.template_source().into(),
        infills: text.infills(),
        temperature: sampling.temperature,
        top_k: u32(sampling.top_k),
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
    }
}

pub(in crate::service) fn loaded_model(model: &Model, info: &ModelInfo, state: &State) -> v1::Model {
    use v1::model::State as S;
    let (phase, context) = match &state.model {
        Some((loaded, phase)) if loaded.path == model.path => match phase {
            Phase::Loading(_) => (S::Loading, None),
            Phase::Ready(ready) => (S::Ready, Some(ready.context)),
            Phase::Bench(_) => (S::NotLoaded, None),
        },
        _ => (S::NotLoaded, None),
    };
    v1::Model {
        id: model.id.clone(),
        path: model.path.display().to_string(),
        arch: info.arch.clone(),
        params: info.params,
        active_params: info.active_params,
        quantization: info.quantization.clone(),
        size_bytes: info.size_bytes,
        context_max: u32(info.context_max),
        context_length: u32(context.unwrap_or_else(|| context_length(info, state.options.context))),
        layers: u32(info.layers),
        experts: u32(info.experts),
        top_k: u32(info.top_k),
        vocab_size: u32(info.vocab_size),
        state: phase.into(),
        expert_bytes: info.expert_bytes,
        trunk_bytes: info.trunk_bytes,
        packed: info.packed,
        tools: info.tools,
        reasoning: info.thinks,
        ..v1::Model::default()
    }
}

pub(in crate::service) fn cache(ready: &Ready) -> v1::Cache {
    let experts = &ready.report.experts;
    v1::Cache {
        slots_per_layer: u32(experts.slots_per_layer),
        slots_wanted: u32(experts.slots_wanted),
        slot_bytes: experts.slot_bytes,
        budget_bytes: slab_bytes(&ready.report),
        resident_bytes: experts.resident_bytes,
        working_set_bytes: (ready.info.top_k * experts.layers.len()) as u64 * experts.slot_bytes,
    }
}

fn slab_bytes(report: &Report) -> u64 {
    (report.experts.slots_per_layer * report.experts.layers.len()) as u64 * report.experts.slot_bytes
}

// ---- stats and doctor ----

/// What Stats is made of.
pub(in crate::service) struct Seen<'a> {
    pub(in crate::service) started: Instant,
    pub(in crate::service) state: &'a State,
    pub(in crate::service) totals: &'a Totals,
    pub(in crate::service) view: &'a pressure::View,
    pub(in crate::service) process_bytes: u64,
    pub(in crate::service) gap: Option<gap::Found>,
}

pub(in crate::service) fn snapshot(seen: Seen<'_>) -> v1::Snapshot {
    let Seen { started, state, totals, view, process_bytes, gap } = seen;
    let ready = state.ready().map(|(_, ready)| ready);
    let report = state.report();
    // A benchmark's requests are nobody's.
    let served = state.ready().map(|(_, ready)| &ready.report);
    let speed = totals.speed();
    v1::Snapshot {
        uptime_s: started.elapsed().as_secs_f64(),
        model: state.model.as_ref().map(|(model, phase)| loaded(model, phase)),
        requests: Some(v1::Requests {
            running: served.map_or(0, |report| u32(report.running)),
            waiting: u32(state.in_line + served.map_or(0, |report| report.waiting)),
            finished: totals.finished.load(Relaxed),
            cancelled: totals.cancelled.load(Relaxed),
            failed: totals.failed.load(Relaxed),
            refused: totals.refused.load(Relaxed),
            prompt_tokens: totals.prompt_tokens.load(Relaxed),
            completion_tokens: totals.completion_tokens.load(Relaxed),
            grammar_s: totals.grammars().as_secs_f64(),
            relaxed: totals.relaxed.load(Relaxed),
            parallel: u32(state.options.parallel),
        }),
        speed: Some(v1::Speed {
            decode_tok_s: speed.decode_tok_s,
            prefill_tok_s: speed.prefill_tok_s,
            ttft_ms_p50: speed.ttft_ms_p50,
            ttft_ms_p95: speed.ttft_ms_p95,
        }),
        experts: ready.map(|ready| v1::Experts { belady: gap.map(belady), ..experts(ready, &state.options) }),
        memory: Some(v1::Memory {
            process_bytes,
            trunk_bytes: report.map_or(0, |report| report.trunk_bytes),
            slab_bytes: report.map_or(0, slab_bytes),
            kv_bytes: report.map_or(0, |report| report.kv_bytes),
            kv_reserved_bytes: report.map_or(0, |report| report.kv_reserved_bytes),
            scratch_bytes: report.map_or(0, |report| report.scratch_bytes),
            cap_bytes: state.options.memory,
            kv_blocks: report.map_or(0, |report| report.kv_blocks as u64),
            kv_busy_blocks: report.map_or(0, |report| report.kv_busy_blocks as u64),
            mlx: report.and_then(|report| report.mlx).map(|mlx| v1::Mlx {
                active_bytes: mlx.active_bytes,
                peak_bytes: mlx.peak_bytes,
                cached_bytes: mlx.cached_bytes,
                host_syncs: mlx.host_syncs,
            }),
        }),
        prefix: report.and_then(prefix),
        pressure: Some(v1::Pressure {
            level: match view.level {
                Level::Normal => v1::pressure::Level::Normal,
                Level::Warn => v1::pressure::Level::Warn,
                Level::Critical => v1::pressure::Level::Critical,
            }
            .into(),
            budget_bytes: view.ceiling.filter(|_| report.is_some()),
            readings: view.readings.iter().map(|(name, value)| v1::Reading { name: name.clone(), value: value.clone() }).collect(),
            decisions: view
                .decisions
                .iter()
                .map(|(at, what)| v1::Decision { at_s: at.saturating_duration_since(started).as_secs_f64(), what: what.clone() })
                .collect(),
        }),
    }
}

fn loaded(model: &Model, phase: &Phase) -> v1::LoadedModel {
    use v1::loaded_model::State as S;
    let id = model.id.clone();
    match phase {
        Phase::Loading(progress) => v1::LoadedModel { id, state: S::Loading.into(), progress: *progress, ..v1::LoadedModel::default() },
        Phase::Ready(ready) => v1::LoadedModel {
            id,
            state: if ready.report.running + ready.report.waiting > 0 { S::Busy } else { S::Ready }.into(),
            progress: 1.0,
            context_length: u32(ready.context),
            context_used: u32(ready.report.context_used),
            unload_in_s: ready.unload_at.map(|at| at.saturating_duration_since(Instant::now()).as_secs_f64()),
            kernels: ready.report.kernels.clone(),
            threads: u32(ready.report.threads),
            packed: ready.info.packed,
        },
        Phase::Bench(_) => v1::LoadedModel { id, state: S::Benchmark.into(), progress: 1.0, ..v1::LoadedModel::default() },
    }
}

/// `None`: no prefixes are kept.
fn prefix(report: &Report) -> Option<v1::Prefix> {
    let prefix = &report.prefix;
    let disk = |disk: DiskReport| v1::PrefixDisk {
        files: disk.files as u64,
        bytes: disk.bytes,
        budget_bytes: disk.budget_bytes,
        written_today_bytes: disk.written_today_bytes,
        daily_bytes: disk.daily_bytes,
        read: disk.blocks_read,
        written: disk.blocks_written,
        bad: disk.bad_files,
        failed_writes: disk.failed_writes,
        over_budget: disk.over_budget,
    };
    prefix.on.then(|| v1::Prefix {
        hits: prefix.hits,
        misses: prefix.misses,
        memory_tokens: prefix.memory_tokens,
        disk_tokens: prefix.disk_tokens,
        tokens: (prefix.blocks * prefix.block_tokens) as u64,
        bytes: prefix.bytes,
        idle_bytes: prefix.idle_bytes,
        budget_bytes: prefix.budget_bytes,
        evicted: prefix.evicted,
        disk: prefix.disk.map(disk),
        disk_error: prefix.disk_error.clone().unwrap_or_default(),
    })
}

pub(in crate::service) fn cleared(cleared: Cleared) -> v1::ClearCacheResponse {
    v1::ClearCacheResponse { memory_bytes: cleared.memory_bytes, files: cleared.files, disk_bytes: cleared.disk_bytes }
}

fn belady(found: gap::Found) -> v1::Belady {
    v1::Belady { tokens: u32(found.tokens), policy: found.policy, belady: found.belady }
}

fn experts(ready: &Ready, options: &Options) -> v1::Experts {
    let stats = &ready.report.experts;
    v1::Experts {
        cache: Some(cache(ready)),
        hits: stats.hits,
        misses: stats.misses,
        joined: stats.joined,
        evictions: stats.evictions,
        loads: stats.loads,
        load_errors: stats.load_errors,
        bytes_read: stats.bytes_read,
        read_s: stats.read_time.as_secs_f64(),
        wait_s: stats.wait_time.as_secs_f64(),
        layers: (0u32..)
            .zip(&stats.layers)
            .map(|(index, layer)| v1::LayerHits { layer: index, hits: layer.hits, misses: layer.misses, resident: u32(layer.resident) })
            .collect(),
        bad_records: u32(stats.bad_records),
        checksum_errors: stats.checksum_errors,
        policy: stats.policy.to_string(),
        io: ready.report.io.to_string(),
        prefetch: Some(v1::Prefetch {
            mode: options.lookahead.to_string(),
            issued: stats.prefetched,
            useful: stats.prefetch_useful,
            wasted: stats.prefetch_wasted,
            late: stats.prefetch_late,
        }),
        belady: None,
        warm_loads: stats.warm_loads,
    }
}

pub(in crate::service) fn setting(setting: config::Setting) -> v1::Setting {
    v1::Setting { name: setting.name.into(), value: setting.value, origin: setting.origin }
}

pub(in crate::service) fn check(finding: Finding) -> v1::Check {
    v1::Check { name: finding.name.into(), ok: finding.ok, finding: finding.finding, fix: finding.fix.into() }
}
