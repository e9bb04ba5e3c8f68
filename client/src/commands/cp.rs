//! `flashctl cp`: a model under another name.

use flash_proto::v1::CopyRequest;
use serde_json::json;

use crate::{
    args::{CpArgs, Global},
    connect::connect,
    failure::Failure,
    job, load, render, term,
};

pub(crate) async fn run(args: CpArgs, global: &Global) -> Result<(), Failure> {
    let daemon = connect(global).await?;
    let request = CopyRequest { model: load::model_name(&args.model), name: args.name };
    let done = job::follow(&daemon, daemon.models().copy(request).await, "copying", global).await?;
    if global.json {
        let value = json!({"event": "done", "name": done.model, "path": done.path, "bytes": done.bytes, "seconds": done.seconds});
        return term::print_json(&value);
    }
    term::println(&format!("copied {} to {}, {}", args.model, done.path, render::bytes(done.bytes)))
}
