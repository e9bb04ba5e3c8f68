//! `flashctl verify`: has the daemon read every record of a packed model, and says which are not what was written.

use flash_proto::v1::VerifyRequest;
use serde_json::json;

use crate::{
    args::{Global, VerifyArgs},
    connect::connect,
    failure::{Failure, exit},
    job, load, render, term,
};

/// Bad records that are named; a disk that lost them all needs no longer list.
const NAMED: usize = 20;

pub(crate) async fn run(args: VerifyArgs, global: &Global) -> Result<(), Failure> {
    let daemon = connect(global).await?;
    let request = VerifyRequest { model: load::model_name(&args.model) };
    let done = job::follow(&daemon, daemon.models().verify(request).await, "verifying", global).await?;
    if global.json {
        let value = json!({
            "event": "done", "ok": done.bad.is_empty(), "name": done.model, "path": done.path, "records": done.records,
            "bytes": done.bytes, "seconds": done.seconds, "bad": done.bad,
        });
        term::print_json(&value)?;
        return if done.bad.is_empty() { Ok(()) } else { Err(Failure::silent(exit::GENERIC)) };
    }
    let size = format!("{} records, {}, in {}", done.records, render::bytes(done.bytes), render::seconds(done.seconds));
    if done.bad.is_empty() {
        return term::println(&format!("{} is as it was written: {size}", done.model));
    }
    for bad in done.bad.iter().take(NAMED) {
        term::println(bad)?;
    }
    if let Some(more @ 1..) = done.bad.len().checked_sub(NAMED) {
        term::println(&format!("… and {more} more"))?;
    }
    let failure =
        Failure::new(exit::GENERIC, "records_bad", format!("{} of {} records of {} are bad", done.bad.len(), done.records, done.model));
    Err(failure.hint("pack the model again from its checkpoint, or copy experts.flash again; a disk that does this twice is failing"))
}
