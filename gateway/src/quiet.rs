//! When nobody has been connected for a while, the allocator's free pages go back to the system: after a burst of streams glibc keeps
//! several times what an idle gateway needs.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use tokio::time::{Duration, sleep};
use tokio_util::task::TaskTracker;

const WHILE: Duration = Duration::from_secs(2);

/// Whether somebody is looking already.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quiet(Arc<AtomicBool>);

impl Quiet {
    /// One of `connections` is about to end.
    pub(crate) fn ended(self, connections: TaskTracker) {
        if self.0.swap(true, SeqCst) {
            return;
        }
        tokio::spawn(async move {
            sleep(WHILE).await;
            self.0.store(false, SeqCst);
            if connections.is_empty() {
                give_back();
            }
        });
    }
}

/// macOS gives free pages back by itself.
fn give_back() {
    // SAFETY: takes no pointer and may be called at any time.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}
