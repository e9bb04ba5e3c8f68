//! Where each expert's bytes lie, and reading one into its slot. It knows files and offsets, not tensors, and holds no
//! cache. `Experts::open` makes a store out of a [`Source`]; loader threads read through it.

mod direct;
#[cfg(test)]
#[path = "tests.rs"]
mod kinds;
mod measure;
mod mmap;
#[cfg(target_os = "linux")]
#[path = "linux.rs"]
mod os;
#[cfg(not(target_os = "linux"))]
#[path = "macos.rs"]
mod os;
mod pread;
mod span;
mod storage;
#[cfg(target_os = "linux")]
mod uring;

pub use measure::{Measured, measure};
pub(crate) use os::forget;
pub use pread::Pread;
pub use storage::{Io, Read, Storage};

use crate::{
    Entry, Error,
    cache::Load,
    format::{self, HEADER as BLOCK},
    key::ExpertKey,
    slab::Slab,
};
use direct::Direct;
use std::{hash::Hasher, io, path::Path};
use twox_hash::XxHash3_64;

/// Opens a file to be read by `io`; [`Io::Auto`] is direct where the file system allows it, else buffered.
pub fn open(path: &Path, io: Io) -> io::Result<Box<dyn Storage>> {
    Ok(match io {
        Io::Auto => match Direct::open(path) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Box::new(Pread::open(path)?),
            other => Box::new(other?),
        },
        Io::Direct => Box::new(Direct::open(path)?),
        Io::Buffered => Box::new(Pread::open(path)?),
        #[cfg(target_os = "linux")]
        Io::Uring => Box::new(uring::Uring::open(path)?),
        #[cfg(not(target_os = "linux"))]
        Io::Uring => return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring is there on Linux only")),
        Io::Mmap => Box::new(mmap::Mapped::open(path)?),
    })
}

/// File bytes `[offset, offset + len)` go to slot bytes `[at, at + len)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    pub file: u32,
    pub offset: u64,
    pub len: u32,
    pub at: u32,
}

/// What an expert is made of.
#[derive(Clone, Debug)]
pub struct Record {
    pub slices: Vec<Slice>,
    /// XXH3-64 of the first `payload` bytes of the slices, in the file's order; they are then neighbours in one file.
    pub checksum: Option<u64>,
    /// What is read beyond it is padding.
    pub payload: u32,
}

/// The experts of a model on disk.
#[derive(Debug)]
pub struct Source {
    pub files: Vec<Box<dyn Storage>>,
    /// `[layer][expert]`; all layers have as many experts.
    pub layers: Vec<Vec<Record>>,
}

impl Record {
    /// Scattered bytes that nothing is known of but their places.
    pub fn unchecked(slices: Vec<Slice>) -> Self {
        let payload = slices.iter().map(|slice| slice.len).fold(0, u32::saturating_add);
        Self { slices, checksum: None, payload }
    }

    /// A record of file number `file`, an expert store: its padding as far as a direct read needs it
    /// to be one request.
    pub fn stored(file: u32, entry: &Entry) -> Self {
        let len = entry.payload.next_multiple_of(BLOCK as u32);
        let slice = Slice { file, offset: entry.offset, len, at: 0 };
        Self { slices: vec![slice], checksum: Some(entry.checksum), payload: entry.payload }
    }
}

/// A checked source whose slices are in reading order, neighbours joined.
#[derive(Debug)]
pub(crate) struct Store {
    source: Source,
    experts: usize,
}

impl Store {
    /// Checks everything that [`Store::load`] relies on.
    pub(crate) fn new(mut source: Source, slab: &Slab) -> Result<Self, Error> {
        let experts = source.layers.first().map_or(0, Vec::len);
        if experts == 0 || source.layers.len() > usize::from(u16::MAX) || experts > usize::from(u16::MAX) {
            return Err(Error::Source(format!(
                "{} layers of {experts} experts; at least one and at most 65535 of each",
                source.layers.len()
            )));
        }
        let files: Vec<u64> = source.files.iter().map(|file| file.len()).collect();
        for (layer, list) in source.layers.iter_mut().enumerate() {
            if list.len() != experts {
                return Err(Error::Source(format!("layer {layer} has {} experts and layer 0 has {experts}", list.len())));
            }
            for (expert, record) in list.iter_mut().enumerate() {
                let bad = |reason: String| Error::Source(format!("layer {layer} expert {expert}: {reason}"));
                check(&mut record.slices, &files, slab.stride_bytes()).map_err(bad)?;
                join(&mut record.slices);
                check_payload(record).map_err(bad)?;
            }
        }
        Ok(Self { source, experts })
    }

