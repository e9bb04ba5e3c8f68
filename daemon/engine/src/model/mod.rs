//! A checkpoint on disk: what it is ([`arch`]), where its bytes lie ([`weights`], [`families`]), and its text side
//! ([`text`], [`chat`], [`output`]). Nothing here computes; the backend gets [`Model`] and reads what it needs.

pub(crate) mod arch;
pub(crate) mod chat;
mod encoded;
pub(crate) mod families;
mod files;
pub mod hub;
mod infill;
mod limits;
pub(crate) mod output;
pub(crate) mod packed;
mod pattern;
mod python;
mod rewrite;
mod safetensors;
mod template;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod text;
mod tokenizer;
pub(crate) mod weights;

pub use chat::{Chat, Choice, Format, Message, Parameters, Tool, ToolCall, ToolChoice};
pub use output::Reply;
pub use text::Text;
