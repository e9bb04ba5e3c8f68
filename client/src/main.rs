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

use clap::{
    CommandFactory, FromArgMatches,
    error::{ContextKind, ContextValue, ErrorKind},
};
use flash_proto::socket;

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
        match term::print_json(&json::failure(failure)) {
            Ok(()) => return failure.exit,
            Err(gone) if gone.message.is_empty() => return gone.exit,
            // Standard output takes nothing, and somebody must hear of it.
            Err(_) => {}
        }
    }
    term::note(&format!("{} {}", term::Paint::stderr().bad("error:"), failure.message));
    if let Some(hint) = &failure.hint {
        term::note(&format!("hint: {hint}"));
    }
    failure.exit
}

/// clap's own words, for help and for mistakes, and ours for what to do about those.
async fn refuse(error: &clap::Error) -> u8 {
    let json = env::args_os().any(|arg| arg == "--json");
    if !error.use_stderr() {
        let printed = term::print(&term::Paint::stdout().styled(&error.render()));
        return printed.map_or_else(|failure| show(&failure, json), |()| 0);
    }
    // Of a command without its subcommand, the whole help.
    let helps = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    let styled = term::Paint::stderr().styled(&error.render());
    if helps && !json {
        term::note(styled.trim_end());
        return exit::USAGE;
    }
    let words: Vec<_> = env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let command = command_of(&words);
    let text = error.to_string();
    // What is missing or possible is listed below the first line.
    let said: Vec<&str> = text.trim_start_matches("error: ").lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let message = if helps { format!("`flashctl {command}` takes a subcommand") } else { said.join(" ") };
    let hint = match error.kind() {
        ErrorKind::InvalidSubcommand if words.iter().any(|word| word == "pull") => no_downloads(),
        ErrorKind::MissingRequiredArgument if lacks_model(error) => installed().await,
        _ => failure::explained(&command),
    };
    let failure = Failure::new(exit::USAGE, "usage", message).hint(hint.as_str());
    if json {
        return show(&failure, true);
    }
    // Where it ends by pointing to --help stands the hint.
    term::note(styled.split("\nFor more information").next().unwrap_or_default().trim_end());
    term::note(&format!("\nhint: {hint}"));
    failure.exit
}

/// The whole name of the command that these words begin with, as `help` takes it.
fn command_of(words: &[String]) -> String {
    let command = Cli::command();
    let (mut at, mut names, mut words) = (&command, Vec::new(), words.iter());
    while let Some(word) = words.next() {
        match at.find_subcommand(word) {
            Some(below) => {
                names.push(below.get_name());
                at = below;
            }
            // The one option of all commands that has a value.
            None if word == "--socket" => drop(words.next()),
            None if word.starts_with('-') => {}
            None => break,
        }
    }
    names.join(" ")
}

fn lacks_model(error: &clap::Error) -> bool {
    matches!(error.get(ContextKind::InvalidArg), Some(ContextValue::Strings(missing)) if missing.iter().any(|name| name == "<MODEL>"))
}

fn no_downloads() -> String {
    let given = env::var_os("FLASH_MODELS").and_then(|list| env::split_paths(&list).find(|path| !path.as_os_str().is_empty()));
    let folder = given.or_else(|| Some(socket::home().ok()?.join("models")));
    let folder = folder.map_or_else(|| "a folder of FLASH_MODELS".into(), |path| path.display().to_string());
    format!("flashctl downloads nothing yet; put a checkpoint's folder into {folder}, or run it by its path")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_found_among_its_options() {
        let check = |line: &str, expected: &str| {
            let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            assert_eq!(command_of(&words), expected, "{line}");
        };
        check("", "");
        check("--json", "");
        check("rum local", "");
        check("run local chat", "run");
        check("ls --json", "models");
        check("--socket run daemon -q logs -n -1", "daemon logs");
        check("daemon nonsense logs", "daemon");
    }
}
