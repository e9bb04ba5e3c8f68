//! The `flash-gateway` command: arguments, log, signals, exit code. Everything else is in the library.

use std::{
    io::{IsTerminal, Write},
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
            note(&format!("flash-gateway: {error:#}"));
            ExitCode::from(error.downcast_ref::<Error>().map_or(70, Error::exit_code))
        }
    }
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
