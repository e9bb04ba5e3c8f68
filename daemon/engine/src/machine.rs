//! What this machine's memory and disk give, measured: the figures that bounds are computed from. Not what the engine reaches
//! and nothing that it decides by; `bench.rs` asks in the same run in which it measures the engine.

use std::{
    hint::black_box,
    io,
    path::PathBuf,
    sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use flash_experts::{Read, Record, Storage};

use crate::{
    Bytes, Error, Io,
    backend::cpu::pin,
    memory::available,
    model::{
        families::{FfnSpec, Model},
        weights::Span,
    },
};

/// Far beyond any cache.
const BUFFER: Bytes = 512 << 20;
const BUFFER_MIN: Bytes = 256 << 20;
const ROUNDS: usize = 3;
/// Of random reads: long enough that a burst the device can buffer does not decide.
const READING: Duration = Duration::from_secs(1);
/// Of memory and of file offset, for reads past the page cache.
const PAGE: usize = 4096;

/// Bytes per second that `threads` threads, pinned to these CPUs, read from memory together, the best of three rounds. Takes 512
/// MiB meanwhile, or a sixteenth of what is `left` where that is less.
pub(crate) fn memory_bandwidth(threads: usize, cpus: &[usize], left: Option<Bytes>) -> f64 {
    let left = left.into_iter().chain(available()).min().unwrap_or(BUFFER);
    let words = (BUFFER.min(left / 16).max(BUFFER_MIN) / 8) as usize / threads.max(1);
    let barrier = Barrier::new(threads.max(1));
    let worker = |index: usize| {
        pin(cpus.get(index).map_or(cpus, std::slice::from_ref));
        // Touched by the thread that reads it.
        let part = vec![1u64; words];
        let round = |_| {
            barrier.wait();
            let start = Instant::now();
            black_box(sum(black_box(&part)));
            start.elapsed().as_secs_f64()
        };
        (0..ROUNDS).map(round).collect::<Vec<f64>>()
    };
    let rounds: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..threads.max(1)).map(|index| scope.spawn(move || worker(index))).collect();
        started.into_iter().map(|thread| thread.join().expect("summing does not panic")).collect()
    });
    let slowest = |round: usize| rounds.iter().map(|times| times[round]).fold(0.0, f64::max);
    let best = (0..ROUNDS).map(slowest).fold(f64::INFINITY, f64::min);
    (rounds.len() * words * 8) as f64 / best.max(1e-9)
}

/// In lanes of their own, which become vectors.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in words.chunks_exact(lanes.len()) {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.into_iter().fold(0, u64::wrapping_add)
}

/// Bytes that this process has had fetched from disks so far, read-ahead included and what the page cache had left out;
/// `None` where the system does not say.
pub(crate) fn fetched() -> Option<Bytes> {
    fetched_in(&std::fs::read_to_string("/proc/self/io").ok()?)
}

fn fetched_in(text: &str) -> Option<Bytes> {
    text.lines().find_map(|line| line.strip_prefix("read_bytes:"))?.trim().parse().ok()
}

/// Where one expert's bytes lie: what is read together from each file.
type Pieces = Vec<(u32, Vec<(u64, u32)>)>;

/// The experts of a checkpoint as the loaders read them.
#[derive(Debug)]
pub(crate) struct Disk {
    files: Vec<PathBuf>,
    experts: Vec<Pieces>,
    /// The next one to read, in an order that mixes them.
    next: AtomicUsize,
}

impl Disk {
    pub(crate) fn new(model: &Model) -> Self {
        let mut packed = model.packed.iter().flat_map(|packed| &packed.records);
        let mut experts = Vec::new();
        for layer in &model.layers {
            let FfnSpec::Moe { experts: of_layer, .. } = &layer.ffn else { continue };
            let entries = packed.next();
            for (index, ffn) in of_layer.iter().enumerate() {
                let matrices = ffn.matrices();
                experts.push(match entries {
                    Some(entries) => {
                        let slice = Record::stored(matrices[0].weight.file, &entries[index]).slices[0];
                        vec![(slice.file, vec![(slice.offset, slice.len)])]
                    }
                    None => {
                        let spans = matrices.into_iter().flat_map(|matrix| [Some(matrix.weight), matrix.scales, matrix.biases]);
                        pieces(spans.flatten().collect())
                    }
                });
            }
        }
        Self { files: model.weights.files().to_vec(), experts, next: AtomicUsize::new(0) }
    }

    /// Bytes per second of whole experts in random order, read by `readers` threads for about a second. What the page cache
    /// holds is dropped first, where reads go through it.
    pub(crate) fn bandwidth(&self, io: Io, readers: usize) -> Result<f64, Error> {
        self.forget();
        let open = |path: &PathBuf| flash_experts::open(path, io).map_err(|source| Error::Read { path: path.clone(), source });
        let storages = self.files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let start = Instant::now();
        let read = self.sweep(&storages, readers).map_err(|source| Error::Read { path: self.files[0].clone(), source })?;
        Ok(read as f64 / start.elapsed().as_secs_f64().max(1e-9))
    }

