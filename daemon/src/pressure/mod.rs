//! Memory pressure: a thread that samples the sensors, asks the policy in [`budget`], and hands the engine's thread a
//! ceiling. A thread and not a task, so that a busy runtime cannot delay a cut. It knows no models and changes no
//! settings; Stats and Doctor read what it saw.

mod budget;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use flash_engine::{Bytes, Report};
use flash_proto::heap;

use crate::{Error, worker::Worker};

pub(crate) use budget::Level;
use budget::{Governor, Limit, Readings, Slab};
#[cfg(target_os = "linux")]
pub(crate) use linux::Sensors;
#[cfg(target_os = "linux")]
use linux::{Alarm, hold_code};
#[cfg(target_os = "macos")]
pub(crate) use macos::Sensors;
#[cfg(target_os = "macos")]
use macos::{Alarm, hold_code};

const PERIOD_IDLE: Duration = Duration::from_millis(250);
/// While requests run: a limit that falls takes the pages of our code first, and then every sample comes late.
const PERIOD: Duration = Duration::from_millis(50);
/// Near a bound.
const PERIOD_CLOSE: Duration = Duration::from_millis(20);
/// After so long without requests, what they left in the allocator is given back.
const QUIET: Duration = Duration::from_secs(1);
/// Decisions kept for Stats.
const DECISIONS: usize = 16;

/// What the monitor saw last.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub(crate) level: Level,
    pub(crate) ceiling: Option<Bytes>,
    /// Name and value of every sensor that answered.
    pub(crate) readings: Vec<(String, String)>,
    pub(crate) decisions: VecDeque<(Instant, String)>,
}

/// One check of this machine, for Doctor.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) name: &'static str,
    pub(crate) ok: bool,
    pub(crate) finding: String,
    pub(crate) fix: &'static str,
}

impl Finding {
    pub(crate) fn good(name: &'static str, finding: String) -> Self {
        Self { name, ok: true, finding, fix: "" }
    }

    pub(crate) fn bad(name: &'static str, finding: String, fix: &'static str) -> Self {
        Self { name, ok: false, finding, fix }
    }

    pub(crate) fn check(name: &'static str, ok: bool, finding: String, fix: &'static str) -> Self {
        if ok { Self::good(name, finding) } else { Self::bad(name, finding, fix) }
    }
}

/// The running monitor; dropping it ends its thread.
#[derive(Debug)]
pub(crate) struct Monitor {
    pub(crate) sensors: Sensors,
    view: Arc<Mutex<View>>,
    _stop: mpsc::SyncSender<()>,
}

impl Monitor {
    pub(crate) fn start(sensors: Sensors, worker: Worker) -> Result<Self, Error> {
        let view = Arc::new(Mutex::new(View::default()));
        let (stop, stopped) = mpsc::sync_channel(0);
        let thread = (sensors.clone(), view.clone());
        let spawned = thread::Builder::new().name("flash-pressure".into()).spawn(move || watch(&thread.0, &thread.1, &worker, &stopped));
        spawned.map_err(|source| Error::Thread { name: "flash-pressure", source })?;
        Ok(Self { sensors, view, _stop: stop })
    }

    pub(crate) fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn watch(sensors: &Sensors, view: &Mutex<View>, worker: &Worker, stopped: &mpsc::Receiver<()>) {
    let (mut governor, mut alarm) = (Governor::default(), Alarm::default());
    hold_code();
    let (mut ended, mut last_busy) = (0, None);
    loop {
        let mut readings = sensors.read();
        readings.squeezed = alarm.rang(sensors);
        let state = worker.state();
        // The cap holds for what is measured from outside, allocators and code included, not only for what the engine counts.
        let cap = state.options.memory.zip(readings.process);
        readings.limits.extend(cap.map(|(bytes, held)| Limit { name: "--memory".into(), bytes, held, cached: 0, code: false }));
        let slab = state.report().map(slab);
        let verdict = governor.decide(&readings, slab);
        worker.set_ceiling(verdict.ceiling);
        if slab.is_some() {
            // An idle engine's report grows stale while its slab is still being faulted in.
            worker.wake();
        }
        let mut view = view.lock().unwrap_or_else(PoisonError::into_inner);
        view.level = verdict.level;
        view.ceiling = verdict.ceiling;
        view.readings = describe(&readings);
        if let Some(decision) = verdict.decision {
            tracing::info!(level = ?verdict.level, "{decision}");
            if view.decisions.len() == DECISIONS {
                view.decisions.pop_front();
            }
            view.decisions.push_back((Instant::now(), decision));
        }
        drop(view);
        let busy = state.report().is_some_and(|report| report.running > 0);
        // The short ones between two looks count as well.
        if busy | (std::mem::replace(&mut ended, worker.ended()) != worker.ended()) {
            last_busy = Some(Instant::now());
        } else if last_busy.take_if(|at| at.elapsed() >= QUIET).is_some() {
            heap::give_back();
        }
        let period = match (busy, verdict.close) {
            (false, false) => PERIOD_IDLE,
            (true, false) => PERIOD,
            (_, true) => PERIOD_CLOSE,
        };
        alarm.wait(period);
        if stopped.try_recv() == Err(mpsc::TryRecvError::Disconnected) {
            return;
        }
    }
}

fn slab(report: &Report) -> Slab {
    let experts = &report.experts;
    Slab { configured: experts.slots_wanted as u64 * experts.layers.len() as u64 * experts.slot_bytes, resident: experts.slab_bytes }
}

fn describe(readings: &Readings) -> Vec<(String, String)> {
    let mib = |bytes: Bytes| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let limits = readings.limits.iter().map(|limit| (limit.name.clone(), format!("{} held of {}", mib(limit.held), mib(limit.bytes))));
    let machine = readings.machine.map(|(available, total)| ("machine".into(), format!("{} available of {}", mib(available), mib(total))));
    let stall =
        readings.stall.or(readings.machine_stall).map(|(some, full)| ("memory stalls".into(), format!("some {some}%, full {full}%")));
    let system = (readings.system > Level::Normal).then(|| ("system".into(), format!("{:?}", readings.system)));
    let process = readings.process.map(|bytes| ("process".into(), mib(bytes)));
    limits.chain(machine).chain(stall).chain(system).chain(process).collect()
}
