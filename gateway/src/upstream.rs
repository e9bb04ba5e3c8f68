//! The way to flashd: one channel that reconnects by itself, the short calls with their deadlines, and [`Feeds`], the
//! generations of one request as its handler sees them. Dropping them drops the gRPC streams, which cancels them in the daemon.

use std::{
    future::poll_fn,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use axum::http;
use flash_proto::v1::{
    self, admin_client::AdminClient, generate_client::GenerateClient, generate_event::Event, loaded_model::State as Loading,
    models_client::ModelsClient, progress::Phase,
};
use tokio::time::{Instant, timeout};
use tonic::{Response, Status, Streaming, transport::Channel};
use tower::Service;

use crate::{
    App,
    config::Timing,
    error::{self, Code, Failure},
    metrics::Metrics,
    openai::models,
};

/// The daemon answers these from memory; one that does not is as good as down.
const SHORT_CALL: Duration = Duration::from_secs(5);
/// How long a list of models may be late before the last one stands in for it.
const LIST_PATIENCE: Duration = Duration::from_millis(40);
/// How often the daemon is asked why a request has to wait.
const LOOK: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Upstream {
    channel: Channel,
    /// The daemon at the other end speaks our protocol; unknown again after every lost connection.
    greeted: AtomicBool,
    /// The list as last seen: names are looked up in it, and it stands in while the daemon is slow.
    models: Mutex<Option<Arc<v1::ListResponse>>>,
    /// Further names of models, and whose they are.
    aliases: Vec<(String, String)>,
}

impl Upstream {
    pub(crate) fn new(socket: &Path, aliases: Vec<(String, String)>) -> Self {
        Self { channel: flash_proto::socket::connect_lazy(socket), greeted: AtomicBool::new(false), models: Mutex::new(None), aliases }
    }

    pub(crate) async fn version(&self) -> Result<v1::VersionResponse, Failure> {
        let version = self.short(|channel| async move { AdminClient::new(channel).version(v1::VersionRequest {}).await }).await?;
        if version.protocol != flash_proto::PROTOCOL_VERSION {
            let (theirs, ours) = (version.protocol, flash_proto::PROTOCOL_VERSION);
            let message = format!("flashd speaks protocol {theirs}, flash-gateway {ours}; install both from one release");
            return Err(Failure::new(Code::DaemonUnavailable, message));
        }
        self.greeted.store(true, Ordering::Relaxed);
        Ok(version)
    }

    async fn greet(&self) -> Result<(), Failure> {
        if self.greeted.load(Ordering::Relaxed) { Ok(()) } else { self.version().await.map(drop) }
    }

    pub(crate) async fn stats(&self) -> Result<v1::Snapshot, Failure> {
        self.short(|channel| async move { AdminClient::new(channel).stats(v1::StatsRequest {}).await }).await
    }

    /// The installed models, from the daemon; from memory if it is only slow.
    pub(crate) async fn models(&self) -> Result<Arc<v1::ListResponse>, Failure> {
        let fetch = async {
            self.greet().await?;
            let mut list = self.short(|channel| async move { ModelsClient::new(channel).list(v1::ListRequest {}).await }).await?;
            for (alias, model) in &self.aliases {
                models::name(alias, model, &mut list);
            }
            let list = Arc::new(list);
            *self.models.lock().unwrap_or_else(PoisonError::into_inner) = Some(list.clone());
            Ok(list)
        };
        tokio::pin!(fetch);
        if let Ok(list) = timeout(LIST_PATIENCE, &mut fetch).await {
            return list;
        }
        match self.known_models() {
            Some(list) => Ok(list),
            None => fetch.await,
        }
    }

    /// As last seen, without asking.
    pub(crate) fn known_models(&self) -> Option<Arc<v1::ListResponse>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The canonical id behind a client's name for a model; empty for the default one, which only the daemon knows for sure.
    pub(crate) async fn resolve(&self, requested: &str) -> Result<String, Failure> {
        if models::is_default(requested) {
            return self.greet().await.map(|()| String::new());
        }
        if let Some(model) = self.known_models().as_ref().and_then(|list| models::exact(requested, list)) {
            return Ok(model.id.clone());
        }
        // A closer one may have been installed since.
        let list = self.models().await?;
        models::resolve(requested, &list).map(|model| model.id.clone()).ok_or_else(|| models::not_found(requested, &list))
    }

    /// Opens a generation. To be loaded, a model has [`Timing::load_wait`]; whoever waits for what comes before it, [`Timing::queue_wait`].
    async fn generate(&self, request: v1::GenerateRequest, timing: Timing) -> Result<Streaming<v1::GenerateEvent>, Failure> {
        let model = request.model.clone();
        let mut client = GenerateClient::new(self.channel.clone());
        let mut call = std::pin::pin!(client.generate(request));
        let look = LOOK.min(timing.load_wait).min(timing.queue_wait);
        let (mut loading, mut queued) = (Duration::ZERO, Duration::ZERO);
        loop {
            let since = Instant::now();
            if let Ok(outcome) = timeout(look, &mut call).await {
                return outcome.map(Response::into_inner).map_err(|status| self.failed(&status));
            }
            let loads = |loaded: &v1::LoadedModel| loaded.state() == Loading::Loading && (model.is_empty() || model == loaded.id);
            let (waited, most, code) = match self.stats().await {
                Ok(snapshot) if snapshot.model.as_ref().is_some_and(loads) => (&mut loading, timing.load_wait, Code::ModelLoading),
                _ => (&mut queued, timing.queue_wait, Code::QueueTimeout),
            };
            *waited += since.elapsed();
            if *waited >= most {
                return Err(too_late(code));
            }
        }
    }

    /// A conversation's tokens; needs no place in the daemon's queue.
    pub(crate) async fn count(&self, request: v1::TokenizeRequest, patience: Duration) -> Result<v1::TokenizeResponse, Failure> {
        let mut client = GenerateClient::new(self.channel.clone());
        match timeout(patience, client.tokenize(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failed(&status)),
            Err(_) => Err(too_late(Code::ModelLoading)),
        }
    }

    /// What a listing leaves out of an installed model.
    pub(crate) async fn show(&self, model: &str) -> Result<v1::ShowResponse, Failure> {
        self.short(|channel| async move { ModelsClient::new(channel).show(v1::ShowRequest { model: model.to_owned() }).await }).await
    }

    /// Loads a model, or puts a loaded one's end off.
    pub(crate) async fn load(&self, model: &str, keep_alive: Option<String>, patience: Duration) -> Result<(), Failure> {
        let request = v1::LoadRequest { model: model.to_owned(), keep_alive, ..Default::default() };
        let mut client = ModelsClient::new(self.channel.clone());
        match timeout(patience, client.load(request)).await {
            Ok(outcome) => outcome.map(drop).map_err(|status| self.failed(&status)),
            Err(_) => Err(too_late(Code::ModelLoading)),
        }
    }

    /// Drops a model when it is idle.
    pub(crate) async fn unload(&self, model: &str, patience: Duration) -> Result<(), Failure> {
        let request = v1::UnloadRequest { model: model.to_owned(), force: false };
        let mut client = ModelsClient::new(self.channel.clone());
        match timeout(patience, client.unload(request)).await {
            Ok(outcome) => outcome.map(drop).map_err(|status| self.failed(&status)),
            Err(_) => Err(too_late(Code::Busy)),
        }
    }

    /// A call that is not ours, as it is.
    pub(crate) async fn forward(&self, request: http::Request<tonic::body::Body>) -> Result<http::Response<tonic::body::Body>, Failure> {
        let mut channel = self.channel.clone();
        let lost = |error: tonic::transport::Error| self.failed(&Status::from_error(error.into()));
        poll_fn(|context| channel.poll_ready(context)).await.map_err(lost)?;
        channel.call(request).await.map_err(lost)
    }

    /// A call that may be repeated: once more if the connection turned out to be a dead one.
    async fn short<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut again = true;
        loop {
            match timeout(SHORT_CALL, call(self.channel.clone())).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if again && flash_proto::code::of(&status).is_none() => again = false,
                Ok(Err(status)) => return Err(self.failed(&status)),
                Err(_) => return Err(error::daemon_down()),
            }
        }
    }

    fn failed(&self, status: &Status) -> Failure {
        let failure = error::of_status(status);
        if failure.code == Code::DaemonUnavailable {
            self.greeted.store(false, Ordering::Relaxed);
            tracing::debug!(%status, "lost the daemon");
        }
        failure
    }
}

