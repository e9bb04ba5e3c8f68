//! Routed experts: a layer's slots are rows of one MLX array, its bank, into which loaders read records as they are. What
//! `gather_qmm` wants, `[slots, rows, columns]` for each tensor of a record, are views of it: an expert that comes or goes
//! changes no array and copies nothing.

use std::ptr::NonNull;

use flash_experts::{ExpertId, Slot};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{
        self,
        indexing::{TryIndexMutOp, TryIndexOp},
    },
};

use super::{Result, weights::dtype_of};
use crate::{
    backend::record::{Place, Record},
    model::weights::Format,
};

/// Direct reads go to whole pages.
const PAGE: usize = 16 << 10;

#[derive(Debug)]
pub(super) struct Bank {
    gate: Stack,
    up: Stack,
    down: Stack,
    /// Whose scales and biases are widened, by slot.
    widened: Vec<Option<ExpertId>>,
    table: Option<Table>,
}

/// Where the device finds an expert.
#[derive(Debug)]
struct Table {
    /// Per expert, slots of all layers; what `slots` was made of.
    found: Vec<Option<Slot>>,
    /// Per expert, rows of the bank.
    slots: Array,
}

/// One matrix of every slot.
#[derive(Debug)]
struct Stack {
    format: Format,
    weight: Array,
    /// Scales and biases of [`Format::Affine`].
    affine: Option<[Array; 2]>,
    /// The same in the type that is computed in, where the file's is another: MLX would otherwise convert the whole bank's in
    /// every product. On Metal the types are the same.
    wide: Option<[Array; 2]>,
}

/// Views of a bank.
struct Views<'a> {
    memory: &'a Array,
    slots: usize,
    stride: usize,
    /// Bytes before the first slot.
    skip: usize,
    /// What is computed in.
    dtype: Dtype,
}

impl Bank {
    /// Zeroed memory for `slots` records, `stride` bytes apart, and where the first begins.
    pub(super) fn new(record: &Record, slots: usize, stride: usize, dtype: Dtype) -> Result<(Self, NonNull<u8>)> {
        // Two dimensions, because MLX counts each in i32, and their product not.
        let pages = slots.checked_mul(stride).ok_or_else(|| Exception::custom("more bytes than can be addressed"))?.div_ceil(PAGE) + 1;
        let memory = ops::zeros::<u32>(&super::shape(&[pages, PAGE / 4])?)?;
        let start = memory.try_as_slice::<u32>().map_err(|error| super::exception(&error))?.as_ptr().cast::<u8>().cast_mut();
        let skip = start.align_offset(PAGE);
        let views = Views { memory: &memory, slots, stride, skip, dtype };
        let (gate, up, down) = (views.stack(&record.gate)?, views.stack(&record.up)?, views.stack(&record.down)?);
        let first = NonNull::new(start.wrapping_add(skip)).expect("a slice has an address");
        Ok((Self { gate, up, down, widened: vec![None; slots], table: None }, first))
    }

    /// A slot holds this expert now.
    pub(super) fn widen(&mut self, expert: ExpertId, slot: u32) -> Result<()> {
        if self.widened[slot as usize].replace(expert) == Some(expert) {
            return Ok(());
        }
        let row = slot as i32..slot as i32 + 1;
        for stack in [&mut self.gate, &mut self.up, &mut self.down] {
            for (wide, narrow) in stack.wide.iter_mut().flatten().zip(stack.affine.iter().flatten()) {
                // In place; a scatter over several slots would copy the whole array.
                wide.try_index_mut(row.clone(), narrow.try_index(row.clone())?.as_dtype(wide.dtype())?)?;
            }
        }
        Ok(())
    }

    /// Slots [experts] in the bank, `layers` apart where `found` has them. Of experts that are not in memory it says another
    /// one's, which can be computed with and means nothing. `None`: there is nothing to compute with.
    pub(super) fn slots(&mut self, found: &[Option<Slot>], layers: u32) -> Result<Option<&Array>> {
        let Some(any) = found.iter().flatten().next() else { return Ok(None) };
        if self.table.as_ref().is_none_or(|table| table.found != found) {
            for (expert, slot) in (0..).zip(found) {
                slot.map_or(Ok(()), |slot| self.widen(ExpertId(expert), slot.0 / layers))?;
            }
            let slots = super::indices(found.iter().map(|slot| slot.unwrap_or(*any).0 / layers));
            self.table = Some(Table { found: found.to_vec(), slots });
        }
        Ok(self.table.as_ref().map(|table| &table.slots))
    }

