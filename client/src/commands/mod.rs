//! One verb per file. Each gets its arguments and the global options, calls the daemon, prints, and returns.

mod chat;
mod completions;
mod daemon;
mod doctor;
mod load;
mod models;
mod ps;
mod run;
mod serve;
mod service;
mod stats;
mod stop;
mod tokenize;
mod version;

use std::{
    future::Future,
    io::{self, IsTerminal, Read},
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::{Cli, Command},
    failure::{Failure, exit},
    term,
};

pub(crate) async fn dispatch(cli: Cli) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    // These two have their own idea of Ctrl-C.
    let command = match command {
        Command::Chat(args) => return chat::run(args, &global).await,
        Command::Serve(args) => return serve::run(args, &global).await,
        Command::Run(args) if run::is_chat(&args) => return chat::run(args.into(), &global).await,
        other => other,
    };
    interruptible(async {
        match command {
            Command::Run(args) => run::run(args, &global).await,
            Command::Tokenize(args) => tokenize::run(args, &global).await,
            Command::Models => models::run(&global).await,
            Command::Load(args) => load::run(args, &global).await,
            Command::Ps => ps::run(&global).await,
            Command::Stop(args) => stop::run(args, &global).await,
            Command::Stats(args) => stats::run(args, &global).await,
            Command::Daemon(command) => daemon::run(command, &global).await,
            Command::Service(args) => service::run(&args, &global).await,
            Command::Doctor => doctor::run(&global).await,
            Command::Completions { shell } => completions::run(shell),
            Command::Version => version::run(&global).await,
            Command::Chat(_) | Command::Serve(_) => unreachable!("answered above"),
        }
    })
    .await
}

/// Dropping the work cancels its requests and puts the terminal back; what was printed has been flushed already.
async fn interruptible(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let mut terminate = terminations()?;
    tokio::select! {
        result = work => return result,
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => return Err(Failure::silent(exit::SIGTERM)),
    }
    term::note("");
    Err(Failure::silent(exit::SIGINT))
}

fn terminations() -> Result<tokio::signal::unix::Signal, Failure> {
    signal(SignalKind::terminate()).map_err(|error| Failure::new(exit::INTERNAL, "signals", format!("cannot listen for signals: {error}")))
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
}