    pub(crate) fn layers(&self) -> usize {
        self.source.layers.len()
    }

    pub(crate) fn experts(&self) -> usize {
        self.experts
    }

    /// The error for a load that ended without telling which read it was at: names the whole record.
    pub(crate) fn failed(&self, key: ExpertKey, source: io::Error) -> Error {
        self.error(key, &self.record(key).slices, source)
    }

    fn record(&self, key: ExpertKey) -> &Record {
        &self.source.layers[key.layer.index()][key.expert.index()]
    }

    fn error(&self, key: ExpertKey, batch: &[Slice], source: io::Error) -> Error {
        Error::Read { layer: key.layer.0, expert: key.expert.0, file: self.name(batch), offset: batch[0].offset, len: bytes(batch), source }
    }

    /// Reads an expert into the slot that `load` holds, and holds it against its checksum; returns the bytes read.
    pub(crate) fn load(&self, load: &Load, slab: &Slab) -> Result<u64, Error> {
        let key = load.key();
        let record = self.record(key);
        let into = |slice: &Slice| {
            // SAFETY: `check` has seen that the slice lies in the slot and overlaps no other slice, the core
            // makes slots of this slab only, and `load` says that nobody else reads or writes this one. No slice is made
            // again while an earlier one of the same bytes is in use.
            unsafe {
                let part = slab.slot_ptr(load.slot()).add(slice.at as usize);
                std::slice::from_raw_parts_mut(part.as_ptr(), slice.len as usize)
            }
        };
        for batch in record.slices.chunk_by(|a, b| a.file == b.file) {
            let mut reads: Vec<_> = batch.iter().map(|slice| Read { offset: slice.offset, into: into(slice) }).collect();
            let file = &self.source.files[batch[0].file as usize];
            file.read(&mut reads).map_err(|source| self.error(key, batch, source))?;
        }
        if let Some(expected) = record.checksum
            && expected != checksum(record, |slice| into(slice))
        {
            let (file, offset) = (self.name(&record.slices), record.slices[0].offset);
            return Err(Error::Checksum { layer: key.layer.0, expert: key.expert.0, file, offset, len: record.payload.into() });
        }
        Ok(bytes(&record.slices))
    }

    fn name(&self, batch: &[Slice]) -> String {
        self.source.files[batch[0].file as usize].name().to_owned()
    }
}

/// Of the payload, as its slices lie in memory.
fn checksum<'a>(record: &Record, loaded: impl Fn(&Slice) -> &'a mut [u8]) -> u64 {
    if let [whole] = &record.slices[..] {
        return format::checksum(&loaded(whole)[..record.payload as usize]);
    }
    let (mut hasher, mut left) = (XxHash3_64::new(), record.payload as usize);
    for slice in &record.slices {
        let bytes = loaded(slice);
        let part = bytes.len().min(left);
        hasher.write(&bytes[..part]);
        left -= part;
    }
    hasher.finish()
}

fn bytes(slices: &[Slice]) -> u64 {
    slices.iter().map(|slice| u64::from(slice.len)).sum()
}

