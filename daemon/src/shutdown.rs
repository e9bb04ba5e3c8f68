//! When to stop: signals as futures for `main.rs`, and the drain that `run` walks through. No process exit here.

use std::{io, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

/// How long running requests may still take after a signal.
pub const DRAIN: Duration = Duration::from_secs(30);

/// SIGTERM and SIGINT, in the order they come.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The number of the next one.
    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
        }
    }
}

/// Whether new requests are taken: asked by every service, set once.
#[derive(Debug)]
pub(crate) struct Drain {
    grace: watch::Sender<Option<Duration>>,
}

impl Drain {
    pub(crate) fn new() -> Self {
        Self { grace: watch::Sender::new(None) }
    }

    /// Begins the drain; a shorter grace than before wins.
    pub(crate) fn begin(&self, grace: Duration) {
        self.grace.send_modify(|known| *known = Some(known.map_or(grace, |known| known.min(grace))));
    }

    pub(crate) fn begun(&self) -> bool {
        self.grace.borrow().is_some()
    }

    /// Returns when a drain begins (or is cut shorter than `than`), with its grace.
    pub(crate) async fn shorter(&self, than: Duration) -> Duration {
        let mut grace = self.grace.subscribe();
        match grace.wait_for(|grace| grace.is_some_and(|grace| grace < than)).await {
            Ok(grace) => grace.unwrap_or(than),
            Err(_) => than,
        }
    }
}
