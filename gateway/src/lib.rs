//! flash-gateway: the HTTP APIs of OpenAI, Anthropic and Ollama in front of flashd. It translates and guards; it knows no
//! models, and all it keeps between requests is a bounded store of responses. [`serve`] is what `main.rs` and the tests call.

mod anthropic;
mod ask;
mod body;
mod call;
pub mod config;
mod error;
mod guard;
mod io;
mod json;
mod lmstudio;
mod metrics;
mod ollama;
mod openai;
mod ops;
mod remote;
mod reply;
mod router;
mod sse;
mod upstream;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use flash_proto::heap;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Duration, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

pub use config::{Config, Timing};
use error::{Code, Failure};
use io::{Activity, Timed};
use metrics::Metrics;
use openai::responses::store::Store;
use router::Connection;
use upstream::Upstream;

/// After so long without a connection, what they left in the allocator is given back.
const QUIET: Duration = Duration::from_secs(1);

/// What all requests share.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) config: Config,
    pub(crate) upstream: Upstream,
    pub(crate) metrics: Metrics,
    /// Cancelled when shutdown begins: no new work.
    drain: CancellationToken,
    /// Cancelled when patience with running work ends.
    pub(crate) cut: CancellationToken,
    pub(crate) hint_v1_v1: Once,
    guests: Guests,
    /// Responses by which clients may go on.
    pub(crate) responses: Mutex<Store>,
}

impl App {
    pub(crate) fn draining(&self) -> bool {
        self.drain.is_cancelled()
    }

    /// Counts the fields that nobody knows, or refuses them if that is wished.
    pub(crate) fn note_unknown(&self, fields: &[String]) -> Result<(), Failure> {
        for field in fields {
            tracing::debug!(field, "ignored an unknown field");
            self.metrics.unknown_field(field);
        }
        match fields.first().filter(|_| self.config.strict_fields) {
            Some(field) => Err(Failure::at(Code::UnsupportedValue, field, format!("Unknown field: '{field}'."))),
            None => Ok(()),
        }
    }
}

/// Serves until `shutdown` resolves, then drains: running requests finish, new ones are refused, and after
/// [`Timing::drain`] what is left is ended with an error.
pub async fn serve(config: Config, listener: TcpListener, shutdown: impl Future<Output = ()>) -> std::io::Result<()> {
    let bound = listener.local_addr()?.ip();
    let timing = config.timing;
    let app = Arc::new(App {
        upstream: Upstream::new(&config.socket, config.aliases.clone()),
        metrics: Metrics::new(),
        drain: CancellationToken::new(),
        cut: CancellationToken::new(),
        hint_v1_v1: Once::new(),
        guests: Guests::default(),
        responses: Mutex::default(),
        config,
    });
    let server = Server { app: app.clone(), routes: router::router(app.clone()), bound, connections: TaskTracker::new() };
    tokio::select! {
        () = server.accept(&listener) => {}
        () = shutdown => {}
    }
    tracing::info!("draining");
    app.drain.cancel();
    server.connections.close();
    tokio::select! {
        // Those who come now hear that we are going.
        () = server.accept(&listener) => {}
        () = server.connections.wait() => return Ok(()),
        () = sleep(timing.drain) => {}
    }
    app.cut.cancel();
    // Enough to write the last error; who does not read it by then is cut off.
    if timeout(Duration::from_secs(1), server.connections.wait()).await.is_err() {
        tracing::warn!(connections = server.connections.len(), "cut off");
    }
    Ok(())
}

/// Connections: open, and ever opened.
#[derive(Debug, Default)]
struct Guests {
    here: AtomicUsize,
    came: AtomicUsize,
}

/// One of them, until it is dropped.
struct Guest(Arc<App>);

impl Guest {
    fn new(app: Arc<App>) -> Self {
        app.guests.here.fetch_add(1, SeqCst);
        app.guests.came.fetch_add(1, SeqCst);
        Self(app)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.0.guests.here.fetch_sub(1, SeqCst) > 1 {
            return;
        }
        let (app, came) = (self.0.clone(), self.0.guests.came.load(SeqCst));
        tokio::spawn(async move {
            sleep(QUIET).await;
            if app.guests.came.load(SeqCst) == came {
                heap::give_back();
            }
        });
    }
}

struct Server {
    app: Arc<App>,
    routes: axum::Router,
    bound: IpAddr,
    /// Those that shutdown waits for.
    connections: TaskTracker,
}

impl Server {
    async fn accept(&self, listener: &TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if self.app.draining() => drop(tokio::spawn(self.connection(stream, peer))),
                Ok((stream, peer)) => drop(self.connections.spawn(self.connection(stream, peer))),
                Err(error) => {
                    // Out of descriptors, mostly: others must close before another try makes sense.
                    tracing::warn!(%error, "cannot accept");
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    fn connection(&self, stream: TcpStream, peer: SocketAddr) -> impl Future<Output = ()> + Send + 'static {
        let (app, routes) = (self.app.clone(), self.routes.clone());
        let connection = Connection { peer, bound: self.bound, activity: Arc::new(Activity::default()) };
        let guest = Guest::new(app.clone());
        async move {
            let _guest = guest;
            // Events must not wait for each other; a failure only costs latency.
            let _ = stream.set_nodelay(true);
            let io = TokioIo::new(Timed::new(stream, connection.activity.clone(), app.config.timing));
            let uris = app.clone();
            let service = tower::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
                if let Some(uri) = router::canonical(&uris, request.uri()) {
                    let spelled = std::mem::replace(request.uri_mut(), uri);
                    request.extensions_mut().insert(router::Spelled(spelled));
                }
                request.extensions_mut().insert(connection.clone());
                routes.clone().oneshot(request)
            });
            let mut builder = Builder::new(TokioExecutor::new());
            // `Timed` has the clocks for headers and idleness.
            builder.http1().timer(TokioTimer::new()).header_read_timeout(None);
            builder.http2().timer(TokioTimer::new());
            let served = builder.serve_connection(io, TowerToHyperService::new(service));
            tokio::pin!(served);
            // A connection that came during the drain is to hear its refusal first.
            let late = app.draining();
            let outcome = tokio::select! {
                outcome = served.as_mut() => outcome,
                () = app.drain.cancelled(), if !late => {
                    served.as_mut().graceful_shutdown();
                    served.await
                }
            };
            if let Err(error) = outcome {
                tracing::debug!(%peer, error, "connection ended");
            }
        }
    }
}
