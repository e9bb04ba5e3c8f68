//! Which way of reading is the fastest for this file, by a short trial. Decides nothing for good and remembers nothing;
//! the engine asks it when a model is loaded with `auto`, the doctor when it reports.

use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use super::{
    open, os,
    storage::{Io, Read, Storage},
};

/// Of each candidate; four of them stay below 0.3 s but for a very slow disk's last read.
const TRIAL: Duration = Duration::from_millis(65);
/// How much faster than direct reads another way must be. Reads through the page cache must be worth the memory they take from
/// others: in a group with a limit the kernel reclaims at every read, which looks like pressure and costs the slab its slots.
/// Besides, a disk's speed may change by half within the trial.
const MARGINS: [(Io, f64); 2] = [(Io::Uring, 1.2), (Io::Buffered, 2.0)];

/// What a trial found.
#[derive(Debug)]
pub struct Measured {
    pub best: Io,
    /// Bytes per second of each candidate, or why it cannot be used.
    pub tried: Vec<(Io, Result<f64, String>)>,
}

/// Reads of these records, each a batch of spans (offset, length) of the file, in random order by `threads` threads, in
/// each way.
pub fn measure(path: &Path, records: &[Vec<(u64, u32)>], threads: usize) -> Measured {
    let kinds = [Io::Direct, Io::Uring, Io::Buffered, Io::Mmap];
    let tried: Vec<_> = kinds.map(|io| (io, trial(path, io, records, threads.max(1)).map_err(|error| error.to_string()))).into();
    let speed = |kind: Io| tried.iter().find(|(io, _)| *io == kind).and_then(|(_, result)| result.as_ref().ok()).copied();
    let direct = speed(Io::Direct).unwrap_or(0.0);
    let fallback = (if direct > 0.0 { Io::Direct } else { Io::Buffered }, direct);
    let faster = |best: (Io, f64), (kind, margin): (Io, f64)| {
        let worth = speed(kind).map_or(0.0, |speed| speed / margin);
        if worth > best.1 { (kind, worth) } else { best }
    };
    let (best, _) = MARGINS.into_iter().fold(fallback, faster);
    Measured { best, tried }
}

fn trial(path: &Path, io: Io, records: &[Vec<(u64, u32)>], threads: usize) -> std::io::Result<f64> {
    let storage = open(path, io)?;
    // What earlier reads left in memory would be measured instead of the disk.
    let cached = matches!(io, Io::Buffered | Io::Mmap).then(|| File::open(path)).transpose()?;
    let results: Vec<_> = std::thread::scope(|scope| {
        let run = |seed: usize| reader(&*storage, cached.as_ref(), records, seed);
        let started: Vec<_> = (0..threads).map(|seed| scope.spawn(move || run(seed))).collect();
        started.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the trial panicked")))).collect()
    });
    let (mut bytes, mut seconds) = (0, 0.0);
    for result in results {
        let (read, time) = result?;
        bytes += read;
        seconds += time.as_secs_f64();
    }
    Ok(bytes as f64 * threads as f64 / f64::max(seconds, 1e-9))
}

/// One thread's bytes, and the time it spent in reads.
fn reader(storage: &dyn Storage, cached: Option<&File>, records: &[Vec<(u64, u32)>], seed: usize) -> std::io::Result<(u64, Duration)> {
    let bytes = |record: &Vec<(u64, u32)>| record.iter().map(|span| span.1 as usize).sum::<usize>();
    let mut memory = vec![0; records.iter().map(bytes).max().unwrap_or(0) + os::ALIGN];
    let start = memory.as_ptr().addr().wrapping_neg() % os::ALIGN;
    let (begin, mut state, mut total, mut time) = (Instant::now(), seed as u64, 0, Duration::ZERO);
    while begin.elapsed() < TRIAL && !records.is_empty() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let record = &records[((mixed ^ (mixed >> 32)) % records.len() as u64) as usize];
        let (mut reads, mut rest) = (Vec::with_capacity(record.len()), &mut memory[start..]);
        for &(offset, len) in record {
            if let Some(file) = cached {
                os::forget(file, offset, len.into());
            }
            let (into, after) = rest.split_at_mut(len as usize);
            reads.push(Read { offset, into });
            rest = after;
        }
        let reading = Instant::now();
        storage.read(&mut reads)?;
        time += reading.elapsed();
        total += bytes(record) as u64;
    }
    Ok((total, time))
}
