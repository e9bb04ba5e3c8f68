//! Between wire types and the engine's: the only file that names both, and the only mapping of errors to statuses.
//! Checks ranges on the way in. Pure.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant, SystemTime},
};

use flash_engine::{CacheBudget, Done, Finish, Message, ModelInfo, Request, Sampling, Text, TokenLogprob, parse_bytes};
use flash_proto::{code, v1};
use tonic::Status;

use crate::{
    Error,
    catalog::Entry,
    config::{self, KEEP_ALIVE_WANTS, KeepAlive, parse_keep_alive},
    pressure::{self, Finding, Level},
    stats::Totals,
    worker::{Admitted, Model, Phase, Ready, State},
};

/// A request that asks for nothing in particular gets at most this context.
const CONTEXT_DEFAULT_MAX: usize = 32 * 1024;
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const TOP_LOGPROBS_MAX: u32 = 20;

// ---- errors ----

pub(super) fn status(error: &Error) -> Status {
    let message = error.to_string();
    match error {
        Error::ModelNotFound { .. } => code::with_param(code::status(code::MODEL_NOT_FOUND, message), "model"),
        Error::Value { param, .. } => code::with_param(code::status(code::INVALID_VALUE, message), param),
        Error::QueueFull { retry_after_s, .. } => code::with_retry_after(code::status(code::QUEUE_FULL, message), *retry_after_s),
        Error::Draining => code::status(code::DRAINING, message),
        Error::Cancelled(_) => code::status(code::CANCELLED, message),
        Error::Engine(error) => engine_status(error, message),
        Error::Load { source, .. } => match &**source {
            flash_engine::Error::Internal(_) => code::status(code::ENGINE, message),
            flash_engine::Error::Memory { .. } => code::status(code::INSUFFICIENT_MEMORY, message),
            _ => code::with_param(code::status(code::MODEL_INVALID, message), "model"),
        },
        _ => code::status(code::ENGINE, message),
    }
}

fn engine_status(error: &flash_engine::Error, message: String) -> Status {
    use flash_engine::Error as E;
    match error {
        E::Setting { .. } => code::status(code::INVALID_VALUE, message),
        E::Read { .. } | E::File { .. } | E::Tensor { .. } | E::Unsupported { .. } => code::status(code::MODEL_INVALID, message),
        E::Template { .. } => code::with_param(code::status(code::CHAT_TEMPLATE, message), "messages"),
        E::ContextLength { .. } => code::with_param(code::status(code::CONTEXT_LENGTH, message), "messages"),
        E::EmptyPrompt | E::TokenId { .. } => code::with_param(code::status(code::INVALID_VALUE, message), "prompt"),
        E::QueueFull { .. } => code::status(code::QUEUE_FULL, message),
        E::Memory { .. } => code::status(code::INSUFFICIENT_MEMORY, message),
        E::Tokenizer { .. } | E::Experts(_) | E::Internal(_) => code::status(code::ENGINE, message),
    }
}

fn bad(param: &'static str, reason: impl Into<String>) -> Error {
    Error::Value { param, reason: reason.into() }
}

// ---- requests ----

/// A checked GenerateRequest; what needs the model's text side is still to be settled.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) model: String,
    pub(super) prompt: Prompt,
    pub(super) sampling: Overrides,
    pub(super) keep_alive: Option<KeepAlive>,
    pub(super) rest: Rest,
}

#[derive(Debug)]
pub(super) enum Prompt {
    Chat { messages: Vec<Message>, kwargs: serde_json::Map<String, serde_json::Value>, continue_final: bool },
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Debug)]
pub(super) struct Overrides(v1::Sampling);

#[derive(Debug)]
pub(super) struct Rest {
    stop: Vec<String>,
    max_tokens: Option<usize>,
    top_logprobs: Option<usize>,
    ignore_eos: bool,
    client: String,
}

