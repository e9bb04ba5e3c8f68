//! The engine's vocabulary: what goes in and what comes out. Plain data, no behaviour beyond parsing.

use std::{collections::HashMap, fmt, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

pub use flash_experts::{Error as ExpertsError, Io, Measured, PolicyKind};

use crate::{Error, Lookahead, Profile, Reply};

/// A byte count.
pub type Bytes = u64;

/// How much of the routed experts may be resident.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CacheBudget {
    /// Slots ÷ experts in every layer, in 0.0..=1.0: floor(E × share) slots.
    Share(f64),
    /// Slot stride × slots, over all layers.
    Bytes(Bytes),
    /// All experts if they fit in half of the available memory, else what fits there.
    Auto,
}

/// Which kernels compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// Portable code, f32 activations, f32 KV cache: what the others are measured against.
    Reference,
    /// The fastest this CPU has among those that keep what the model says.
    Cpu,
    /// Activations in 8 bits where that is faster: some tokens change. As `Cpu` where the CPU has no such kernels.
    FastMath,
    /// MLX: in f32 on its CPU device, in the model's own type on Metal. Needs the feature `mlx`.
    Mlx,
    /// MLX on a Mac where it was built in, else the CPU.
    Auto,
}

impl Kernels {
    /// What [`Kernels::from_str`] takes.
    pub const CHOICES: &str = if cfg!(feature = "mlx") {
        "auto, cpu, fast-math, mlx or reference"
    } else {
        "auto, cpu, fast-math or reference (MLX is not built in)"
    };

    pub(crate) fn or_default(self) -> Self {
        match self {
            Self::Auto if cfg!(all(feature = "mlx", target_os = "macos")) => Self::Mlx,
            Self::Auto => Self::Cpu,
            chosen => chosen,
        }
    }
}

impl FromStr for Kernels {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "fast-math" => Ok(Self::FastMath),
            "mlx" if cfg!(feature = "mlx") => Ok(Self::Mlx),
            "reference" => Ok(Self::Reference),
            _ => Err(Error::Setting { value: text.into(), wants: Self::CHOICES }),
        }
    }
}

/// What [`crate::Engine::load`] needs to know besides the model's path.
#[derive(Clone, Debug)]
pub struct Options {
    pub kernels: Kernels,
    /// Worker threads, the engine thread included; `None` = physical cores.
    pub threads: Option<usize>,
    pub expert_cache: CacheBudget,
    /// Cap on trunk + slab + KV + scratch.
    pub memory: Option<Bytes>,
    /// Tokens of a request, prompt and completion; `None` = min(the model's maximum, 32k).
    pub context: Option<usize>,
    /// Requests computed together in a step.
    pub parallel: usize,
    /// Requests waiting behind those; one more is refused with [`Error::QueueFull`].
    pub queue: usize,
    /// Threads that read experts.
    pub loaders: usize,
    /// What [`CacheBudget::Auto`] takes half of; `None` = what the system says is available.
    pub available: Option<Bytes>,
    /// How experts are read; [`Io::Auto`] tries what there is on a large model and takes the fastest.
    pub io: Io,
    /// Which expert makes room for another.
    pub policy: PolicyKind,
    pub lookahead: Lookahead,
    /// Memory for KV blocks that no request uses, kept for requests that begin alike; a share is of the available memory, 0 = no
    /// such cache, [`CacheBudget::Auto`] = an eighth of it, and of what [`Options::memory`] leaves.
    pub prefix_cache: CacheBudget,
    /// Where such blocks are kept across restarts; `None` = nowhere.
    pub disk_cache: Option<DiskCache>,
    /// Has the last word on logits; nothing that a user can set.
    pub script: Option<Script>,
}

/// KV blocks on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskCache {
    pub dir: PathBuf,
    /// Of all files; `None` = an eighth of what is free on that disk, 16 GiB at most.
    pub budget: Option<Bytes>,
    /// Written a day at most (UTC).
    pub daily_writes: Bytes,
}

