//! What OpenAI's chat and completions answer, as far as we answer it. Output only: requests are read by hand (`chat.rs`),
//! because clients send more, less and other things than any schema says.

use flash_proto::v1;
use serde::Serialize;

/// What a completion and all of its chunks have in common.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    /// As the client wrote it; the canonical id is in `x-flash-model`.
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Completion<'a> {
    #[serde(flatten)]
    pub(crate) head: &'a Head,
    pub(crate) object: &'static str,
    pub(crate) choices: Vec<Choice<'a>>,
    pub(crate) usage: Usage,
    pub(crate) x_flash: Measured,
}

#[derive(Debug, Serialize)]
pub(crate) struct Choice<'a> {
    pub(crate) index: usize,
    pub(crate) message: Message<'a>,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) finish_reason: &'static str,
}

#[derive(Debug, Serialize)]
pub(crate) struct Message<'a> {
    pub(crate) role: &'static str,
    /// Null where there are only calls.
    pub(crate) content: Option<&'a str>,
    pub(crate) refusal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<Call<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) function_call: Option<Function<'a>>,
}

/// A whole call, or in a stream a part of one: the first part names the tool, the others only add to its input.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Call<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) function: Option<Function<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) custom: Option<Custom<'a>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Function<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<&'a str>,
    pub(crate) arguments: &'a str,
}

#[derive(Debug, Serialize)]
pub(crate) struct Custom<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<&'a str>,
    pub(crate) input: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Chunk<'a> {
    #[serde(flatten)]
    pub(crate) head: &'a Head,
    pub(crate) object: &'static str,
    pub(crate) choices: Vec<Delta<'a>>,
    /// `Some(None)` is a null: promised for the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) x_flash: Option<Measured>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Delta<'a> {
    pub(crate) index: usize,
    pub(crate) delta: DeltaMessage<'a>,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct DeltaMessage<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tool_calls: Option<[Call<'a>; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) function_call: Option<Function<'a>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Logprobs {
    pub(crate) content: Vec<Logprob>,
    pub(crate) refusal: Option<Vec<Logprob>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Logprob {
    #[serde(flatten)]
    pub(crate) token: Token,
    pub(crate) top_logprobs: Vec<Token>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Token {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) total_tokens: u32,
    pub(crate) prompt_tokens_details: PromptDetails,
    pub(crate) completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: u32,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct CompletionDetails {
    pub(crate) reasoning_tokens: u32,
}

/// Our own addition beside `usage`; null where nothing was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measured {
    pub(crate) ttft_ms: f64,
    pub(crate) prefill_tok_s: Option<f64>,
    pub(crate) decode_tok_s: Option<f64>,
    pub(crate) queue_ms: f64,
    pub(crate) expert_cache_hit_rate: Option<f64>,
    pub(crate) bytes_from_ssd: u64,
    /// What `--fast-math` may have changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) price: Option<String>,
}

/// The prompt is read once for all choices of it.
pub(crate) fn usage(prompts: &[&[v1::Usage]]) -> Usage {
    let sum = |of: &dyn Fn(&v1::Usage) -> u32, all: &mut dyn Iterator<Item = &v1::Usage>| all.map(of).fold(0, u32::saturating_add);
    let firsts = || prompts.iter().filter_map(|choices| choices.first());
    let all = || prompts.iter().flat_map(|choices| choices.iter());
    let prompt_tokens = sum(&|usage| usage.prompt_tokens, &mut firsts());
    let completion_tokens = sum(&|usage| usage.completion_tokens, &mut all());
    Usage {
        prompt_tokens,
        completion_tokens,
        total_tokens: prompt_tokens.saturating_add(completion_tokens),
        prompt_tokens_details: PromptDetails { cached_tokens: sum(&|usage| usage.cached_tokens, &mut firsts()) },
        completion_tokens_details: CompletionDetails { reasoning_tokens: sum(&|usage| usage.reasoning_tokens, &mut all()) },
    }
}

pub(crate) fn measured(done: &v1::Done) -> Measured {
    let (usage, timing) = (done.usage.unwrap_or_default(), done.timing.unwrap_or_default());
    let per_second = |tokens: u32, ms: f64| (tokens > 0 && ms > 0.0).then(|| f64::from(tokens) * 1e3 / ms);
    let lookups = timing.expert_hits + timing.expert_misses;
    #[allow(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
    let hit_rate = (lookups > 0).then(|| timing.expert_hits as f64 / lookups as f64);
    Measured {
        ttft_ms: timing.ttft_ms,
        prefill_tok_s: per_second(usage.prompt_tokens.saturating_sub(usage.cached_tokens), timing.prefill_ms),
        // The first token belongs to the prefill.
        decode_tok_s: per_second(usage.completion_tokens.saturating_sub(1), timing.decode_ms),
        queue_ms: timing.queue_ms,
        expert_cache_hit_rate: hit_rate,
        bytes_from_ssd: timing.ssd_bytes,
        price: Some(done.price.clone()).filter(|price| !price.is_empty()),
    }
}

/// JSON has no infinity; OpenAI writes this for what was masked.
pub(crate) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(-9999.0) } else { -9999.0 }
}

pub(crate) fn logprobs(tokens: &[v1::TokenLogprob]) -> Vec<Logprob> {
    let token = |bytes: &[u8], logprob: f32| Token {
        token: String::from_utf8_lossy(bytes).into_owned(),
        logprob: finite(logprob),
        bytes: bytes.to_vec(),
    };
    let entry = |found: &v1::TokenLogprob| Logprob {
        token: token(&found.token, found.logprob),
        top_logprobs: found.top.iter().map(|other| token(&other.token, other.logprob)).collect(),
    };
    tokens.iter().map(entry).collect()
}
