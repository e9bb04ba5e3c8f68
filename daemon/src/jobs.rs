//! Long jobs on threads of their own: packing, verifying and writing models, each a stream of progress that ends with what
//! came of it. Dropping the stream cancels the job, and so does a drain that has no more time. What a job does is the
//! engine's business; who may touch which folder meanwhile is the worker's (`Command::Reserve`). Called by the services.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
};

use flash_engine::{Progress, Tell};
use tokio::sync::{mpsc, watch};

use crate::{Error, worker::panic_text};

/// Events that a slow reader may leave unread before it misses progress; what came of the job always has a place.
const EVENTS: usize = 16;

pub(crate) type Events = mpsc::Receiver<Result<Event, Error>>;

#[derive(Debug)]
pub(crate) enum Event {
    Progress(Progress),
    /// The last event.
    Done(Done),
}

/// What a job has made or read.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) model: String,
    pub(crate) path: String,
    pub(crate) records: u64,
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    /// Records that are not what was written.
    pub(crate) bad: Vec<String>,
}

/// The jobs that run.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    running: watch::Sender<usize>,
    stop: AtomicBool,
}

/// One of them; dropping it says that it has ended.
#[derive(Debug)]
pub(crate) struct Running(Arc<Jobs>);

impl Jobs {
    /// Starts `work` on a thread.
    pub(crate) fn start(self: &Arc<Self>, work: impl FnOnce(Tell<'_>) -> Result<Done, Error> + Send + 'static) -> Result<Events, Error> {
        let (sender, events) = mpsc::channel(EVENTS);
        let running = self.enter();
        let run = move || {
            let mut tell = |progress| {
                if sender.is_closed() || running.stopped() {
                    return false;
                }
                if sender.capacity() > 1 {
                    let _ = sender.try_send(Ok(Event::Progress(progress)));
                }
                true
            };
            let result = catch_unwind(AssertUnwindSafe(|| work(&mut tell)));
            let result = result.unwrap_or_else(|panic| Err(Error::Panicked(panic_text(&*panic))));
            let result = match result {
                Err(Error::Engine(flash_engine::Error::Cancelled)) if running.stopped() => Err(Error::Draining),
                result => result,
            };
            if let Err(error) = &result {
                tracing::warn!(%error, "a job ended");
            }
            // Nobody is there to hear of a cancelled one.
            let _ = sender.try_send(result.map(Event::Done));
        };
        let spawned = thread::Builder::new().name("flash-job".into()).spawn(run);
        spawned.map_err(|source| Error::Thread { name: "flash-job", source })?;
        Ok(events)
    }

    /// Counts something as a job that runs elsewhere: on the engine's thread.
    pub(crate) fn enter(self: &Arc<Self>) -> Running {
        self.running.send_modify(|count| *count += 1);
        Running(self.clone())
    }

    /// Returns once none runs.
    pub(crate) async fn none(&self) {
        // The sender lives in self, so the channel cannot close meanwhile.
        let _ = self.running.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Cancels all of them and waits until they have cleaned up.
    pub(crate) async fn stop(&self) {
        self.stop.store(true, SeqCst);
        self.none().await;
    }
}

impl Running {
    /// The daemon has no time left for it.
    pub(crate) fn stopped(&self) -> bool {
        self.0.stop.load(SeqCst)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endless(tell: Tell<'_>) -> Result<Done, Error> {
        let mut done = 0;
        while tell(Progress { stage: "counting", done, total: u64::MAX }) {
            done += 1;
        }
        Err(flash_engine::Error::Cancelled.into())
    }

    async fn last(mut events: Events) -> Result<Event, Error> {
        let mut last = None;
        while let Some(event) = events.recv().await {
            last = Some(event);
        }
        last.expect("an end")
    }

    #[tokio::test]
    async fn a_job_ends_with_what_came_of_it() {
        let jobs = Arc::new(Jobs::default());
        // More progress than the channel holds, read by nobody before the end.
        let (ended, end) = std::sync::mpsc::channel();
        let job = jobs.start(move |tell| {
            (0..100).for_each(|done| assert!(tell(Progress { stage: "x", done, total: 100 })));
            ended.send(()).expect("the test waits");
            Ok(Done { records: 7, ..Done::default() })
        });
        end.recv().expect("the job ends");
        assert!(matches!(last(job.expect("started")).await, Ok(Event::Done(Done { records: 7, .. }))));
        let job = jobs.start(|_| panic!("on purpose"));
        assert!(matches!(last(job.expect("started")).await, Err(Error::Panicked(text)) if text == "on purpose"));
        jobs.none().await;
    }

    #[tokio::test]
    async fn jobs_end_with_their_reader_or_with_the_daemon() {
        let jobs = Arc::new(Jobs::default());
        drop(jobs.start(endless).expect("started"));
        jobs.none().await;
        let job = jobs.start(endless).expect("started");
        jobs.stop().await;
        assert!(matches!(last(job).await, Err(Error::Draining)));
    }
}
