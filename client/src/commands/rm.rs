//! `flashctl rm`: deletes a model, asking first. Only an exact name will do: what finds a model that is to be read must not find one that is
//! to be deleted.

use std::io::{self, BufRead, IsTerminal};

use flash_proto::v1::{ListRequest, RemoveRequest};
use serde_json::json;

use crate::{
    args::{Global, RmArgs},
    connect::connect,
    failure::{Failure, exit},
    render, term,
};

pub(crate) async fn run(args: RmArgs, global: &Global) -> Result<(), Failure> {
    let daemon = connect(global).await?;
    let failed = |status| daemon.failure(&status, "deleting a model");
    let list = daemon.models().list(ListRequest {}).await.map_err(failed)?.into_inner();
    let found = list.models.iter().find(|model| model.id == args.model || model.path == args.model);
    let Some(model) = found else {
        let names: Vec<&str> = list.models.iter().map(|model| model.id.as_str()).collect();
        let failure = Failure::new(exit::GENERIC, "model_not_found", format!("no model is named exactly `{}`", args.model));
        return Err(failure.hint(format!("installed: {}", if names.is_empty() { "none".into() } else { names.join(", ") })));
    };
    let what = format!("{} ({}, {})", model.id, render::bytes(model.disk_bytes), model.path);
    if !args.yes && !agreed(&what).await? {
        term::note("nothing was deleted");
        return Err(Failure::silent(exit::GENERIC));
    }
    let removed = daemon.models().remove(RemoveRequest { model: model.path.clone() }).await.map_err(failed)?.into_inner();
    if global.json {
        return term::print_json(&json!({"name": model.id, "path": removed.path, "bytes": removed.bytes}));
    }
    term::println(&format!("deleted {}, {}", model.id, render::bytes(removed.bytes)))
}

async fn agreed(what: &str) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        let failure = Failure::new(exit::BAD_DATA, "confirmation", format!("{what} is not deleted without being asked"));
        return Err(failure.hint("--yes says so where nobody can answer"));
    }
    term::note_part(&format!("Delete {what}? [y/N] "));
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    let line = answer.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    let line = line.map_err(|error| Failure::new(exit::NO_INPUT, "input", format!("cannot read the answer: {error}")))?;
    Ok(matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
