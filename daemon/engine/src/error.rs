//! Everything that can go wrong in the engine, with what was attempted and where.

use std::{io, path::PathBuf};

/// One enum for the crate; the message says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{value}` is not {wants}")]
    Setting { value: String, wants: &'static str },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot clear {path}: {source}; delete the folder yourself")]
    Clear { path: PathBuf, source: io::Error },
    /// A checkpoint's file says something that cannot be.
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("{path}: tensor `{tensor}`: {reason}")]
    Tensor { path: PathBuf, tensor: String, reason: String },
    #[error("{path}: {reason}")]
    Unsupported { path: PathBuf, reason: String },
    #[error("the chat template failed: {reason}")]
    Template { reason: String },
    /// What the request asks of a reply's form cannot be enforced.
    #[error("{param}: {reason}")]
    Schema { param: &'static str, reason: String },
    #[error("tools: {reason}")]
    NoTools { reason: &'static str },
    /// The tools of a request and what it says of them do not go together.
    #[error("tool_choice: {reason}")]
    Tools { reason: String },
    #[error("suffix: this model has no tokens that frame a gap; leave the suffix out")]
    Infill,
    #[error("the tokenizer failed: {reason}")]
    Tokenizer { reason: String },
    #[error("This model's maximum context length is {limit} tokens. However, your messages resulted in {prompt} tokens.")]
    ContextLength { prompt: usize, limit: usize },
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    TokenId { id: u32, vocab: usize },
    #[error("{waiting} requests are waiting already; try again later")]
    QueueFull { waiting: usize },
    #[error("{needed} bytes are needed ({what}) and the memory cap leaves {left}; raise --memory or lower --ctx")]
    Memory { what: &'static str, needed: u64, left: u64 },
    #[error(transparent)]
    Experts(#[from] std::sync::Arc<flash_experts::Error>),
    /// The caller's [`crate::Tell`] said so; what the job had written is gone.
    #[error("cancelled")]
    Cancelled,
    #[error("internal error: {0}")]
    Internal(String),
}