/// Changes the logits of a request's next position: a stand-in for a model that says what a test needs, through the engine's own
/// sampling and grammars.
#[derive(Clone)]
pub struct Script(pub Arc<Steer>);

/// Tokens so far, how many of them are the prompt, logits.
pub type Steer = dyn Fn(&[u32], usize, &mut [f32]) + Send + Sync;

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Script")
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernels: Kernels::Auto,
            threads: None,
            expert_cache: CacheBudget::Auto,
            memory: None,
            context: None,
            parallel: 2,
            queue: 64,
            loaders: 4,
            available: None,
            io: Io::Auto,
            policy: PolicyKind::default(),
            lookahead: Lookahead::default(),
            prefix_cache: CacheBudget::Auto,
            disk_cache: None,
            script: None,
        }
    }
}

/// Names a request inside one engine; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One generation, already tokenised.
#[derive(Clone, Debug)]
pub struct Request {
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    /// Stop strings; not part of the output.
    pub stop: Vec<String>,
    /// Clamped to the remaining context; `None` = all of it.
    pub max_tokens: Option<usize>,
    /// `Some(n)`: log-probabilities with n alternatives each.
    pub top_logprobs: Option<usize>,
    /// Says in [`Event::Prompt`] the same of the prompt.
    pub prompt_logprobs: bool,
    pub ignore_eos: bool,
    /// Says in [`Event::Routing`] how every position was routed, prompt included.
    pub record_routing: bool,
    /// How many of the prompt's first tokens will be asked for again: their KV blocks are kept on disk at once.
    pub keep: usize,
    /// Fairness key: clients take turns, requests of one client queue behind each other.
    pub client: String,
    /// How the reply is read and what it may be.
    pub reply: Reply,
}

impl Request {
    /// `prompt` with greedy sampling and no limits but the context.
    pub fn greedy(prompt: Vec<u32>) -> Self {
        Self {
            prompt,
            sampling: Sampling::greedy(),
            stop: Vec::new(),
            max_tokens: None,
            top_logprobs: None,
            prompt_logprobs: false,
            ignore_eos: false,
            record_routing: false,
            keep: 0,
            client: String::new(),
            reply: Reply::default(),
        }
    }
}

/// Order of application: penalties → logit bias → grammar → temperature → top-k → top-p → min-p → seeded draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 = greedy.
    pub temperature: f32,
    /// 0 = off.
    pub top_k: usize,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub min_p: f32,
    /// 1 = off.
    pub repetition_penalty: f32,
    /// Last tokens the repetition penalty looks at; 0 = all.
    pub repetition_window: usize,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub logit_bias: HashMap<u32, f32>,
    /// `None`: drawn from the operating system.
    pub seed: Option<u64>,
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: HashMap::new(),
            seed: None,
        }
    }
}

/// What a step has to say about one request.
#[derive(Debug)]
pub enum Event {
    /// Part of the prompt has been read.
    Prefill {
        done: usize,
        total: usize,
    },
    /// Log-probabilities of the prompt's next tokens; of its first one, NaN.
    Prompt(Vec<TokenLogprob>),
    /// No part while a character or a possible mark or stop string is held back.
    Token {
        parts: Vec<Part>,
        /// Of the tokens that the content among the parts is made of.
        logprobs: Vec<TokenLogprob>,
        /// What the token is part of.
        channel: Channel,
    },
    /// Which experts the next tokens were routed to: ids are [tokens, MoE layers, top_k], in rank order.
    Routing {
        tokens: Vec<u32>,
        layers: usize,
        ids: Vec<u16>,
    },
    Done(Done),
    /// Last event: the request is gone.
    Failed(Error),
}

/// A piece of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Content(String),
    /// What the model thinks, without the marks around it.
    Reasoning(String),
    Call(CallPart),
}

