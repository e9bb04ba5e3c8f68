//! Bounds for programs that come with a model or a request: how long they may compute, and how deep.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Of memory that is taken only as far as it is used.
const STACK: usize = 256 << 20;

/// Runs what may nest as deep as a request is long: a thread's usual stack is too small for that, and with it ends the process.
pub(super) fn on_deep_stack<T: Send>(name: &str, work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| format!("cannot start a thread for the {name}: {error}"))?;
        thread.join().unwrap_or_else(|_| Err(format!("the {name} engine panicked")))
    })
}

/// For what one thread computes; if it stood still meanwhile, in a busy or a paused machine, that has not used up anything.
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
