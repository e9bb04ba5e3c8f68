//! KV blocks on disk, the second tier: which there are, what is written, what goes. One file a block, named by a key that stands for
//! the model, its kernels and every token up to the block's end (SHA-256, so that nobody finds two prefixes with one key). A thread
//! of its own writes; a few others read, a batch of blocks side by side, because a small file's time is the disk's latency. Nothing that
//! goes wrong here is a request's error: the block is computed instead.
//!
//! A block is written when its prefix is used a second time, or where a request says that it will be; never more a day than
//! the write budget, whose count survives a restart. What was used longest ago makes room; of one prefix the end goes first.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use sha2::{Digest, Sha256};

use super::{BLOCK, record};
use crate::{Bytes, Cleared, DiskCache, DiskReport, Error};

/// Names a block with all that is before it.
pub(crate) type Key = [u8; 32];

/// Blocks that wait to be written, besides the one that is.
const QUEUE: usize = 4;
/// Threads that read.
const READERS: usize = 8;
/// Blocks that are read side by side: at least, at most, and bytes of them between those two.
const BATCH: (usize, usize) = (READERS, 32);
const BATCH_BYTES: usize = 4 << 20;
/// How long others wait for the writer at a time.
const MOMENT: Duration = Duration::from_millis(20);
/// After a write that failed: most likely the disk is full.
const PAUSE: Duration = Duration::from_secs(60);
/// By default an eighth of what is free, and no more than this.
const BUDGET_MAX: Bytes = 16 << 30;
const BUDGET_SHARE: Bytes = 8;
/// A prefix's earlier blocks count as used so much later than the ones behind them, microseconds each.
const DEPTH_MAX: u64 = 1 << 16;
/// The count of what was written today.
const WRITES: &str = "writes";

/// The key of what follows `before`.
pub(crate) fn key(before: &Key, tokens: &[u32; BLOCK]) -> Key {
    let mut hasher = Sha256::new_with_prefix(before);
    tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
    hasher.finalize().into()
}

/// Now, as the time of use of a prefix …
pub(crate) fn used() -> u64 {
    now().as_micros() as u64
}

/// … and of a block in it, those further behind being older.
pub(crate) fn behind(used: u64, depth: usize) -> u64 {
    used + DEPTH_MAX.saturating_sub(depth as u64)
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

fn today() -> u64 {
    now().as_secs() / 86400
}

#[derive(Debug)]
pub(crate) struct Disk {
    dir: PathBuf,
    budget: Bytes,
    daily: Bytes,
    /// What a prefix's first key follows.
    pub(crate) root: Key,
    /// Bytes of each layer in a block.
    layers: Arc<[usize]>,
    readers: Readers,
    entries: HashMap<Key, Entry>,
    order: BTreeSet<(u64, Key)>,
    bytes: Bytes,
    writes: Writes,
    writer: Writer,
    /// What the writer has.
    writing: HashSet<Key>,
    /// No writing until then.
    paused: Option<Instant>,
    counted: Counted,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: Bytes,
    used: u64,
    /// The file does not know `used` yet.
    stale: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    read: u64,
    written: u64,
    bad: u64,
    failed: u64,
    over_budget: u64,
}

/// Bytes written on a day, counted from 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Writes {
    day: u64,
    bytes: Bytes,
}

impl Disk {
    /// What earlier runs have left is found again. `model` names the model and what computes it, `layers` says how many bytes of a block
    /// are each layer's.
    pub(crate) fn open(config: &DiskCache, model: &[u8], layers: Vec<usize>) -> io::Result<Self> {
        let dir = config.dir.clone();
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let _ = fs::remove_file(dir.join(record::PART));
        let mut hasher = Sha256::new_with_prefix(model);
        hasher.update(if cfg!(target_endian = "little") { b"le" } else { b"be" });
        layers.iter().for_each(|bytes| hasher.update((*bytes as u64).to_le_bytes()));
        let layers: Arc<[usize]> = layers.into();
        let mut disk = Self {
            budget: 0,
            daily: config.daily_writes,
            root: hasher.finalize().into(),
            readers: Readers::start(&dir, &layers)?,
            layers,
            entries: HashMap::new(),
            order: BTreeSet::new(),
            bytes: 0,
            writes: read_writes(&dir),
            writer: Writer::start(&dir)?,
            writing: HashSet::new(),
            paused: None,
            counted: Counted::default(),
            dir,
        };
        let found = files(&disk.dir)?;
        disk.budget = config.budget.unwrap_or_else(|| share(free(&disk.dir), found.iter().map(|(_, meta)| meta.len()).sum()));
        for (key, meta) in found {
            let used = meta.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
            disk.insert(key, Entry { bytes: meta.len(), used, stale: false });
        }
        for key in disk.make_room(0) {
            let _ = fs::remove_file(disk.path(&key));
        }
        Ok(disk)
    }

