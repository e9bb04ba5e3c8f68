//! `flashctl launch`: a coding agent on this daemon, with the environment and settings it needs and nothing written where it keeps its own.
//! A gateway that listens already is used; else one is started on a free port, and ends with the agent.

mod agents;
mod gateway;

use std::{
    os::unix::process::{CommandExt, ExitStatusExt},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use flash_proto::{
    socket,
    v1::{TokenizeRequest, tokenize_request},
};
use rustix::process::Signal;
use tokio::signal::unix::SignalKind;

use self::{
    agents::{Endpoint, Setup},
    gateway::Found,
};
use super::{listen, serve, terminations};
use crate::{
    args::{Agent, Global, LaunchArgs, Settings},
    connect::{self, Daemon},
    failure::{Failure, exit},
    files, load, render,
    term::{self, Paint},
    url::Url,
};

/// What an agent's first request alone needs, about: its instructions and its tools.
const FIRST_PROMPT: u32 = 12_000;
/// Its streams are cancelled when the agent is gone, so it has nothing to wait for.
const GATEWAY_LEAVES: Duration = Duration::from_secs(5);

pub(crate) async fn run(args: LaunchArgs, global: &Global) -> Result<(), Failure> {
    let prints = args.print_env || args.print_config;
    let program = if prints { None } else { Some(installed(args.agent)?) };
    let url = Url::from_environment()?.unwrap_or_default();
    let key = std::env::var("FLASH_API_KEY").ok().filter(|key| !key.is_empty());
    let found = gateway::find(&url).await?;
    let Some(found) = found else {
        return match program {
            Some(program) => with_own_gateway(args, program, key, global).await,
            None => {
                let daemon = connect::connect(global).await?;
                let (model, context) = prepared(&daemon, &args, global).await?;
                term::note(&format!("hint: no gateway listens on {url} yet; `flashctl serve` or `flashctl service install --now` does"));
                print(&args, &Endpoint { base: url.to_string(), key, model, context: Some(context) })
            }
        };
    };
    let endpoint = behind(&found, &url, &args, key, global).await?;
    match program {
        None => print(&args, &endpoint),
        Some(program) => {
            warn(args.agent, endpoint.context, global);
            let failed = command(&args, program, &endpoint)?.exec();
            Err(Failure::new(exit::GENERIC, "agent_start", format!("cannot start {}: {failed}", args.agent.program())))
        }
    }
}

/// What the listening gateway says of the model, after the daemon below it was told what the command line wants.
async fn behind(found: &Found, url: &Url, args: &LaunchArgs, key: Option<String>, global: &Global) -> Result<Endpoint, Failure> {
    let mut model = args.model.clone();
    let ours = url.is_loopback();
    let wants = args.settings != Settings::default() || is_path(&model);
    if wants && !ours {
        return Err(Failure::new(
            exit::USAGE,
            "usage",
            format!("settings and paths are for a daemon on this machine; {url} is another one"),
        ));
    }
    if wants || (ours && !found.daemon_up) {
        let daemon = connect::connect(global).await?;
        if wants {
            (model, _) = prepared(&daemon, args, global).await?;
        }
    }
    let context = gateway::context(url, &model, key.as_deref()).await?;
    Ok(Endpoint { base: url.to_string(), key, model, context })
}

/// The name that the gateway knows the model by, and its context; loads it only if settings ask for it.
async fn prepared(daemon: &Daemon, args: &LaunchArgs, global: &Global) -> Result<(String, u32), Failure> {
    let name = load::model_name(&args.model);
    if args.settings != Settings::default() || is_path(&name) {
        let model = load::load(daemon, &args.model, &args.settings, global).await?.model.unwrap_or_default();
        return Ok((model.id, model.context_length));
    }
    let request = TokenizeRequest { model: name, prompt: Some(tokenize_request::Prompt::Text(String::new())) };
    let size = daemon.generate().tokenize(request).await.map_err(|status| daemon.failure(&status, "looking for the model"))?;
    Ok((args.model.clone(), size.into_inner().context_length))
}

/// A gateway knows names only.
fn is_path(model: &str) -> bool {
    load::model_name(model).starts_with('/')
}

async fn with_own_gateway(args: LaunchArgs, program: PathBuf, key: Option<String>, global: &Global) -> Result<(), Failure> {
    let daemon = connect::connect(global).await?;
    let loaded = load::load(&daemon, &args.model, &args.settings, global).await?.model.unwrap_or_default();
    let model = if is_path(&args.model) { loaded.id } else { args.model.clone() };
    warn(args.agent, Some(loaded.context_length), global);
    let (mut gateway, base) = gateway::start(global).await?;
    let outcome = attend(command(&args, program, &Endpoint { base, key, model, context: Some(loaded.context_length) })?).await;
    serve::forward(&gateway, Signal::TERM);
    // What does not leave in time is killed when it is dropped.
    let _ = tokio::time::timeout(GATEWAY_LEAVES, gateway.wait()).await;
    outcome
}

/// Runs the agent at our terminal. Ctrl-C reaches it without us and means what it says it means.
async fn attend(command: Command) -> Result<(), Failure> {
    let (mut interrupt, mut terminate, mut hangup) = (listen(SignalKind::interrupt())?, terminations()?, listen(SignalKind::hangup())?);
    let name = command.get_program().to_string_lossy().into_owned();
    let failed = |what: &str, error: std::io::Error| Failure::new(exit::GENERIC, "agent_start", format!("cannot {what} {name}: {error}"));
    let mut child = tokio::process::Command::from(command).spawn().map_err(|error| failed("start", error))?;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status.map_err(|error| failed("wait for", error))?,
            _ = interrupt.recv() => {}
            _ = terminate.recv() => serve::forward(&child, Signal::TERM),
            _ = hangup.recv() => serve::forward(&child, Signal::HUP),
        }
    };
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    match code {
        Some(0) => Ok(()),
        code => Err(Failure::silent(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::GENERIC))),
    }
}

