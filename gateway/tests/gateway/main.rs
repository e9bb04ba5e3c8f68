//! flash-gateway over real sockets: raw HTTP in front, a scripted gRPC daemon behind. Nothing here knows the gateway's
//! insides; pure translation is tested beside the code.

mod chat;
mod client;
mod compat;
mod edge;
mod fake;
mod lifecycle;
mod messages;
mod responses;
mod tools;

use std::{future::Future, net::SocketAddr, path::Path, time::Duration};

use flash_gateway::{
    Config, Timing,
    config::{Compat, ReasoningField},
    serve,
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle, time::timeout};

use crate::fake::Fake;

/// Waits for what must happen; a test that hangs says where.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.unwrap_or_else(|_| panic!("{what} did not happen"))
}

/// Compares with a file; UPDATE_EXPECT=1 rewrites it.
fn expect(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gateway/fixtures").join(name);
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(&path, found).expect("a writable fixture");
    }
    assert_eq!(found, std::fs::read_to_string(&path).expect("the fixture"), "{name}");
}

/// A transcript without what differs from run to run: the 24 digits that every id is made of, and times.
fn timeless(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_hexdigit()) {
        let (before, from) = rest.split_at(at);
        let length = from.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(from.len());
        let (digits, after) = from.split_at(length);
        out.push_str(before);
        let time = length == 10 && ["\"created\":", "\"created_at\":"].iter().any(|key| out.ends_with(key));
        out.push_str(match length {
            24 => "1",
            _ if time => "0",
            _ => digits,
        });
        rest = after;
    }
    out + rest
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
            aliases: Vec::new(),
            strict_fields: false,
            reasoning_field: ReasoningField::ReasoningContent,
            compat: vec![Compat::Ollama, Compat::Lmstudio],
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
