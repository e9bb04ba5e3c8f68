//! `flashctl stop`: unloads a model; the daemon stays. Nothing loaded, or no daemon, is as good.

use flash_proto::v1::UnloadRequest;
use serde_json::json;

use crate::{
    args::{Global, StopArgs},
    connect,
    failure::Failure,
    load, term,
};

pub(crate) async fn run(args: StopArgs, global: &Global) -> Result<(), Failure> {
    let model = if args.all { None } else { args.model.as_deref() };
    let was_loaded = match connect::running(global).await? {
        Some(daemon) => {
            let request = UnloadRequest { model: model.map(load::model_name).unwrap_or_default(), force: args.force };
            let answer = daemon.models().unload(request).await;
            answer.map_err(|status| daemon.failure(&status, "unloading the model"))?.into_inner().was_loaded
        }
        None => false,
    };
    if global.json {
        return term::print_json(&json!({"was_loaded": was_loaded}));
    }
    match (was_loaded, model) {
        (true, Some(model)) => term::println(&format!("unloaded {model}")),
        (true, None) => term::println("unloaded"),
        (false, Some(model)) => term::println(&format!("{model} is not loaded")),
        (false, None) => term::println("nothing is loaded"),
    }
}
