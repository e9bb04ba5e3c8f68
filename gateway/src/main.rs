//! The `flash-gateway` command: arguments, log, signals, exit code. Everything else is in the library.

use std::{
    io::{ErrorKind, IsTerminal, Write},
    process::ExitCode,
};

use clap::Parser;
use flash_gateway::config::{Args, Error};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_env("FLASH_LOG").unwrap_or_else(|_| EnvFilter::new("warn,flash_gateway=info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    // Else it tells of a log that is gone, as a closed terminal is, where the log was, and panics.
    log.log_internal_errors(false).init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let (what, hint) = told(&error);
            note(&format!("error: {what}\nhint: {hint}"));
            ExitCode::from(error.downcast_ref::<Error>().map_or(70, Error::exit_code))
        }
    }
}

/// What is wrong and what to do, which a message may say itself, after a semicolon.
fn told(error: &anyhow::Error) -> (String, String) {
    let text = format!("{error:#}");
    if let Some((what, hint)) = text.rsplit_once("; ") {
        return (what.into(), hint.into());
    }
    let hint = match error.downcast_ref() {
        Some(Error::Listen { source, .. }) if source.kind() == ErrorKind::PermissionDenied => "choose a --port of 1024 or more",
        Some(Error::Host { .. } | Error::Listen { .. }) => "--host takes an address of this machine, such as 127.0.0.1 or 0.0.0.0",
        _ => "FLASH_LOG=debug has it tell more",
    };
    (text, hint.into())
}

/// Nobody is told if it cannot be shown.
fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[tokio::main]
async fn run(args: &Args) -> anyhow::Result<()> {
    let config = args.resolve()?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let listener = args.listen().await?;
    note(&format!("listening on http://{}", listener.local_addr()?));
    let shutdown = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    Ok(flash_gateway::serve(config, listener, shutdown).await?)
}