/// Calls come one after another: the first part of each has its name, the arguments of all its parts are a JSON object, unless the
/// request ended for its length within it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallPart {
    pub index: u32,
    pub name: String,
    pub arguments: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Channel {
    #[default]
    Content,
    Reasoning,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    pub id: u32,
    pub logprob: f32,
    /// Most likely first.
    pub top: Vec<(u32, f32)>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Finish {
    /// An end-of-turn token, or this stop string.
    Stop(Option<String>),
    /// max_tokens or the context's end.
    Length,
    /// At least one tool was called, and the last call is complete.
    ToolCalls,
}

#[derive(Clone, Debug)]
pub struct Done {
    pub finish: Finish,
    pub prompt_tokens: usize,
    /// Those of them whose keys and values were there already.
    pub cached_tokens: usize,
    /// Generated tokens that the model spent on reasoning.
    pub reasoning_tokens: usize,
    /// Generated ids, end-of-turn token included.
    pub token_ids: Vec<u32>,
    pub timing: Timing,
    /// What [`Kernels::FastMath`] may have changed; `None`: nothing.
    pub price: Option<&'static str>,
}

/// Where a request's time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// From admission to the first step it took part in.
    pub queue: Duration,
    pub prefill: Duration,
    /// From admission to the first token.
    pub ttft: Duration,
    pub decode: Duration,
    /// Of the steps it took part in.
    pub expert_hits: u64,
    pub expert_misses: u64,
    pub ssd_bytes: Bytes,
}

/// What the receiver of an [`Event`] did with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    Taken,
    /// Taken, and there is no room for another: the request pauses until [`crate::Engine::resume`].
    Full,
    /// Nobody listens any more: the request is cancelled.
    Gone,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Worked,
    /// Nothing to do until a command arrives: no request, or all of them are paused.
    Idle,
}

/// What is known of a model from its files.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// The folder's name.
    pub id: String,
    pub path: PathBuf,
    /// config.json's model_type.
    pub arch: String,
    pub params: u64,
    pub active_params: u64,
    /// "4-bit g64", "bf16" …
    pub quantization: String,
    /// Of the weight files; of a packed model, of the trunk and the expert store, whatever else is kept beside them.
    pub size_bytes: Bytes,
    /// The routed experts are in an expert store of their own.
    pub packed: bool,
    pub context_max: usize,
    pub layers: usize,
    pub experts: usize,
    pub top_k: usize,
    pub vocab_size: usize,
    /// Payload of one expert's record.
    pub expert_bytes: Bytes,
    /// Everything that is not a routed expert.
    pub trunk_bytes: Bytes,
    /// It can be given tools: its template shows them, and its way of calling them is known here.
    pub tools: bool,
    /// It may think before it answers.
    pub thinks: bool,
}

/// Counters and gauges of a loaded engine, for stats; taken between steps.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub running: usize,
    pub waiting: usize,
    /// Longest context in use.
    pub context_used: usize,
    pub trunk_bytes: Bytes,
    pub kv_bytes: Bytes,
    pub kv_reserved_bytes: Bytes,
    /// Blocks in memory, and those of them that running requests hold.
    pub kv_blocks: usize,
    pub kv_busy_blocks: usize,
    pub scratch_bytes: Bytes,
    /// "avx2", "portable" …
    pub kernels: String,
    pub threads: usize,
    /// Where MLX computes.
    pub mlx: Option<MlxReport>,
    pub io: Io,
    /// Experts that layers wanted where lookahead had a say, and those of them that it had foreseen.
    pub lookahead_wanted: u64,
    pub lookahead_foreseen: u64,
    /// Tokens of steps that threads shared by requests: [`crate::Split::Rows`].
    pub decoded_apart: u64,
    pub profile: Profile,
    pub experts: flash_experts::Stats,
    pub prefix: PrefixReport,
}

/// The cache of prefixes since the model was loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixReport {
    /// Prefixes are kept at all.
    pub on: bool,
    /// Requests that found a part of their prompt there, and those that did not.
    pub hits: u64,
    pub misses: u64,
    /// Prompt tokens that were not computed, by where their blocks came from.
    pub memory_tokens: u64,
    pub disk_tokens: u64,
    /// Blocks that can be found, of [`PrefixReport::block_tokens`] each; running requests hold some of them.
    pub blocks: usize,
    pub bytes: Bytes,
    pub block_tokens: usize,
    /// Of blocks that no request holds, and what these may take now.
    pub idle_bytes: Bytes,
    pub budget_bytes: Bytes,
    /// Blocks that made room.
    pub evicted: u64,
    pub disk: Option<DiskReport>,
    /// Why there is none although it is configured.
    pub disk_error: Option<String>,
}

