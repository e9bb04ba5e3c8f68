//! The engine's thread and the handle the async side holds. Commands come in over one bounded channel and are served in
//! order; events go out over one bounded channel per request. No RPC types, no tokenising, no policy: the service
//! prepares requests, the pressure monitor decides ceilings.
//!
//! What must never be lost is a level, not a message: a request is cancelled when its receiver is gone, resumed when its
//! channel has room, the ceiling is an atomic. The thread looks at all of these at every turn; [`Command::Wake`] only
//! ends its sleep.

mod command;
mod line;

use std::{
    collections::{HashMap, VecDeque},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use flash_engine::{Bytes, Cleared, Delivery, Engine, Event, ModelInfo, Options, Report, RequestId, Step, Text, clear_disk_cache};
use flash_proto::heap;
use tokio::sync::watch;

pub(crate) use self::command::{
    Admitted, Bench, ClearCache, Command, Events, Generate, Load, Loaded, Model, Recent, Reply, Reservation, Reserve, Unload,
};
use self::line::Waiting;
use crate::{Error, config::KeepAlive, hot::HotSets, stats::Totals};

/// Events a slow reader may leave unread before its request pauses …
pub(crate) const EVENTS: usize = 64;
/// … and room beyond them for a last word (Failed) to a paused request.
pub(crate) const EVENTS_SPARE: usize = 4;
/// Events of a benchmark that may be unread before progress is left out.
pub(crate) const BENCH_EVENTS: usize = 256;
/// Places in the command channel besides the waiting requests'.
const COMMANDS_SPARE: usize = 64;
/// How stale the published report may be while the engine works.
const PUBLISH_EVERY: Duration = Duration::from_millis(50);

/// What everyone may know about the engine, without waiting for it.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) model: Option<(Model, Phase)>,
    /// In line for the engine, besides those it has admitted.
    pub(crate) in_line: usize,
    /// The configured options with what Load calls changed.
    pub(crate) options: Options,
}

#[derive(Clone, Debug)]
pub(crate) enum Phase {
    Loading(f64),
    Ready(Arc<Ready>),
    /// A benchmark's engine, as it stands.
    Bench(Arc<Report>),
}

#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) info: Arc<ModelInfo>,
    pub(crate) text: Arc<Text>,
    pub(crate) context: usize,
    pub(crate) report: Report,
    /// When the idle model goes; `None`: busy, or never.
    pub(crate) unload_at: Option<Instant>,
}

impl State {
    pub(crate) fn ready(&self) -> Option<(&Model, &Arc<Ready>)> {
        match &self.model {
            Some((model, Phase::Ready(ready))) => Some((model, ready)),
            _ => None,
        }
    }

    /// Of whatever engine there is: that of a benchmark counts as well.
    pub(crate) fn report(&self) -> Option<&Report> {
        match &self.model {
            Some((_, Phase::Ready(ready))) => Some(&ready.report),
            Some((_, Phase::Bench(report))) => Some(report),
            _ => None,
        }
    }
}

/// The async side's handle. The thread ends when all of them are gone, or at [`Worker::stop`].
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    commands: SyncSender<Command>,
    state: watch::Receiver<Arc<State>>,
    levels: Arc<Levels>,
    totals: Arc<Totals>,
}

#[derive(Debug)]
struct Levels {
    /// Slab bytes that memory pressure allows; `u64::MAX` = as configured.
    ceiling: AtomicU64,
    stop: AtomicBool,
}

impl Worker {
    pub(crate) fn start(options: Options, keep_alive: KeepAlive, hot: HotSets, totals: Arc<Totals>) -> Result<Self, Error> {
        let (commands, inbox) = sync_channel(options.queue + COMMANDS_SPARE);
        let (publish, state) = watch::channel(Arc::new(State { model: None, in_line: 0, options: options.clone() }));
        let levels = Arc::new(Levels { ceiling: AtomicU64::new(u64::MAX), stop: AtomicBool::new(false) });
        let thread = Thread {
            inbox,
            publish,
            published: Instant::now(),
            published_live: 0,
            levels: levels.clone(),
            totals: totals.clone(),
            options,
            standing_keep_alive: keep_alive,
            keep_alive,
            last_used: Instant::now(),
            line: VecDeque::new(),
            measuring: false,
            loaded: None,
            hot,
            reserved: Vec::new(),
            live: HashMap::new(),
        };
        let spawned = thread::Builder::new().name("flash-engine".into()).spawn(move || thread.run());
        spawned.map_err(|source: io::Error| Error::Thread { name: "flash-engine", source })?;
        Ok(Self { commands, state, levels, totals })
    }

