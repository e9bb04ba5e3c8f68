//! flash-gateway over real sockets: raw HTTP in front, a scripted gRPC daemon behind. Nothing here knows the gateway's
//! insides; pure translation is tested beside the code.

mod chat;
mod client;
mod edge;
mod fake;
mod lifecycle;

use std::{future::Future, net::SocketAddr, time::Duration};

use flash_gateway::{Config, Timing, serve};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle, time::timeout};

use crate::fake::Fake;

/// Waits for what must happen; a test that hangs says where.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.unwrap_or_else(|_| panic!("{what} did not happen"))
}

/// No timer of the gateway fires in a test unless the test sets it.
fn patient() -> Timing {
    let long = Duration::from_secs(600);
    Timing {
        header: long,
        body_idle: long,
        keep_alive: long,
        write_stall: long,
        heartbeat: long,
        commit: long,
        coalesce: Duration::ZERO,
        load_wait: long,
        queue_wait: long,
        drain: long,
    }
}

struct Gateway {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Gateway {
    async fn start(fake: &Fake) -> Self {
        Self::with(fake, |_| {}).await
    }

    async fn with(fake: &Fake, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config {
            socket: fake.socket(),
            keys: Vec::new(),
            hosts: vec!["127.0.0.1".into()],
            origins: Vec::new(),
            strict_fields: false,
            timing: patient(),
        };
        change(&mut config);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(serve(config, listener, async {
            let _ = stopped.await;
        }));
        Self { address, stop: Some(stop), task }
    }

    fn stop(&mut self) {
        self.stop.take().expect("stopped once").send(()).expect("the gateway is listening for it");
    }
}
