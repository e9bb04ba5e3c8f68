//! Between wire types and the engine's: the only place that names both, and the only mapping of errors to statuses.
//! Checks ranges on the way in. Pure.

mod chat;

use std::{
    collections::VecDeque,
    path::PathBuf,
    str::FromStr,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant, SystemTime},
};

use flash_engine::{
    CacheBudget, Chat, Cleared, DiskReport, Done, ExpertsError, Finish, Format, ModelInfo, Options, PolicyKind, Reply, Report, Request,
    Sampling, Text,
    bench::{self, BenchEvent, BenchOptions, Machine, Row, Variant},
    parse_bytes,
    replay::{ReplayPolicy, Replayed, Trace},
    synth::Synth,
};
use flash_proto::{code, v1};
use tonic::Status;

pub(super) use self::chat::token;
use super::gap;
use crate::{
    Error,
    catalog::Entry,
    config::{self, KEEP_ALIVE_WANTS, KeepAlive, parse_keep_alive},
    jobs,
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
        Error::NoSpace { .. } => code::status(code::NO_SPACE, message),
        Error::Create { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => code::status(code::NO_SPACE, message),
        Error::QueueFull { retry_after_s, .. } => code::with_retry_after(code::status(code::QUEUE_FULL, message), *retry_after_s),
        Error::Busy(_) => code::status(code::BUSY, message),
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
        E::Schema { param, .. } => code::with_param(code::status(code::SCHEMA_NOT_SUPPORTED, message), param),
        E::Infill => code::with_param(code::status(code::FIM_NOT_SUPPORTED, message), "suffix"),
        E::Tools { .. } => code::with_param(code::status(code::INVALID_VALUE, message), "tool_choice"),
        E::ContextLength { .. } => code::with_param(code::status(code::CONTEXT_LENGTH, message), "messages"),
        E::EmptyPrompt | E::TokenId { .. } => code::with_param(code::status(code::INVALID_VALUE, message), "prompt"),
        E::Cancelled => code::status(code::CANCELLED, message),
        E::QueueFull { .. } => code::status(code::QUEUE_FULL, message),
        E::Memory { .. } => code::status(code::INSUFFICIENT_MEMORY, message),
        E::Experts(error) if matches!(**error, ExpertsError::Space { .. }) => code::status(code::NO_SPACE, message),
        E::Clear { .. } | E::Tokenizer { .. } | E::Experts(_) | E::Internal(_) => code::status(code::ENGINE, message),
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
    pub(super) format: Option<Format>,
    pub(super) sampling: Overrides,
    pub(super) keep_alive: Option<KeepAlive>,
    pub(super) rest: Rest,
}

#[derive(Debug)]
pub(super) enum Prompt {
    Chat(Box<Chat>),
    Text(String),
    Tokens(Vec<u32>),
    Infill(v1::Infill),
}

#[derive(Debug)]
pub(super) struct Overrides(v1::Sampling);

#[derive(Debug)]
pub(super) struct Rest {
    stop: Vec<String>,
    max_tokens: Option<usize>,
    top_logprobs: Option<usize>,
    ignore_eos: bool,
    record_routing: bool,
    cache_prompt: bool,
    client: String,
}

pub(super) fn generate(request: v1::GenerateRequest) -> Result<Wanted, Error> {
    use v1::generate_request::Prompt as P;
    let prompt = match request.prompt {
        Some(P::Chat(chat)) => Prompt::Chat(Box::new(chat::chat(chat)?)),
        Some(P::Text(text)) => Prompt::Text(text),
        Some(P::Tokens(tokens)) => Prompt::Tokens(tokens.ids),
        Some(P::Infill(gap)) => Prompt::Infill(gap),
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
        format: request.format.map_or(Ok(None), |format| chat::format("response_format", format))?,
        sampling: Overrides(request.sampling.unwrap_or_default()),
        keep_alive: request.keep_alive.as_deref().map(keep_alive).transpose()?,
        rest: Rest {
            stop,
            max_tokens: request.max_tokens.map(|n| n as usize),
            top_logprobs: request.top_logprobs.map(|n| n as usize),
            ignore_eos: request.ignore_eos,
            record_routing: request.record_routing,
            cache_prompt: request.cache_prompt,
            client: request.client,
        },
    })
}

