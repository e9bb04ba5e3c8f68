//! Persistent pinned workers and the fork-join around them. The engine thread is worker 0.
//!
//! A job is a counted list of tasks that workers take from an atomic counter, so which thread runs a task never
//! changes a result. Waiting spins briefly and then blocks: pure spinning collapses when another process wants the
//! core. A worker that the scheduler holds back is not waited for: when the tasks are gone the job closes, and
//! only workers that entered it are awaited.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::JoinHandle,
};

/// Rounds of `spin_loop` before a thread blocks; about 20 µs, more than the gap between two jobs of a decode step.
const SPINS: u32 = 4000;

/// Rows of element-wise work that a task takes: enough to outweigh the hand-over.
pub(crate) const TASK_ROWS: usize = 8;

/// Fork-join over a fixed set of threads.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// What the caller might run on before it was pinned.
    unpinned: Vec<usize>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Epoch << 16 | open flag << 15 | workers inside. Raising the epoch opens a job, clearing the flag closes it.
    state: AtomicU64,
    /// Two words of a `&dyn Fn(usize)`; valid while the job is open or a worker is inside it.
    job: [AtomicUsize; 2],
    tasks: AtomicUsize,
    next: AtomicUsize,
    /// Threads blocked on `wake`; checked so that a busy pool makes no system call.
    sleeping: AtomicUsize,
    stop: AtomicBool,
    /// `panic` holds one: looked at after every job, without its lock.
    panicked: AtomicBool,
    /// Also what the condition variables sleep under.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// A job opened, or the pool ends.
    wake: Condvar,
    /// The last worker left a closed job.
    left: Condvar,
}

const OPEN: u64 = 1 << 15;
const INSIDE: u64 = OPEN - 1;
type Job<'a> = &'a (dyn Fn(usize) + Sync);

impl Pool {
    /// `threads` ≥ 1 workers, the caller included; the caller is pinned too.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let cpus = allowed_cpus();
        let mut pool = Self { shared: shared.clone(), threads: Vec::new(), unpinned: cpus.clone() };
        for index in 1..threads.max(1) {
            let shared = shared.clone();
            let cpu = cpus.get(index).copied();
            let thread = std::thread::Builder::new().name(format!("flash-worker-{index}"));
            pool.threads.push(thread.spawn(move || {
                pin(cpu.as_slice());
                shared.work();
            })?);
        }
        if threads > 1 {
            pin(&cpus[..cpus.len().min(1)]);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `f(0)`, …, `f(tasks - 1)`, each once, and returns when all are done. A panic in a task resumes here.
    pub(crate) fn run(&self, tasks: usize, f: Job<'_>) {
        if self.threads.is_empty() || tasks <= 1 {
            return (0..tasks).for_each(f);
        }
        let shared = &*self.shared;
        // SAFETY: only the representation is taken; `enter` rebuilds the reference while the job is open or occupied,
        // and this function does not return before the job is closed and empty.
        let [data, vtable]: [usize; 2] = unsafe { std::mem::transmute(f) };
        shared.job[0].store(data, Relaxed);
        shared.job[1].store(vtable, Relaxed);
        shared.tasks.store(tasks, Relaxed);
        shared.next.store(0, Relaxed);
        let epoch = shared.state.load(Relaxed) >> 16;
        shared.state.store((epoch + 1) << 16 | OPEN, SeqCst);
        if shared.sleeping.load(SeqCst) > 0 {
            drop(shared.lock());
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take(f)));
        shared.state.fetch_and(!OPEN, SeqCst);
        shared.until(|| shared.state.load(SeqCst) & INSIDE == 0, &shared.left);
        if own.is_err() || shared.panicked.load(Relaxed) {
            shared.panicked.store(false, Relaxed);
            let theirs = shared.lock().take();
            resume_unwind(own.err().or(theirs).expect("somebody panicked"));
        }
    }

