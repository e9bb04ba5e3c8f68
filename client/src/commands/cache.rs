//! `flashctl cache clear`: forgets what the daemon keeps of earlier prompts. Starts one if none runs: what is on disk is its business.

use flash_proto::v1::ClearCacheRequest;
use serde_json::json;

use crate::{
    args::{CacheCommand, Global},
    connect::connect,
    failure::Failure,
    render, term,
};

pub(crate) async fn run(command: CacheCommand, global: &Global) -> Result<(), Failure> {
    let CacheCommand::Clear = command;
    let daemon = connect(global).await?;
    let cleared = daemon.admin().clear_cache(ClearCacheRequest {}).await;
    let cleared = cleared.map_err(|status| daemon.failure(&status, "clearing the cache"))?.into_inner();
    if global.json {
        return term::print_json(&json!({"memory_bytes": cleared.memory_bytes, "files": cleared.files, "disk_bytes": cleared.disk_bytes}));
    }
    let (memory, disk) = (render::bytes(cleared.memory_bytes), render::bytes(cleared.disk_bytes));
    term::println(&format!("cleared {memory} of memory and {} files, {disk}, on disk", cleared.files))
}
