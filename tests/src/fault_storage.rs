//! Storage that fails, delays and reorders on demand: a wrapper around real files, plugged into the engine's one disk
//! seam. What happens is set through a shared [`Faults`] while the engine runs. Production code knows nothing of it.

use std::{
    fmt, io,
    ops::Range,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use flash_experts::{Pread, Read, Storage};

use crate::{DEADLINE, rng::Rng};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The device says no (EIO).
    Error,
    /// The file ends early: some bytes arrive, then `UnexpectedEof`.
    Short,
    /// The file is gone (ESTALE, as a network file system says it).
    Vanished,
    /// One bit is wrong and nobody says so.
    Flip,
    Panic,
}

#[derive(Clone, Debug)]
pub enum When {
    Always,
    /// The n-th read call from now on, counted from 0; once.
    Nth(u64),
    /// Reads of any of these bytes of the file with this name.
    Touches(String, Range<u64>),
}

/// The switchboard: shared by the storages of one engine and the test.
#[derive(Debug)]
pub struct Faults {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    rules: Vec<(When, Fault)>,
    gate: Gate,
    /// Tickets of the reads that wait at the gate.
    waiting: Vec<u64>,
    tickets: u64,
    reads: u64,
    /// Faults that have struck.
    struck: u64,
}

#[derive(Debug)]
enum Gate {
    Open,
    Held,
    /// Lets waiting reads through one at a time, in random order.
    Shuffled(Rng),
}

/// How long a read waits for company before one of those waiting goes: the delay that the shuffled gate adds.
const SHUFFLE: Duration = Duration::from_micros(300);

impl Faults {
    pub fn new() -> Arc<Self> {
        let state = State { rules: Vec::new(), gate: Gate::Open, waiting: Vec::new(), tickets: 0, reads: 0, struck: 0 };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Opens files for [`flash_engine::Engine::load_from`].
    pub fn opener(self: &Arc<Self>) -> impl Fn(&Path) -> io::Result<Box<dyn Storage>> + use<> {
        let faults = Arc::clone(self);
        move |path| Ok(Box::new(FaultStorage { inner: Pread::open(path)?, faults: Arc::clone(&faults) }))
    }

    pub fn arm(&self, when: When, fault: Fault) {
        let mut state = self.lock();
        let when = match when {
            When::Nth(n) => When::Nth(state.reads + n),
            when => when,
        };
        state.rules.push((when, fault));
    }

    /// Forgets every rule: the disk is well again.
    pub fn heal(&self) {
        self.lock().rules.clear();
    }

    pub fn struck(&self) -> u64 {
        self.lock().struck
    }

    pub fn reads(&self) -> u64 {
        self.lock().reads
    }

    /// From now on every read is delayed, and those that wait together go in random order.
    pub fn shuffle(&self, seed: u64) {
        self.lock().gate = Gate::Shuffled(Rng::new(seed));
    }

    /// Stops every read until the guard is dropped.
    pub fn hold(self: &Arc<Self>) -> Held {
        self.lock().gate = Gate::Held;
        Held(Arc::clone(self))
    }

    /// Waits until `count` reads are held.
    pub fn wait_held(&self, count: usize) {
        let end = Instant::now() + DEADLINE;
        let mut state = self.lock();
        while state.waiting.len() < count {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} reads are held, not {count}", state.waiting.len());
            state = self.changed.wait_timeout(state, left).expect("no panic under the lock").0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under the lock")
    }

    /// Passes the gate; says which fault strikes this read.
    fn admit(&self, name: &str, reads: &[Read<'_>]) -> Option<Fault> {
        let mut state = self.lock();
        let ticket = state.tickets;
        state.tickets += 1;
        state.waiting.push(ticket);
        self.changed.notify_all();
        while state.waiting.contains(&ticket) {
            let State { gate, waiting, .. } = &mut *state;
            match gate {
                Gate::Open => waiting.retain(|&other| other != ticket),
                Gate::Held => state = self.changed.wait(state).expect("no panic under the lock"),
                Gate::Shuffled(rng) => {
                    let chosen = rng.below(waiting.len());
                    let (next, timeout) = self.changed.wait_timeout(state, SHUFFLE).expect("no panic under the lock");
                    state = next;
                    if timeout.timed_out() && state.waiting.contains(&ticket) {
                        let chosen = chosen.min(state.waiting.len() - 1);
                        state.waiting.swap_remove(chosen);
                        self.changed.notify_all();
                    }
                }
            }
        }
        let number = state.reads;
        state.reads += 1;
        let strikes = |when: &When| match when {
            When::Always => true,
            When::Nth(n) => *n == number,
            When::Touches(file, range) => {
                let overlaps = |read: &Read<'_>| read.offset < range.end && range.start < read.offset + read.into.len() as u64;
                name.ends_with(file.as_str()) && reads.iter().any(overlaps)
            }
        };
        let fault = state.rules.iter().find(|(when, _)| strikes(when)).map(|(_, fault)| *fault);
        state.struck += u64::from(fault.is_some());
        fault
    }
}

/// Reads wait as long as this lives.
#[derive(Debug)]
pub struct Held(Arc<Faults>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.lock().gate = Gate::Open;
        self.0.changed.notify_all();
    }
}

struct FaultStorage {
    inner: Pread,
    faults: Arc<Faults>,
}

impl fmt::Debug for FaultStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultStorage({})", self.inner.name())
    }
}

impl Storage for FaultStorage {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
        let fault = self.faults.admit(self.inner.name(), reads);
        match fault {
            Some(Fault::Error) => return Err(rustix::io::Errno::IO.into()),
            Some(Fault::Vanished) => return Err(rustix::io::Errno::STALE.into()),
            Some(Fault::Panic) => panic!("a storage that panics"),
            None | Some(Fault::Short | Fault::Flip) => self.inner.read(reads)?,
        }
        let Some(last) = reads.last_mut() else { return Ok(()) };
        match fault {
            Some(Fault::Short) => {
                let half = last.into.len() / 2;
                last.into[half..].fill(0);
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Some(Fault::Flip) => {
                last.into[0] ^= 0x10;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
