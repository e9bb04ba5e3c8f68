//! Packing a checkpoint in its own place: file by file the experts move into the store, and the file is replaced by one
//! without them. A journal says what moves where; it is written before anything else and removed after everything else, and
//! while it is there the model cannot be loaded. The work is a list of steps, each of which may be stopped at any point and
//! done again: what a step finds on the disk tells it what is left to do.

use std::{
    collections::HashSet,
    fs::{self, File},
    hash::Hasher,
    io::{self, Write},
    path::{Path, PathBuf},
};

use flash_experts::{Read, StoreWriter, free_space, part_path, sync_folder};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use twox_hash::XxHash3_64;

use super::{ALIGN, Layout, Piece, Source, WRITING, experts, strip::Rest};
use crate::{
    Bytes, Error, Io, Progress, Tell,
    model::{
        families::Model,
        packed::{JOURNAL, LayerMeta, Meta, STORE, SourceMeta},
    },
};

const INDEX: &str = "model.safetensors.index.json";

#[derive(Debug, Deserialize, Serialize)]
struct Journal {
    layers: Vec<LayerMeta>,
    experts: usize,
    align: u32,
    files: Vec<Moving>,
}

/// A weight file that has experts.
#[derive(Debug, Deserialize, Serialize)]
struct Moving {
    file: String,
    /// Before and after; they differ, and so tell whether the file has been replaced.
    whole: u64,
    stripped: u64,
    pieces: Vec<Piece>,
    /// Known when the pieces are in the store, synced and read back.
    copied: Option<SourceMeta>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    /// A file's experts into the store.
    Copy(usize),
    /// The file without them takes its place.
    Strip(usize),
    /// Index, meta, header; the store gets its name.
    Finish,
    /// The checkpoint's index forgets the tensors that are gone.
    Index,
    /// The journal goes.
    Close,
}

/// A conversion at work.
struct Work<'a> {
    dir: &'a Path,
    journal: Journal,
    /// Bytes of all pieces, and of those copied.
    total: Bytes,
    done: Bytes,
}

/// Begins, or goes on with what was interrupted.
pub(super) fn run(dir: &Path, tell: Tell<'_>) -> Result<(), Error> {
    let mut work = match Work::resume(dir)? {
        Some(work) => work,
        None => Work::begin(dir)?,
    };
    for step in work.steps() {
        work.perform(step, tell).map_err(|error| work.failed(error))?;
    }
    Ok(())
}

impl<'a> Work<'a> {
    /// Plans, looks for space, and writes the journal.
    fn begin(dir: &'a Path) -> Result<Self, Error> {
        let model = Model::open(dir)?;
        let Layout { layers, experts, pieces } = Layout::of(&model)?;
        let mut files = Vec::new();
        for (path, pieces) in model.weights.files().iter().zip(pieces).filter(|(_, pieces)| !pieces.is_empty()) {
            let whole = plain(path)?;
            let stripped = Rest::of(path, gone(&pieces))?.len();
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.push(Moving { file, whole, stripped, pieces, copied: None });
        }
        if dir.join(INDEX).exists() {
            plain(&dir.join(INDEX))?;
        }
        let work = Self::over(dir, Journal { layers, experts, align: ALIGN, files });
        let store = work.store();
        remove(&part_path(&store))?;
        // The store grows by a file's experts before the file shrinks by them; what it has beyond them is padding and index.
        let largest = work.journal.files.iter().map(|moving| moving.whole).max().unwrap_or(0);
        let beyond: Bytes = work.journal.layers.iter().map(|layer| Bytes::from(layer.payload().next_multiple_of(ALIGN))).sum();
        let needed = largest + (beyond * experts as Bytes).saturating_sub(work.total) + (1 << 20);
        let free = free_space(dir).map_err(|source| Error::Read { path: dir.into(), source })?;
        if free < needed {
            let file = store.display().to_string();
            return Err(super::experts(flash_experts::Error::Space { file, needed, free }));
        }
        work.save()?;
        Ok(work)
    }

