//! A checkpoint on disk: what it is ([`arch`]), where its bytes lie ([`weights`], [`families`]), and its text side
//! ([`text`]). Nothing here computes; the backend gets [`Model`] and reads what it needs.

pub(crate) mod arch;
pub(crate) mod families;
mod files;
pub mod hub;
mod safetensors;
#[cfg(test)]
mod tests;
pub(crate) mod text;
pub(crate) mod weights;

pub use text::{Message, Text};
