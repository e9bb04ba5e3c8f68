//! Persistent pinned workers and the fork-join around them. The engine thread is worker 0, and free to run where others leave room:
//! pinned, too, four clients of a daemon got a tenth less.
//!
//! A job is a counted list of tasks that workers take from an atomic counter, so which thread runs a task never
//! changes a result. Waiting spins briefly and then blocks: pure spinning collapses when another process wants the
//! core. A worker that the scheduler holds back is not waited for: when the tasks are gone the job closes, and
//! only workers that entered it are awaited. If these lose their cores to another process for much of the time, they rest for a
//! while: waiting out time slices costs more than the half of a core that they would get. What takes a core a few times a second,
//! as the kernel does, costs less than any rest. Beside a long job, as a prompt's are, a time slice is little, and nobody rests;
//! nor is such a job computed alone when a rest is over.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Rounds of `spin_loop` before a thread blocks; about 20 µs, more than the gap between two jobs of a decode step.
const SPINS: u32 = 4000;

/// Whoever is awaited for as long has lost its core: the last task of a decode step's job takes a fraction of it.
const HELD_BACK: Duration = Duration::from_millis(1);

/// By the time that the one who waits took for the job's tasks.
fn held_back(worked: Duration) -> Duration {
    HELD_BACK.max(worked / 2)
}

/// A worker rests when so much has been lost to waiting, of late ...
const WORTH_A_REST: Duration = Duration::from_millis(6);

/// ... that is, beyond this part of the time since. A rest costs a third of the speed and more.
const BEARABLE: u32 = 4;

/// How long it rests: at first, and at most, if its core is found taken again and again.
const REST: [Duration; 2] = [Duration::from_millis(8), Duration::from_millis(256)];

/// Rows of element-wise work that a task takes: enough to outweigh the hand-over.
pub(crate) const TASK_ROWS: usize = 8;

/// Fork-join over a fixed set of threads.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// What the caller may run on.
    allowed: Vec<usize>,
    /// The caller is on a resting worker's core.
    moved: AtomicBool,
}

#[derive(Debug)]
struct Rest {
    until: Instant,
    /// How long it is this time.
    time: Duration,
    /// To waiting, by `counted`.
    lost: Duration,
    counted: Instant,
    /// A worker's, for a caller that lost its core.
    waits_since: Instant,
}

impl Rest {
    /// A job has ended after a wait of `waited`. True: a rest begins.
    fn lose(&mut self, waited: Duration, now: Instant) -> bool {
        let before = self.lost.saturating_sub(now.saturating_duration_since(self.counted.max(self.until)) / BEARABLE);
        (self.lost, self.counted) = (before + waited, now);
        if before.is_zero() {
            self.time = Duration::ZERO;
        }
        if self.lost < WORTH_A_REST {
            return false;
        }
        self.time = (2 * self.time).clamp(REST[0], REST[1]);
        self.until = now + self.time;
        // Nothing of a long absence is held against whoever comes back.
        self.lost = WORTH_A_REST;
        true
    }
}

impl Default for Rest {
    fn default() -> Self {
        let now = Instant::now();
        Self { until: now, time: Duration::ZERO, lost: Duration::ZERO, counted: now, waits_since: now }
    }
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
    /// Of each worker but the caller.
    workers: Vec<Worker>,
    /// Workers that rest, so that a job's caller need not look at the clock; all until one moment.
    resting: AtomicUsize,
    rest: Mutex<Rest>,
    /// The caller was inside a job for [`held_back`] after its tasks were gone.
    caller_late: AtomicBool,
    stop: AtomicBool,
    /// `panic` holds one: looked at after every job, without its lock.
    panicked: AtomicBool,
    /// Also what the condition variables sleep under.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// A job opened, a worker shall rest, or the pool ends.
    wake: Condvar,
    /// The last worker left a closed job.
    left: Condvar,
    /// The pool ends: nothing else breaks a rest.
    ends: Condvar,
}