/// The part of it on disk, of all models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskReport {
    pub files: usize,
    pub bytes: Bytes,
    pub budget_bytes: Bytes,
    /// Since midnight UTC, and how much it may be.
    pub written_today_bytes: Bytes,
    pub daily_bytes: Bytes,
    /// Since the model was loaded.
    pub blocks_read: u64,
    pub blocks_written: u64,
    /// Files that were not what was written, and were deleted.
    pub bad_files: u64,
    pub failed_writes: u64,
    /// Blocks left out because they would have passed a budget.
    pub over_budget: u64,
}

/// What [`crate::Engine::clear_prefixes`] gave back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleared {
    pub memory_bytes: Bytes,
    pub files: u64,
    pub disk_bytes: Bytes,
}

/// What MLX has taken and what it was waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MlxReport {
    /// Times that the host waited for a result: each leaves a GPU idle.
    pub host_syncs: u64,
    /// Of the whole process.
    pub active_bytes: Bytes,
    pub peak_bytes: Bytes,
    /// Freed, and kept to be used again.
    pub cached_bytes: Bytes,
}

/// How far a long job (converting, verifying, writing a synthetic model) has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, as a person would say it: "writing experts".
    pub stage: &'static str,
    /// Bytes; of this stage.
    pub done: u64,
    pub total: u64,
}

/// Hears a job's progress; `false` stops it with [`Error::Cancelled`].
pub type Tell<'a> = &'a mut dyn FnMut(Progress) -> bool;

impl CacheBudget {
    /// What [`CacheBudget::from_str`] reads, for messages.
    pub const WANTS: &str = "a share such as 25%, a size such as 512MiB, or auto";
}

impl FromStr for CacheBudget {
    type Err = Error;

    /// "25%", "512MiB", "1.5GB", plain bytes, or "auto".
    fn from_str(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("auto") {
            return Ok(Self::Auto);
        }
        if let Some(percent) = text.strip_suffix('%') {
            return match percent.trim().parse::<f64>() {
                Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Self::Share(percent / 100.0)),
                _ => Err(Error::Setting { value: text.into(), wants: "a percentage from 0% to 100%" }),
            };
        }
        parse_bytes(text).map(Self::Bytes).map_err(|_| Error::Setting { value: text.into(), wants: Self::WANTS })
    }
}

impl fmt::Display for CacheBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Share(share) => write!(f, "{}%", share * 100.0),
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// Reads "512MiB", "1.5 GB", "4096"; MB is 10^6 bytes, MiB (or MI, M followed by nothing) 2^20.
pub fn parse_bytes(text: &str) -> Result<Bytes, Error> {
    let wants = "a size such as 512MiB, 1.5GB or 1073741824";
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(Error::Setting { value: text.into(), wants }),
    };
    match number.parse::<f64>() {
        Ok(number) if number.is_finite() && number * factor < 9e18 => Ok((number * factor) as Bytes),
        _ => Err(Error::Setting { value: text.into(), wants }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_and_refused() {
        let check = |text: &str, expected: Option<CacheBudget>| assert_eq!(text.parse::<CacheBudget>().ok(), expected, "{text}");
        check("25%", Some(CacheBudget::Share(0.25)));
        check(" auto ", Some(CacheBudget::Auto));
        check("512MiB", Some(CacheBudget::Bytes(512 << 20)));
        check("1.5 GB", Some(CacheBudget::Bytes(1_500_000_000)));
        check("0", Some(CacheBudget::Bytes(0)));
        for bad in ["", "101%", "-1%", "NaN%", "12 parsecs", "1e400", "99999999999TB", "½"] {
            check(bad, None);
        }
    }
}
