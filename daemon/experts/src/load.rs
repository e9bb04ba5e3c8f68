//! Loader threads: take a job, fill the slot, say so. They decide nothing and look nothing up; `Experts::open` starts them
//! and `Experts`' drop ends them.

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::JoinHandle,
    time::Instant,
};

use crate::{
    Error,
    cache::{Cache, Job, Load},
    slab::Slab,
    store::Store,
};

/// What the engine thread and the loaders share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) slab: Slab,
    pub(crate) cache: Cache,
}

pub(crate) fn spawn(number: usize, shared: &Arc<Shared>) -> Result<JoinHandle<()>, Error> {
    let shared = Arc::clone(shared);
    std::thread::Builder::new().name(format!("flash-loader-{number}")).spawn(move || run(&shared)).map_err(Error::Thread)
}

fn run(Shared { store, slab, cache }: &Shared) {
    while let Some(job) = cache.job() {
        let vacant = match job {
            Job::Load(load) => {
                let start = Instant::now();
                let result = read(store, slab, &load);
                cache.loaded(load, result, start.elapsed())
            }
            Job::Populate(slot) => {
                slab.populate(slot.index()..slot.index() + 1);
                cache.populated(slot)
            }
        };
        if let Some(vacant) = vacant {
            slab.discard(&vacant);
            cache.drained(vacant);
        }
    }
}

/// A panic in a storage is a failed read: whoever waits for the expert must hear of it.
fn read(store: &Store, slab: &Slab, load: &Load) -> Result<u64, Error> {
    catch_unwind(AssertUnwindSafe(|| store.load(load, slab))).unwrap_or_else(|panic| {
        let key = load.key();
        let source = io::Error::other(format!("the storage panicked: {}", message(&*panic)));
        Err(store.failed(key, source))
    })
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