#[derive(Debug, Default)]
struct Worker {
    inside: AtomicBool,
    rests: AtomicBool,
}

const OPEN: u64 = 1 << 15;
const INSIDE: u64 = OPEN - 1;
type Job<'a> = &'a (dyn Fn(usize) + Sync);

impl Pool {
    /// `threads` ≥ 1 workers, the caller included.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let workers = (1..threads.max(1)).map(|_| Worker::default()).collect();
        let shared = Arc::new(Shared { workers, ..Shared::default() });
        let cpus = allowed_cpus();
        let mut pool = Self { shared: shared.clone(), threads: Vec::new(), allowed: cpus.clone(), moved: AtomicBool::new(false) };
        for index in 1..threads.max(1) {
            let shared = shared.clone();
            let cpu = cpus.get(index).copied();
            let thread = std::thread::Builder::new().name(format!("flash-worker-{index}"));
            pool.threads.push(thread.spawn(move || {
                pin(cpu.as_slice());
                shared.work(index - 1);
            })?);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `f(0)`, …, `f(tasks - 1)`, each once, and returns when all are done. A panic in a task resumes here.
    pub(crate) fn run(&self, tasks: usize, f: Job<'_>) {
        let shared = &*self.shared;
        let mut done = 0;
        // Workers may come back while a long job lasts.
        while done < tasks && (tasks - done == 1 || shared.resting.load(Relaxed) == self.threads.len()) {
            f(done);
            done += 1;
        }
        if done == tasks {
            return;
        }
        if self.moved.load(Relaxed) && shared.resting.load(Relaxed) == 0 {
            self.moved.store(false, Relaxed);
            pin(&self.allowed);
        }
        // SAFETY: only the representation is taken; `enter` rebuilds the reference while the job is open or occupied,
        // and this function does not return before the job is closed and empty.
        let [data, vtable]: [usize; 2] = unsafe { std::mem::transmute(f) };
        shared.job[0].store(data, Relaxed);
        shared.job[1].store(vtable, Relaxed);
        shared.tasks.store(tasks, Relaxed);
        shared.next.store(done, Relaxed);
        // Raised too late for its own job: the time since then was not lost.
        shared.caller_late.store(false, Relaxed);
        let epoch = shared.state.load(Relaxed) >> 16;
        shared.state.store((epoch + 1) << 16 | OPEN, SeqCst);
        if shared.sleeping.load(SeqCst) > 0 {
            drop(shared.lock());
            shared.wake.notify_all();
        }
        let began = Instant::now();
        let own = catch_unwind(AssertUnwindSafe(|| shared.take(f)));
        shared.state.fetch_and(!OPEN, SeqCst);
        let left = || shared.state.load(SeqCst) & INSIDE == 0;
        if !spin(left) {
            self.wait(left, held_back(began.elapsed()));
        }
        if shared.caller_late.load(Acquire) {
            self.give_way();
        }
        if own.is_err() || shared.panicked.load(Relaxed) {
            shared.panicked.store(false, Relaxed);
            let theirs = shared.lock().take();
            resume_unwind(own.err().or(theirs).expect("somebody panicked"));
        }
    }

    /// For the workers inside a closed job.
    #[cold]
    fn wait(&self, left: impl Fn() -> bool, most: Duration) {
        let inside = |awaited: u64, worker: usize| awaited | u64::from(self.shared.workers[worker].inside.load(Relaxed)) << worker;
        let awaited = (0..self.threads.len().min(64)).fold(0, inside);
        let waited = self.shared.block(left, &self.shared.left, Duration::MAX);
        if waited > most {
            self.lost(waited, |worker| worker < 64 && awaited >> worker & 1 == 1);
        }
    }

    /// The caller's own core was taken: if that is worth a rest it moves to the last worker's.
    #[cold]
    fn give_way(&self) {
        self.shared.caller_late.store(false, Relaxed);
        let waited = lock(&self.shared.rest).waits_since.elapsed();
        let last = self.threads.len();
        if self.lost(waited, |worker| worker + 1 == last) {
            self.moved.store(true, Relaxed);
            pin(self.allowed.get(last..=last).unwrap_or_default());
        }
    }

    /// The chosen workers rest if that much more, lost to waiting, is worth it.
    fn lost(&self, waited: Duration, chosen: impl Fn(usize) -> bool) -> bool {
        if !lock(&self.shared.rest).lose(waited, Instant::now()) {
            return false;
        }
        for (index, worker) in self.shared.workers.iter().enumerate() {
            if chosen(index) && !worker.rests.swap(true, SeqCst) {
                self.shared.resting.fetch_add(1, Relaxed);
            }
        }
        drop(self.shared.lock());
        self.shared.wake.notify_all();
        true
    }

    /// Runs `f` on every item, each handed to one task. A single item, as a decode step has, costs nothing.
    pub(crate) fn each<T: Send>(&self, mut items: impl Iterator<Item = T>, f: impl Fn(T) + Sync) {
        let Some(first) = items.next() else { return };
        let Some(second) = items.next() else { return f(first) };
        let items: Vec<Mutex<Option<T>>> = [first, second].into_iter().chain(items).map(|item| Mutex::new(Some(item))).collect();
        self.run(items.len(), &|task| {
            let item = lock(&items[task]).take();
            item.into_iter().for_each(&f);
        });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        lock(&self.panic)
    }

    fn work(&self, index: usize) {
        let me = &self.workers[index];
        let (mut seen, mut worked) = (0, Duration::ZERO);
        loop {
            let opened = || self.state.load(SeqCst) >> 16 != seen;
            if !spin(opened) {
                let open = || {
                    let state = self.state.load(SeqCst);
                    state >> 16 == seen && state & OPEN != 0
                };
                let called = || opened() || me.rests.load(SeqCst);
                let most = held_back(worked);
                let began = Instant::now();
                if open() && self.block(called, &self.wake, most) > most && open() {
                    lock(&self.rest).waits_since = began;
                    self.caller_late.store(true, Release);
                }
                self.block(called, &self.wake, Duration::MAX);
            }
            if self.stop.load(SeqCst) {
                return;
            }
            if me.rests.load(SeqCst) {
                self.rest(me);
                continue;
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
            me.inside.store(true, Relaxed);
            let began = Instant::now();
            let job = [self.job[0].load(Relaxed), self.job[1].load(Relaxed)];
            // SAFETY: these are the two words stored by `run`, and being counted inside keeps `run` from returning.
            let job: Job<'_> = unsafe { std::mem::transmute(job) };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take(job))) {
                *self.lock() = Some(panic);
                self.panicked.store(true, Relaxed);
            }
            me.inside.store(false, Relaxed);
            if self.state.fetch_sub(1, SeqCst) & (INSIDE | OPEN) == 1 && self.sleeping.load(SeqCst) > 0 {
                drop(self.lock());
                self.left.notify_all();
            }
            worked = began.elapsed();
        }
    }

    /// A worker's, until its time is over; that may be put off meanwhile.
    #[cold]
    fn rest(&self, me: &Worker) {
        let left = || lock(&self.rest).until.saturating_duration_since(Instant::now());
        while !left().is_zero() && !self.stop.load(SeqCst) {
            self.sleep(|| false, &self.ends, left());
        }
        me.rests.store(false, SeqCst);
        self.resting.fetch_sub(1, Relaxed);
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

    /// As `sleep`, counted so that `bell` is rung; how long it took.
    fn block(&self, ready: impl Fn() -> bool, bell: &Condvar, most: Duration) -> Duration {
        let began = Instant::now();
        self.sleeping.fetch_add(1, SeqCst);
        self.sleep(ready, bell, most);
        self.sleeping.fetch_sub(1, SeqCst);
        began.elapsed()
    }

    /// Until `ready`, the pool stops or the time is over.
    fn sleep(&self, ready: impl Fn() -> bool, bell: &Condvar, most: Duration) {
        let waits = |_: &mut Option<_>| !ready() && !self.stop.load(SeqCst);
        drop(bell.wait_timeout_while(self.lock(), most, waits));
    }
}

/// Nothing of ours is left half-changed by a panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// False if `ready` did not come while it was worth spinning.
fn spin(ready: impl Fn() -> bool) -> bool {
    for _ in 0..SPINS {
        if ready() {
            return true;
        }
        std::hint::spin_loop();
    }
    false
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        // Workers that still spin see a new epoch; the lock orders the flag before any sleep.
        self.shared.state.fetch_add(1 << 16, SeqCst);
        drop(self.shared.lock());
        self.shared.wake.notify_all();
        self.shared.ends.notify_all();
        for thread in self.threads.drain(..) {
            // A worker's panic was handed to `run` already.
            let _ = thread.join();
        }
        if *self.moved.get_mut() {
            // The next engine of this thread counts the cores it may use, and its loaders inherit them.
            pin(&self.allowed);
        }
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
pub(crate) fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

#[cfg(target_os = "linux")]
pub(crate) fn pin(cpus: &[usize]) {
    if !cpus.is_empty() {
        let mut set = rustix::thread::CpuSet::new();
        cpus.iter().for_each(|cpu| set.set(*cpu));
        // Pinning is a help, not a need.
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
}

/// macOS has no thread affinity; its scheduler keeps busy threads on performance cores.
#[cfg(not(target_os = "linux"))]
pub(crate) fn allowed_cpus() -> Vec<usize> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn pin(_: &[usize]) {}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_rest_is_for_what_takes_a_core_again_and_again() {
        let (ms, mut rest) = (Duration::from_millis, Rest::default());
        let mut now = rest.until;
        for _ in 0..100 {
            now += ms(300);
            assert!(!rest.lose(ms(5), now), "what the kernel does is no neighbour");
        }
        // One that never sleeps, for half of the time.
        let mut times = Vec::new();
        for _ in 0..14 {
            now = now.max(rest.until) + ms(8);
            if rest.lose(ms(4), now) {
                times.push(rest.time.as_millis());
            }
        }
        assert_eq!(times[..7], [8, 16, 32, 64, 128, 256, 256]);
        now = rest.until + ms(8);
        assert!(rest.lose(ms(1000), now));
        now = rest.until + ms(24);
        assert!(!rest.lose(ms(4), now), "it left");
        assert!(rest.lose(ms(4), now + ms(8)));
        assert_eq!(rest.time, REST[0]);
    }

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
            pool.lost(WORTH_A_REST, |_| true);
            let ran_by = || {
                let ids = Mutex::new(HashSet::new());
                pool.run(64, &|_| {
                    lock(&ids).insert(std::thread::current().id());
                    std::thread::yield_now();
                });
                lock(&ids).len()
            };
            let until = lock(&pool.shared.rest).until;
            let alone = ran_by();
            assert!(alone == 1 || Instant::now() >= until, "workers rest");
            let end = Instant::now() + Duration::from_secs(60);
            while threads > 1 && ran_by() == 1 {
                assert!(Instant::now() < end, "workers come back");
            }
            // Also to a job that began without them, after a rest that is short again.
            *lock(&pool.shared.rest) = Rest::default();
            pool.lost(WORTH_A_REST, |_| true);
            let ids = Mutex::new(HashSet::new());
            pool.run(1 << 19, &|_| {
                let mut ids = lock(&ids);
                ids.insert(std::thread::current().id());
                if ids.len() < threads.min(2) {
                    drop(ids);
                    std::thread::yield_now();
                }
            });
            assert!(lock(&ids).len() >= threads.min(2), "workers come back to a long job");
            let mut floats = vec![0.0; 8];
            let cells = Cells::new(&mut floats);
            pool.run(8, &|task| cells.fill(task, &[task as f32]));
            assert_eq!(floats, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        }
    }
}
