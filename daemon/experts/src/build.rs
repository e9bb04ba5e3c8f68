//! Writing an expert store whole, and reading what it holds: records → `.part` file → fsync → rename. What a record
//! contains is the caller's business, as is the meta text. `flash-engine` converts checkpoints and writes synthetic models
//! with it, and opens stores to find their records.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::fs::OFlags;

use crate::{
    Error, Io, Read, Storage,
    format::{self, Bad, Entry, HEADER, Header, Part},
    store,
};

/// Written bytes between two syncs: dirty pages must not pile up under a memory limit, and progress must be true.
const SYNC_EVERY: u64 = 64 << 20;

/// What a store is to hold; fixes every record's place.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Payload bytes, `[layer][expert]`.
    pub records: Vec<Vec<u32>>,
    /// 4096, or 16384 for Macs.
    pub align: u32,
    /// Kept for the reader, not looked at.
    pub meta: Vec<u8>,
}

/// Writes one store; records may come from several threads, in any order. Dropped before [`StoreWriter::finish`], it
/// leaves the `.part` file behind.
#[derive(Debug)]
pub struct StoreWriter {
    path: PathBuf,
    part: PathBuf,
    file: File,
    header: Header,
    meta: Vec<u8>,
    payloads: Vec<u32>,
    offsets: Vec<u64>,
    state: Mutex<Vec<Written>>,
    unsynced: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    /// Bytes that nobody has written yet.
    left: u32,
    /// Known for records that were written whole.
    checksum: Option<u64>,
}

/// `path` with `.part` after it.
pub fn part_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

/// Bytes that an ordinary user may still write to the file system of this folder or file.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let space = rustix::fs::statvfs(path)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

/// Makes a rename in this folder last.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

impl Plan {
    fn header(&self, path: &Path) -> Result<(Header, Vec<u64>), Error> {
        let planned = Header::plan(&self.records, self.align, self.meta.len() as u64);
        planned.map_err(|bad| bad.in_file(&path.display().to_string()))
    }
}