    pub(crate) fn send(&self, command: Command) -> Result<(), Error> {
        match self.commands.try_send(command) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                let (waiting, parallel) = (self.state().in_line, self.state().options.parallel);
                Err(Error::QueueFull { waiting, retry_after_s: self.totals.retry_after_s(parallel) })
            }
            Err(TrySendError::Disconnected(_)) => Err(Error::Draining),
        }
    }

    /// A full channel wakes the thread just as well.
    pub(crate) fn wake(&self) {
        let _ = self.commands.try_send(Command::Wake);
    }

    pub(crate) fn state(&self) -> Arc<State> {
        self.state.borrow().clone()
    }

    /// Requests that came to their end.
    pub(crate) fn ended(&self) -> u64 {
        self.totals.ended()
    }

    pub(crate) fn set_ceiling(&self, ceiling: Option<Bytes>) {
        if self.levels.ceiling.swap(ceiling.unwrap_or(u64::MAX), SeqCst) != ceiling.unwrap_or(u64::MAX) {
            self.wake();
        }
    }

    /// Fails what is left and ends the thread; returns when it has ended. A load in progress is waited for.
    pub(crate) async fn stop(&self) {
        self.levels.stop.store(true, SeqCst);
        self.wake();
        let mut state = self.state.clone();
        while state.changed().await.is_ok() {}
    }
}

struct Reserved {
    path: PathBuf,
    exclusive: bool,
    holder: Weak<()>,
}

struct Loadable {
    model: Model,
    engine: Engine,
    info: Arc<ModelInfo>,
    ceiling: u64,
}

struct Live {
    events: Events,
    paused: bool,
    span: tracing::Span,
}

struct Thread {
    inbox: Receiver<Command>,
    publish: watch::Sender<Arc<State>>,
    published: Instant,
    /// Requests that were live then: gauges of requests are never stale.
    published_live: usize,
    levels: Arc<Levels>,
    totals: Arc<Totals>,
    options: Options,
    /// The daemon's setting, or what the last Load call asked for.
    standing_keep_alive: KeepAlive,
    /// After the latest request.
    keep_alive: KeepAlive,
    last_used: Instant,
    line: VecDeque<Waiting>,
    /// A benchmark has the engine's thread.
    measuring: bool,
    loaded: Option<Loadable>,
    hot: HotSets,
    reserved: Vec<Reserved>,
    live: HashMap<RequestId, Live>,
}