/// Every slice lies in its file and in its slot, and no two of them in each other's slot bytes.
fn check(slices: &mut [Slice], files: &[u64], stride: usize) -> Result<(), String> {
    for slice in &*slices {
        let Slice { file, offset, len, at } = *slice;
        let size = *files.get(file as usize).ok_or_else(|| format!("file {file} of {}", files.len()))?;
        if len == 0 {
            return Err(format!("an empty slice at offset {offset} of file {file}"));
        }
        if offset.checked_add(u64::from(len)).is_none_or(|end| end > size) {
            return Err(format!("{len} bytes at offset {offset} of file {file}, which has {size}"));
        }
        if u64::from(at) + u64::from(len) > stride as u64 {
            return Err(format!("{len} bytes at {at} of a slot of {stride}"));
        }
    }
    slices.sort_unstable_by_key(|slice| slice.at);
    let overlap = slices.windows(2).find(|pair| pair[0].at + pair[0].len > pair[1].at);
    match overlap {
        Some(pair) => Err(format!("two slices fill byte {}", pair[1].at)),
        None if slices.is_empty() => Err("no slices".into()),
        None => Ok(()),
    }
}

/// What a checksum covers is one run of bytes in one file, and the slices hold all of it.
fn check_payload(record: &Record) -> Result<(), String> {
    if record.checksum.is_none() {
        return Ok(());
    }
    let apart = |pair: &[Slice]| (pair[0].file, pair[0].offset + u64::from(pair[0].len)) != (pair[1].file, pair[1].offset);
    if record.slices.windows(2).any(apart) {
        return Err("a checksum over slices that are apart in the file".into());
    }
    match u64::from(record.payload) <= bytes(&record.slices) {
        true => Ok(()),
        false => Err(format!("a payload of {} bytes in slices of {}", record.payload, bytes(&record.slices))),
    }
}

