//! flashctl: parse, call, print. Everything that a model, a cache or a budget means is decided in the daemon; here are
//! only the words for it. The one place that turns a failure into text and an exit code.

mod args;
mod commands;
mod connect;
mod failure;
mod files;
mod job;
mod json;
mod load;
mod log_file;
mod render;
mod reply;
mod term;
mod url;

use std::{env, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, error::ErrorKind};

use crate::{
    args::{Cli, Global},
    failure::{Failure, exit},
};

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            term::note(&format!("error: cannot start the runtime: {error}"));
            return ExitCode::from(exit::INTERNAL);
        }
    };
    let code = runtime.block_on(async {
        match parse() {
            Ok((cli, command)) => {
                let json = cli.global.json;
                commands::dispatch(cli).await.map_or_else(|failure| show(&failure.or_hint(&command), json), |()| 0)
            }
            Err(error) => refuse(&error).await,
        }
    });
    // A thread may still sit in a read of standard input.
    runtime.shutdown_background();
    ExitCode::from(code)
}

/// With the command's name, as `help` takes it.
fn parse() -> Result<(Cli, String), clap::Error> {
    let matches = Cli::command().try_get_matches()?;
    let mut command = Vec::new();
    let mut at = &matches;
    while let Some((name, below)) = at.subcommand() {
        command.push(name);
        at = below;
    }
    let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut Cli::command()))?;
    Ok((cli, command.join(" ")))
}

fn show(failure: &Failure, json: bool) -> u8 {
    if failure.message.is_empty() {
        return failure.exit;
    }
    if json {
        if let Err(unwritable) = term::print_json(&json::failure(failure)) {
            return unwritable.exit;
        }
    } else {
        term::note(&format!("{} {}", term::Paint::stderr().bad("error:"), failure.message));
        if let Some(hint) = &failure.hint {
            term::note(&format!("hint: {hint}"));
        }
    }
    failure.exit
}

/// clap's own words, for help and for mistakes, and ours for what to do about those.
async fn refuse(error: &clap::Error) -> u8 {
    // Of a command without its subcommand, the whole help.
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // A closed pipe behind `--help | head` is nobody's error.
        let _ = error.print();
        return u8::try_from(error.exit_code()).unwrap_or(exit::USAGE);
    }
    let first = env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let known = Cli::command().find_subcommand(&first).is_some();
    let text = error.to_string();
    let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    let failure = Failure::new(exit::USAGE, "usage", message);
    let failure = match error.kind() {
        ErrorKind::InvalidSubcommand if first == "pull" => {
            failure.hint("flashctl downloads nothing yet; put a checkpoint's folder into ~/.flashd/models, or run it by its path")
        }
        ErrorKind::MissingRequiredArgument if first == "run" || first == "tokenize" => failure.hint(installed().await),
        _ => failure.or_hint(if known { &first } else { "" }),
    };
    if env::args().any(|arg| arg == "--json") {
        return show(&failure, true);
    }
    let styled = term::Paint::stderr().styled(&error.render());
    // Where it ends by pointing to --help stands the hint.
    term::note(styled.split("\nFor more information").next().unwrap_or_default().trim_end());
    if let Some(hint) = &failure.hint {
        term::note(&format!("\nhint: {hint}"));
    }
    failure.exit
}

async fn installed() -> String {
    if let Ok(Some(daemon)) = connect::running(&Global::default()).await
        && let Ok(list) = daemon.models().list(flash_proto::v1::ListRequest {}).await
    {
        let names: Vec<String> = list.into_inner().models.into_iter().map(|model| model.id).collect();
        return format!("installed models: {}", names.join(", "));
    }
    "`flashctl models` lists the installed models, `local` is the default one".into()
}
