//! A limit for what a thread computes: one that stood still meanwhile, in a busy or a paused machine, has not used it up.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Begins and is looked at on one thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    /// Not before; costs no system call to look at.
    earliest: Instant,
    used: Duration,
}

impl Deadline {
    pub(super) fn after(time: Duration) -> Self {
        Self { earliest: Instant::now() + time, used: used() + time }
    }

    pub(super) fn passed(&self) -> bool {
        Instant::now() > self.earliest && used() > self.used
    }
}

/// The processor time of this thread.
fn used() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_stand_still_uses_up_nothing() {
        let deadline = Deadline::after(Duration::from_millis(10));
        std::thread::sleep(Duration::from_millis(30));
        assert!(!deadline.passed());
        let began = Instant::now();
        while !deadline.passed() {
            assert!(began.elapsed() < Duration::from_secs(60), "to compute does");
        }
    }
}
