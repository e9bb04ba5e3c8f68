//! One verb per file. Each gets its arguments and the global options, calls the daemon, prints, and returns.

mod bench;
mod cache;
mod chat;
mod completions;
mod config;
mod convert;
mod cp;
mod daemon;
mod doctor;
mod launch;
mod load;
mod models;
mod ps;
mod rm;
mod run;
mod serve;
mod service;
mod show;
mod stats;
mod stop;
mod tokenize;
mod trace;
mod verify;
mod version;

use std::{
    future::Future,
    io::{self, IsTerminal, Read},
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::{BenchArgs, Cli, Command, TraceCommand},
    failure::{Failure, exit},
    term,
};

pub(crate) async fn dispatch(cli: Cli) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    let global = match command.remote() {
        Some(remote) => remote.aim(global)?,
        None => global,
    };
    // These have their own idea of Ctrl-C.
    let command = match command {
        Command::Chat(args) => return chat::run(args, &global).await,
        Command::Serve(args) => return serve::run(args, &global).await,
        Command::Launch(args) => return launch::run(args, &global).await,
        Command::Run(args) if run::is_chat(&args) => return chat::run(args.into(), &global).await,
        other => other,
    };
    let left_behind = left_behind(&command).filter(|_| !global.quiet && !global.json);
    interruptible(left_behind, async {
        match command {
            Command::Run(args) => run::run(args, &global).await,
            Command::Tokenize(args) => tokenize::run(args, &global).await,
            Command::Models(_) => models::run(&global).await,
            Command::Show(args) => show::run(args, &global).await,
            Command::Cp(args) => cp::run(args, &global).await,
            Command::Rm(args) => rm::run(args, &global).await,
            Command::Config(command) => config::run(command, &global).await,
            Command::Load(args) => load::run(args, &global).await,
            Command::Ps(_) => ps::run(&global).await,
            Command::Stop(args) => stop::run(args, &global).await,
            Command::Stats(args) => stats::run(args, &global).await,
            Command::Convert(args) => convert::run(args, &global).await,
            Command::Verify(args) => verify::run(args, &global).await,
            Command::Cache(command) => cache::run(command, &global).await,
            Command::Bench(args) => bench::run(args, &global).await,
            Command::Trace(command) => trace::run(command, &global).await,
            Command::Daemon(command) => daemon::run(command, &global).await,
            Command::Service(args) => service::run(&args, &global).await,
            Command::Doctor => doctor::run(&global).await,
            Command::Completions { shell } => completions::run(shell),
            Command::Version => version::run(&global).await,
            Command::Chat(_) | Command::Serve(_) | Command::Launch(_) => unreachable!("answered above"),
        }
    })
    .await
}

/// What an interrupted command leaves on disk, where that is in question.
fn left_behind(command: &Command) -> Option<String> {
    match command {
        Command::Convert(args) if args.in_place => {
            Some(format!("cancelled; `flashctl convert --in-place {}` goes on where this stopped", args.model))
        }
        Command::Bench(BenchArgs { synth: Some(_), .. }) | Command::Convert(_) | Command::Cp(_) => {
            Some("cancelled; nothing is left behind".into())
        }
        Command::Trace(TraceCommand::Record(args)) => Some(format!("cancelled; {} holds the tokens until now", args.out.display())),
        _ => None,
    }
}

/// Dropping the work cancels its requests and puts the terminal back; what was printed has been flushed already.
async fn interruptible(left_behind: Option<String>, work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    // Both before the work begins: whoever sees its first word may interrupt it.
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, terminations()?);
    let exit = tokio::select! {
        result = work => return result,
        _ = interrupt.recv() => {
            term::note("");
            exit::SIGINT
        }
        _ = terminate.recv() => exit::SIGTERM,
    };
    if let Some(text) = left_behind {
        term::note(&text);
    }
    Err(Failure::silent(exit))
}

fn terminations() -> Result<tokio::signal::unix::Signal, Failure> {
    listen(SignalKind::terminate())
}

fn listen(kind: SignalKind) -> Result<tokio::signal::unix::Signal, Failure> {
    signal(kind).map_err(|error| Failure::new(exit::INTERNAL, "signals", format!("cannot listen for signals: {error}")))
}

/// All of standard input, unless that is a terminal.
async fn piped_input() -> Result<Option<String>, Failure> {
    if io::stdin().is_terminal() {
        return Ok(None);
    }
    let read = tokio::task::spawn_blocking(|| {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
    });
    let bytes = read.await.map_err(|error| Failure::new(exit::INTERNAL, "input", error.to_string()))?;
    let bytes = bytes.map_err(|error| Failure::new(exit::NO_INPUT, "input", format!("cannot read standard input: {error}")))?;
    let text = String::from_utf8(bytes).map_err(|error| not_text("standard input", error.utf8_error()))?;
    Ok(Some(text))
}

fn not_text(what: &str, error: std::str::Utf8Error) -> Failure {
    Failure::new(exit::BAD_DATA, "not_text", format!("{what} is not UTF-8 text (byte {})", error.valid_up_to()))
        .hint("convert it first, with iconv -t UTF-8")
}