pub(super) fn generate(request: v1::GenerateRequest) -> Result<Wanted, Error> {
    use v1::generate_request::Prompt as P;
    let prompt = match request.prompt {
        Some(P::Chat(chat)) => chat_prompt(chat)?,
        Some(P::Text(text)) => Prompt::Text(text),
        Some(P::Tokens(tokens)) => Prompt::Tokens(tokens.ids),
        None => return Err(bad("prompt", "is missing")),
    };
    let stop = request.stop;
    if stop.len() > STOPS_MAX {
        return Err(bad("stop", format!("has {} strings; at most {STOPS_MAX} are allowed", stop.len())));
    }
    if let Some(long) = stop.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
        return Err(bad("stop", format!("each string must have 1 to {STOP_BYTES_MAX} bytes; one has {}", long.len())));
    }
    if request.max_tokens == Some(0) {
        return Err(bad("max_tokens", "must be at least 1"));
    }
    if let Some(n) = request.top_logprobs.filter(|n| *n > TOP_LOGPROBS_MAX) {
        return Err(bad("top_logprobs", format!("is {n}; at most {TOP_LOGPROBS_MAX} are allowed")));
    }
    Ok(Wanted {
        model: request.model,
        prompt,
        sampling: Overrides(request.sampling.unwrap_or_default()),
        keep_alive: request.keep_alive.as_deref().map(keep_alive).transpose()?,
        rest: Rest {
            stop,
            max_tokens: request.max_tokens.map(|n| n as usize),
            top_logprobs: request.top_logprobs.map(|n| n as usize),
            ignore_eos: request.ignore_eos,
            client: request.client,
        },
    })
}

pub(super) fn tokenize_prompt(prompt: Option<v1::tokenize_request::Prompt>) -> Result<Prompt, Error> {
    use v1::tokenize_request::Prompt as P;
    match prompt {
        Some(P::Chat(chat)) => chat_prompt(chat),
        Some(P::Text(text)) => Ok(Prompt::Text(text)),
        None => Err(bad("prompt", "is missing")),
    }
}

fn chat_prompt(chat: v1::Chat) -> Result<Prompt, Error> {
    if chat.messages.is_empty() {
        return Err(bad("messages", "is empty; at least one message is needed"));
    }
    let kwargs = match chat.template_kwargs_json.as_str() {
        "" => serde_json::Map::new(),
        text => serde_json::from_str(text).map_err(|error| bad("chat_template_kwargs", format!("is not a JSON object: {error}")))?,
    };
    let message = |message: v1::Message| Message { role: message.role, content: message.content, name: message.name };
    let messages = chat.messages.into_iter().map(message).collect();
    Ok(Prompt::Chat { messages, kwargs, continue_final: chat.continue_final_message })
}

fn keep_alive(text: &str) -> Result<KeepAlive, Error> {
    parse_keep_alive(text).ok_or_else(|| bad("keep_alive", format!("`{text}` is not {KEEP_ALIVE_WANTS}")))
}

impl Prompt {
    /// CPU work; for a thread that may block.
    pub(super) fn encode(self, text: &Text) -> Result<Vec<u32>, flash_engine::Error> {
        match self {
            Self::Chat { messages, kwargs, continue_final } => text.encode(&text.render(&messages, &kwargs, continue_final)?),
            Self::Text(prompt) => text.encode(&prompt),
            Self::Tokens(ids) => Ok(ids),
        }
    }
}

impl Overrides {
    /// The model's defaults with what the request says, checked.
    pub(super) fn over(self, base: &Sampling, vocab: usize) -> Result<Sampling, Error> {
        let Self(wanted) = self;
        let sampling = Sampling {
            temperature: wanted.temperature.unwrap_or(base.temperature),
            top_k: wanted.top_k.map_or(base.top_k, |k| k as usize),
            top_p: wanted.top_p.unwrap_or(base.top_p),
            min_p: wanted.min_p.unwrap_or(base.min_p),
            repetition_penalty: wanted.repetition_penalty.unwrap_or(base.repetition_penalty),
            repetition_window: wanted.repetition_window.map_or(base.repetition_window, |n| n as usize),
            frequency_penalty: wanted.frequency_penalty.unwrap_or(base.frequency_penalty),
            presence_penalty: wanted.presence_penalty.unwrap_or(base.presence_penalty),
            logit_bias: wanted.logit_bias,
            seed: wanted.seed,
        };
        // Written so that NaN is out of every range.
        let check = |param, value: f32, inside: bool, wants: &str| {
            if inside { Ok(()) } else { Err(bad(param, format!("is {value}; it must be {wants}"))) }
        };
        let Sampling { temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty, .. } = sampling;
        check("temperature", temperature, (0.0..=2.0).contains(&temperature), "from 0 to 2")?;
        check("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", min_p, (0.0..1.0).contains(&min_p), "at least 0 and below 1")?;
        check("repetition_penalty", repetition_penalty, repetition_penalty > 0.0 && repetition_penalty <= 2.0, "above 0 and at most 2")?;
        check("frequency_penalty", frequency_penalty, (-2.0..=2.0).contains(&frequency_penalty), "from -2 to 2")?;
        check("presence_penalty", presence_penalty, (-2.0..=2.0).contains(&presence_penalty), "from -2 to 2")?;
        for (id, bias) in &sampling.logit_bias {
            check("logit_bias", *bias, (-100.0..=100.0).contains(bias), "from -100 to 100")?;
            if *id as usize >= vocab {
                return Err(bad("logit_bias", format!("token id {id} is outside the vocabulary of {vocab}")));
            }
        }
        Ok(sampling)
    }
}

