//! Generate and Tokenize: prepare the request off the engine's thread, admit it, stream its events. A dropped stream is
//! the cancellation; a slow one pauses its own request. Wire types meet engine types in `convert.rs` only.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use flash_engine::{Event, Text};
use flash_proto::{code, v1};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, Interval, MissedTickBehavior, Sleep, interval, sleep},
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use super::{Daemon, convert};
use crate::{
    Error,
    sessions::Guard,
    worker::{Command, EVENTS, EVENTS_SPARE, Generate},
};

/// A waiting client hears from us this often.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// After a token's event, those that follow within this time go together: to wake us and the reader for each would take more of
/// two cores than a small model's token. The first one never waits.
const GATHER: Duration = Duration::from_millis(1);

pub(super) struct Service {
    pub(super) daemon: Arc<Daemon>,
}

#[tonic::async_trait]
impl v1::generate_server::Generate for Service {
    type GenerateStream = Events;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        if self.daemon.drain.begun() {
            return Err(self.daemon.refused(&Error::Draining));
        }
        let (guard, request_id) = self.daemon.sessions.enter(&request.request_id, &self.daemon.worker);
        let span = tracing::info_span!("generate", request = request_id);
        self.start(request, guard, span.clone()).instrument(span).await.map(Response::new)
    }

    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let daemon = &self.daemon;
        let tokenize = async {
            let prompt = convert::tokenize_prompt(request.prompt)?;
            let model = daemon.catalog.resolve(&request.model).await?;
            let text = daemon.text(&model).await?;
            let ids = daemon.catalog.encode(move || prompt.encode(&text)).await?;
            let context_length = convert::u32(daemon.context_length(&model).await);
            Ok(v1::TokenizeResponse { model: model.id, ids, context_length })
        };
        tokenize.await.map(Response::new).map_err(|error: Error| convert::status(&error))
    }
}

impl Service {
    /// Everything up to the first event. Whatever is refused is refused here.
    async fn start(&self, request: v1::GenerateRequest, guard: Guard, span: tracing::Span) -> Result<Events, Status> {
        let daemon = &self.daemon;
        let prepared = async {
            convert::together(&request, &daemon.worker.state().options)?;
            let wanted = convert::generate(request)?;
            let model = daemon.catalog.resolve(&wanted.model).await?;
            let text = daemon.text(&model).await?;
            let sampling = wanted.sampling.over(text.sampling(), text.vocab_size())?;
            let (asked, format, side) = (wanted.prompt, wanted.format, text.clone());
            let context = daemon.context_length(&model).await;
            let prepared = daemon.catalog.encode(move || asked.prepare(format.as_ref(), &side, context)).await?;
            let convert::Prepared { tokens, reply, grammar } = prepared;
            daemon.totals.grammar(grammar, reply.relaxed());
            Ok((wanted.rest.request(tokens, reply, sampling), wanted.keep_alive, model, text))
        };
        let (request, keep_alive, model, text) = prepared.await.map_err(|error: Error| daemon.refused(&error))?;
        let prompt_tokens = convert::u32(request.prompt.len());
        let (events, receiver) = mpsc::channel(EVENTS + EVENTS_SPARE);
        let (reply, admitted) = oneshot::channel();
        let command = Generate { model: model.clone(), request, keep_alive, events, reply, span };
        daemon.worker.send(Command::Generate(Box::new(command))).map_err(|error| daemon.refused(&error))?;
        let admitted = match admitted.await {
            Ok(Ok(admitted)) => admitted,
            // The worker has counted these.
            Ok(Err(error)) => return Err(convert::status(&error)),
            Err(_) => return Err(daemon.refused(&Error::Draining)),
        };
        daemon.catalog.forget_text(&model);
        tracing::info!(model = model.id, prompt_tokens, position = admitted.position, "accepted");
        let accepted = convert::accepted(model.id, prompt_tokens, admitted);
        let progress = v1::Progress { phase: v1::progress::Phase::Queued.into(), done_tokens: 0, total_tokens: prompt_tokens };
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.reset();
        Ok(Events {
            accepted: Some(accepted),
            receiver,
            progress: Some(progress),
            parts: VecDeque::new(),
            heartbeat,
            gather: Box::pin(sleep(GATHER)),
            gathers: false,
            text,
            ended: false,
            guard,
        })
    }
}

/// The stream a client reads.
#[derive(Debug)]
pub(super) struct Events {
    accepted: Option<v1::GenerateEvent>,
    receiver: mpsc::Receiver<Result<Event, Error>>,
    /// Repeated while nothing else is to be said; `None` once text flows.
    progress: Option<v1::Progress>,
    /// Messages of an event that takes more than one.
    parts: VecDeque<v1::GenerateEvent>,
    heartbeat: Interval,
    gather: Pin<Box<Sleep>>,
    /// Until `gather` has passed.
    gathers: bool,
    text: Arc<Text>,
    ended: bool,
    guard: Guard,
}

