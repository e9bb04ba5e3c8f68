//! Which way of reading a model's experts is the fastest here: a trial with the model's own spans. The reading itself is in
//! `flash-experts`. Called when a model is loaded with `auto`, and by whoever reports on a machine.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use flash_experts::{Measured, Record, Slice};

use crate::{
    Bytes, Error, Io, Options,
    model::{
        families::{FfnSpec, Model},
        weights::Span,
    },
};

/// A smaller model is read through the page cache: most machines keep it there whole, which no disk can match, and give
/// the memory back when it is wanted. It would be served before a trial of 0.3 s is over.
const TRIAL_FROM: Bytes = 1 << 30;
/// Records to choose from: enough that few are read twice.
const RECORDS_MAX: usize = 4096;

/// Offsets and lengths that are read together.
type Batch = Vec<(u64, u32)>;

/// What reading a model's experts gives on this disk.
#[derive(Debug)]
pub struct StorageReport {
    pub model: Measured,
    /// Of an unpacked model: what the best of those ways gives when every expert is one piece, bytes per second.
    pub packed: Option<Result<f64, String>>,
    pub expert_bytes: Bytes,
}

/// Tries every way of reading on the weight file that holds most of the model's experts, as `loaders` threads would, and on
/// as many bytes in one piece each. Reads weight files only.
pub fn storage_report(dir: &Path, loaders: usize) -> Result<StorageReport, Error> {
    let opened = Model::open(dir)?;
    let (path, spans, _) = spans(&opened);
    let model = flash_experts::measure(&path, &spans, loaders);
    let expert_bytes = opened.info.expert_bytes;
    if opened.packed.is_some() {
        return Ok(StorageReport { model, packed: None, expert_bytes });
    }
    // Records lie page by page in a store; what the pages hold makes no difference to the disk.
    let record = expert_bytes.next_multiple_of(4096).max(4096);
    let len = std::fs::metadata(&path).map_err(|source| Error::Read { path: path.clone(), source })?.len();
    let step = (len / record).div_ceil(RECORDS_MAX as u64).max(1);
    let whole: Vec<_> = (0..len / record).step_by(step as usize).map(|at| vec![(at * record, record as u32)]).collect();
    let tried = flash_experts::measure(&path, &whole, loaders).tried;
    let packed = tried.into_iter().find(|(io, _)| *io == model.best).map(|(_, speed)| speed);
    Ok(StorageReport { model, packed, expert_bytes })
}

/// What [`Io::Auto`] means for this model.
pub(crate) fn choose(model: &Model, options: &Options) -> Io {
    if options.io != Io::Auto {
        return options.io;
    }
    let (path, spans, total) = spans(model);
    if total < TRIAL_FROM {
        return Io::Buffered;
    }
    let Measured { best, tried } = flash_experts::measure(&path, &spans, options.loaders);
    tracing::info!(%best, ?tried, file = %path.display(), "measured how experts are read fastest");
    best
}

/// The file with most expert bytes, what loaders ask of it for each expert, and the bytes of all experts.
fn spans(model: &Model) -> (PathBuf, Vec<Batch>, Bytes) {
    let mut files: HashMap<u32, (Bytes, Vec<Batch>)> = HashMap::new();
    let mut add = |file: u32, record: Batch| {
        let (bytes, records) = files.entry(file).or_default();
        *bytes += record.iter().map(|span| Bytes::from(span.1)).sum::<Bytes>();
        records.push(record);
    };
    let (mut total, mut packed) = (0, model.packed.iter().flat_map(|packed| &packed.records));
    for layer in &model.layers {
        let FfnSpec::Moe { experts, .. } = &layer.ffn else { continue };
        let entries = packed.next();
        for (index, expert) in experts.iter().enumerate() {
            let matrices = expert.matrices();
            total += matrices.iter().map(|matrix| matrix.bytes()).sum::<Bytes>();
            if let Some(entries) = entries {
                let Slice { offset, len, .. } = Record::stored(0, &entries[index]).slices[0];
                add(matrices[0].weight.file, vec![(offset, len)]);
                continue;
            }
            let spans: Vec<Span> =
                matrices.into_iter().flat_map(|matrix| [Some(matrix.weight), matrix.scales, matrix.biases]).flatten().collect();
            for spans in spans.chunk_by(|a, b| a.file == b.file) {
                add(spans[0].file, spans.iter().map(|span| (span.offset, span.len as u32)).collect());
            }
        }
    }
    let (file, (_, records)) = files.into_iter().max_by_key(|(_, (bytes, _))| *bytes).unwrap_or_default();
    let step = records.len().div_ceil(RECORDS_MAX).max(1);
    (model.weights.files()[file as usize].clone(), records.into_iter().step_by(step).collect(), total)
}