fn too_late(code: Code) -> Failure {
    Failure::new(code, "the request waited too long; try again later")
}

type Opening = Pin<Box<dyn Future<Output = Result<Streaming<v1::GenerateEvent>, Failure>> + Send>>;

enum State {
    Opening(Opening),
    Open(Box<Streaming<v1::GenerateEvent>>),
    Over,
}

/// One generation: events in order, deadlines for the wait before them, and the account of how it went.
struct Feed {
    app: Arc<App>,
    state: State,
    /// When patience with the queue ends.
    deadline: Option<Instant>,
    arrived: Instant,
    last_text: Option<Instant>,
    /// Why it was cancelled, should it be dropped before its end.
    reason: &'static str,
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Feed").field("arrived", &self.arrived).field("reason", &self.reason).finish_non_exhaustive()
    }
}

impl Feed {
    fn open(app: &Arc<App>, request: v1::GenerateRequest, arrived: Instant) -> Self {
        let asked = app.clone();
        let state = State::Opening(Box::pin(async move { asked.upstream.generate(request, asked.config.timing).await }));
        Self { app: app.clone(), state, deadline: None, arrived, last_text: None, reason: "client_gone" }
    }

    /// The next event; [`Event::Done`] is the last one. May be dropped and called again: nothing is lost.
    async fn next(&mut self) -> Result<Event, Failure> {
        let event = match self.deadline {
            Some(at) => match tokio::time::timeout_at(at, self.pull()).await {
                Ok(event) => event,
                Err(_) => Err(too_late(Code::QueueTimeout)),
            },
            None => self.pull().await,
        };
        match event {
            Ok(event) => {
                self.account(&event);
                Ok(event)
            }
            Err(failure) => {
                self.state = State::Over;
                Err(failure)
            }
        }
    }

