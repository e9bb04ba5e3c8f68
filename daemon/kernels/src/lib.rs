//! What the CPU computes a decoder with: products with packed or plain weights, attention over one span of positions, norms, rotary
//! embedding and gates. Functions over slices that keep nothing, know no threads and no files; which of them serve is [`Isa`]'s to say.
//!
//! A crate of its own because it takes long to optimise and nothing else need be.

pub mod attention;
pub mod fixed_kv;
pub mod matrix;
pub mod norm;
pub mod portable;
mod simd;

pub use simd::{Isa, TOKENS_MAX, ToFixed, exponentials};

/// Of the code that computes. The last number is raised when an instruction set's results change, be it in their last bits: what was
/// computed before is not continued, and equal seeds may give other tokens.
pub const RESULTS: &str = concat!(env!("CARGO_PKG_VERSION"), ".2");
