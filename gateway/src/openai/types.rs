//! What OpenAI's API answers, as far as we answer it. Output only: requests are read by hand (`chat.rs`), because clients
//! send more, less and other things than any schema says.

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
    pub(crate) choices: [Choice<'a>; 1],
    pub(crate) usage: Usage,
    pub(crate) x_flash: Measured,
}

#[derive(Debug, Serialize)]
pub(crate) struct Choice<'a> {
    pub(crate) index: u32,
    pub(crate) message: Message<'a>,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) finish_reason: &'static str,
}

#[derive(Debug, Serialize)]
pub(crate) struct Message<'a> {
    pub(crate) role: &'static str,
    pub(crate) content: &'a str,
    pub(crate) refusal: Option<&'a str>,
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
    pub(crate) index: u32,
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
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Measured {
    pub(crate) ttft_ms: f64,
    pub(crate) prefill_tok_s: Option<f64>,
    pub(crate) decode_tok_s: Option<f64>,
    pub(crate) queue_ms: f64,
    pub(crate) expert_cache_hit_rate: Option<f64>,
    pub(crate) bytes_from_ssd: u64,
}