    async fn pull(&mut self) -> Result<Event, Failure> {
        loop {
            let pulled = match &mut self.state {
                State::Opening(opening) => {
                    self.state = State::Open(Box::new(opening.await?));
                    continue;
                }
                State::Open(stream) => stream.message().await,
                State::Over => Ok(None),
            };
            return match pulled {
                Ok(Some(v1::GenerateEvent { event: Some(Event::Failed(failed)) })) => Err(error::of_failed(&failed)),
                Ok(Some(v1::GenerateEvent { event: Some(event) })) => Ok(event),
                // An event of a later version.
                Ok(Some(v1::GenerateEvent { event: None })) => continue,
                Ok(None) => Err(error::daemon_down()),
                Err(status) => Err(self.app.upstream.failed(&status)),
            };
        }
    }

    fn account(&mut self, event: &Event) {
        let metrics: &Metrics = &self.app.metrics;
        match event {
            Event::Accepted(_) => self.deadline = Some(Instant::now() + self.app.config.timing.queue_wait),
            Event::Progress(progress) if progress.phase() == Phase::Queued => {}
            Event::Progress(_) | Event::Prompt(_) | Event::Failed(_) | Event::Routing(_) => self.deadline = None,
            Event::Text(_) | Event::ToolCall(_) => {
                self.deadline = None;
                let now = Instant::now();
                match self.last_text.replace(now) {
                    Some(last) => metrics.inter_token.observe((now - last).as_secs_f64()),
                    None => metrics.ttft.observe((now - self.arrived).as_secs_f64()),
                }
            }
            Event::Done(done) => {
                self.state = State::Over;
                let usage = done.usage.unwrap_or_default();
                metrics.prompt_tokens.inc_by(usage.prompt_tokens.into());
                metrics.cached_tokens.inc_by(usage.cached_tokens.into());
                metrics.generated_tokens.inc_by(usage.completion_tokens.into());
            }
        }
    }
}

/// The generations of one request: one for each choice, their events as they come.
#[derive(Debug)]
pub(crate) struct Feeds {
    feeds: Vec<Feed>,
    /// Which one is asked first the next time, so that a quick one does not silence the others.
    turn: usize,
}

impl Feeds {
    pub(crate) fn open(app: &Arc<App>, requests: Vec<v1::GenerateRequest>, arrived: Instant) -> Self {
        Self { feeds: requests.into_iter().map(|request| Feed::open(app, request, arrived)).collect(), turn: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.feeds.len()
    }

    /// Whether every one has had its last event.
    pub(crate) fn over(&self) -> bool {
        self.feeds.iter().all(|feed| matches!(feed.state, State::Over))
    }

    /// Notes why they will be dropped before their end.
    pub(crate) fn reason(&mut self, reason: &'static str) {
        self.feeds.iter_mut().for_each(|feed| feed.reason = reason);
    }

    /// The next event of any that is not over, and whose it is. May be dropped and called again: nothing is lost.
    pub(crate) async fn next(&mut self) -> Result<(usize, Event), Failure> {
        let count = self.feeds.len();
        let mut waiting: Vec<_> = self
            .feeds
            .iter_mut()
            .enumerate()
            .filter(|(_, feed)| !matches!(feed.state, State::Over))
            .map(|(index, feed)| (index, Box::pin(feed.next())))
            .collect();
        waiting.sort_by_key(|(index, _)| (index + count - self.turn) % count);
        let next = poll_fn(|context| {
            let ready = waiting.iter_mut().find_map(|(index, next)| match next.as_mut().poll(context) {
                Poll::Ready(event) => Some((*index, event)),
                Poll::Pending => None,
            });
            ready.map_or(Poll::Pending, Poll::Ready)
        });
        let (index, event) = next.await;
        drop(waiting);
        self.turn = (index + 1) % count;
        if event.is_err() {
            self.reason("sibling_failed");
        }
        event.map(|event| (index, event))
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if !matches!(self.state, State::Over) {
            self.app.metrics.cancelled(self.reason);
        }
    }
}