    fn resume(dir: &'a Path) -> Result<Option<Self>, Error> {
        let path = dir.join(JOURNAL);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| Error::Read { path: path.clone(), source })?,
        };
        let bad = |reason: String| Error::File { path: path.clone(), reason };
        let journal: Journal = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        if !journal.sound() {
            return Err(bad("was not written by this program; it came with the model or is damaged".into()));
        }
        Ok(Some(Self::over(dir, journal)))
    }

    fn over(dir: &'a Path, journal: Journal) -> Self {
        let total = journal.files.iter().map(Moving::bytes).sum();
        let done = journal.files.iter().filter(|moving| moving.copied.is_some()).map(Moving::bytes).sum();
        Self { dir, journal, total, done }
    }

    fn steps(&self) -> Vec<Step> {
        let files = (0..self.journal.files.len()).flat_map(|file| [Step::Copy(file), Step::Strip(file)]);
        files.chain([Step::Finish, Step::Index, Step::Close]).collect()
    }

    fn perform(&mut self, step: Step, tell: Tell<'_>) -> Result<(), Error> {
        match step {
            Step::Copy(file) if self.journal.files[file].copied.is_none() => self.copy(file, tell),
            Step::Copy(_) => Ok(()),
            Step::Strip(file) => self.strip(file),
            Step::Finish if self.store().exists() => Ok(()),
            Step::Finish => self.finish(tell),
            Step::Index => self.index(),
            Step::Close => self.close(),
        }
    }

    /// What to say of a step that failed or was stopped; if no file has been replaced yet, everything is as before.
    fn failed(&self, error: Error) -> Error {
        let whole = |moving: &Moving| plain(&self.dir.join(&moving.file)).is_ok_and(|len| len == moving.whole);
        if self.journal.files.iter().all(whole) {
            let undo = || {
                remove(&part_path(&self.store()))?;
                self.close()
            };
            return undo().err().unwrap_or(error);
        }
        let reason = "stopped half-way: some weight files have given their experts to the store already, and the model \
                      cannot be loaded; run `flashctl convert --in-place` again to finish";
        match error {
            Error::Cancelled => Error::Unsupported { path: self.dir.into(), reason: reason.into() },
            error => error,
        }
    }

    fn close(&self) -> Result<(), Error> {
        let journal = self.dir.join(JOURNAL);
        remove(&part_path(&journal))?;
        remove(&journal)?;
        self.sync()
    }

    /// Copies, syncs, reads back from the disk, and notes the checksum; only then may the file be replaced.
    fn copy(&mut self, file: usize, tell: Tell<'_>) -> Result<(), Error> {
        let writer = self.writer()?;
        let moving = &self.journal.files[file];
        let path = self.dir.join(&moving.file);
        if plain(&path)? != moving.whole {
            return Err(Error::File {
                path,
                reason: "has changed since its conversion began; restore it and run the conversion again".into(),
            });
        }
        let (mut source, mut buffer) = (Source::open(&path)?, Vec::new());
        for &Piece(layer, expert, at, offset, len) in &moving.pieces {
            buffer.resize(len as usize, 0);
            source.read(&mut [Read { offset, into: &mut buffer }])?;
            writer.write(layer, expert, at, &buffer).map_err(experts)?;
            self.done += Bytes::from(len);
            if !tell(Progress { stage: WRITING, done: self.done, total: self.total }) {
                return Err(Error::Cancelled);
            }
        }
        writer.sync().map_err(experts)?;
        let part = part_path(&self.store());
        let store = flash_experts::open(&part, Io::Auto).map_err(|source| Error::Read { path: part.clone(), source })?;
        let mut hasher = XxHash3_64::new();
        for &Piece(layer, expert, at, _, len) in &moving.pieces {
            buffer.resize(len as usize, 0);
            let read = store.read(&mut [Read { offset: writer.offset(layer, expert) + u64::from(at), into: &mut buffer }]);
            read.map_err(|source| Error::Read { path: part.clone(), source })?;
            hasher.write(&buffer);
        }
        let copied = source.meta();
        if format!("{:016x}", hasher.finish()) != copied.xxh3 {
            let reason = format!("what was read back is not what was written of {}; check the disk", moving.file);
            return Err(Error::File { path: part, reason });
        }
        self.journal.files[file].copied = Some(copied);
        self.save()
    }

    fn strip(&self, file: usize) -> Result<(), Error> {
        let moving = &self.journal.files[file];
        let path = self.dir.join(&moving.file);
        let part = part_path(&path);
        // With the store complete every file has been replaced, and those without tensors may be gone.
        if self.store().exists() || plain(&path)? == moving.stripped {
            return remove(&part);
        }
        if plain(&path)? != moving.whole || moving.copied.is_none() {
            return Err(Error::File {
                path,
                reason: "has changed since its conversion began; restore it and run the conversion again".into(),
            });
        }
        let rest = Rest::of(&path, gone(&moving.pieces))?;
        remove(&part)?;
        let fail = |source| Error::Read { path: path.clone(), source };
        rest.write(&path, &part).map_err(fail)?;
        fs::rename(&part, &path).map_err(fail)?;
        self.sync()
    }

    fn finish(&self, tell: Tell<'_>) -> Result<(), Error> {
        let mut go_on = |done, total| tell(Progress { stage: "hashing experts", done, total });
        match self.writer()?.finish_with(&mut go_on).map_err(experts)? {
            true => Ok(()),
            false => Err(Error::Cancelled),
        }
    }

    /// Files that have no tensor left and are listed for none go as well.
    fn index(&self) -> Result<(), Error> {
        let path = self.dir.join(INDEX);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(|source| Error::Read { path: path.clone(), source })?,
        };
        let mut index: Value =
            serde_json::from_slice(&bytes).map_err(|error| Error::File { path: path.clone(), reason: error.to_string() })?;
        let mut empty = Vec::new();
        for moving in &self.journal.files {
            let file = self.dir.join(&moving.file);
            if !file.exists() {
                continue;
            }
            let left: HashSet<String> = Rest::of(&file, |_| false)?.tensors.into_iter().collect();
            if let Some(map) = index["weight_map"].as_object_mut() {
                map.retain(|tensor, shard| *shard != moving.file || left.contains(tensor));
                if map.values().all(|shard| *shard != moving.file) {
                    empty.push(file);
                }
            }
        }
        let text = serde_json::to_vec_pretty(&index).expect("it was JSON");
        replace(&path, &text)?;
        self.sync()?;
        empty.iter().try_for_each(|file| remove(file))
    }

    /// Of the plan as it was made, whatever this program's defaults are by now.
    fn writer(&self) -> Result<StoreWriter, Error> {
        let Journal { layers, experts: count, align, files } = &self.journal;
        let source = files.iter().filter_map(|moving| moving.copied.clone()).collect();
        let meta = Meta { layers: layers.clone(), source }.to_bytes();
        let records = layers.iter().map(|layer| vec![layer.payload(); *count]).collect();
        StoreWriter::resume(&self.store(), flash_experts::Plan { records, align: *align, meta }).map_err(experts)
    }

    fn store(&self) -> PathBuf {
        self.dir.join(STORE)
    }

    fn save(&self) -> Result<(), Error> {
        let text = serde_json::to_vec(&self.journal).expect("plain data with string keys");
        replace(&self.dir.join(JOURNAL), &text)?;
        self.sync()
    }

    fn sync(&self) -> Result<(), Error> {
        sync_folder(self.dir).map_err(|source| Error::Read { path: self.dir.into(), source })
    }
}