    /// down · (silu(gate · x) ⊙ up · x) for products of rows `x[lhs[i]]`, [rows, hidden], with the experts in slots `rhs[i]`.
    pub(super) fn feed_forward(&self, x: &Array, lhs: Option<&Array>, rhs: &Array) -> Result<Array> {
        let gate = self.gate.product(x, lhs, rhs)?;
        let mid = gate.multiply(ops::sigmoid(&gate)?)?.multiply(self.up.product(x, lhs, rhs)?)?;
        self.down.product(&mid, None, rhs)
    }
}

impl Place {
    /// Of [`Stack::wide`], for one slot.
    pub(super) fn widened_bytes(&self, dtype: Dtype) -> usize {
        match self.format {
            Format::Affine { params, .. } if dtype_of(params) != dtype => {
                (self.scales.1 + self.biases.1) / super::size_of(dtype_of(params)) * super::size_of(dtype)
            }
            _ => 0,
        }
    }
}

impl Views<'_> {
    fn stack(&self, place: &Place) -> Result<Stack> {
        let view = |(at, _): (usize, usize), cols: usize, dtype: Dtype| {
            let size = super::size_of(dtype);
            let shape = super::shape(&[self.slots, place.rows, cols])?;
            let strides = [(self.stride / size) as i64, cols as i64, 1];
            let view = ops::as_strided(self.memory.view_dtype(dtype)?, &shape[..], &strides[..], (self.skip + at) / size)?;
            view.eval()?;
            Ok::<_, Exception>(view)
        };
        let (weight, affine) = match place.format {
            Format::Affine { bits, group, params } => {
                let side = |at| view(at, place.cols / group, dtype_of(params));
                let weight = view(place.weight, place.cols * usize::from(bits) / 32, Dtype::Uint32)?;
                (weight, Some([side(place.scales)?, side(place.biases)?]))
            }
            Format::F32 => (view(place.weight, place.cols, Dtype::Float32)?, None),
            Format::F16 => (view(place.weight, place.cols, Dtype::Float16)?, None),
            Format::Bf16 => (view(place.weight, place.cols, Dtype::Bfloat16)?, None),
        };
        let other = affine.as_ref().filter(|[scales, _]| scales.dtype() != self.dtype);
        let zeros = |[scales, _]: &[Array; 2]| {
            let zeros = || ops::zeros_dtype(scales.shape(), self.dtype);
            Ok::<_, Exception>([zeros()?, zeros()?])
        };
        let wide = other.map(zeros).transpose()?;
        Ok(Stack { format: place.format, weight, affine, wide })
    }
}