fn installed(agent: Agent) -> Result<PathBuf, Failure> {
    let program = agent.program();
    connect::on_path(program).ok_or_else(|| {
        let message = format!("{} is not installed: there is no `{program}` on PATH", agent.title());
        Failure::new(exit::UNAVAILABLE, "agent_not_installed", message).hint(format!("npm install -g {}", agent.package()))
    })
}

fn warn(agent: Agent, context: Option<u32>, global: &Global) {
    if let Some(context) = context.filter(|context| *context < FIRST_PROMPT && !global.quiet) {
        let title = agent.title();
        let text = format!(
            "warning: this model's context holds {context} tokens, and {title}'s first request alone has some {FIRST_PROMPT}; \
             --ctx raises it if the model allows, --model takes another"
        );
        term::note(&Paint::stderr().dim(&text));
    }
}

fn command(args: &LaunchArgs, program: PathBuf, endpoint: &Endpoint) -> Result<Command, Failure> {
    let Setup { env, unset, args: ours, file } = agents::setup(args.agent, endpoint);
    let mut command = Command::new(program);
    command.args(ours).envs(env);
    for name in unset {
        command.env_remove(name);
    }
    if let Some(file) = file {
        command.arg(file.flag).arg(place(args.agent, file.name, &file.text)?);
    }
    command.args(&args.args);
    Ok(command)
}

/// Writes a file of ours for an agent, in a folder of ours.
fn place(agent: Agent, name: &str, text: &str) -> Result<PathBuf, Failure> {
    let home = socket::home().map_err(|error| Failure::new(exit::CONFIG, "config", error.to_string()))?;
    let home = std::path::absolute(&home).unwrap_or(home);
    let path = home.join("launch").join(agent.program()).join(name);
    files::write_private(&path, text.as_bytes())?;
    Ok(path)
}

fn print(args: &LaunchArgs, endpoint: &Endpoint) -> Result<(), Failure> {
    if args.print_config {
        return term::print(&agents::config(args.agent, endpoint));
    }
    let Setup { mut env, unset, .. } = agents::setup(args.agent, endpoint);
    match args.agent {
        Agent::Claude => {}
        // It has no variables for its settings, but one for the folder where they are.
        Agent::Codex => {
            let config = place(args.agent, "config.toml", &agents::config(args.agent, endpoint))?;
            env.push(("CODEX_HOME", config.parent().unwrap_or(&config).display().to_string()));
        }
        Agent::Continue => {
            let failure = Failure::new(exit::USAGE, "usage", "Continue takes no settings from the environment");
            return Err(failure.hint("flashctl launch continue --print-config > flash.yaml && cn --config flash.yaml"));
        }
    }
    let mut lines: Vec<String> = unset.iter().map(|name| format!("unset {name}\n")).collect();
    lines.extend(env.iter().map(|(name, value)| format!("export {name}={}\n", render::shell_word(value))));
    term::print(&lines.concat())
}