impl Rest {
    pub(super) fn request(self, prompt: Vec<u32>, sampling: Sampling) -> Request {
        let Self { stop, max_tokens, top_logprobs, ignore_eos, client } = self;
        Request { prompt, sampling, stop, max_tokens, top_logprobs, ignore_eos, client }
    }
}

#[derive(Debug)]
pub(super) struct LoadSettings {
    pub(super) expert_cache: Option<CacheBudget>,
    pub(super) memory: Option<Option<u64>>,
    pub(super) context: Option<usize>,
    pub(super) keep_alive: Option<KeepAlive>,
}

pub(super) fn load_settings(request: &v1::LoadRequest) -> Result<LoadSettings, Error> {
    let expert_cache = request
        .expert_cache
        .as_deref()
        .map(|text| text.parse().map_err(|error: flash_engine::Error| bad("expert_cache", error.to_string())));
    let memory = request.memory.as_deref().map(|text| match text {
        "auto" => Ok(None),
        text => parse_bytes(text).map(Some).map_err(|error| bad("memory", error.to_string())),
    });
    if request.context_length == Some(0) {
        return Err(bad("context_length", "must be at least 1"));
    }
    Ok(LoadSettings {
        expert_cache: expert_cache.transpose()?,
        memory: memory.transpose()?,
        context: request.context_length.map(|tokens| tokens as usize),
        keep_alive: request.keep_alive.as_deref().map(keep_alive).transpose()?,
    })
}

// ---- events ----

/// Saturating: counts on the wire are 32 bits wide.
pub(super) fn u32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn event(event: v1::generate_event::Event) -> v1::GenerateEvent {
    v1::GenerateEvent { event: Some(event) }
}

pub(super) fn accepted(model: String, prompt_tokens: u32, admitted: Admitted) -> v1::GenerateEvent {
    event(v1::generate_event::Event::Accepted(v1::Accepted {
        model,
        prompt_tokens,
        context_length: u32(admitted.context),
        queue_position: u32(admitted.position),
        fingerprint: admitted.fingerprint,
    }))
}

pub(super) fn prefill(done: usize, total: usize) -> v1::Progress {
    v1::Progress { phase: v1::progress::Phase::Prefill.into(), done_tokens: u32(done), total_tokens: u32(total) }
}

pub(super) fn progress(progress: v1::Progress) -> v1::GenerateEvent {
    event(v1::generate_event::Event::Progress(progress))
}

pub(super) fn token(text: String, logprobs: Vec<TokenLogprob>, side: &Text) -> v1::GenerateEvent {
    let bytes = |id| side.token_bytes(id).to_vec();
    let alternative = |(id, logprob)| v1::Alternative { id, token: bytes(id), logprob };
    let logprob = |found: TokenLogprob| v1::TokenLogprob {
        id: found.id,
        token: bytes(found.id),
        logprob: found.logprob,
        top: found.top.into_iter().map(alternative).collect(),
    };
    event(v1::generate_event::Event::Text(v1::Text { text, logprobs: logprobs.into_iter().map(logprob).collect() }))
}

