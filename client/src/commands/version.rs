//! `flashctl version`: both sides, whether they understand each other or not.

use flash_proto::PROTOCOL_VERSION;
use serde_json::json;

use crate::{args::Global, connect, failure::Failure, json, term};

pub(crate) async fn run(global: &Global) -> Result<(), Failure> {
    let ours = env!("CARGO_PKG_VERSION");
    let daemon = connect::find(global).await?.map(|daemon| daemon.version);
    if global.json {
        let daemon = daemon.as_ref().map(json::version);
        return term::print_json(&json!({"version": ours, "protocol": PROTOCOL_VERSION, "daemon": daemon}));
    }
    let theirs = daemon.map_or("no daemon is running".into(), |daemon| {
        format!("flashd {} (protocol {}, pid {}, {})", daemon.version, daemon.protocol, daemon.pid, daemon.kernels)
    });
    term::println(&format!("flashctl {ours} (protocol {PROTOCOL_VERSION})\n{theirs}"))
}
