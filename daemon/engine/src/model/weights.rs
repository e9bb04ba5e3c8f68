//! Where tensors lie, and reading them into aligned memory.

use crate::Error;

/// How a matrix's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    F16,
    Bf16,
    /// MLX affine: little-endian u32 words of packed `bits`-wide codes along a row; per `group` columns one scale and one
    /// bias (both of dtype `params`): w = scale·q + bias. 3- and 6-bit codes cross word boundaries as MLX packs them.
    Affine {
        bits: u8,
        group: usize,
        params: Float,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Float {
    F32,
    F16,
    Bf16,
}

/// A row-major matrix [rows, cols] as it lies in a file; `scales` and `biases` exist for [`Format::Affine`] only.
#[derive(Clone, Debug)]
pub(crate) struct MatrixSpec {
    /// The tensor's name without `.weight`, for errors.
    pub(crate) name: String,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) format: Format,
    pub(crate) weight: Span,
    pub(crate) scales: Option<Span>,
    pub(crate) biases: Option<Span>,
}

/// Bytes in a weight file; checked to lie inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Index into [`Weights::files`].
    pub(crate) file: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A vector of `len` numbers (norm weights, biases).
#[derive(Clone, Debug)]
pub(crate) struct VectorSpec {
    pub(crate) name: String,
    pub(crate) len: usize,
    pub(crate) float: Float,
    pub(crate) span: Span,
}

/// Owned bytes, 64-byte aligned.
#[derive(Debug)]
pub(crate) struct Aligned {
    _todo: Vec<u8>,
}
impl Aligned {
    /// Zeroed.
    pub(crate) fn new(_len: usize) -> Self {
        unimplemented!()
    }
    pub(crate) fn as_slice(&self) -> &[u8] {
        unimplemented!()
    }
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        unimplemented!()
    }
}

/// The checkpoint's weight files and the table of their tensors.
#[derive(Debug)]
pub(crate) struct Weights {}
impl Weights {
    /// Paths in the order [`Span::file`] counts.
    pub(crate) fn files(&self) -> &[std::path::PathBuf] {
        unimplemented!()
    }
    /// Reads a span by positional reads; a short read is an error.
    pub(crate) fn read(&self, _name: &str, _span: Span) -> Result<Aligned, Error> {
        unimplemented!()
    }
    /// Reads and widens to f32.
    pub(crate) fn read_vector(&self, _spec: &VectorSpec) -> Result<Vec<f32>, Error> {
        unimplemented!()
    }
}