pub(super) fn done(done: Done) -> v1::GenerateEvent {
    let (finish, stop) = match done.finish {
        Finish::Stop(stop) => (v1::done::Finish::Stop, stop),
        Finish::Length => (v1::done::Finish::Length, None),
    };
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let timing = done.timing;
    event(v1::generate_event::Event::Done(v1::Done {
        finish: finish.into(),
        stop,
        usage: Some(v1::Usage { prompt_tokens: u32(done.prompt_tokens), cached_tokens: 0, completion_tokens: u32(done.token_ids.len()) }),
        timing: Some(v1::Timing {
            queue_ms: ms(timing.queue),
            prefill_ms: ms(timing.prefill),
            ttft_ms: ms(timing.ttft),
            decode_ms: ms(timing.decode),
            expert_hits: timing.expert_hits,
            expert_misses: timing.expert_misses,
            ssd_bytes: timing.ssd_bytes,
        }),
        token_ids: done.token_ids,
    }))
}

pub(super) fn failed(code: &str, message: &str) -> v1::GenerateEvent {
    event(v1::generate_event::Event::Failed(v1::Failed { code: code.into(), message: message.into() }))
}

// ---- models ----

/// What a request on a model gets that is not loaded yet.
pub(super) fn context_length(info: &ModelInfo, configured: Option<usize>) -> usize {
    info.context_max.min(configured.unwrap_or(CONTEXT_DEFAULT_MAX))
}

pub(super) fn model(entry: &Entry, default_model: &str, state: &State) -> v1::Model {
    let mut model = match &entry.info {
        Ok(info) => loaded_model(&entry.model, info, state),
        Err(problem) => v1::Model {
            id: entry.model.id.clone(),
            path: entry.model.path.display().to_string(),
            problem: problem.clone(),
            ..v1::Model::default()
        },
    };
    model.modified = entry.modified.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs());
    if entry.model.id == default_model {
        model.aliases.push("local".into());
    }
    model
}