    /// Runs `f` on every item, each handed to one task. A single item, as a decode step has, costs nothing.
    pub(crate) fn each<T: Send>(&self, mut items: impl Iterator<Item = T>, f: impl Fn(T) + Sync) {
        let Some(first) = items.next() else { return };
        let Some(second) = items.next() else { return f(first) };
        let items: Vec<Mutex<Option<T>>> = [first, second].into_iter().chain(items).map(|item| Mutex::new(Some(item))).collect();
        self.run(items.len(), &|task| {
            let item = items[task].lock().unwrap_or_else(PoisonError::into_inner).take();
            item.into_iter().for_each(&f);
        });
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut seen = 0;
        loop {
            self.until(|| self.state.load(SeqCst) >> 16 != seen, &self.wake);
            if self.stop.load(SeqCst) {
                return;
            }
            let state = self.state.load(Acquire);
            seen = state >> 16;
            // Enter, unless the job closed or changed meanwhile.
            if state & OPEN == 0 || self.state.compare_exchange(state, state + 1, SeqCst, Relaxed).is_err() {
                if state & OPEN != 0 {
                    seen -= 1;
                }
                continue;
            }
            let job = [self.job[0].load(Relaxed), self.job[1].load(Relaxed)];
            // SAFETY: these are the two words stored by `run`, and being counted inside keeps `run` from returning.
            let job: Job<'_> = unsafe { std::mem::transmute(job) };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take(job))) {
                *self.lock() = Some(panic);
                self.panicked.store(true, Relaxed);
            }
            if self.state.fetch_sub(1, SeqCst) & (INSIDE | OPEN) == 1 && self.sleeping.load(SeqCst) > 0 {
                drop(self.lock());
                self.left.notify_all();
            }
        }
    }

    fn take(&self, job: Job<'_>) {
        let tasks = self.tasks.load(Relaxed);
        loop {
            let task = self.next.fetch_add(1, Relaxed);
            if task >= tasks {
                return;
            }
            job(task);
        }
    }

    /// Spins, then blocks on `bell`, until `ready` or the pool stops.
    fn until(&self, ready: impl Fn() -> bool, bell: &Condvar) {
        for _ in 0..SPINS {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock();
        self.sleeping.fetch_add(1, SeqCst);
        while !ready() && !self.stop.load(SeqCst) {
            guard = bell.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleeping.fetch_sub(1, SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        // Workers that still spin see a new epoch; the lock orders the flag before any sleep.
        self.shared.state.fetch_add(1 << 16, SeqCst);
        drop(self.shared.lock());
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A worker's panic was handed to `run` already.
            let _ = thread.join();
        }
        // The next engine of this thread counts the cores it may use, and its loaders inherit them.
        pin(&self.unpinned);
    }
}

/// Floats that several tasks fill at once. Cells are relaxed atomics: a plain store each, and no unsafe code in the
/// kernels that share an output.
#[derive(Debug)]
pub(crate) struct Cells<'a>(&'a [AtomicU32]);

impl<'a> Cells<'a> {
    pub(crate) fn new(floats: &'a mut [f32]) -> Self {
        // SAFETY: AtomicU32 has the size and alignment of f32, every bit pattern is valid for both, and the exclusive
        // borrow makes these cells the only way to the memory while they live.
        Self(unsafe { &*(std::ptr::from_mut(floats) as *const [AtomicU32]) })
    }

    pub(crate) fn set(&self, index: usize, value: f32) {
        self.0[index].store(value.to_bits(), Relaxed);
    }

    /// Cells [at, at + values.len()) take `values`.
    pub(crate) fn fill(&self, at: usize, values: &[f32]) {
        for (cell, value) in self.0[at..at + values.len()].iter().zip(values) {
            cell.store(value.to_bits(), Relaxed);
        }
    }
}

/// Cores this process may use, hyper-threads counted once.
#[cfg(target_os = "linux")]
pub(crate) fn physical_cores() -> usize {
    let siblings = |cpu: &usize| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(path).unwrap_or_else(|_| cpu.to_string())
    };
    let cores: std::collections::HashSet<String> = allowed_cpus().iter().map(siblings).collect();
    cores.len().max(1)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn physical_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(target_os = "linux")]
fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

#[cfg(target_os = "linux")]
fn pin(cpus: &[usize]) {
    if !cpus.is_empty() {
        let mut set = rustix::thread::CpuSet::new();
        cpus.iter().for_each(|cpu| set.set(*cpu));
        // Pinning is a help, not a need.
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
}

/// macOS has no thread affinity; its scheduler keeps busy threads on performance cores.
#[cfg(not(target_os = "linux"))]
fn allowed_cpus() -> Vec<usize> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
fn pin(_: &[usize]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_and_panics_come_back() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads).expect("threads");
            for tasks in [0, 1, 2, 7, 64] {
                for _ in 0..200 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|task| {
                        counts[task].fetch_add(1, Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "{threads} threads, {tasks} tasks");
                }
            }
            let panicked = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|task| assert!(task != 5, "task five"))));
            assert!(panicked.is_err());
            for items in [0, 1, 2, 9] {
                let (mut numbers, ones) = (vec![0; items], vec![1; items]);
                pool.each(numbers.iter_mut().zip(&ones), |(number, one)| *number += one);
                assert_eq!(numbers, ones);
            }
            let mut floats = vec![0.0; 8];
            let cells = Cells::new(&mut floats);
            pool.run(8, &|task| cells.set(task, task as f32));
            assert_eq!(floats, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        }
    }
}