impl StoreWriter {
    /// Starts `path`.part anew, if the disk has room for all of it.
    pub fn create(path: &Path, plan: Plan) -> Result<Self, Error> {
        let part = part_path(path);
        match fs::remove_file(&part) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &part, source)),
            _ => {}
        }
        let (header, _) = plan.header(path)?;
        let free = free_space(folder_of(path)).map_err(|source| failed("look for space beside", path, source))?;
        match header.len <= free {
            true => Self::plan(path, plan, false),
            false => Err(Error::Space { file: path.display().to_string(), needed: header.len, free }),
        }
    }

    /// Goes on with the `path`.part that another writer of the same plan left, or starts it. Looks for no space, and
    /// believes the caller that records it does not write again are there.
    pub fn resume(path: &Path, plan: Plan) -> Result<Self, Error> {
        Self::plan(path, plan, true)
    }

    fn plan(path: &Path, plan: Plan, resumed: bool) -> Result<Self, Error> {
        let (header, offsets) = plan.header(path)?;
        let part = part_path(path);
        // A link of this name may have come with a model; it is not followed.
        let flags = OFlags::NOFOLLOW.bits() as i32;
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(&part);
        let file = open.map_err(|source| failed("create", &part, source))?;
        // Sparse: padding is zeros without being written, and a conversion in place takes space as it goes.
        file.set_len(header.index.offset).map_err(|source| failed("size", &part, source))?;
        let payloads = plan.records.concat();
        let meta = plan.meta;
        let state = payloads.iter().map(|payload| Written { left: if resumed { 0 } else { *payload }, checksum: None }).collect();
        Ok(Self { path: path.into(), part, file, header, meta, payloads, offsets, state: Mutex::new(state), unsynced: AtomicU64::new(0) })
    }

    /// Takes this text instead of the plan's.
    pub fn set_meta(&mut self, meta: Vec<u8>) -> Result<(), Error> {
        let part = Part { len: meta.len() as u64, ..self.header.meta };
        let header = Header { len: part.offset + part.len, meta: part, ..self.header.clone() };
        header.check(header.len).map_err(|bad| bad.in_file(&self.path.display().to_string()))?;
        (self.header, self.meta) = (header, meta);
        Ok(())
    }

    /// Bytes of the finished file.
    #[expect(clippy::len_without_is_empty, reason = "a store has a header at least")]
    pub fn len(&self) -> u64 {
        self.header.len
    }

    /// Where a record's payload begins.
    ///
    /// # Panics
    /// If the plan has no such record.
    pub fn offset(&self, layer: usize, expert: usize) -> u64 {
        self.offsets[self.index(layer, expert)]
    }

    /// A whole record.
    ///
    /// # Panics
    /// If the plan has no such record, or it has another length.
    pub fn record(&self, layer: usize, expert: usize, bytes: &[u8]) -> Result<(), Error> {
        let index = self.index(layer, expert);
        assert_eq!(bytes.len(), self.payloads[index] as usize, "the plan's length of layer {layer} expert {expert}");
        self.put(index, 0, bytes)?;
        self.lock()[index] = Written { left: 0, checksum: Some(format::checksum(bytes)) };
        Ok(())
    }

    /// Bytes `at..` of a record's payload. Every byte is to be written once; those between tensors are zeros.
    ///
    /// # Panics
    /// If the plan has no such record, or it is shorter.
    pub fn write(&self, layer: usize, expert: usize, at: u32, bytes: &[u8]) -> Result<(), Error> {
        let index = self.index(layer, expert);
        let (end, payload) = (u64::from(at) + bytes.len() as u64, self.payloads[index]);
        assert!(end <= u64::from(payload), "bytes up to {end} of {payload}, layer {layer} expert {expert}");
        self.put(index, at, bytes)?;
        let written = &mut self.lock()[index];
        *written = Written { left: written.left.saturating_sub(bytes.len() as u32), checksum: None };
        Ok(())
    }

    /// What was written so far is on the disk when this returns.
    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync_data().map_err(|source| failed("sync", &self.part, source))?;
        // What is on the disk need not stay in memory: it is the page cache that a memory limit counts.
        store::forget(&self.file, 0, 0);
        Ok(())
    }

    /// Hashes what was written in pieces, adds index, meta and header, and gives the file its name.
    pub fn finish(self) -> Result<(), Error> {
        self.finish_with(&mut |_, _| true).map(|_| ())
    }

    /// As [`StoreWriter::finish`]; `each` hears the records done and their number, and stops it with false: then nothing
    /// is lost, and the result is false.
    pub fn finish_with(mut self, each: &mut dyn FnMut(u64, u64) -> bool) -> Result<bool, Error> {
        self.sync()?;
        let mut entries = Vec::with_capacity(self.payloads.len());
        let mut buffer = Vec::new();
        for (index, written) in self.lock().clone().into_iter().enumerate() {
            let (offset, payload) = (self.offsets[index], self.payloads[index]);
            if written.left > 0 {
                let experts = self.header.experts as usize;
                let reason = format!("lacks {} bytes of layer {} expert {}", written.left, index / experts, index % experts);
                return Err(Bad::of("record", reason).in_file(&self.part.display().to_string()));
            }
            let checksum = match written.checksum {
                Some(checksum) => checksum,
                None => {
                    buffer.resize(payload as usize, 0);
                    self.file.read_exact_at(&mut buffer, offset).map_err(|source| failed("read back", &self.part, source))?;
                    format::checksum(&buffer)
                }
            };
            entries.push(Entry { offset, payload, checksum });
            if !each(index as u64 + 1, self.payloads.len() as u64) {
                return Ok(false);
            }
        }
        let index = format::encode_index(&entries);
        self.header.index.checksum = format::checksum(&index);
        self.header.meta.checksum = format::checksum(&self.meta);
        let put = |bytes: &[u8], at: u64| self.file.write_all_at(bytes, at).map_err(|source| failed("write", &self.part, source));
        put(&index, self.header.index.offset)?;
        put(&self.meta, self.header.meta.offset)?;
        self.file.set_len(self.header.len).map_err(|source| failed("size", &self.part, source))?;
        self.sync()?;
        put(&self.header.encode(), 0)?;
        self.sync()?;
        fs::rename(&self.part, &self.path).map_err(|source| failed("rename", &self.part, source))?;
        sync_folder(folder_of(&self.path)).map_err(|source| failed("sync the folder of", &self.path, source))?;
        Ok(true)
    }

    /// Removes what was written.
    pub fn discard(&self) -> Result<(), Error> {
        fs::remove_file(&self.part).map_err(|source| failed("remove", &self.part, source))
    }

    fn put(&self, index: usize, at: u32, bytes: &[u8]) -> Result<(), Error> {
        let offset = self.offsets[index] + u64::from(at);
        self.file.write_all_at(bytes, offset).map_err(|source| failed("write", &self.part, source))?;
        let len = bytes.len() as u64;
        if self.unsynced.fetch_add(len, Ordering::Relaxed) + len >= SYNC_EVERY {
            self.unsynced.store(0, Ordering::Relaxed);
            self.sync()?;
        }
        Ok(())
    }

    fn index(&self, layer: usize, expert: usize) -> usize {
        let (layers, experts) = (self.header.layers as usize, self.header.experts as usize);
        assert!(layer < layers && expert < experts, "layer {layer} of {layers}, expert {expert} of {experts}");
        layer * experts + expert
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Written>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A store's index and meta, checked, and its records to read one by one.
#[derive(Debug)]
pub struct StoreReader {
    storage: Box<dyn Storage>,
    header: Header,
    meta: Vec<u8>,
    entries: Vec<Entry>,
}

impl StoreReader {
    /// Reads and checks everything but the records.
    pub fn open(path: &Path, io: Io) -> Result<Self, Error> {
        Self::over(store::open(path, io).map_err(|source| failed("open", path, source))?)
    }

    /// The same through a storage that is open already.
    pub fn over(storage: Box<dyn Storage>) -> Result<Self, Error> {
        let name = storage.name().to_owned();
        let bytes = |offset: u64, len: u64| {
            let mut bytes = vec![0; len as usize];
            let read = storage.read(&mut [Read { offset, into: &mut bytes }]);
            read.map(|()| bytes).map_err(|source| failed("read", Path::new(&name), source))
        };
        let refuse = |bad: Bad| bad.in_file(&name);
        let header = Header::decode(&bytes(0, storage.len().min(HEADER as u64))?, storage.len()).map_err(refuse)?;
        // Both lie in the file, whose length is true, and below the format's limits.
        let entries = header.decode_index(&bytes(header.index.offset, header.index.len)?).map_err(refuse)?;
        let meta = bytes(header.meta.offset, header.meta.len)?;
        if format::checksum(&meta) != header.meta.checksum {
            return Err(refuse(Bad::of("meta checksum", "does not match the meta text")));
        }
        Ok(Self { storage, header, meta, entries })
    }

    pub fn meta(&self) -> &[u8] {
        &self.meta
    }

    /// Of the file.
    #[expect(clippy::len_without_is_empty, reason = "a store has a header at least")]
    pub fn len(&self) -> u64 {
        self.header.len
    }

    /// `[layer][expert]`
    pub fn records(&self) -> impl ExactSizeIterator<Item = &[Entry]> {
        self.entries.chunks_exact(self.header.experts as usize)
    }

    /// Reads every record and compares; `each` hears the bytes done and their number and stops it with false, the result
    /// being what was found so far.
    pub fn verify(&self, each: &mut dyn FnMut(u64, u64) -> bool) -> Vec<Error> {
        let (mut bad, mut done) = (Vec::new(), 0);
        let span = |entry: &Entry| u64::from(entry.payload.next_multiple_of(self.header.align));
        let total = self.entries.iter().map(span).sum();
        let mut buffer = Vec::new();
        for (index, entry) in self.entries.iter().enumerate() {
            bad.extend(self.check(index, &mut buffer).err());
            done += span(entry);
            if !each(done, total) {
                break;
            }
        }
        bad
    }

    /// One record against its checksum, its padding against zero.
    fn check(&self, index: usize, buffer: &mut Vec<u8>) -> Result<(), Error> {
        let Entry { offset, payload, checksum } = self.entries[index];
        let experts = self.header.experts as usize;
        let (layer, expert, file) = ((index / experts) as u16, (index % experts) as u16, self.storage.name().to_owned());
        buffer.resize(payload.next_multiple_of(self.header.align) as usize, 0);
        let len = buffer.len() as u64;
        let read = self.storage.read(&mut [Read { offset, into: buffer }]);
        read.map_err(|source| Error::Read { layer, expert, file: file.clone(), offset, len, source })?;
        let (bytes, padding) = buffer.split_at(payload as usize);
        match format::checksum(bytes) == checksum && padding.iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(Error::Checksum { layer, expert, file, offset, len: payload.into() }),
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn failed(attempt: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File { attempt, file: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const SIZES: [[u32; 3]; 2] = [[5000, 4096, 1], [9000, 8192, 64]];

    fn bytes(layer: usize, expert: usize) -> Vec<u8> {
        (0..SIZES[layer][expert]).map(|i| (i as usize * 7 + layer * 31 + expert * 101 + 1) as u8).collect()
    }

    fn plan(align: u32) -> Plan {
        Plan { records: SIZES.map(Vec::from).into(), align, meta: b"{\"a\":1}".to_vec() }
    }

    fn each_record(mut put: impl FnMut(usize, usize, Vec<u8>)) {
        for layer in [1, 0] {
            (0..3).rev().for_each(|expert| put(layer, expert, bytes(layer, expert)));
        }
    }

    fn written(align: u32) -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("experts.flash");
        let writer = StoreWriter::create(&path, plan(align)).unwrap();
        each_record(|layer, expert, bytes| writer.record(layer, expert, &bytes).unwrap());
        writer.finish().unwrap();
        (dir, path)
    }

    fn open(path: &Path) -> Result<StoreReader, Error> {
        StoreReader::open(path, Io::Buffered)
    }

    #[test]
    fn what_was_written_is_read() {
        for align in format::ALIGNS {
            let (dir, path) = written(align);
            let store = open(&path).unwrap();
            assert_eq!((store.meta(), store.len()), (&b"{\"a\":1}"[..], fs::metadata(&path).unwrap().len()));
            let file = fs::read(&path).unwrap();
            for (layer, records) in store.records().enumerate() {
                for (expert, entry) in records.iter().enumerate() {
                    assert!(entry.offset.is_multiple_of(align.into()));
                    let at = entry.offset as usize;
                    assert_eq!(file[at..at + entry.payload as usize], bytes(layer, expert));
                }
            }
            let mut heard = Vec::new();
            let bad = store.verify(&mut |done, total| {
                heard.push((done, total));
                true
            });
            assert!(bad.is_empty() && heard.len() == 6 && heard[5].0 == heard[5].1, "{bad:?} {heard:?}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no .part is left");
        }
    }

    /// Whoever changes a byte of this file changes the format: FORMAT.md says what that takes.
    #[test]
    fn version_1_stays_as_it_is() {
        let (_dir, path) = written(4096);
        let file = fs::read(&path).unwrap();
        assert_eq!((file.len(), format!("{:016x}", format::checksum(&file))), (45_255, "cdc1a796f6c15f24".into()));
    }

    #[test]
    fn pieces_and_interruptions_make_the_same_file() {
        let (_dir, whole) = written(4096);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("experts.flash");
        let pieces = |writer: &StoreWriter, layer: usize| {
            for expert in 0..3 {
                let bytes = bytes(layer, expert);
                for (i, piece) in bytes.chunks(1000).enumerate().collect::<Vec<_>>().into_iter().rev() {
                    writer.write(layer, expert, i as u32 * 1000, piece).unwrap();
                }
            }
        };
        let writer = StoreWriter::create(&path, plan(4096)).unwrap();
        pieces(&writer, 0);
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.contains("lacks 9000 bytes of layer 1 expert 0"), "{error}");
        let mut writer = StoreWriter::resume(&path, Plan { meta: Vec::new(), ..plan(4096) }).unwrap();
        pieces(&writer, 1);
        writer.set_meta(plan(4096).meta).unwrap();
        assert!(!writer.finish_with(&mut |done, _| done < 3).unwrap());
        assert!(!path.exists());
        let mut writer = StoreWriter::resume(&path, plan(4096)).unwrap();
        assert!(writer.set_meta(vec![0; 65 << 20]).unwrap_err().to_string().contains("meta length"));
        writer.finish().unwrap();
        assert!(fs::read(&path).unwrap() == fs::read(&whole).unwrap());
    }

    #[test]
    fn a_stale_part_is_overwritten_and_an_old_store_replaced() {
        let (dir, path) = written(4096);
        fs::write(part_path(&path), vec![0xEE; 100_000]).unwrap();
        let before = fs::read(&path).unwrap();
        let writer = StoreWriter::create(&path, plan(4096)).unwrap();
        each_record(|layer, expert, bytes| writer.record(layer, expert, &bytes).unwrap());
        assert!(fs::read(&path).unwrap() == before, "untouched until the rename");
        writer.finish().unwrap();
        assert!(fs::read(&path).unwrap() == before);
        StoreWriter::create(&path, plan(4096)).unwrap().discard().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_disk_without_room_is_an_error_that_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let records = vec![vec![1 << 30; 1 << 10]; 1 << 10]; // a pebibyte
        let result = StoreWriter::create(&dir.path().join("experts.flash"), Plan { records, align: 4096, meta: Vec::new() });
        assert!(matches!(result, Err(Error::Space { .. })), "{result:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_are_not_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("experts.flash"), dir.path().join("victim"));
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, part_path(&path)).unwrap();
        assert!(matches!(StoreWriter::resume(&path, plan(4096)), Err(Error::File { attempt: "create", .. })));
        drop(StoreWriter::create(&path, plan(4096)).unwrap());
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
    }

    /// Every damaged byte is noticed: by the open, or by the one record that holds it.
    #[test]
    fn every_flipped_bit_is_found() {
        let (_dir, path) = written(4096);
        let good = fs::read(&path).unwrap();
        let entries: Vec<Entry> = open(&path).unwrap().records().flatten().copied().collect();
        for at in (0..good.len()).step_by(97).chain(good.len() - 220..good.len()) {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&path, &bytes).unwrap();
            match open(&path) {
                Err(Error::Store { file, .. }) => assert_eq!(file, path.display().to_string()),
                Err(other) => panic!("byte {at}: {other}"),
                Ok(store) => {
                    let bad = store.verify(&mut |_, _| true);
                    let [Error::Checksum { layer, expert, offset, .. }] = &bad[..] else { panic!("byte {at}: {bad:?}") };
                    let entry = entries[usize::from(layer * 3 + expert)];
                    let end = entry.offset + u64::from(entry.payload.next_multiple_of(4096));
                    assert!(*offset == entry.offset && (entry.offset..end).contains(&(at as u64)), "byte {at}: {bad:?}");
                }
            }
        }
        for len in [0, 1, 4095, 4096, 20_000, good.len() - 1] {
            fs::write(&path, &good[..len]).unwrap();
            assert!(matches!(open(&path), Err(Error::Store { .. })), "cut to {len}");
        }
    }
}
