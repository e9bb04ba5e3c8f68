//! What waits for its turn at the engine, and how each is served. Part of `worker.rs`: the same thread.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Instant,
};

use flash_engine::{
    Engine, Options,
    bench::{self, BenchEvent},
};
use flash_proto::heap;

use super::{
    Admitted, BENCH_EVENTS, Bench, Generate, Live, Load, Loadable, Loaded, Model, PUBLISH_EVERY, Phase, Reservation, Reserve, Reserved,
    Thread, Unload, panic_text,
};
use crate::{Error, config::context_length};

/// What waits for its turn: one line, so that a second model is not starved by the first one's requests.
pub(super) enum Waiting {
    Generate(Box<Generate>),
    Load(Box<Load>),
    Unload(Unload),
    Bench(Box<Bench>),
}

impl Thread {
    /// Serves the front of the line as long as it need not wait for running requests.
    pub(super) fn serve_line(&mut self) {
        while let Some(front) = self.line.front() {
            let free = self.live.is_empty();
            let at_once = match front {
                Waiting::Generate(job) => job.reply.is_closed() || self.matches(Some(&job.model)),
                Waiting::Load(job) => job.reply.is_closed() || self.matches(Some(&job.model)) && !self.changes_context(job.context),
                Waiting::Unload(job) => job.reply.is_closed() || !self.matches(job.model.as_ref()),
                Waiting::Bench(job) => job.reply.is_closed(),
            };
            if !(at_once || free) {
                return;
            }
            match self.line.pop_front() {
                Some(Waiting::Generate(job)) => self.serve_generate(*job),
                Some(Waiting::Load(job)) => self.serve_load(*job),
                Some(Waiting::Unload(job)) => self.serve_unload(job),
                Some(Waiting::Bench(job)) => self.serve_bench(*job),
                None => return,
            }
        }
    }

    fn changes_context(&self, context: Option<Option<usize>>) -> bool {
        let Some((loaded, context)) = self.loaded.as_ref().zip(context) else { return false };
        loaded.engine.context() != context_length(&loaded.info, context)
    }

    fn serve_generate(&mut self, job: Generate) {
        if job.reply.is_closed() {
            return;
        }
        let _entered = job.span.clone().entered();
        if let Err(error) = self.ensure(&job.model) {
            return self.refuse(job.reply, error);
        }
        let loaded = self.loaded.as_mut().expect("ensure has loaded a model");
        let admitted = catch_unwind(AssertUnwindSafe(|| loaded.engine.admit(job.request)));
        match admitted {
            Ok(Ok((id, position))) => {
                let reply = Admitted { position, context: loaded.engine.context(), fingerprint: loaded.engine.fingerprint() };
                self.keep_alive = job.keep_alive.unwrap_or(self.standing_keep_alive);
                self.live.insert(id, Live { events: job.events, paused: false, span: job.span });
                // A caller that left meanwhile has closed its events too: the next look cancels.
                let _ = job.reply.send(Ok(reply));
            }
            Ok(Err(flash_engine::Error::QueueFull { waiting })) => {
                let retry_after_s = self.totals.retry_after_s(self.options.parallel);
                self.refuse(job.reply, Error::QueueFull { waiting, retry_after_s });
            }
            Ok(Err(error)) => self.refuse(job.reply, error.into()),
            Err(panic) => {
                let error = || Error::Panicked(panic_text(&*panic));
                self.refuse(job.reply, error());
                self.fail_live(error);
                self.unload();
            }
        }
    }

    fn serve_load(&mut self, job: Load) {
        if job.reply.is_closed() {
            return;
        }
        let started = Instant::now();
        let before = (self.options.clone(), self.standing_keep_alive);
        if self.changes_context(job.context) {
            self.unload();
        }
        let now = !self.matches(Some(&job.model));
        self.options.expert_cache = job.expert_cache.unwrap_or(self.options.expert_cache);
        self.options.memory = job.memory.unwrap_or(self.options.memory);
        self.options.context = job.context.unwrap_or(self.options.context);
        self.standing_keep_alive = job.keep_alive.unwrap_or(self.standing_keep_alive);
        self.keep_alive = self.standing_keep_alive;
        let fits = |thread: &Self| match &thread.loaded {
            Some(loaded) => Ok(loaded.engine.fits(thread.options.memory)?),
            None => Ok(()),
        };
        if let Err(error) = self.ensure(&job.model).and_then(|()| fits(self)) {
            // What no model can be loaded with would stay in the way of the next one.
            (self.options, self.standing_keep_alive) = before;
            self.keep_alive = self.standing_keep_alive;
            return self.refuse(job.reply, error);
        }
        let loaded = self.loaded.as_mut().expect("ensure has loaded a model");
        if let Some(budget) = job.expert_cache.filter(|_| !now) {
            loaded.engine.set_cache(budget);
        }
        if let Some(cap) = job.memory.filter(|_| !now) {
            loaded.engine.set_memory(cap);
        }
        let warnings = loaded.engine.warnings();
        self.last_used = Instant::now();
        self.publish();
        let _ = job.reply.send(Ok(Loaded { now, took: started.elapsed(), warnings }));
    }

    pub(super) fn serve_unload(&mut self, job: Unload) {
        let was_loaded = self.matches(job.model.as_ref());
        if was_loaded && !job.reply.is_closed() {
            self.unload();
        }
        let _ = job.reply.send(Ok(was_loaded));
    }

