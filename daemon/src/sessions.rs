//! The requests that are alive, from their arrival until their last event was read or their stream dropped. Drain waits
//! for them; nothing else here. Cancelling needs no entry: it is the receiver's absence, see `worker.rs`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use dashmap::DashMap;
use tokio::sync::watch;

use crate::worker::Worker;

#[derive(Debug)]
pub(crate) struct Sessions {
    live: DashMap<u64, Session>,
    next: AtomicU64,
    count: watch::Sender<usize>,
}

#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) request_id: String,
    pub(crate) since: Instant,
}

/// A request's entry; dropping it removes the entry and tells the engine's thread to look who has left.
#[derive(Debug)]
pub(crate) struct Guard {
    sessions: Arc<Sessions>,
    worker: Worker,
    number: u64,
}

impl Sessions {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { live: DashMap::new(), next: AtomicU64::new(1), count: watch::Sender::new(0) })
    }

    /// Registers a request and names it if the caller did not.
    pub(crate) fn enter(self: &Arc<Self>, request_id: &str, worker: &Worker) -> (Guard, String) {
        let number = self.next.fetch_add(1, Relaxed);
        let given = request_id.chars().filter(|c| !c.is_control()).take(128).collect::<String>();
        let request_id = if given.is_empty() { format!("req-{number}") } else { given };
        self.live.insert(number, Session { request_id: request_id.clone(), since: Instant::now() });
        self.count.send_modify(|count| *count += 1);
        (Guard { sessions: self.clone(), worker: worker.clone(), number }, request_id)
    }

    /// Returns once nobody is left.
    pub(crate) async fn empty(&self) {
        // The sender lives in self, so the channel cannot close meanwhile.
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }

    pub(crate) fn list(&self) -> Vec<Session> {
        self.live.iter().map(|entry| entry.value().clone()).collect()
    }
}

impl Guard {
    /// Tells the engine's thread that the reader has caught up.
    pub(crate) fn wake(&self) {
        self.worker.wake();
    }

    /// Nobody is told of the request any more.
    pub(crate) fn leave(&self) {
        self.sessions.live.remove(&self.number);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.leave();
        self.sessions.count.send_modify(|count| *count -= 1);
        self.worker.wake();
    }
}