/// Sorts into reading order and makes one slice of neighbours in both file and slot: fewer, longer reads.
fn join(slices: &mut Vec<Slice>) {
    slices.sort_unstable_by_key(|slice| (slice.file, slice.offset));
    slices.dedup_by(|next, last| {
        let adjacent = next.file == last.file && next.offset == last.offset + u64::from(last.len) && next.at == last.at + last.len;
        let len = last.len.checked_add(next.len).filter(|_| adjacent);
        last.len = len.unwrap_or(last.len);
        len.is_some()
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{ExpertId, LayerId, Slot};
    use std::sync::{Arc, Mutex};

    /// Offset and length of each read, batch by batch.
    type Asked = Mutex<Vec<Vec<(u64, usize)>>>;

    /// Byte i is `i as u8`; remembers the batches it was asked for.
    #[derive(Debug)]
    struct Counting(u64, Arc<Asked>);

    impl Storage for Counting {
        fn name(&self) -> &str {
            "counting"
        }
        fn len(&self) -> u64 {
            self.0
        }
        fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
            self.1.lock().unwrap().push(reads.iter().map(|read| (read.offset, read.into.len())).collect());
            for read in reads {
                (read.offset..).zip(read.into.iter_mut()).for_each(|(i, byte)| *byte = i as u8);
            }
            Ok(())
        }
    }

    fn slice(file: u32, offset: u64, len: u32, at: u32) -> Slice {
        Slice { file, offset, len, at }
    }

    #[test]
    fn bad_sources_are_refused() {
        let slab = Slab::anonymous(4096, 2).unwrap();
        let check = |layers: Vec<Vec<Vec<Slice>>>, expected: &str| {
            let layers = layers.into_iter().map(|layer| layer.into_iter().map(Record::unchecked).collect()).collect();
            let files: Vec<Box<dyn Storage>> = vec![Box::new(Counting(1000, Default::default()))];
            let error = Store::new(Source { files, layers }, &slab).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} / {expected}");
        };
        check(vec![], "0 layers");
        check(vec![vec![]], "of 0 experts");
        check(vec![vec![vec![slice(0, 0, 8, 0)]], vec![]], "layer 1 has 0 experts and layer 0 has 1");
        check(vec![vec![vec![]]], "layer 0 expert 0: no slices");
        check(vec![vec![vec![slice(1, 0, 8, 0)]]], "file 1 of 1");
        check(vec![vec![vec![slice(0, 0, 0, 0)]]], "an empty slice");
        check(vec![vec![vec![slice(0, 993, 8, 0)]]], "8 bytes at offset 993 of file 0, which has 1000");
        check(vec![vec![vec![slice(0, u64::MAX, 8, 0)]]], "which has 1000");
        check(vec![vec![vec![slice(0, 0, 8, slab.stride_bytes() as u32 - 7)]]], "of a slot of");
        check(vec![vec![vec![slice(0, 0, 8, u32::MAX)]]], "of a slot of");
        check(vec![vec![vec![slice(0, 0, 8, 8), slice(0, 100, 9, 0)]]], "two slices fill byte 8");
    }

    #[test]
    fn a_checksum_covers_the_payload_wherever_it_goes() {
        let slab = Slab::anonymous(4096, 2).unwrap();
        let payload: Vec<u8> = (16..16 + 700u64).map(|i| i as u8).collect();
        let open = |slices: &[Slice], checksum: u64, payload: u32| {
            let record = Record { slices: slices.to_vec(), checksum: Some(checksum), payload };
            let files: Vec<Box<dyn Storage>> = vec![Box::new(Counting(1000, Default::default()))];
            Store::new(Source { files, layers: vec![vec![record]] }, &slab)
        };
        let load = || Load::for_test(Slot(0), ExpertKey { layer: LayerId(0), expert: ExpertId(0) });
        let sum = format::checksum(&payload);
        // Whole with padding, and in three pieces that lie the other way round in the slot.
        for slices in [&[slice(0, 16, 800, 0)][..], &[slice(0, 16, 100, 3000), slice(0, 116, 50, 2000), slice(0, 166, 560, 0)]] {
            assert_eq!(open(slices, sum, 700).unwrap().load(&load(), &slab).unwrap(), bytes(slices));
            let error = open(slices, sum ^ 1, 700).unwrap().load(&load(), &slab).unwrap_err();
            assert!(matches!(error, Error::Checksum { offset: 16, len: 700, .. }), "{error}");
            assert!(error.to_string().contains("flashctl verify"), "{error}");
        }
        let refused = |slices: &[Slice], expected: &str| {
            let error = open(slices, sum, 700).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        refused(&[slice(0, 16, 699, 0)], "a payload of 700 bytes in slices of 699");
        refused(&[slice(0, 16, 350, 0), slice(0, 367, 350, 350)], "apart in the file");
    }

    #[test]
    fn neighbours_are_joined_and_files_batched() {
        let slab = Slab::anonymous(4096, 2).unwrap();
        let asked: [Arc<Asked>; 2] = Default::default();
        let check = |slices: Vec<Slice>, expected: [Vec<Vec<(u64, usize)>>; 2]| {
            let files = asked.each_ref().map(|log| Box::new(Counting(1000, log.clone())) as Box<dyn Storage>);
            let bytes: u64 = slices.iter().map(|slice| u64::from(slice.len)).sum();
            let store = Store::new(Source { files: files.into(), layers: vec![vec![Record::unchecked(slices.clone())]] }, &slab).unwrap();
            let load = Load::for_test(Slot(1), ExpertKey { layer: LayerId(0), expert: ExpertId(0) });
            assert_eq!(store.load(&load, &slab).unwrap(), bytes);
            assert_eq!(asked.each_ref().map(|log| std::mem::take(&mut *log.lock().unwrap())), expected);
            // SAFETY: the load is over and nobody else has the slab.
            let slot = unsafe { slab.slot(Slot(1)).bytes() };
            for Slice { offset, len, at, .. } in slices {
                assert!((0..u64::from(len)).all(|i| slot[at as usize + i as usize] == (offset + i) as u8));
            }
        };
        let none = Vec::new;
        check(vec![slice(0, 10, 5, 0)], [vec![vec![(10, 5)]], none()]);
        check(vec![slice(0, 15, 7, 5), slice(0, 10, 5, 0), slice(0, 22, 1, 12)], [vec![vec![(10, 13)]], none()]);
        check(vec![slice(0, 15, 7, 6), slice(0, 10, 5, 0)], [vec![vec![(10, 5), (15, 7)]], none()]); // apart in the slot
        check(vec![slice(0, 16, 7, 5), slice(0, 10, 5, 0)], [vec![vec![(10, 5), (16, 7)]], none()]); // apart in the file
        check(vec![slice(1, 15, 5, 5), slice(0, 10, 5, 0)], [vec![vec![(10, 5)]], vec![vec![(15, 5)]]]);
    }
}