    pub(crate) fn contains(&self, key: &Key) -> bool {
        self.entries.contains_key(key)
    }

    /// Whether it is on its way there.
    pub(crate) fn writes(&self, key: &Key) -> bool {
        self.writing.contains(key)
    }

    /// A block was wanted, wherever it came from.
    pub(crate) fn touch(&mut self, key: Key, used: u64) {
        if let Some(entry) = self.remove(&key) {
            self.insert(key, Entry { used, stale: true, ..entry });
        }
    }

    /// Blocks that one [`Disk::read`] takes at most.
    pub(crate) fn batch(&self) -> usize {
        (BATCH_BYTES / self.payload().max(1)).clamp(BATCH.0, BATCH.1)
    }

    /// Reads blocks side by side and gives `each` the layers' bytes of one after the other, in order, up to the first that is not to be had.
    /// How many those are.
    pub(crate) fn read(&mut self, keys: &[Key], each: &mut dyn FnMut(usize, &[u8])) -> usize {
        let mut good = 0;
        for (key, read) in keys.iter().zip(self.readers.read(keys)) {
            match read {
                Ok(payload) => {
                    each(good, &payload);
                    good += 1;
                }
                Err(error) => {
                    tracing::warn!(%error, "a block of the prefix cache cannot be used; it is computed instead");
                    self.counted.bad += 1;
                    self.remove(key);
                    let _ = fs::remove_file(self.path(key));
                    break;
                }
            }
        }
        self.counted.read += good as u64;
        good
    }

    /// Whether a block may be written now.
    pub(crate) fn takes(&mut self) -> bool {
        self.hear();
        self.paused.take_if(|until| *until <= Instant::now());
        self.paused.is_none() && self.writing.len() < QUEUE
    }

    /// Waits a moment for the writer; false: there is nothing to wait for.
    pub(crate) fn wait(&mut self) -> bool {
        let waits = !self.writing.is_empty();
        if waits {
            self.writer.wait();
            self.hear();
        }
        waits
    }

    /// Whether budgets allow another block. Else `left_out` are counted as such.
    pub(crate) fn affords(&mut self, left_out: usize) -> bool {
        let (bytes, day) = (record::size(&self.layers), today());
        if self.writes.day != day {
            self.writes = Writes { day, bytes: 0 };
        }
        let affords = bytes <= self.budget && self.writes.bytes + bytes <= self.daily;
        self.counted.over_budget += if affords { 0 } else { left_out as u64 };
        affords
    }

    /// Has a block written that [`Disk::affords`] and [`Disk::takes`].
    pub(crate) fn write(&mut self, key: Key, used: u64, payload: Vec<u8>) {
        let bytes = record::size(&self.layers);
        self.writes.bytes += bytes;
        self.writing.insert(key);
        let gone = self.make_room(bytes * self.writing.len() as Bytes);
        self.writer.push(Job { key, used, layers: self.layers.clone(), payload, gone, writes: self.writes });
    }

    /// What the writer has done meanwhile.
    pub(crate) fn hear(&mut self) {
        if self.writing.is_empty() {
            return;
        }
        for (key, used, written) in self.writer.done() {
            self.writing.remove(&key);
            match written {
                Ok(()) => {
                    self.counted.written += 1;
                    self.insert(key, Entry { bytes: record::size(&self.layers), used, stale: false });
                }
                Err(error) => {
                    tracing::warn!(%error, dir = %self.dir.display(), "the prefix cache cannot be written; trying again later");
                    self.counted.failed += 1;
                    self.paused = Some(Instant::now() + PAUSE);
                }
            }
        }
    }

