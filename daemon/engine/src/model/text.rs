//! The text side of a model: tokenizer, chat template, end-of-turn tokens, sampling defaults. Usable from any thread.

use std::path::Path;

use crate::{Error, Sampling};

/// Tokenizer, chat template and defaults of one model.
#[derive(Debug)]
pub struct Text {}

/// One chat message, as the template sees it.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Text {
    pub fn open(_dir: &Path) -> Result<Self, Error> {
        unimplemented!()
    }
    /// Token ids of `text`; special tokens written in it are recognised (as transformers does).
    pub fn encode(&self, _text: &str) -> Result<Vec<u32>, Error> {
        unimplemented!()
    }
    /// The chat template applied; `kwargs` are extra variables; the generation prompt is added unless the last message is to be continued.
    pub fn render(
        &self,
        _messages: &[Message],
        _kwargs: &serde_json::Map<String, serde_json::Value>,
        _continue_final: bool,
    ) -> Result<String, Error> {
        unimplemented!()
    }
    /// The raw bytes one token stands for (byte-level BPE undone); empty for special tokens.
    pub fn token_bytes(&self, _id: u32) -> &[u8] {
        unimplemented!()
    }
    /// Ids that end a turn: generation_config.json's eos_token_id, else config.json's, plus the tokenizer's eos.
    pub fn end_ids(&self) -> &[u32] {
        unimplemented!()
    }
    /// generation_config.json's sampling; else temperature 0.7.
    pub fn sampling(&self) -> &Sampling {
        unimplemented!()
    }
    pub fn vocab_size(&self) -> usize {
        unimplemented!()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Decoder {}
impl Decoder {
    pub(crate) fn push(&mut self, _text: &Text, _id: u32) -> String {
        unimplemented!()
    }
    pub(crate) fn finish(&mut self) -> String {
        unimplemented!()
    }
}