impl Stack {
    /// Never told that the indices are sorted: MLX then chooses its kernel by the number of slots, and tokens would depend
    /// on the size of the cache.
    fn product(&self, x: &Array, lhs: Option<&Array>, rhs: &Array) -> Result<Array> {
        tracing::trace!(target: super::TRACE, x = ?x.shape(), experts = ?rhs.shape(), weight = ?&self.weight.shape()[1..], "gather");
        match (self.format, self.wide.as_ref().or(self.affine.as_ref())) {
            (Format::Affine { bits, group, .. }, Some([scales, biases])) => {
                ops::gather_qmm(x, &self.weight, scales, biases, lhs, rhs, true, group as i32, i32::from(bits), false)
            }
            _ => ops::gather_mm(x, self.weight.swap_axes(1, 2)?, lhs, rhs, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        families::Ffn,
        weights::{Float, MatrixSpec, Span},
    };

    const HIDDEN: usize = 64;

    /// 4-bit matrices [64, 64] in groups of 32, whose spans say no more than lengths.
    fn record(params: Float) -> Record {
        let size = if params == Float::F32 { 4 } else { 2 };
        let span = |len: usize| Span { file: 0, offset: 0, len: len as u64 };
        let side = span(HIDDEN * HIDDEN / 32 * size);
        let matrix = || MatrixSpec {
            name: String::new(),
            rows: HIDDEN,
            cols: HIDDEN,
            format: Format::Affine { bits: 4, group: 32, params },
            weight: span(HIDDEN * HIDDEN / 2),
            scales: Some(side),
            biases: Some(side),
        };
        Record::new(&Ffn { gate: matrix(), up: matrix(), down: matrix() })
    }

    /// A bank, and what loaders do to it.
    struct Loaded {
        bank: Bank,
        first: NonNull<u8>,
        record: Record,
        params: Float,
    }

    impl Loaded {
        fn new(params: Float, slots: usize) -> Self {
            let record = record(params);
            let (bank, first) = Bank::new(&record, slots, record.bytes, Dtype::Float32).unwrap();
            Self { bank, first, record, params }
        }

        /// Expert `seed` is read into a slot.
        fn load(&mut self, slot: u32, seed: u32) {
            let mut bytes: Vec<u8> = (0..self.record.bytes as u32).map(|i| ((i ^ seed).wrapping_mul(0x9e37_79b1) >> 13) as u8).collect();
            for place in [&self.record.gate, &self.record.up, &self.record.down] {
                for (at, len) in [place.scales, place.biases] {
                    let number = |i: usize| ((i as u32 + seed) % 29) as f32 / 256.0 - 0.05;
                    match self.params {
                        Float::F32 => bytes[at..at + len]
                            .chunks_exact_mut(4)
                            .enumerate()
                            .for_each(|(i, b)| b.copy_from_slice(&number(i).to_le_bytes())),
                        _ => bytes[at..at + len]
                            .chunks_exact_mut(2)
                            .enumerate()
                            .for_each(|(i, b)| b.copy_from_slice(&half::bf16::from_f32(number(i)).to_le_bytes())),
                    }
                }
            }
            // SAFETY: a slot of the bank, which MLX does not read now.
            unsafe { self.first.add(slot as usize * bytes.len()).copy_from_nonoverlapping(NonNull::from(&bytes[..]).cast(), bytes.len()) };
        }

        fn start(&mut self, x: &Array, lhs: &[u32], rhs: &[u32]) -> Array {
            self.bank.feed_forward(x, Some(&indices(lhs)), &indices(rhs)).unwrap()
        }

        fn bits(&mut self, x: &Array, lhs: &[u32], rhs: &[u32]) -> Vec<u32> {
            self.start(x, lhs, rhs).as_slice::<f32>().iter().map(|value| value.to_bits()).collect()
        }
    }

    fn indices(ids: &[u32]) -> Array {
        super::super::indices(ids.iter().copied())
    }

    /// [3, 1, 64]
    fn rows() -> Array {
        let x: Vec<f32> = (0..3 * HIDDEN).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        Array::from_slice(&x, &[3, 1, HIDDEN as i32])
    }

    #[test]
    fn bits_depend_on_no_slot_no_neighbour_and_no_size_of_the_bank() {
        for params in [Float::F32, Float::Bf16] {
            let (mut few, mut many) = (Loaded::new(params, 2), Loaded::new(params, 9));
            for (few_slot, many_slot, expert) in [(0, 7, 11), (1, 2, 12)] {
                few.load(few_slot, expert);
                many.load(many_slot, expert);
                few.bank.widen(ExpertId(expert as u16), few_slot).unwrap();
                many.bank.widen(ExpertId(expert as u16), many_slot).unwrap();
            }
            let x = rows();
            let together = few.bits(&x, &[0, 2, 1, 0], &[0, 0, 1, 1]);
            assert!(together.iter().any(|bits| *bits != 0));
            assert_eq!(many.bits(&x, &[0, 2, 1, 0], &[7, 7, 2, 2]), together);
            let apart = [many.bits(&x, &[0, 2], &[7, 7]), many.bits(&x, &[1], &[2]), many.bits(&x, &[0], &[2])].concat();
            assert_eq!(apart, together, "{params:?}");
        }
    }

    #[test]
    fn a_bank_that_cannot_be_is_an_error() {
        let record = record(Float::F32);
        let refused = |slots: usize, stride| Bank::new(&record, slots, stride, Dtype::Float32).map(|_| ()).unwrap_err().to_string();
        assert!(refused(usize::MAX, 1 << 26).contains("addressed"));
        assert!(refused(1 << 30, 1 << 31).contains("too large"));
    }

    /// Loads are seen through arrays made before them, and by graphs that wait: why pins last until a result was read.
    #[test]
    fn a_graph_reads_its_slots_when_it_is_evaluated() {
        let mut loaded = Loaded::new(Float::F32, 2);
        let x = rows();
        loaded.load(1, 5);
        let (first, late) = (loaded.bits(&x, &[0], &[1]), loaded.start(&x, &[0], &[1]));
        loaded.load(1, 6);
        let second = loaded.bits(&x, &[0], &[1]);
        assert_ne!(second, first);
        assert_eq!(late.as_slice::<f32>().iter().map(|value| value.to_bits()).collect::<Vec<_>>(), second);
    }
}
