//! `flashctl convert`: packs a model's experts. What that means and whether it can be done is the daemon's to say.

use flash_proto::v1::ConvertRequest;
use serde_json::json;

use crate::{
    args::{ConvertArgs, Global},
    connect::connect,
    failure::Failure,
    job, load, render, term,
};

pub(crate) async fn run(args: ConvertArgs, global: &Global) -> Result<(), Failure> {
    let daemon = connect(global).await?;
    let request = ConvertRequest { model: load::model_name(&args.model), in_place: args.in_place };
    let done = job::follow(&daemon, daemon.models().convert(request).await, "packing", global).await?;
    if global.json {
        let (records, bytes, seconds) = (done.records, done.bytes, done.seconds);
        let value = json!({"event": "done", "name": done.model, "path": done.path, "records": records, "bytes": bytes, "seconds": seconds});
        return term::print_json(&value);
    }
    let (bytes, seconds) = (render::bytes(done.bytes), render::seconds(done.seconds));
    term::println(&format!("packed {}: {} experts, {bytes}, in {seconds} into {}", done.model, done.records, done.path))
}