    /// Bytes read. No expert is read twice, and another sweep goes on where this one ended: the second time they might come from
    /// the page cache, or from a cache below it, and a small model's disk would seem twice as fast.
    fn sweep(&self, storages: &[Box<dyn Storage>], readers: usize) -> io::Result<Bytes> {
        let mut order: Vec<usize> = (0..self.experts.len()).collect();
        order.sort_by_key(|expert| (*expert as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (order, end) = (&order, self.next.load(Relaxed) + self.experts.len());
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..readers.max(1)).map(|_| scope.spawn(move || self.read(storages, order, end))).collect();
            started.into_iter().try_fold(0, |bytes, thread| Ok(bytes + thread.join().expect("reading does not panic")?))
        })
    }

    /// Drops the weight files from the page cache; where the system has no way to, they stay.
    pub(crate) fn forget(&self) {
        #[cfg(target_os = "linux")]
        for path in &self.files {
            if let Ok(file) = std::fs::File::open(path) {
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            }
        }
    }

    /// One reader: takes experts until the time is over or none is left.
    fn read(&self, storages: &[Box<dyn Storage>], order: &[usize], end: usize) -> io::Result<Bytes> {
        let bytes = |pieces: &Pieces| pieces.iter().flat_map(|(_, spans)| spans).map(|span| span.1 as usize).sum::<usize>();
        let mut memory = vec![0; self.experts.iter().map(bytes).max().unwrap_or(0) + PAGE];
        let aligned = memory.as_ptr().addr().wrapping_neg() % PAGE;
        let (start, mut total) = (Instant::now(), 0);
        while start.elapsed() < READING {
            let Ok(next) = self.next.try_update(Relaxed, Relaxed, |next| (next < end).then_some(next + 1)) else { break };
            let expert = &self.experts[order[next % order.len()]];
            let mut rest = &mut memory[aligned..];
            for (file, spans) in expert {
                let mut reads = Vec::with_capacity(spans.len());
                for &(offset, len) in spans {
                    let (into, after) = rest.split_at_mut(len as usize);
                    reads.push(Read { offset, into });
                    rest = after;
                }
                storages[*file as usize].read(&mut reads)?;
            }
            total += bytes(expert) as Bytes;
        }
        Ok(total)
    }
}

fn pieces(mut spans: Vec<Span>) -> Pieces {
    spans.sort_unstable_by_key(|span| (span.file, span.offset));
    let of_file = |spans: &[Span]| (spans[0].file, spans.iter().map(|span| (span.offset, span.len as u32)).collect());
    spans.chunk_by(|a, b| a.file == b.file).map(of_file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::cpu::allowed_cpus,
        synth::{self, Synth},
    };

    #[test]
    fn every_word_is_summed() {
        let words: Vec<u64> = (0..64 * 32).collect();
        assert_eq!(sum(&words), words.iter().sum::<u64>());
        assert!(memory_bandwidth(2, &allowed_cpus(), Some(BUFFER_MIN)).is_finite());
    }

    #[test]
    fn no_expert_is_read_twice() {
        let dir = tempfile::tempdir().unwrap();
        let synth = Synth { shape: "tiny".into(), layers: None, context: None, seed: 1, routing: synth::Routing::Uniform };
        synth::write(dir.path(), &synth, &mut |_| true).unwrap();
        let disk = Disk::new(&Model::open(dir.path()).unwrap());
        let storages: Vec<_> = disk.files.iter().map(|path| flash_experts::open(path, Io::Buffered).unwrap()).collect();
        // 16 experts of two pages each; three readers, who would go on for a second.
        assert_eq!(disk.sweep(&storages, 3).unwrap(), 16 * 8192);
        assert!(disk.bandwidth(Io::Buffered, 3).unwrap() > 0.0);
    }

    #[test]
    fn what_disks_gave_is_told_from_what_was_asked_for() {
        let check = |text: &str, expected: Option<Bytes>| assert_eq!(fetched_in(text), expected, "{text}");
        check("rchar: 900\nread_bytes: 4096\nwrite_bytes: 7\n", Some(4096));
        check("rchar: 900\n", None);
        check("read_bytes: many\n", None);
    }

    #[test]
    fn an_expert_is_read_file_by_file() {
        let span = |file, offset, len| Span { file, offset, len };
        let expected: Pieces = vec![(0, vec![(5, 1), (90, 2)]), (1, vec![(7, 3)])];
        assert_eq!(pieces(vec![span(0, 90, 2), span(1, 7, 3), span(0, 5, 1)]), expected);
    }
}
