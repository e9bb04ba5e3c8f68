//! Between wire types and the engine's: the only place that names both, and the only mapping of errors to statuses.
//! Checks ranges on the way in. Pure.

mod chat;
mod measure;
mod state;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use flash_engine::{CacheBudget, Chat, Done, ExpertsError, Finish, Format, Options, Reply, Request, Sampling, Text};
use flash_proto::{code, v1};
use tonic::Status;

pub(super) use self::{
    chat::{prompt, token},
    measure::{absolute, bench, bench_event, job, replay_policies, replay_row, replay_slots, replayed, synth},
    state::{Seen, cache, check, cleared, loaded_model, model, setting, shown, snapshot},
};
use crate::{
    Error,
    config::{CONTEXT_WANTS, Config, KEEP_ALIVE_WANTS, KeepAlive, MEMORY_WANTS, parse_count, parse_keep_alive, parse_memory},
    worker::Admitted,
};

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
        E::NoTools { .. } => code::with_param(code::status(code::CHAT_TEMPLATE, message), "tools"),
        E::Schema { param, .. } => code::with_param(code::status(code::SCHEMA_NOT_SUPPORTED, message), param),
        E::Infill => code::with_param(code::status(code::FIM_NOT_SUPPORTED, message), "suffix"),
        E::Tools { .. } => code::with_param(code::status(code::INVALID_VALUE, message), "tool_choice"),
        // Its pattern gave up on this very text, such as a million spaces.
        E::Tokenizer { .. } => code::with_param(code::status(code::INVALID_VALUE, message), "messages"),
        E::ContextLength { .. } => code::with_param(code::status(code::CONTEXT_LENGTH, message), "messages"),
        E::EmptyPrompt | E::TokenId { .. } => code::with_param(code::status(code::INVALID_VALUE, message), "prompt"),
        E::Cancelled => code::status(code::CANCELLED, message),
        E::QueueFull { .. } => code::status(code::QUEUE_FULL, message),
        E::Memory { .. } => code::status(code::INSUFFICIENT_MEMORY, message),
        E::Experts(error) if matches!(**error, ExpertsError::Space { .. }) => code::status(code::NO_SPACE, message),
        E::Clear { .. } | E::Experts(_) | E::Internal(_) => code::status(code::ENGINE, message),
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

/// What a request is for the engine.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) tokens: Vec<u32>,
    pub(super) reply: Reply,
    /// What making the reply's grammar took.
    pub(super) grammar: Duration,
}

#[derive(Debug)]
pub(super) struct Overrides(v1::Sampling);

#[derive(Debug)]
pub(super) struct Rest {
    stop: Vec<String>,
    max_tokens: Option<usize>,
    top_logprobs: Option<usize>,
    prompt_logprobs: bool,
    ignore_eos: bool,
    record_routing: bool,
    cache_prompt: bool,
    client: String,
}