    /// Forgets and deletes everything, other models' blocks too.
    pub(crate) fn clear(&mut self) -> Result<Cleared, Error> {
        self.writer.finish();
        self.hear();
        (self.entries, self.order, self.bytes) = (HashMap::new(), BTreeSet::new(), 0);
        clear_disk_cache(&self.dir)
    }

    /// Bytes that wait to be written, at most, and those of a batch that is read.
    pub(crate) fn buffer_bytes(&self) -> Bytes {
        ((QUEUE + 1 + self.batch()) * self.payload()) as Bytes
    }

    fn payload(&self) -> usize {
        self.layers.iter().sum()
    }

    pub(crate) fn report(&self) -> DiskReport {
        let Counted { read, written, bad, failed, over_budget } = self.counted;
        DiskReport {
            files: self.entries.len(),
            bytes: self.bytes,
            budget_bytes: self.budget,
            written_today_bytes: if self.writes.day == today() { self.writes.bytes } else { 0 },
            daily_bytes: self.daily,
            blocks_read: read,
            blocks_written: written,
            bad_files: bad,
            failed_writes: failed,
            over_budget,
        }
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(name(key))
    }

    fn insert(&mut self, key: Key, entry: Entry) {
        self.remove(&key);
        self.bytes += entry.bytes;
        self.order.insert((entry.used, key));
        self.entries.insert(key, entry);
    }

    fn remove(&mut self, key: &Key) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.order.remove(&(entry.used, *key));
        self.bytes -= entry.bytes;
        Some(entry)
    }

    /// What has to go so that `bytes` more fit.
    fn make_room(&mut self, bytes: Bytes) -> Vec<Key> {
        let mut gone = Vec::new();
        while self.bytes + bytes > self.budget {
            let Some((_, key)) = self.order.first().copied() else { break };
            self.remove(&key);
            gone.push(key);
        }
        gone
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.writer.finish();
        for (key, entry) in self.entries.iter().filter(|(_, entry)| entry.stale) {
            record::touch(&self.path(key), entry.used);
        }
    }
}

/// Deletes every prefix kept in `dir`, whatever model it is of; nothing else there. For when no engine has it open.
pub fn clear_disk_cache(dir: &Path) -> Result<Cleared, Error> {
    let delete = || -> io::Result<Cleared> {
        let mut cleared = Cleared::default();
        for (key, meta) in files(dir)? {
            fs::remove_file(dir.join(name(&key)))?;
            cleared.files += 1;
            cleared.disk_bytes += meta.len();
        }
        Ok(cleared)
    };
    match delete() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Cleared::default()),
        cleared => cleared.map_err(|source| Error::Clear { path: dir.into(), source }),
    }
}

fn name(key: &Key) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).chain([".kv".into()]).collect()
}

/// The blocks in `dir`.
fn files(dir: &Path) -> io::Result<Vec<(Key, fs::Metadata)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(key) = name.to_str().and_then(|name| parse(name.strip_suffix(".kv")?)) else { continue };
        let meta = entry.metadata()?;
        if meta.is_file() {
            found.push((key, meta));
        }
    }
    Ok(found)
}

fn parse(hex: &str) -> Option<Key> {
    let mut key = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(key)
}

fn free(dir: &Path) -> Bytes {
    rustix::fs::statvfs(dir).map_or(0, |disk| disk.f_bavail * disk.f_frsize)
}

/// What blocks may take where nobody says: what they have is not free any more, and must not count against them.
fn share(free: Bytes, ours: Bytes) -> Bytes {
    (free.saturating_add(ours) / BUDGET_SHARE).min(BUDGET_MAX)
}

fn read_writes(dir: &Path) -> Writes {
    let text = fs::read_to_string(dir.join(WRITES)).unwrap_or_default();
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(day)), Some(Ok(bytes))) => Writes { day, bytes },
        _ => Writes::default(),
    }
}

fn save_writes(dir: &Path, writes: Writes) -> io::Result<()> {
    let part = dir.join("writes.part");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
    io::Write::write_all(&mut file, format!("{} {}\n", writes.day, writes.bytes).as_bytes())?;
    fs::rename(part, dir.join(WRITES))
}

/// The thread that writes.
#[derive(Debug)]
struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    busy: bool,
    done: Vec<(Key, u64, io::Result<()>)>,
    end: bool,
}

