//! How far the eviction policy is from the best possible one, over the latest tokens: replayed beside the engine, seldom
//! enough to cost nothing. Stats shows it and never waits long for it.

use std::time::{Duration, Instant};

use flash_engine::replay::{self, ReplayPolicy, Trace};
use tokio::{
    sync::{Mutex, oneshot},
    task::spawn_blocking,
    time::timeout,
};

use super::Daemon;
use crate::worker::{Command, Ready, Recent};

/// How long a figure is believed.
const EVERY: Duration = Duration::from_secs(5);
/// The engine answers between two steps; a long prompt's may take longer than anyone waits for statistics.
const WAIT: Duration = Duration::from_millis(500);

/// The latest figure.
#[derive(Debug, Default)]
pub(super) struct Gap(Mutex<Option<(Instant, Option<Found>)>>);

/// Shares of hits over so many tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Found {
    pub(super) tokens: usize,
    pub(super) policy: f64,
    pub(super) belady: f64,
}

impl Daemon {
    /// Over the latest tokens; `None` until some were decoded.
    pub(super) async fn gap(&self) -> Option<Found> {
        let state = self.worker.state();
        let (_, ready) = state.ready()?;
        let mut known = self.gap.0.lock().await;
        if let Some((at, found)) = *known
            && at.elapsed() < EVERY
        {
            return found;
        }
        let (reply, recent) = oneshot::channel();
        self.worker.send(Command::Recent(Recent { reply })).ok()?;
        let found = match timeout(WAIT, recent).await {
            Ok(Ok(Some(trace))) => measure(trace, ready).await,
            // Busy: what was true is better than nothing.
            _ => known.and_then(|(_, found)| found),
        };
        *known = Some((Instant::now(), found));
        found
    }
}

async fn measure(trace: Trace, ready: &Ready) -> Option<Found> {
    let (policy, slots) = (ready.report.experts.policy, ready.report.experts.slots_per_layer);
    let replayed = spawn_blocking(move || {
        let share = |policy| {
            let replayed = replay::replay(&trace, policy, slots);
            let all = replayed.hits + replayed.misses;
            (all > 0).then(|| replayed.hits as f64 / all as f64)
        };
        Some(Found { tokens: trace.tokens(), policy: share(ReplayPolicy::Live(policy))?, belady: share(ReplayPolicy::Belady)? })
    });
    replayed.await.ok().flatten()
}