/// Whether there can ever be room for all of them.
pub(super) fn together(request: &v1::GenerateRequest, options: &Options) -> Result<(), Error> {
    let most = options.parallel + options.queue;
    if request.together as usize <= most {
        return Ok(());
    }
    let says = format!("asks for {} replies at once; this daemon has room for {most}: ask for fewer, or raise `queue`", request.together);
    Err(bad("n", says))
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
    let format = request.format.map_or(Ok(None), |format| chat::format("response_format", format))?;
    if format.is_some() && matches!(&prompt, Prompt::Chat(chat) if chat.continue_final) {
        return Err(bad("response_format", "is of a whole reply, and this one goes on from a message: leave out one of the two"));
    }
    Ok(Wanted {
        model: request.model,
        prompt,
        format,
        sampling: Overrides(request.sampling.unwrap_or_default()),
        keep_alive: request.keep_alive.as_deref().map(keep_alive).transpose()?,
        rest: Rest {
            stop,
            max_tokens: request.max_tokens.map(|n| n as usize),
            top_logprobs: request.top_logprobs.map(|n| n as usize),
            prompt_logprobs: request.prompt_logprobs,
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
            Self::Text(prompt) => text.encode_raw(&prompt),
            Self::Tokens(ids) => Ok(ids),
            Self::Infill(gap) => text.encode_raw(&text.infill(&gap.prefix, &gap.suffix)?),
        }
    }

    /// Ids, and how the reply is to be read. `context` is the model's, 0 if nobody knows.
    pub(super) fn prepare(self, format: Option<&Format>, text: &Text, context: usize) -> Result<Prepared, flash_engine::Error> {
        let timed = |tokens, make: &dyn Fn() -> Result<Reply, flash_engine::Error>| {
            let begun = Instant::now();
            Ok(Prepared { tokens, reply: make()?, grammar: begun.elapsed() })
        };
        // The engine would say the same, once it has loaded the model.
        let fits = |prompt| match context {
            1.. if prompt >= context => Err(flash_engine::Error::ContextLength { prompt, limit: context }),
            _ => Ok(()),
        };
        match self {
            Self::Chat(chat) => {
                let prompt = match text.render(&chat) {
                    Err(error @ flash_engine::Error::NoTools { .. }) => {
                        // A small model may not have the room for what an agent says either, and for that agents have words.
                        text.tokens_with_tools(&chat).map_or(Ok(()), fits)?;
                        return Err(error);
                    }
                    prompt => prompt?,
                };
                let tokens = text.encode(&prompt)?;
                fits(tokens.len())?;
                timed(tokens, &|| text.reply(&chat, &prompt, format))
            }
            raw => {
                let tokens = raw.encode(text)?;
                fits(tokens.len())?;
                timed(tokens, &|| text.raw_reply(format))
            }
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
        let Self { stop, max_tokens, top_logprobs, prompt_logprobs, ignore_eos, record_routing, cache_prompt, client } = self;
        let keep = if cache_prompt { prompt.len() } else { 0 };
        Request { prompt, sampling, stop, max_tokens, top_logprobs, prompt_logprobs, ignore_eos, record_routing, keep, client, reply }
    }
}

#[derive(Debug)]
pub(super) struct LoadSettings {
    pub(super) expert_cache: Option<CacheBudget>,
    pub(super) memory: Option<Option<u64>>,
    pub(super) context: Option<Option<usize>>,
    pub(super) keep_alive: Option<KeepAlive>,
}

/// `configured` is what "default" means.
pub(super) fn load_settings(request: &v1::LoadRequest, configured: &Config) -> Result<LoadSettings, Error> {
    fn read<T>(text: &Option<String>, default: T, parse: impl Fn(&str) -> Result<T, Error>) -> Result<Option<T>, Error> {
        match text.as_deref() {
            Some("default") => Ok(Some(default)),
            text => text.map(parse).transpose(),
        }
    }
    let expert_cache = |text: &str| text.parse().map_err(|error: flash_engine::Error| bad("expert_cache", error.to_string()));
    let memory = |text: &str| parse_memory(text).ok_or_else(|| bad("memory", format!("`{text}` is not {MEMORY_WANTS}")));
    let context = |text: &str| parse_count(text).ok_or_else(|| bad("context_length", format!("`{text}` is not {CONTEXT_WANTS}")));
    let Options { expert_cache: cache, memory: cap, context: tokens, .. } = &configured.options;
    Ok(LoadSettings {
        expert_cache: read(&request.expert_cache, *cache, expert_cache)?,
        memory: read(&request.memory, *cap, memory)?,
        context: read(&request.context_length, *tokens, context)?,
        keep_alive: read(&request.keep_alive, configured.keep_alive, keep_alive)?,
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

/// Of one part, and not hidden: listings pass over those.
pub(super) fn folder_name(param: &'static str, name: String) -> Result<String, Error> {
    let valid = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let good = (1..=100).contains(&name.len()) && !name.starts_with(['.', '-']) && name.chars().all(valid);
    if good { Ok(name) } else { Err(bad(param, format!("`{name}` is no name for a model: letters, digits, -, _ and ., at most 100"))) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::RawConfig;

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

    /// With a tokenizer that puts a token before each text.
    #[test]
    fn only_a_text_without_a_template_begins_as_the_tokenizer_has_it() {
        let bundled = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/flash-tiny-moe");
        let dir = tempfile::tempdir().expect("a folder");
        for file in ["config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"] {
            std::fs::copy(bundled.join(file), dir.path().join(file)).expect("copied");
        }
        let path = dir.path().join("tokenizer.json");
        let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        let (first, id) = (&tokenizer["added_tokens"][0]["content"], &tokenizer["added_tokens"][0]["id"]);
        let expected = id.as_u64().expect("an id") as u32;
        let special = json!({"SpecialToken": {"id": first, "type_id": 0}});
        let [a, b] = ["A", "B"].map(|id| json!({"Sequence": {"id": id, "type_id": 0}}));
        let named = json!({first.as_str().expect("a name"): {"id": first, "ids": [id], "tokens": [first]}});
        tokenizer["post_processor"] =
            json!({"type": "TemplateProcessing", "single": [special, a], "pair": [special, a, b], "special_tokens": named});
        std::fs::write(&path, tokenizer.to_string()).expect("written");

        let text = Text::open(dir.path()).expect("a tokenizer");
        let plain = Prompt::Text("Once".into()).encode(&text).expect("ids");
        assert_eq!((plain[0], &plain[1..]), (expected, &text.encode("Once").expect("ids")[..]));
        let chat = Chat::of(vec![flash_engine::Message { role: "user".into(), content: "Once".into(), ..Default::default() }]);
        assert_ne!(Prompt::Chat(Box::new(chat)).encode(&text).expect("ids")[0], expected);
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
        check(flash_engine::Error::NoTools { reason: "x" }.into(), code::CHAT_TEMPLATE, tonic::Code::InvalidArgument);
        check(flash_engine::Error::Tools { reason: "x".into() }.into(), code::INVALID_VALUE, tonic::Code::InvalidArgument);
        check(flash_engine::Error::Tokenizer { reason: "x".into() }.into(), code::INVALID_VALUE, tonic::Code::InvalidArgument);
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
    fn load_settings_are_read_or_refused() {
        let configured = Config::resolve(RawConfig { memory: Some("3GiB".into()), ..RawConfig::default() }, &|name| {
            (name == "FLASH_HOME").then(|| "/nowhere".into())
        });
        let configured = configured.expect("a good configuration");
        let check = |request: v1::LoadRequest, expected: Result<(Option<CacheBudget>, Option<Option<u64>>), &str>| {
            let found = load_settings(&request, &configured).map(|settings| (settings.expert_cache, settings.memory));
            let found = found.map_err(|error| code::param(&status(&error)).map(String::from).unwrap_or_default());
            assert_eq!(found, expected.map_err(String::from));
        };
        let text = |text: &str| Some(text.to_owned());
        check(v1::LoadRequest::default(), Ok((None, None)));
        check(
            v1::LoadRequest { expert_cache: text("25%"), memory: text("auto"), ..Default::default() },
            Ok((Some(CacheBudget::Share(0.25)), Some(None))),
        );
        check(
            v1::LoadRequest { expert_cache: text("default"), memory: text("default"), ..Default::default() },
            Ok((Some(CacheBudget::Auto), Some(Some(3 << 30)))),
        );
        check(v1::LoadRequest { expert_cache: text("much"), ..Default::default() }, Err("expert_cache"));
        check(v1::LoadRequest { memory: text("1"), ..Default::default() }, Err("memory"));
        check(v1::LoadRequest { memory: text("25%"), ..Default::default() }, Err("memory"));
        check(v1::LoadRequest { context_length: text("0"), ..Default::default() }, Err("context_length"));
        check(v1::LoadRequest { keep_alive: text("x"), ..Default::default() }, Err("keep_alive"));
    }
}
