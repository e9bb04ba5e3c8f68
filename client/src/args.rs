//! The command line as types. Parsing only: no defaults that the daemon decides, no checks that it makes anyway.

mod measure;
mod models;
mod serving;
mod talk;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::{
    failure::{Failure, exit},
    url::Url,
};

pub(crate) use self::{measure::*, models::*, serving::*, talk::*};

/// clap knows no groups of subcommands, so they are written here; a test holds them against the real ones.
const HELP: &str = "\
{about}

{usage-heading} flashctl [OPTIONS] COMMAND

Talk to a model:
  run          Answer one prompt, from the arguments or standard input
  chat         Talk in turns
  tokenize     Show a text as the model sees it

Models:
  models       List what is installed (ls, list)
  show         Show one model: experts, memory, template
  cp           Copy a model
  rm           Delete a model
  load         Load a model, or change the settings of the loaded one
  ps           Show what is loaded
  stop         Unload a model and give its memory back
  stats        Show speed, cache hits, bytes read, memory and pressure
  convert      Pack a model's experts into records that are read in one piece
  verify       Check every record of a packed model
  cache        Forget what was kept of earlier prompts

Measuring:
  bench        Measure a model beside what memory and disk allow
  trace        Record which experts a model uses, replay it through cache policies

Serving:
  serve        Run the OpenAI-compatible gateway in the foreground
  launch       Start Claude Code, Codex or Continue on this daemon
  daemon       Start, stop and inspect the daemon, read its log
  service      Keep daemon and gateway running with launchd or systemd

Help:
  config       Read and change the settings in flash.toml
  doctor       Check this installation, show settings and where they come from
  completions  Write a completion script for a shell
  version      Show versions of flashctl and the daemon
  help         Explain a command

Options:
{options}{after-help}";

const EXAMPLES: &str = "\
Examples:
  flashctl run local \"Tell me a short story about a little dog named Pip.\" --expert-cache 25%
  git diff | flashctl run local \"Write a commit message\" > message.txt
  flashctl chat
  flashctl ps --json | jq -r '.models[] | select(.state == \"ready\").name'
  flashctl launch claude
  flashctl stats --watch

`local` is the default model. The daemon starts by itself when it is needed.
Environment: FLASH_HOME, FLASH_SOCKET, FLASH_MODELS, FLASH_HOST, FLASH_API_KEY, NO_COLOR.
Exit codes: 0 ok, 1 failed, 2 usage, 64 bad value, 66 no such input file, 69 no daemon,
  73 cannot write, 75 busy, 77 permission, 78 configuration, 124 --timeout, 130 Ctrl-C.";

/// Run Mixture-of-Experts language models larger than memory.
#[derive(Debug, Parser)]
#[command(name = "flashctl", version, help_template = HELP, after_help = EXAMPLES, max_term_width = 110, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Global {
    /// Write JSON to standard output, errors included
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
    /// No progress, no warnings, no summary
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub(crate) quiet: bool,
    /// Fail (69) instead of starting a daemon when none runs
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) no_autostart: bool,
    /// Where the daemon listens [env: FLASH_SOCKET]
    #[arg(long, global = true, value_name = "PATH", help_heading = "Global options")]
    pub(crate) socket: Option<PathBuf>,
    /// Another machine's gateway, behind which the daemon is; from [`Remote`].
    #[arg(skip)]
    pub(crate) gateway: Option<Url>,
}

/// Of the commands that another machine's daemon answers as well.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Remote {
    /// Ask the daemon behind this gateway: HOST:PORT or http://HOST:PORT [env: FLASH_HOST], or the one at unix:PATH
    #[arg(long, value_name = "URL", help_heading = "Global options", display_order = 100)]
    pub(crate) host: Option<String>,
}

impl Remote {
    /// The global options with where to ask.
    pub(crate) fn aim(&self, global: Global) -> Result<Global, Failure> {
        if self.host.is_some() && global.socket.is_some() {
            return Err(Failure::new(exit::USAGE, "usage", "--host and --socket are two places").hint("leave one of them out"));
        }
        let (given, from) = match &self.host {
            Some(host) => (Some(host.clone()), "--host"),
            None => (Url::environment().filter(|_| global.socket.is_none()), "FLASH_HOST"),
        };
        let Some(host) = given else { return Ok(global) };
        if let Some(path) = host.trim().strip_prefix("unix:") {
            return Ok(Global { socket: Some(path.into()), ..global });
        }
        let usage = |failure| if self.host.is_some() { Failure { exit: exit::USAGE, ..failure } } else { failure };
        Ok(Global { gateway: Some(Url::read(&host, from).map_err(usage)?), ..global })
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(RunArgs),
    Chat(ChatArgs),
    Tokenize(TokenizeArgs),
    /// List installed models
    #[command(visible_aliases = ["ls", "list"])]
    Models(Remote),
    Show(ShowArgs),
    Cp(CpArgs),
    Rm(RmArgs),
    Load(LoadArgs),
    /// Show what is loaded
    Ps(Remote),
    Stop(StopArgs),
    Stats(StatsArgs),
    Convert(ConvertArgs),
    Verify(VerifyArgs),
    /// Forget what was kept of earlier prompts
    #[command(subcommand)]
    Cache(CacheCommand),
    Bench(BenchArgs),
    /// Record which experts a model uses, replay it through cache policies
    #[command(subcommand)]
    Trace(TraceCommand),
    Serve(ServeArgs),
    Launch(LaunchArgs),
    /// Start, stop and inspect the daemon
    #[command(subcommand)]
    Daemon(DaemonCommand),
    Service(ServiceArgs),
    /// Read and change the settings in flash.toml
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Check this installation, show settings and where they come from
    #[command(after_help = "Exits 1 if a check failed. Starts the daemon if none runs, which is one of the checks.")]
    Doctor,
    /// Write a completion script for a shell to standard output
    #[command(after_help = "Example: flashctl completions zsh > ~/.zfunc/_flashctl")]
    Completions {
        shell: Shell,
    },
    /// Show versions of flashctl and of the running daemon
    Version,
}

impl Command {
    /// Where it is to ask, if it may ask elsewhere.
    pub(crate) fn remote(&self) -> Option<&Remote> {
        match self {
            Self::Models(remote) | Self::Ps(remote) => Some(remote),
            Self::Run(args) => Some(&args.remote),
            Self::Chat(args) => Some(&args.remote),
            Self::Tokenize(args) => Some(&args.remote),
            Self::Show(args) => Some(&args.remote),
            Self::Stats(args) => Some(&args.remote),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grouped_help_names_every_command_once() {
        let command = Cli::command();
        command.clone().debug_assert();
        let listed: Vec<&str> = HELP.lines().filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next()).collect();
        let real: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        for name in &real {
            assert_eq!(listed.iter().filter(|listed| listed == &name).count(), 1, "{name}");
        }
        assert_eq!(listed.len(), real.len() + 1, "`help` and nothing else is listed besides");
    }

    #[test]
    fn settings_may_follow_the_prompt_and_keep_alive_may_be_negative() {
        let cli = Cli::try_parse_from(["flashctl", "run", "local", "Tell me", "a story.", "--expert-cache", "25%", "--keep-alive", "-1"]);
        let Command::Run(run) = cli.expect("valid").command else { panic!("not run") };
        assert_eq!(run.prompt, ["Tell me", "a story."]);
        assert_eq!(run.settings.expert_cache.as_deref(), Some("25%"));
        assert_eq!(run.settings.keep_alive.as_deref(), Some("-1"));
    }
}
