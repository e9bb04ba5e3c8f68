//! Makes a model ready, with the settings of the command line, showing progress and the daemon's warnings. Used by every
//! command that generates, and by `load` and `serve`.

use std::path::{Path, absolute};

use flash_proto::v1::{LoadRequest, LoadResponse, StatsRequest};
use tokio::time::interval;

use crate::{
    args::{Global, Settings},
    connect::Daemon,
    failure::Failure,
    render,
    term::{self, Paint, StatusLine},
};

/// Loads `model`, or changes the settings of the loaded one.
pub(crate) async fn load(daemon: &Daemon, model: &str, settings: &Settings, global: &Global) -> Result<LoadResponse, Failure> {
    let request = LoadRequest {
        model: name_there(model, global),
        expert_cache: settings.expert_cache.clone(),
        memory: settings.memory.clone(),
        context_length: settings.ctx.clone(),
        keep_alive: settings.keep_alive.clone(),
    };
    let mut line = StatusLine::new(global.quiet);
    let (mut models, mut admin) = (daemon.models(), daemon.admin());
    let loading = models.load(request);
    tokio::pin!(loading);
    let mut tick = interval(StatusLine::PERIOD);
    tick.tick().await;
    let response = loop {
        tokio::select! {
            response = &mut loading => break response,
            _ = tick.tick(), if line.is_visible() => {
                // Progress is a courtesy: if Stats fails, Load says why.
                let progress = admin.stats(StatsRequest {}).await.ok().and_then(|stats| stats.into_inner().model);
                match progress {
                    Some(model) if model.state() == flash_proto::v1::loaded_model::State::Loading => {
                        line.show(&format!("loading {} {}", model.id, render::percent(model.progress)));
                    }
                    _ => line.show(&format!("loading {model}")),
                }
            }
        }
    };
    line.clear();
    let response = response.map_err(|status| daemon.failure(&status, "loading the model"))?.into_inner();
    if !global.quiet {
        for warning in &response.warnings {
            term::note(&Paint::stderr().dim(&format!("warning: {warning}")));
        }
    }
    Ok(response)
}

/// As [`model_name`], unless another machine is asked, which has paths of its own.
pub(crate) fn name_there(model: &str, global: &Global) -> String {
    if global.gateway.is_some() { model.into() } else { model_name(model) }
}

/// A path means the same to the daemon, which has another working directory; a name stays a name.
pub(crate) fn model_name(model: &str) -> String {
    let is_path = (model.contains('/') || model.starts_with('.')) && Path::new(model).exists();
    let whole = is_path.then(|| absolute(model).ok()?.into_os_string().into_string().ok()).flatten();
    whole.unwrap_or_else(|| model.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_absolute_and_names_stay() {
        let here = std::env::current_dir().expect("a working directory");
        let check = |model: &str, expected: &str| assert_eq!(name_there(model, &Global::default()), expected);
        check("local", "local");
        check("src", "src");
        check("mlx-community/Nothing-Here-4bit", "mlx-community/Nothing-Here-4bit");
        check("./src", here.join("src").to_str().expect("UTF-8"));
        check("/", "/");
        let there = Global { gateway: Some(crate::url::Url::default()), ..Global::default() };
        assert_eq!(name_there("./src", &there), "./src");
    }
}