pub(super) fn loaded_model(model: &Model, info: &ModelInfo, state: &State) -> v1::Model {
    use v1::model::State as S;
    let (phase, context) = match &state.model {
        Some((loaded, phase)) if loaded.path == model.path => match phase {
            Phase::Loading(_) => (S::Loading, None),
            Phase::Ready(ready) => (S::Ready, Some(ready.context)),
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
        ..v1::Model::default()
    }
}

pub(super) fn cache(ready: &Ready) -> v1::Cache {
    let experts = &ready.report.experts;
    let per_slot_row = experts.layers.len() as u64 * experts.slot_bytes;
    v1::Cache {
        slots_per_layer: u32(experts.slots_per_layer),
        slots_wanted: u32(experts.slots_wanted),
        slot_bytes: experts.slot_bytes,
        budget_bytes: experts.slots_per_layer as u64 * per_slot_row,
        resident_bytes: experts.resident_bytes,
        working_set_bytes: ready.info.top_k as u64 * per_slot_row,
    }
}

// ---- stats and doctor ----

pub(super) fn snapshot(started: Instant, state: &State, totals: &Totals, view: &pressure::View, process_bytes: u64) -> v1::Snapshot {
    let ready = state.ready().map(|(_, ready)| ready);
    let report = ready.map(|ready| &ready.report);
    let speed = totals.speed();
    v1::Snapshot {
        uptime_s: started.elapsed().as_secs_f64(),
        model: state.model.as_ref().map(|(model, phase)| loaded(model, phase)),
        requests: Some(v1::Requests {
            running: report.map_or(0, |report| u32(report.running)),
            waiting: u32(state.in_line + report.map_or(0, |report| report.waiting)),
            finished: totals.finished.load(Relaxed),
            cancelled: totals.cancelled.load(Relaxed),
            failed: totals.failed.load(Relaxed),
            refused: totals.refused.load(Relaxed),
            prompt_tokens: totals.prompt_tokens.load(Relaxed),
            completion_tokens: totals.completion_tokens.load(Relaxed),
        }),
        speed: Some(v1::Speed {
            decode_tok_s: speed.decode_tok_s,
            prefill_tok_s: speed.prefill_tok_s,
            ttft_ms_p50: speed.ttft_ms_p50,
            ttft_ms_p95: speed.ttft_ms_p95,
        }),
        experts: ready.map(|ready| experts(ready)),
        memory: Some(v1::Memory {
            process_bytes,
            trunk_bytes: report.map_or(0, |report| report.trunk_bytes),
            slab_bytes: ready.map_or(0, |ready| cache(ready).budget_bytes),
            kv_bytes: report.map_or(0, |report| report.kv_bytes),
            kv_reserved_bytes: report.map_or(0, |report| report.kv_reserved_bytes),
            scratch_bytes: report.map_or(0, |report| report.scratch_bytes),
            cap_bytes: state.options.memory,
        }),
        pressure: Some(v1::Pressure {
            level: match view.level {
                Level::Normal => v1::pressure::Level::Normal,
                Level::Warn => v1::pressure::Level::Warn,
                Level::Critical => v1::pressure::Level::Critical,
            }
            .into(),
            budget_bytes: view.ceiling.filter(|_| ready.is_some()),
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
        },
    }
}

fn experts(ready: &Ready) -> v1::Experts {
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
    }
}

pub(super) fn setting(setting: config::Setting) -> v1::Setting {
    v1::Setting { name: setting.name.into(), value: setting.value, origin: setting.origin }
}

pub(super) fn check(finding: Finding) -> v1::Check {
    v1::Check { name: finding.name.into(), ok: finding.ok, finding: finding.finding, fix: finding.fix.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(change: impl FnOnce(&mut v1::GenerateRequest)) -> Result<(Request, Option<KeepAlive>), Error> {
        let prompt = v1::generate_request::Prompt::Tokens(v1::TokenIds { ids: vec![1] });
        let mut request = v1::GenerateRequest { prompt: Some(prompt), sampling: Some(v1::Sampling::default()), ..Default::default() };
        change(&mut request);
        let wanted = generate(request)?;
        Ok((wanted.rest.request(vec![1], wanted.sampling.over(&Sampling::greedy(), 100)?), wanted.keep_alive))
    }

    fn check_sampling(param: &str, good: &[f32], bad: &[f32], set: fn(&mut v1::Sampling, f32)) {
        let run = |value: f32| wanted(|request| set(request.sampling.as_mut().expect("set above"), value));
        for value in good {
            assert!(run(*value).is_ok(), "{param} {value}");
        }
        for value in bad {
            let status = status(&run(*value).expect_err(param));
            assert_eq!((code::of(&status), code::param(&status)), (Some(code::INVALID_VALUE), Some(param)), "{value}");
        }
    }

    #[test]
    fn sampling_is_checked() {
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let bad = |more: &[f32]| [&odd, more].concat();
        check_sampling("temperature", &[0.0, 2.0], &bad(&[-0.1, 2.01]), |sampling, value| sampling.temperature = Some(value));
        check_sampling("top_p", &[0.01, 1.0], &bad(&[0.0, 1.01, -1.0]), |sampling, value| sampling.top_p = Some(value));
        check_sampling("min_p", &[0.0, 0.99], &bad(&[1.0, -0.1]), |sampling, value| sampling.min_p = Some(value));
        check_sampling("repetition_penalty", &[0.1, 2.0], &bad(&[0.0, 2.1]), |sampling, value| sampling.repetition_penalty = Some(value));
        check_sampling("frequency_penalty", &[-2.0, 2.0], &bad(&[-2.1, 2.1]), |sampling, value| sampling.frequency_penalty = Some(value));
        check_sampling("presence_penalty", &[-2.0, 2.0], &bad(&[-2.1, 2.1]), |sampling, value| sampling.presence_penalty = Some(value));
        check_sampling("logit_bias", &[-100.0, 100.0], &bad(&[-101.0, 101.0]), |sampling, value| {
            sampling.logit_bias.insert(99, value);
        });
    }

    #[test]
    fn other_fields_are_checked() {
        let check = |param: &str, change: fn(&mut v1::GenerateRequest)| {
            let status = status(&wanted(change).expect_err(param));
            assert_eq!((code::of(&status), code::param(&status)), (Some(code::INVALID_VALUE), Some(param)));
        };
        check("prompt", |request| request.prompt = None);
        check("messages", |request| request.prompt = Some(v1::generate_request::Prompt::Chat(v1::Chat::default())));
        check("stop", |request| request.stop = vec!["x".into(); 17]);
        check("stop", |request| request.stop = vec!["x".repeat(257)]);
        check("stop", |request| request.stop = vec![String::new()]);
        check("max_tokens", |request| request.max_tokens = Some(0));
        check("top_logprobs", |request| request.top_logprobs = Some(21));
        check("keep_alive", |request| request.keep_alive = Some("soon".into()));
        check("logit_bias", |request| {
            request.sampling.as_mut().expect("set above").logit_bias.insert(100, 0.0);
        });
        check("chat_template_kwargs", |request| {
            let messages = vec![v1::Message::default()];
            let chat = v1::Chat { messages, template_kwargs_json: "[1]".into(), continue_final_message: false };
            request.prompt = Some(v1::generate_request::Prompt::Chat(chat));
        });
        let (request, keep_alive) = wanted(|request| {
            request.stop = vec!["x".repeat(256); 16];
            (request.max_tokens, request.top_logprobs, request.keep_alive) = (Some(1), Some(20), Some("-1".into()));
        })
        .expect("all at their bounds");
        assert_eq!((request.max_tokens, request.top_logprobs, keep_alive), (Some(1), Some(20), Some(KeepAlive(None))));
        assert_eq!(request.sampling, Sampling::greedy());
    }

    #[test]
    fn errors_become_the_documented_codes() {
        let check = |error: Error, expected: &str, grpc: tonic::Code| {
            let status = status(&error);
            assert_eq!((code::of(&status), status.code()), (Some(expected), grpc), "{error}");
        };
        let internal = || flash_engine::Error::Internal("x".into());
        let file = || flash_engine::Error::File { path: "f".into(), reason: "r".into() };
        let load = |source: flash_engine::Error| Error::Load { id: "m".into(), source: source.into() };
        check(Error::ModelNotFound { wanted: "x".into(), available: "none is".into() }, code::MODEL_NOT_FOUND, tonic::Code::NotFound);
        check(load(file()), code::MODEL_INVALID, tonic::Code::FailedPrecondition);
        check(load(internal()), code::ENGINE, tonic::Code::Internal);
        check(
            load(flash_engine::Error::Memory { what: "KV", needed: 2, left: 1 }),
            code::INSUFFICIENT_MEMORY,
            tonic::Code::FailedPrecondition,
        );
        check(flash_engine::Error::ContextLength { prompt: 2, limit: 1 }.into(), code::CONTEXT_LENGTH, tonic::Code::InvalidArgument);
        check(flash_engine::Error::Template { reason: "x".into() }.into(), code::CHAT_TEMPLATE, tonic::Code::InvalidArgument);
        check(flash_engine::Error::EmptyPrompt.into(), code::INVALID_VALUE, tonic::Code::InvalidArgument);
        check(internal().into(), code::ENGINE, tonic::Code::Internal);
        check(Error::Draining, code::DRAINING, tonic::Code::Unavailable);
        check(Error::Cancelled("x"), code::CANCELLED, tonic::Code::Cancelled);
        check(Error::Panicked("x".into()), code::ENGINE, tonic::Code::Internal);
        let full = status(&Error::QueueFull { waiting: 64, retry_after_s: 7 });
        assert_eq!((code::of(&full), code::retry_after(&full)), (Some(code::QUEUE_FULL), Some(7)));
    }

    #[test]
    fn load_settings_are_read_or_refused() {
        let check = |request: v1::LoadRequest, expected: Result<(Option<CacheBudget>, Option<Option<u64>>), &str>| {
            let found = load_settings(&request).map(|settings| (settings.expert_cache, settings.memory));
            let found = found.map_err(|error| code::param(&status(&error)).map(String::from).unwrap_or_default());
            assert_eq!(found, expected.map_err(String::from));
        };
        let text = |text: &str| Some(text.to_owned());
        check(v1::LoadRequest::default(), Ok((None, None)));
        check(
            v1::LoadRequest { expert_cache: text("25%"), memory: text("auto"), ..Default::default() },
            Ok((Some(CacheBudget::Share(0.25)), Some(None))),
        );
        check(v1::LoadRequest { expert_cache: text("much"), ..Default::default() }, Err("expert_cache"));
        check(v1::LoadRequest { memory: text("25%"), ..Default::default() }, Err("memory"));
        check(v1::LoadRequest { context_length: Some(0), ..Default::default() }, Err("context_length"));
        check(v1::LoadRequest { keep_alive: text("x"), ..Default::default() }, Err("keep_alive"));
    }
}
