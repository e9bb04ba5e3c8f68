//! Trunk matrices as MLX arrays, in the type that is computed in, and their products. Experts are not here: `experts.rs`.

use mlx_rs::{Array, Dtype, ops};

use super::Result;
use crate::{
    Bytes, Error,
    model::weights::{Float, Format, MatrixSpec, Span, VectorSpec, Weights},
};

#[derive(Debug)]
pub(super) struct Matrix {
    format: Format,
    weight: Array,
    /// Scales and biases of [`Format::Affine`].
    affine: Option<(Array, Array)>,
}

impl Matrix {
    /// Not evaluated yet, as [`vector`] is not.
    pub(super) fn read(weights: &Weights, spec: &MatrixSpec, dtype: Dtype) -> std::result::Result<Self, Error> {
        let read = |span: Span, cols: usize, from: Dtype, to: Dtype| {
            let bytes = weights.bytes(&spec.name, span)?;
            array(&bytes, &[spec.rows, cols], from).and_then(|array| array.as_dtype(to)).map_err(super::failed)
        };
        let (weight, affine) = match spec.format {
            Format::Affine { bits, group, params } => {
                let side = |span: Option<Span>| {
                    read(span.expect("affine matrices have scales and biases"), spec.cols / group, dtype_of(params), dtype)
                };
                let weight = read(spec.weight, spec.cols * usize::from(bits) / 32, Dtype::Uint32, Dtype::Uint32)?;
                (weight, Some((side(spec.scales)?, side(spec.biases)?)))
            }
            Format::F32 => (read(spec.weight, spec.cols, Dtype::Float32, dtype)?, None),
            Format::F16 => (read(spec.weight, spec.cols, Dtype::Float16, dtype)?, None),
            Format::Bf16 => (read(spec.weight, spec.cols, Dtype::Bfloat16, dtype)?, None),
        };
        Ok(Self { format: spec.format, weight, affine })
    }

    /// Matrices over the same columns, one below the other: as few as their formats allow.
    pub(super) fn stacked(weights: &Weights, specs: &[&MatrixSpec], dtype: Dtype) -> std::result::Result<Vec<Self>, Error> {
        let mut stacked: Vec<Self> = Vec::new();
        for spec in specs {
            let matrix = Self::read(weights, spec, dtype)?;
            match stacked.last_mut() {
                Some(above) if above.format == matrix.format => *above = above.with(&matrix).map_err(super::failed)?,
                _ => stacked.push(matrix),
            }
        }
        Ok(stacked)
    }

    fn with(&self, below: &Self) -> Result<Self> {
        let join = |above: &Array, below: &Array| ops::concatenate(&[above, below], 0);
        let affine = match (&self.affine, &below.affine) {
            (Some(above), Some(below)) => Some((join(&above.0, &below.0)?, join(&above.1, &below.1)?)),
            _ => None,
        };
        Ok(Self { format: self.format, weight: join(&self.weight, &below.weight)?, affine })
    }

    pub(super) fn arrays(&self) -> impl Iterator<Item = &Array> {
        std::iter::once(&self.weight).chain(self.affine.iter().flat_map(|(scales, biases)| [scales, biases]))
    }

    pub(super) fn bytes(&self) -> Bytes {
        self.arrays().map(|array| array.nbytes() as Bytes).sum()
    }

    /// x · wᵀ
    pub(super) fn product(&self, x: &Array) -> Result<Array> {
        tracing::trace!(target: super::TRACE, x = ?x.shape(), weight = ?self.weight.shape(), "product");
        match (self.format, &self.affine) {
            (Format::Affine { bits, group, .. }, Some((scales, biases))) => {
                ops::quantized_matmul(x, &self.weight, scales, biases, true, group as i32, i32::from(bits))
            }
            _ => x.matmul(self.weight.transpose()?),
        }
    }

    /// Some rows, widened: an embedding.
    pub(super) fn rows(&self, ids: &Array) -> Result<Array> {
        let take = |array: &Array| array.take_axis(ids, 0);
        match (self.format, &self.affine) {
            (Format::Affine { bits, group, .. }, Some((scales, biases))) => {
                ops::dequantize(take(&self.weight)?, take(scales)?, &take(biases)?, group as i32, i32::from(bits))
            }
            _ => take(&self.weight),
        }
    }
}

pub(super) fn vector(weights: &Weights, spec: &VectorSpec, dtype: Dtype) -> std::result::Result<Array, Error> {
    let bytes = weights.bytes(&spec.name, spec.span)?;
    array(&bytes, &[spec.len], dtype_of(spec.float)).and_then(|array| array.as_dtype(dtype)).map_err(super::failed)
}

/// A copy of checkpoint bytes.
fn array(bytes: &[u8], shape: &[usize], dtype: Dtype) -> Result<Array> {
    let shape = super::shape(shape)?;
    assert_eq!(bytes.len(), shape.iter().map(|n| *n as usize).product::<usize>() * super::size_of(dtype), "bytes of {shape:?} {dtype:?}");
    // SAFETY: the bytes are as many as the shape asks for, and are copied before the call returns.
    Ok(unsafe { Array::from_raw_data(bytes.as_ptr().cast(), &shape, dtype) })
}

pub(super) fn dtype_of(float: Float) -> Dtype {
    match float {
        Float::F32 => Dtype::Float32,
        Float::F16 => Dtype::Float16,
        Float::Bf16 => Dtype::Bfloat16,
    }
}