impl Thread {
    fn run(mut self) {
        let mut idle = true;
        loop {
            if idle {
                self.publish();
                match self.wait() {
                    Ok(command) => self.take(command),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            while let Ok(command) = self.inbox.try_recv() {
                self.take(command);
            }
            if self.levels.stop.load(SeqCst) {
                self.fail_live(|| Error::Draining);
                return self.unload();
            }
            self.look();
            self.serve_line();
            let step = self.step();
            // The last live request may have ended in this very step: the line moves before the thread sleeps.
            idle = step == Step::Idle && (self.line.is_empty() || !self.live.is_empty());
            self.drop_idle_model();
            if self.published.elapsed() >= PUBLISH_EVERY || self.published_live != self.live.len() {
                self.publish();
            }
        }
    }

    /// Sleeps until a command, or until the idle model is to go.
    fn wait(&self) -> Result<Command, RecvTimeoutError> {
        match self.unload_at() {
            Some(at) => self.inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            None => self.inbox.recv().map_err(RecvTimeoutError::from),
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Generate(job) if self.line.len() >= self.options.queue && !job.reply.is_closed() => {
                let waiting = self.line.len();
                self.refuse(job.reply, Error::QueueFull { waiting, retry_after_s: self.totals.retry_after_s(self.options.parallel) });
            }
            Command::Generate(job) => self.line.push_back(Waiting::Generate(job)),
            Command::Load(job) => self.line.push_back(Waiting::Load(job)),
            Command::Unload(job) if job.force && self.matches(job.model.as_ref()) => {
                self.fail_live(|| Error::Cancelled("the model was unloaded"));
                self.serve_unload(job);
            }
            Command::Unload(job) => self.line.push_back(Waiting::Unload(job)),
            Command::Reserve(job) => {
                let reserved = self.reserve(&job);
                let _ = job.reply.send(reserved);
            }
            // It would wait for them with the model's memory still taken, for who knows how long.
            Command::Bench(job) if !self.live.is_empty() || !self.line.is_empty() => {
                let _ = job.reply.send(Err(busy(self.live.len() + self.line.len())));
            }
            Command::Bench(job) if self.measuring => {
                let _ =
                    job.reply.send(Err(Error::Busy("another benchmark is running; wait for it, or end it where it was started".into())));
            }
            Command::Bench(job) => self.line.push_back(Waiting::Bench(job)),
            Command::Recent(job) => {
                let _ = job.reply.send(self.loaded.as_ref().map(|loaded| loaded.engine.recent()));
            }
            Command::ClearCache(job) => {
                let cleared = self.clear_cache(&job.dir);
                let _ = job.reply.send(cleared);
            }
            Command::Wake => {}
        }
    }

    fn clear_cache(&mut self, dir: &Path) -> Result<Cleared, Error> {
        let of_engine = self.loaded.as_mut().map_or(Ok(Cleared::default()), |loaded| loaded.engine.clear_prefixes())?;
        // What is left there when nothing is loaded, or when the disk is not used any more.
        let Cleared { files, disk_bytes, .. } = clear_disk_cache(dir)?;
        heap::give_back();
        tracing::info!("the prefix cache was cleared");
        self.publish();
        Ok(Cleared { files: of_engine.files + files, disk_bytes: of_engine.disk_bytes + disk_bytes, ..of_engine })
    }

    /// Reads the levels: readers that left, readers that caught up, the ceiling.
    fn look(&mut self) {
        let Some(loaded) = &mut self.loaded else { return };
        let Thread { live, totals, last_used, .. } = self;
        live.retain(|id, request| {
            let gone = request.events.is_closed();
            if gone {
                loaded.engine.cancel(*id);
                cancelled(totals, request);
                *last_used = Instant::now();
            } else if request.paused && request.events.capacity() >= EVENTS / 2 {
                request.paused = false;
                loaded.engine.resume(*id);
            }
            !gone
        });
        let ceiling = self.levels.ceiling.load(SeqCst);
        if ceiling != loaded.ceiling {
            loaded.ceiling = ceiling;
            loaded.engine.set_ceiling((ceiling != u64::MAX).then_some(ceiling));
            self.publish();
        }
    }

    fn matches(&self, model: Option<&Model>) -> bool {
        self.loaded.as_ref().is_some_and(|loaded| model.is_none_or(|model| loaded.model.path == model.path))
    }

    fn step(&mut self) -> Step {
        let Some(loaded) = &mut self.loaded else { return Step::Idle };
        let Thread { live, totals, last_used, .. } = self;
        let step = catch_unwind(AssertUnwindSafe(|| loaded.engine.step(&mut |id, event| deliver(live, totals, last_used, id, event))));
        step.unwrap_or_else(|panic| {
            let text = panic_text(&*panic);
            tracing::error!(panic = text, "the engine panicked; its model is dropped");
            self.fail_live(|| Error::Panicked(text.clone()));
            self.unload();
            Step::Worked
        })
    }

    /// Every live request ends with `error`.
    fn fail_live(&mut self, error: impl Fn() -> Error) {
        for (id, request) in self.live.drain() {
            if let Some(loaded) = &mut self.loaded {
                // After a panic the engine may be in any state; it is dropped next.
                let _ = catch_unwind(AssertUnwindSafe(|| loaded.engine.cancel(id)));
            }
            match error() {
                Error::Cancelled(_) | Error::Draining => self.totals.cancelled.fetch_add(1, SeqCst),
                _ => self.totals.failed.fetch_add(1, SeqCst),
            };
            let _ = request.events.try_send(Err(error()));
        }
        self.last_used = Instant::now();
    }

    fn unload(&mut self) {
        let Some(loaded) = self.loaded.take() else { return };
        tracing::info!(model = loaded.model.id, "unloading");
        self.publish();
        // After a panic in a step both are asked of an engine in any state.
        if catch_unwind(AssertUnwindSafe(|| self.hot.save(&loaded.engine))).is_err() {
            tracing::error!("the engine panicked while its hot set was saved");
        }
        if catch_unwind(AssertUnwindSafe(|| drop(loaded))).is_err() {
            tracing::error!("the engine panicked while it was dropped");
        }
        heap::give_back();
    }

    fn unload_at(&self) -> Option<Instant> {
        let idle = self.loaded.is_some() && self.live.is_empty() && self.line.is_empty();
        self.keep_alive.0.filter(|_| idle).map(|keep| self.last_used + keep)
    }

    fn drop_idle_model(&mut self) {
        if self.unload_at().is_some_and(|at| at <= Instant::now()) {
            self.unload();
        }
    }

    fn refuse<T>(&self, reply: Reply<T>, error: Error) {
        self.totals.refused.fetch_add(1, SeqCst);
        let _ = reply.send(Err(error));
    }

    fn state(&self, model: Option<(Model, Phase)>) -> Arc<State> {
        let waiting = |task: &&Waiting| matches!(task, Waiting::Generate(_));
        Arc::new(State { model, in_line: self.line.iter().filter(waiting).count(), options: self.options.clone() })
    }

    fn publish(&mut self) {
        let model = self.loaded.as_ref().map(|loaded| {
            let ready = Ready {
                info: loaded.info.clone(),
                text: loaded.engine.text(),
                context: loaded.engine.context(),
                report: loaded.engine.report(),
                unload_at: self.unload_at(),
            };
            (loaded.model.clone(), Phase::Ready(Arc::new(ready)))
        });
        self.publish.send_replace(self.state(model));
        self.published = Instant::now();
        self.published_live = self.live.len();
    }
}

fn busy(requests: usize) -> Error {
    Error::Busy(format!(
        "{requests} requests are running or waiting, and a benchmark needs the memory for itself; wait for them, or end them: flashctl stop --force"
    ))
}

/// Hands one event to its reader, never waiting for it.
fn deliver(live: &mut HashMap<RequestId, Live>, totals: &Totals, last_used: &mut Instant, id: RequestId, event: Event) -> Delivery {
    let Some(request) = live.get_mut(&id) else { return Delivery::Gone };
    let done = match &event {
        Event::Done(done) => Some(Some(done.clone())),
        Event::Failed(_) => Some(None),
        Event::Prefill { .. } | Event::Prompt(_) | Event::Token { .. } | Event::Routing { .. } => None,
    };
    let event = match event {
        Event::Failed(error) => Err(Error::Engine(error)),
        event => Ok(event),
    };
    // The spare places make Full impossible unless an engine ignores it; such a request is as lost as one without reader.
    let Ok(place) = request.events.try_reserve() else {
        cancelled(totals, request);
        live.remove(&id);
        *last_used = Instant::now();
        return Delivery::Gone;
    };
    let Some(done) = done else {
        place.send(event);
        request.paused = request.events.capacity() <= EVENTS_SPARE;
        return if request.paused { Delivery::Full } else { Delivery::Taken };
    };
    // Counted before its reader hears of it and asks for the counts.
    match done {
        Some(done) => {
            totals.finish(&done);
            let ttft_ms = done.timing.ttft.as_millis() as u64;
            tracing::info!(parent: &request.span, tokens = done.token_ids.len(), ttft_ms, finish = ?done.finish, "done");
        }
        None => {
            totals.failed.fetch_add(1, SeqCst);
            tracing::warn!(parent: &request.span, "failed");
        }
    }
    place.send(event);
    live.remove(&id);
    *last_used = Instant::now();
    Delivery::Taken
}

fn cancelled(totals: &Totals, request: &Live) {
    totals.cancelled.fetch_add(1, SeqCst);
    tracing::info!(parent: &request.span, "cancelled by its reader");
}

pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".into())
}