pub(super) fn tokenize_prompt(prompt: Option<v1::tokenize_request::Prompt>) -> Result<Prompt, Error> {
    use v1::tokenize_request::Prompt as P;
    match prompt {
        Some(P::Chat(chat)) => Ok(Prompt::Chat(Box::new(chat::chat(chat)?))),
        Some(P::Text(text)) => Ok(Prompt::Text(text)),
        None => Err(bad("prompt", "is missing")),
    }
}

fn keep_alive(text: &str) -> Result<KeepAlive, Error> {
    parse_keep_alive(text).ok_or_else(|| bad("keep_alive", format!("`{text}` is not {KEEP_ALIVE_WANTS}")))
}

impl Prompt {
    /// Ids alone. CPU work, as [`Prompt::prepare`]: for a thread that may block.
    pub(super) fn encode(self, text: &Text) -> Result<Vec<u32>, flash_engine::Error> {
        match self {
            Self::Chat(chat) => text.encode(&text.render(&chat)?),
            Self::Text(prompt) => text.encode(&prompt),
            Self::Tokens(ids) => Ok(ids),
            Self::Infill(gap) => text.encode_raw(&text.infill(&gap.prefix, &gap.suffix)?),
        }
    }

    /// Ids, and how the reply is to be read.
    pub(super) fn prepare(self, format: Option<&Format>, text: &Text) -> Result<(Vec<u32>, Reply), flash_engine::Error> {
        match self {
            Self::Chat(chat) => {
                let prompt = text.render(&chat)?;
                Ok((text.encode(&prompt)?, text.reply(&chat, &prompt, format)?))
            }
            raw => Ok((raw.encode(text)?, text.raw_reply(format)?)),
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
    pub(super) fn request(self, prompt: Vec<u32>, reply: Reply, sampling: Sampling) -> Request {
        let Self { stop, max_tokens, top_logprobs, ignore_eos, record_routing, cache_prompt, client } = self;
        let keep = if cache_prompt { prompt.len() } else { 0 };
        Request { prompt, sampling, stop, max_tokens, top_logprobs, ignore_eos, record_routing, keep, client, reply }
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

/// In parts of a few hundred kilobytes: messages have a largest size.
pub(super) fn routing(tokens: &[u32], layers: usize, ids: &[u16]) -> VecDeque<v1::GenerateEvent> {
    let per_token = ids.len().checked_div(tokens.len()).unwrap_or(0);
    let parts = tokens.chunks(256).zip(ids.chunks((256 * per_token).max(1)));
    let part = |(tokens, ids): (&[u32], &[u16])| {
        let ids = ids.iter().copied().map(u32::from).collect();
        event(v1::generate_event::Event::Routing(v1::Routing { tokens: tokens.into(), layers: u32(layers), ids }))
    };
    parts.map(part).collect()
}

pub(super) fn done(done: Done) -> v1::GenerateEvent {
    let (finish, stop) = match done.finish {
        Finish::Stop(stop) => (v1::done::Finish::Stop, stop),
        Finish::Length => (v1::done::Finish::Length, None),
        Finish::ToolCalls => (v1::done::Finish::ToolCalls, None),
    };
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let timing = done.timing;
    event(v1::generate_event::Event::Done(v1::Done {
        finish: finish.into(),
        stop,
        usage: Some(v1::Usage {
            prompt_tokens: u32(done.prompt_tokens),
            cached_tokens: u32(done.cached_tokens),
            completion_tokens: u32(done.token_ids.len()),
            reasoning_tokens: u32(done.reasoning_tokens),
        }),
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
        price: done.price.unwrap_or_default().into(),
    }))
}

pub(super) fn failed(code: &str, message: &str) -> v1::GenerateEvent {
    event(v1::generate_event::Event::Failed(v1::Failed { code: code.into(), message: message.into() }))
}

// ---- jobs ----

pub(super) fn job(event: jobs::Event) -> v1::JobEvent {
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

pub(super) fn synth(request: &v1::SynthRequest) -> Result<Synth, Error> {
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
pub(super) fn bench(request: v1::BenchRequest, routing: Option<&Trace>) -> Result<BenchOptions, Error> {
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

pub(super) fn bench_event(event: BenchEvent) -> v1::BenchEvent {
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

pub(super) fn replayed(trace: &Trace) -> v1::ReplayResponse {
    v1::ReplayResponse {
        tokens: trace.tokens() as u32,
        layers: trace.layers as u32,
        experts: trace.experts as u32,
        top_k: trace.top_k() as u32,
        rows: Vec::new(),
    }
}

/// A path on the wire: relative ones would mean the daemon's working directory.
pub(super) fn absolute(param: &'static str, text: &str) -> Result<PathBuf, Error> {
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

pub(super) fn replay_policies(names: &[String]) -> Result<Vec<(&'static str, ReplayPolicy)>, Error> {
    let find = |name: &String| {
        let found = REPLAYED.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.ok_or_else(|| bad("policy", format!("`{name}` is none of lfru, lru, lcp and belady")))
    };
    if names.is_empty() { Ok(REPLAYED.into()) } else { names.iter().map(find).collect() }
}

pub(super) fn replay_slots(wanted: &[String], experts: usize) -> Result<Vec<usize>, Error> {
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

pub(super) fn replay_row(policy: &str, slots: usize, found: &Replayed, best: &Replayed) -> v1::ReplayRow {
    let share = |replayed: &Replayed| replayed.hits as f64 / (replayed.hits + replayed.misses).max(1) as f64;
    v1::ReplayRow { policy: policy.into(), slots: u32(slots), hits: found.hits, misses: found.misses, gap: share(best) - share(found) }
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

/// A model with what its text side says of it.
pub(super) fn shown(model: v1::Model, text: &Text) -> v1::ShowResponse {
    let sampling = text.sampling();
    v1::ShowResponse {
        model: Some(model),
        chat_template: text.template_source().into(),
        calls_tools: text.calls_tools(),
        thinks: text.thinks(),
        infills: text.infills(),
        temperature: sampling.temperature,
        top_k: u32(sampling.top_k),
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
    }
}

/// Of one part, and not hidden: listings pass over those.
pub(super) fn folder_name(param: &'static str, name: String) -> Result<String, Error> {
    let valid = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let good = (1..=100).contains(&name.len()) && !name.starts_with(['.', '-']) && name.chars().all(valid);
    if good { Ok(name) } else { Err(bad(param, format!("`{name}` is no name for a model: letters, digits, -, _ and ., at most 100"))) }
}

pub(super) fn loaded_model(model: &Model, info: &ModelInfo, state: &State) -> v1::Model {
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

pub(super) fn cache(ready: &Ready) -> v1::Cache {
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
pub(super) struct Seen<'a> {
    pub(super) started: Instant,
    pub(super) state: &'a State,
    pub(super) totals: &'a Totals,
    pub(super) view: &'a pressure::View,
    pub(super) process_bytes: u64,
    pub(super) gap: Option<gap::Found>,
}

pub(super) fn snapshot(seen: Seen<'_>) -> v1::Snapshot {
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

pub(super) fn cleared(cleared: Cleared) -> v1::ClearCacheResponse {
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
        Ok((wanted.rest.request(vec![1], Reply::default(), wanted.sampling.over(&Sampling::greedy(), 100)?), wanted.keep_alive))
    }

    #[test]
    fn a_marked_prompt_is_kept_to_its_end() {
        let keep = |marked| wanted(|request| request.cache_prompt = marked).expect("a good request").0.keep;
        assert_eq!((keep(false), keep(true)), (0, 1));
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
            let chat = v1::Chat { messages, template_kwargs_json: "[1]".into(), ..v1::Chat::default() };
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
        let schema = flash_engine::Error::Schema { param: "tools", reason: "x".into() };
        check(schema.into(), code::SCHEMA_NOT_SUPPORTED, tonic::Code::InvalidArgument);
        check(flash_engine::Error::Infill.into(), code::FIM_NOT_SUPPORTED, tonic::Code::InvalidArgument);
        check(flash_engine::Error::Tools { reason: "x".into() }.into(), code::INVALID_VALUE, tonic::Code::InvalidArgument);
        check(flash_engine::Error::EmptyPrompt.into(), code::INVALID_VALUE, tonic::Code::InvalidArgument);
        check(internal().into(), code::ENGINE, tonic::Code::Internal);
        check(Error::Busy("x".into()), code::BUSY, tonic::Code::FailedPrecondition);
        check(Error::Draining, code::DRAINING, tonic::Code::Unavailable);
        check(Error::Cancelled("x"), code::CANCELLED, tonic::Code::Cancelled);
        check(Error::Panicked("x".into()), code::ENGINE, tonic::Code::Internal);
        let full = status(&Error::QueueFull { waiting: 64, retry_after_s: 7 });
        assert_eq!((code::of(&full), code::retry_after(&full)), (Some(code::QUEUE_FULL), Some(7)));
    }

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