    /// Makes `model` the loaded one. Only called when it is, or when nothing runs.
    fn ensure(&mut self, model: &Model) -> Result<(), Error> {
        if self.matches(Some(model)) {
            return Ok(());
        }
        self.may_open(model)?;
        self.unload();
        let started = Instant::now();
        tracing::info!(model = model.id, path = %model.path.display(), expert_cache = %self.options.expert_cache, "loading");
        let publish = |progress| self.publish.send_replace(self.state(Some((model.clone(), Phase::Loading(progress)))));
        publish(0.0);
        // With no model loaded the ceiling is what fits on this machine and in this cgroup: what `auto` divides.
        let fits = self.levels.ceiling.load(SeqCst);
        let options = Options { available: (fits != u64::MAX).then_some(fits), ..self.options.clone() };
        let loaded = catch_unwind(AssertUnwindSafe(|| {
            Engine::load(&model.path, &options, &mut |progress| {
                publish(progress);
            })
        }));
        let mut engine = match loaded {
            Ok(Ok(engine)) => engine,
            Ok(Err(source)) => {
                tracing::error!(model = model.id, %source, "loading failed");
                self.publish();
                return Err(Error::Load { id: model.id.clone(), source: source.into() });
            }
            Err(panic) => {
                self.publish();
                return Err(Error::Panicked(panic_text(&*panic)));
            }
        };
        tracing::info!(model = model.id, seconds = started.elapsed().as_secs_f64(), "loaded");
        for warning in engine.warnings() {
            tracing::warn!(model = model.id, "{warning}");
        }
        self.hot.restore(&mut engine);
        let info = Arc::new(engine.info().clone());
        self.loaded = Some(Loadable { model: model.clone(), engine, info, ceiling: u64::MAX });
        self.keep_alive = self.standing_keep_alive;
        self.last_used = Instant::now();
        self.look();
        self.publish();
        Ok(())
    }

    pub(super) fn reserve(&mut self, job: &Reserve) -> Result<Reservation, Error> {
        let Model { id, path } = &job.model;
        if job.exclusive && self.matches(Some(&job.model)) {
            return Err(Error::Busy(format!("{id} is loaded; unload it first: flashctl stop {id}")));
        }
        if self.reserved(path).is_some() {
            return Err(Error::Busy(format!("{} is being written by another job; wait until it has ended", path.display())));
        }
        let reservation = Arc::new(());
        self.reserved.push(Reserved { path: path.clone(), exclusive: job.exclusive, holder: Arc::downgrade(&reservation) });
        Ok(reservation)
    }

    fn reserved(&mut self, path: &Path) -> Option<&Reserved> {
        self.reserved.retain(|reserved| reserved.holder.strong_count() > 0);
        self.reserved.iter().find(|reserved| reserved.path == path)
    }

    fn may_open(&mut self, model: &Model) -> Result<(), Error> {
        match self.reserved(&model.path) {
            Some(reserved) if reserved.exclusive => {
                Err(Error::Busy(format!("{} is being packed in place; wait until that has ended", model.id)))
            }
            _ => Ok(()),
        }
    }

    /// New requests wait in line meanwhile, as they do while a model is loaded.
    fn serve_bench(&mut self, job: Bench) {
        let Bench { model, options, events, reply, running } = job;
        if reply.is_closed() {
            return;
        }
        if let Err(error) = self.may_open(&model) {
            let _ = reply.send(Err(error));
            return;
        }
        self.unload();
        let reservation = Arc::new(());
        self.reserved.push(Reserved { path: model.path.clone(), exclusive: true, holder: Arc::downgrade(&reservation) });
        tracing::info!(model = model.id, "measuring");
        let _ = reply.send(Ok(()));
        let fits = self.levels.ceiling.load(SeqCst);
        let settings = Options { available: (fits != u64::MAX).then_some(fits), ..self.options.clone() };
        let levels = self.levels.clone();
        let goes_on = || !events.is_closed() && !running.stopped() && !levels.stop.load(SeqCst);
        let mut each = |event| {
            // Rows are few and must arrive; a reader that leaves so many unread is as good as gone.
            let skip = matches!(event, BenchEvent::Progress { .. }) && events.capacity() < BENCH_EVENTS / 2;
            goes_on() && (skip || events.try_send(Ok(event)).is_ok())
        };
        self.measuring = true;
        let mut ceiling = u64::MAX;
        let mut between = |engine: &mut Engine| {
            while let Ok(command) = self.inbox.try_recv() {
                self.take(command);
            }
            let now = levels.ceiling.load(SeqCst);
            if now != ceiling {
                ceiling = now;
                engine.set_ceiling((now != u64::MAX).then_some(now));
            }
            if self.published.elapsed() >= PUBLISH_EVERY {
                self.publish.send_replace(self.state(Some((model.clone(), Phase::Bench(Arc::new(engine.report()))))));
                self.published = Instant::now();
            }
            goes_on()
        };
        let measure = || bench::run(&model.path, &settings, &options, &mut between, &mut each);
        let result = catch_unwind(AssertUnwindSafe(measure));
        self.measuring = false;
        let result = result.unwrap_or_else(|panic| Err(flash_engine::Error::Internal(panic_text(&*panic))));
        heap::give_back();
        self.publish();
        match result {
            Ok(()) => {}
            Err(flash_engine::Error::Cancelled) if self.levels.stop.load(SeqCst) || running.stopped() => {
                let _ = events.try_send(Err(Error::Draining));
            }
            Err(error) => {
                tracing::warn!(model = model.id, %error, "measuring ended");
                let _ = events.try_send(Err(error.into()));
            }
        }
    }
}