impl Journal {
    /// A journal may come with a download: it must not lead out of the folder, nor out of a record.
    fn sound(&self) -> bool {
        let inside = |&Piece(layer, expert, at, _, len): &Piece| {
            let payload = self.layers.get(layer).map_or(0, LayerMeta::payload);
            expert < self.experts && u64::from(at) + u64::from(len) <= u64::from(payload)
        };
        let named = |file: &str| Path::new(file).file_name().is_some_and(|name| name == file) && file.ends_with(".safetensors");
        self.layers.iter().all(LayerMeta::sound) && self.files.iter().all(|moving| named(&moving.file) && moving.pieces.iter().all(inside))
    }
}

impl Moving {
    fn bytes(&self) -> Bytes {
        self.pieces.iter().map(|piece| Bytes::from(piece.4)).sum()
    }
}

/// Whether a tensor that begins at some byte of a file is made of these pieces.
fn gone(pieces: &[Piece]) -> impl Fn(u64) -> bool + use<> {
    let begins: HashSet<u64> = pieces.iter().map(|piece| piece.3).collect();
    move |offset| begins.contains(&offset)
}

/// The length of a file that can be replaced; a link would be replaced and what it points to would stay.
fn plain(path: &Path) -> Result<u64, Error> {
    let meta = fs::symlink_metadata(path).map_err(|source| Error::Read { path: path.into(), source })?;
    match meta.is_file() {
        true => Ok(meta.len()),
        false => {
            let reason = "is a link, so packing in place would free nothing; run `flashctl convert` without --in-place";
            Err(Error::Unsupported { path: path.into(), reason: reason.into() })
        }
    }
}

/// A file is old or new, never half.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let part = part_path(path);
    remove(&part)?;
    let write = || {
        // New: a link of this name, which may have come with the model, is not followed.
        let mut file = File::create_new(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().map_err(|source| Error::Read { path: path.into(), source })
}

/// If it is there.
fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Read { path: path.into(), source }),
        _ => Ok(()),
    }
}

/// For tests: begins and does the first `count` steps, then leaves everything as it lies; the number of all steps.
#[cfg(test)]
pub(super) fn interrupted(dir: &Path, count: usize) -> usize {
    let dir = &dir.canonicalize().expect("a folder");
    let mut work = Work::begin(dir).expect("a checkpoint");
    let steps = work.steps();
    for step in steps.iter().take(count) {
        work.perform(*step, &mut |_| true).expect("a step");
    }
    steps.len()
}