#[derive(Debug)]
struct Job {
    key: Key,
    used: u64,
    layers: Arc<[usize]>,
    payload: Vec<u8>,
    /// Makes room for it.
    gone: Vec<Key>,
    writes: Writes,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, dir: &Path) {
        loop {
            let mut queue =
                self.moved.wait_while(self.lock(), |queue| queue.jobs.is_empty() && !queue.end).unwrap_or_else(PoisonError::into_inner);
            let Some(job) = queue.jobs.pop_front() else { return };
            queue.busy = true;
            let last = queue.jobs.is_empty();
            drop(queue);
            // Before the block: a count that is too high is the better mistake.
            let counted = if last { save_writes(dir, job.writes) } else { Ok(()) };
            for key in &job.gone {
                let _ = fs::remove_file(dir.join(name(key)));
            }
            let written = counted.and_then(|()| record::write(&dir.join(name(&job.key)), &job.key, job.used, &job.layers, &job.payload));
            let mut queue = self.lock();
            queue.busy = false;
            queue.done.push((job.key, job.used, written));
            drop(queue);
            self.moved.notify_all();
        }
    }
}

impl Writer {
    fn start(dir: &Path) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (theirs, dir) = (shared.clone(), dir.to_owned());
        let thread = thread::Builder::new().name("flash-prefix".into()).spawn(move || theirs.run(&dir))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Until a block is written, or a moment has passed.
    fn wait(&self) {
        drop(self.shared.moved.wait_timeout_while(self.shared.lock(), MOMENT, |queue| queue.done.is_empty()));
    }

    fn push(&self, job: Job) {
        self.shared.lock().jobs.push_back(job);
        self.shared.moved.notify_all();
    }

    fn done(&self) -> Vec<(Key, u64, io::Result<()>)> {
        std::mem::take(&mut self.shared.lock().done)
    }

    /// Waits for what is in the queue.
    fn finish(&self) {
        // A writer that panicked writes nothing more.
        let gone = || self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        let mut queue = self.shared.lock();
        while (queue.busy || !queue.jobs.is_empty()) && !gone() {
            queue = self.shared.moved.wait_timeout(queue, MOMENT).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.lock().end = true;
        self.shared.moved.notify_all();
        if let Some(thread) = self.thread.take() {
            // A writer that panicked has nothing left to say.
            let _ = thread.join();
        }
    }
}

/// Threads that read blocks.
#[derive(Debug)]
struct Readers {
    jobs: mpsc::Sender<(usize, Key)>,
    done: mpsc::Receiver<(usize, io::Result<Vec<u8>>)>,
}

impl Readers {
    /// They end when this is dropped.
    fn start(dir: &Path, layers: &Arc<[usize]>) -> io::Result<Self> {
        let (jobs, inbox) = mpsc::channel::<(usize, Key)>();
        let (outbox, done) = mpsc::channel();
        let inbox = Arc::new(Mutex::new(inbox));
        for _ in 0..READERS {
            let (inbox, outbox, dir, layers) = (inbox.clone(), outbox.clone(), dir.to_owned(), layers.clone());
            let run = move || {
                let next = || inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
                while let Ok((index, key)) = next() {
                    if outbox.send((index, record::read(&dir.join(name(&key)), &key, &layers))).is_err() {
                        return;
                    }
                }
            };
            thread::Builder::new().name("flash-prefix".into()).spawn(run)?;
        }
        Ok(Self { jobs, done })
    }

    /// Of each key in turn, the block.
    fn read(&self, keys: &[Key]) -> Vec<io::Result<Vec<u8>>> {
        for (index, key) in keys.iter().enumerate() {
            self.jobs.send((index, *key)).expect("readers live as long as this");
        }
        let mut read: Vec<_> = keys.iter().map(|_| None).collect();
        for _ in keys {
            let (index, block) = self.done.recv().expect("readers live as long as this");
            read[index] = Some(block);
        }
        read.into_iter().map(|block| block.expect("one answer for each key")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_budget_does_not_shrink_as_it_is_used() {
        assert_eq!(share(80 << 30, 0), 10 << 30);
        assert_eq!(share(70 << 30, 10 << 30), 10 << 30, "the same disk, later");
        assert_eq!(share(1 << 40, 0), BUDGET_MAX);
    }
}