impl Stream for Events {
    type Item = Result<v1::GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(accepted) = this.accepted.take() {
            return Poll::Ready(Some(Ok(accepted)));
        }
        if let Some(part) = this.parts.pop_front() {
            return Poll::Ready(Some(Ok(part)));
        }
        if this.ended {
            return Poll::Ready(None);
        }
        if this.gathers {
            ready!(this.gather.as_mut().poll(cx));
            this.gathers = false;
        }
        let event = match (this.receiver.poll_recv(cx), &this.progress) {
            (Poll::Ready(event), _) => event,
            (Poll::Pending, Some(progress)) => {
                ready!(this.heartbeat.poll_tick(cx));
                return Poll::Ready(Some(Ok(convert::progress(*progress))));
            }
            (Poll::Pending, None) => return Poll::Pending,
        };
        // A paused request goes on when half of its channel is free; nothing is sent meanwhile, so this count is passed.
        if this.receiver.len() == EVENTS / 2 {
            this.guard.wake();
        }
        let event = match event {
            Some(Ok(Event::Prefill { done, total })) => {
                let progress = convert::prefill(done, total);
                this.progress = Some(progress);
                this.heartbeat.reset();
                convert::progress(progress)
            }
            Some(Ok(Event::Prompt(logprobs))) => {
                this.parts = convert::prompt(logprobs, &this.text);
                return self.poll_next(cx);
            }
            Some(Ok(Event::Token { parts, logprobs, channel })) => {
                this.progress = None;
                if this.receiver.is_empty() {
                    this.gather.as_mut().reset(Instant::now() + GATHER);
                    this.gathers = true;
                }
                this.parts = convert::token(parts, logprobs, channel, &this.text);
                return self.poll_next(cx);
            }
            Some(Ok(Event::Routing { tokens, layers, ids })) => {
                this.parts = convert::routing(&tokens, layers, &ids);
                return self.poll_next(cx);
            }
            Some(Ok(Event::Done(done))) => {
                this.ended = true;
                convert::done(done)
            }
            Some(Ok(Event::Failed(error))) => this.fail(&Error::Engine(error)),
            Some(Err(error)) => this.fail(&error),
            None => this.fail(&Error::Panicked("the engine's thread is gone".into())),
        };
        Poll::Ready(Some(Ok(event)))
    }
}

impl Drop for Events {
    /// Before the receiver goes: who then finds nothing running finds no request either. The guard, which goes after it, wakes the engine.
    fn drop(&mut self) {
        self.guard.leave();
    }
}

impl Events {
    fn fail(&mut self, error: &Error) -> v1::GenerateEvent {
        self.ended = true;
        let status = convert::status(error);
        convert::failed(code::of(&status).unwrap_or(code::ENGINE), status.message())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, ffi::OsString};

    use flash_proto::v1::{generate_event::Event as Said, generate_server::Generate as _};
    use tokio_stream::StreamExt;

    use super::*;
    use crate::{Config, RawConfig};

    fn request(max_tokens: u32) -> Request<v1::GenerateRequest> {
        Request::new(v1::GenerateRequest {
            prompt: Some(v1::generate_request::Prompt::Text("Once upon a time".into())),
            sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..Default::default()
        })
    }

    async fn finish(mut events: Events) -> v1::Done {
        while let Some(event) = events.next().await {
            match event.expect("no status").event.expect("an event") {
                Said::Done(done) => return done,
                Said::Failed(failed) => panic!("{failed:?}"),
                _ => {}
            }
        }
        panic!("the stream ended without Done");
    }

    /// Without a network in between, whose windows would take thousands of events.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_slow_reader_pauses_only_itself_and_loses_nothing() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let set = [("FLASH_SOCKET", "unused"), ("FLASH_MODEL", "flash-tiny-moe"), ("FLASH_THREADS", "1")];
        let mut env: HashMap<&str, OsString> = set.iter().map(|(name, value)| (*name, OsString::from(value))).collect();
        env.insert("FLASH_HOME", home.path().into());
        let config = Config::resolve(RawConfig::default(), &|name| env.get(name).cloned()).expect("a good configuration");
        let service = Service { daemon: Arc::new(Daemon::start(config).expect("a daemon")) };
        let generate = async |tokens| service.generate(request(tokens)).await.expect("accepted").into_inner();
        let fast = finish(generate(400).await).await;
        let slow = generate(400).await;
        let full = async {
            while slow.receiver.len() < EVENTS {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), full).await.expect("a full channel");
        // Others go on, and as long as nobody reads it the slow one stands still.
        finish(generate(200).await).await;
        assert_eq!(slow.receiver.len(), EVENTS);
        let slow = tokio::time::timeout(Duration::from_secs(60), finish(slow)).await.expect("a resumed request");
        assert_eq!(slow.token_ids, fast.token_ids);
    }
}
