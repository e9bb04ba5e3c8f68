//! flashd: the async shell around `flash_engine::Engine`. [`run`] is what both the binary and the tests call; see
//! `ARCHITECTURE.md`. No maths, no file formats, no HTTP.

mod catalog;
mod config;
mod error;
mod folders;
mod hot;
mod jobs;
mod pressure;
mod service;
mod sessions;
mod shutdown;
mod stats;
mod worker;

use std::{future::Future, os::unix::net::UnixListener, pin::pin, sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

pub use config::{Config, KeepAlive, LogFormat, RawConfig, Setting, Text};
pub use error::Error;
pub use shutdown::{DRAIN, Signals};

use service::Daemon;

/// After the drain, what clients get to read their last bytes.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// Serves until `shutdown` (or an Admin.Shutdown call), lets running requests finish for [`DRAIN`] (or the call's grace),
/// and returns when everything is given back. Dropping the future ends it at once.
pub async fn run(config: Config, listener: UnixListener, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    let listener = tokio::net::UnixListener::from_std(listener).map_err(Error::Listen)?;
    let daemon = Arc::new(Daemon::start(config)?);
    let stop = watch::Sender::new(false);
    let mut stopped = stop.subscribe();
    let (connections, incoming) = mpsc::channel(16);
    // Goes on during the drain, so that new requests hear of it.
    let _accepting = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(accept(listener, connections)));
    let server = service::router(&daemon, &stop).serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
        // A closed channel means that run itself is gone.
        let _ = stopped.wait_for(|stop| *stop).await;
    });
    let mut server = pin!(server);
    tokio::select! {
        result = &mut server => return result.map_err(Error::from),
        () = shutdown => daemon.drain.begin(DRAIN),
        _ = daemon.drain.shorter(Duration::MAX) => {}
    }
    tokio::select! {
        result = &mut server => return result.map_err(Error::from),
        () = drain(&daemon) => {}
    }
    tokio::select! {
        result = &mut server => return result.map_err(Error::from),
        () = async { tokio::join!(daemon.jobs.stop(), daemon.worker.stop()); } => {}
    }
    stop.send_replace(true);
    if let Ok(result) = tokio::time::timeout(LAST_BYTES, server).await {
        result?;
    }
    tracing::info!("stopped");
    Ok(())
}

/// Waits for the live requests and jobs, at most as long as the shortest grace asked for.
async fn drain(daemon: &Daemon) {
    let mut grace = daemon.drain.shorter(Duration::MAX).await;
    let begun = tokio::time::Instant::now();
    tracing::info!(seconds = grace.as_secs_f64(), requests = daemon.sessions.list().len(), "draining");
    loop {
        tokio::select! {
            () = async { tokio::join!(daemon.sessions.empty(), daemon.jobs.none()); } => return,
            () = tokio::time::sleep_until(begun + grace) => break,
            shorter = daemon.drain.shorter(grace) => grace = shorter,
        }
    }
    for session in daemon.sessions.list() {
        tracing::warn!(request = session.request_id, seconds = session.since.elapsed().as_secs_f64(), "cut off by the shutdown");
    }
}

/// Accepts connections of the daemon's own user and drops all others.
async fn accept(listener: tokio::net::UnixListener, connections: mpsc::Sender<std::io::Result<tokio::net::UnixStream>>) {
    let own = rustix::process::geteuid().as_raw();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, most likely: accepting again at once would only spin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == own => {
                if connections.send(Ok(stream)).await.is_err() {
                    return;
                }
            }
            Ok(peer) => tracing::warn!(uid = peer.uid(), "refused a connection of another user"),
            Err(error) => tracing::warn!(%error, "refused a connection that does not say whose it is"),
        }
    }
}
