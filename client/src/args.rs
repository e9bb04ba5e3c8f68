//! The command line as types. Parsing only: no defaults that the daemon decides, no checks that it makes anyway.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

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
  daemon       Start, stop and inspect the daemon, read its log
  service      Keep daemon and gateway running with launchd or systemd

Help:
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
  flashctl stats --watch

`local` is the default model. The daemon starts by itself when it is needed.
Environment: FLASH_HOME, FLASH_SOCKET, FLASH_MODELS, FLASH_API_KEY, NO_COLOR.
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
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(RunArgs),
    Chat(ChatArgs),
    Tokenize(TokenizeArgs),
    /// List installed models
    #[command(visible_aliases = ["ls", "list"])]
    Models,
    Load(LoadArgs),
    /// Show what is loaded
    Ps,
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
    /// Start, stop and inspect the daemon
    #[command(subcommand)]
    Daemon(DaemonCommand),
    Service(ServiceArgs),
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

/// Answer one prompt and exit; without a prompt, at a terminal, talk in turns
#[derive(Args, Debug)]
#[command(after_help = "\
The prompt is PROMPT, then each FILE, then standard input if it is not a terminal, with blank lines between them.

Examples:
  flashctl run local \"Why is the sky blue?\"
  flashctl run local -f notes.txt \"Summarise this\" --max-tokens 200
  echo \"Once upon a time\" | flashctl run local --raw --temperature 0")]
pub(crate) struct RunArgs {
    /// Name from `flashctl models`, `local` for the default one, or the path of a checkpoint
    pub(crate) model: String,
    /// What to say; words are joined by spaces
    pub(crate) prompt: Vec<String>,
    /// Add a file to the prompt; may be repeated
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Vec<PathBuf>,
    /// System prompt
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Continue the text as it is, without the chat template
    #[arg(long, conflicts_with = "system")]
    pub(crate) raw: bool,
    /// Print speed and cache figures to standard error afterwards (at a terminal they always are)
    #[arg(long)]
    pub(crate) stats: bool,
    /// Print the answer when it is complete
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// What the answer must be: `json` for any JSON object, or a file with a JSON schema
    #[arg(long, value_name = "json|SCHEMA.json")]
    pub(crate) format: Option<PathBuf>,
    /// Give up (124) after so long: 30, 90s, 5m
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) timeout: Option<Duration>,
    #[command(flatten)]
    pub(crate) generation: Generation,
    #[command(flatten)]
    pub(crate) thinking: Thinking,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// Talk to a model in turns
#[derive(Args, Debug)]
#[command(after_help = "\
In the chat, /help lists the commands, \"\"\" begins and ends a message of several lines, Ctrl-C stops an answer,
Ctrl-D leaves. The conversation is kept by flashctl and never shortened without being asked to.")]
pub(crate) struct ChatArgs {
    /// Name from `flashctl models`, `local` for the default one, or the path of a checkpoint
    #[arg(default_value = "local")]
    pub(crate) model: String,
    /// System prompt
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Print speed and cache figures after each answer
    #[arg(long)]
    pub(crate) stats: bool,
    /// Neither read nor write the history of what was typed
    #[arg(long)]
    pub(crate) no_history: bool,
    #[command(flatten)]
    pub(crate) generation: Generation,
    #[command(flatten)]
    pub(crate) thinking: Thinking,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// Absent values are the model's own.
#[derive(Args, Clone, Debug, Default, PartialEq)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct Generation {
    /// Randomness; 0 always takes the most likely token
    #[arg(short, long, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Keep the most likely tokens up to this share of probability
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Keep the K most likely tokens; 0 = all
    #[arg(short = 'k', long, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Drop tokens less likely than P times the most likely one
    #[arg(long, value_name = "P")]
    pub(crate) min_p: Option<f32>,
    /// Divide the scores of tokens that were used; 1 = off
    #[arg(long, value_name = "R")]
    pub(crate) repeat_penalty: Option<f32>,
    /// Lower the scores of tokens by how often they were used
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Lower the scores of tokens that were used at all
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// The same seed gives the same answer
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// End the answer after N tokens
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// End the answer before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

/// For models that think before they answer.
#[derive(Args, Clone, Debug, Default, PartialEq)]
#[command(next_help_heading = "Thinking")]
pub(crate) struct Thinking {
    /// Let the model think first, with this effort if it knows efforts: low, medium or high
    #[arg(long, value_name = "EFFORT", num_args = 0..=1, require_equals = true, default_missing_value = "", conflicts_with = "no_think")]
    pub(crate) think: Option<String>,
    /// Ask for an answer without thinking
    #[arg(long)]
    pub(crate) no_think: bool,
    /// Do not show what it thinks (off a terminal it never is)
    #[arg(long)]
    pub(crate) hide_thinking: bool,
}

/// Settings of the daemon; absent ones stay as they are.
#[derive(Args, Clone, Debug, Default, PartialEq)]
#[command(next_help_heading = "Memory and context (these stay set in the daemon)")]
pub(crate) struct Settings {
    /// Experts kept in memory: 25%, 512MiB or auto
    #[arg(long, value_name = "SIZE")]
    pub(crate) expert_cache: Option<String>,
    /// Cap on the daemon's memory: 12GiB or auto
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<String>,
    /// Tokens of a conversation, answers included
    #[arg(long, value_name = "TOKENS")]
    pub(crate) ctx: Option<u32>,
    /// How long an idle model stays loaded: 5m, 0, -1 for ever
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) keep_alive: Option<String>,
}

/// Show a text as the model sees it: token ids, and how many
#[derive(Args, Debug)]
pub(crate) struct TokenizeArgs {
    /// Name, `local`, or the path of a checkpoint
    pub(crate) model: String,
    /// The text; standard input if there is none
    pub(crate) text: Vec<String>,
    /// As a user's message, through the chat template
    #[arg(long)]
    pub(crate) chat: bool,
}

/// Load a model, or change the settings of the loaded one
#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    /// Name, `local`, or the path of a checkpoint
    #[arg(default_value = "local")]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// Unload a model and give its memory back
#[derive(Args, Debug)]
pub(crate) struct StopArgs {
    /// Which; whatever is loaded if absent
    pub(crate) model: Option<String>,
    /// Whatever is loaded
    #[arg(long, conflicts_with = "model")]
    pub(crate) all: bool,
    /// End running requests instead of waiting for them
    #[arg(long)]
    pub(crate) force: bool,
}

/// Show speed, cache hits, bytes read, memory and pressure
#[derive(Args, Debug)]
#[command(after_help = "Watching at a terminal redraws; piped or with --json it writes one JSON object per line.")]
pub(crate) struct StatsArgs {
    /// Again every so many seconds
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
    pub(crate) watch: Option<f64>,
}

/// Pack a model's experts into records that are read in one piece
#[derive(Args, Debug)]
#[command(after_help = "\
Writes experts.flash beside the checkpoint: one aligned, checksummed record per expert. The checkpoint stays as it is
unless --in-place. `flashctl doctor` says whether packing is faster on this disk.")]
pub(crate) struct ConvertArgs {
    /// Name from `flashctl models`, `local` for the default one, or the path of a checkpoint
    pub(crate) model: String,
    /// Remove from the checkpoint what is packed, shard by shard: needs space for one shard only
    #[arg(long)]
    pub(crate) in_place: bool,
}

/// Check every record of a packed model
#[derive(Args, Debug)]
#[command(after_help = "Exits 1 if a record is not what was written, and names it.")]
pub(crate) struct VerifyArgs {
    /// Name, `local`, or the path of a checkpoint
    pub(crate) model: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Delete them, in memory and on disk, of all models
    #[command(after_help = "\
Beginnings of prompts are kept so that a request that begins alike need not read them again: in
memory, and on disk those that came twice. `flashctl stats` shows how much. flashd --no-disk-cache
keeps none on disk, --prefix-cache 0 none at all.")]
    Clear,
}

/// Measure a model beside what memory and disk allow
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Unloads the loaded model; is refused while requests run. Several values of --io, --policy or --lookahead are compared
in one interleaved run. Bounds: what the memory and disk speeds of this run allow, overlapped and one after the other.

Examples:
  flashctl bench local --cache 25%,50%,100%
  flashctl bench synth --shape qwen3-30b-a3b && flashctl bench synth-qwen3-30b-a3b --cache 25% --json"
)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) synth: Option<BenchCommand>,
    /// Name, `local`, or the path of a checkpoint
    #[arg(default_value = "local")]
    pub(crate) model: String,
    /// Sizes of the expert cache, a cold and a warm row each [default: 25%,50%,100%]
    #[arg(long, value_name = "SIZES", value_delimiter = ',')]
    pub(crate) cache: Vec<String>,
    /// Tokens of the prompt
    #[arg(long, value_name = "N")]
    pub(crate) prompt: Option<u32>,
    /// Tokens to generate; 0 measures the prompt only
    #[arg(long = "gen", value_name = "N")]
    pub(crate) generate: Option<u32>,
    /// Only the row without an expert cache, which else is one of several
    #[arg(long, conflicts_with = "cache")]
    pub(crate) no_cache: bool,
    /// Force recorded routing onto the model
    #[arg(long, value_name = "trace:FILE")]
    pub(crate) routing: Option<String>,
    /// How experts are read: auto, direct, buffered, uring, mmap
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    pub(crate) io: Vec<String>,
    /// Which expert makes room: lfru, lru, lcp
    #[arg(long, value_name = "POLICIES", value_delimiter = ',')]
    pub(crate) policy: Vec<String>,
    /// Load what the next layer will probably use: auto, on, off
    #[arg(long, value_name = "MODES", value_delimiter = ',')]
    pub(crate) lookahead: Vec<String>,
    /// Say below each row where the time of a token went
    #[arg(long)]
    pub(crate) profile: bool,
    /// Measure each row so often and report medians
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) repeat: u32,
    /// Of the random prompt
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Write a model of a known shape with random weights
    Synth(SynthArgs),
}

#[derive(Args, Debug)]
pub(crate) struct SynthArgs {
    /// qwen3-30b-a3b, olmoe, tiny …; a wrong one lists them
    #[arg(long, value_name = "NAME")]
    pub(crate) shape: String,
    /// Folder to write [default: $FLASH_HOME/models/synth-NAME]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Fewer layers than the shape has
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<u32>,
    /// Another context than the shape's
    #[arg(long, value_name = "TOKENS")]
    pub(crate) context: Option<u32>,
    /// The same seed gives the same weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// uniform (a cache's worst case) or skewed (popular experts, used again soon)
    #[arg(long, value_name = "KIND", default_value = "uniform")]
    pub(crate) routing: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TraceCommand {
    Record(TraceRecordArgs),
    Replay(TraceReplayArgs),
}

/// Answer one prompt and write which experts each token used
#[derive(Args, Debug)]
#[command(after_help = "\
FILE gets a header line, then {\"tok\": …, \"layers\": [[ids], …]} for each token, the
prompt's included.

Example: flashctl trace record local \"Once upon a time\" --raw -n 1024 --ignore-eos --out pip.jsonl")]
pub(crate) struct TraceRecordArgs {
    /// Name, `local`, or the path of a checkpoint
    pub(crate) model: String,
    /// What to say; words are joined by spaces; standard input is added
    pub(crate) prompt: Vec<String>,
    /// Where the trace goes
    #[arg(short, long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    pub(crate) raw: bool,
    /// Go on past the end of the answer
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    #[command(flatten)]
    pub(crate) generation: Generation,
}

/// Replay a trace through cache policies and show their hit rates
#[derive(Args, Debug)]
#[command(after_help = "\
Reads traces of `flashctl trace record` and plain lines of {\"tok\": …, \"layers\": [[ids], …]}.

Example: flashctl trace replay pip.jsonl --policy lfru,lru --slots 8,25%,50%")]
pub(crate) struct TraceReplayArgs {
    pub(crate) file: PathBuf,
    /// lfru, lru, lcp, belady [default: all]
    #[arg(long, value_name = "POLICIES", value_delimiter = ',')]
    pub(crate) policy: Vec<String>,
    /// Slots of each layer, or shares of its experts [default: 12.5%,25%,50%]
    #[arg(long, value_name = "SLOTS", value_delimiter = ',')]
    pub(crate) slots: Vec<String>,
}

/// Run the OpenAI-compatible gateway in the foreground
#[derive(Args, Debug)]
#[command(after_help = "\
Starts the daemon if none runs, and stops it again at the end. Try:
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"local\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'")]
pub(crate) struct ServeArgs {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 picks one
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,
    /// Key that clients must send [env: FLASH_API_KEY]
    #[arg(long, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
    /// Another Host header to accept; may be repeated
    #[arg(long, value_name = "HOST")]
    pub(crate) allowed_host: Vec<String>,
    /// Another web origin to accept, or *; may be repeated
    #[arg(long, value_name = "ORIGIN")]
    pub(crate) cors_origin: Vec<String>,
    /// Listen beyond this machine without a key
    #[arg(long)]
    pub(crate) insecure_no_auth: bool,
    /// Load this model first
    #[arg(long)]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DaemonCommand {
    /// Start the daemon if none runs
    Start,
    /// Stop the daemon; running requests are finished first
    Stop {
        /// Seconds that running requests may take
        #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
        grace: f64,
    },
    /// Say whether the daemon runs (exit 69 if not)
    Status,
    /// Stop the daemon, then start it
    Restart {
        /// Seconds that running requests may take
        #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
        grace: f64,
    },
    /// Print the end of the daemon's log
    Logs {
        /// Go on printing what is added
        #[arg(short, long)]
        follow: bool,
        /// How many lines
        #[arg(short = 'n', long, default_value_t = 50)]
        lines: usize,
    },
}

/// Keep daemon and gateway running with launchd (macOS) or systemd (Linux), as this user
#[derive(Args, Debug)]
#[command(after_help = "\
On macOS the agents are ~/Library/LaunchAgents/dev.flash.{flashd,gateway}.plist, on Linux the units are
~/.config/systemd/user/{flashd,flash-gateway}.service. FLASH_* settings of this shell are written into them, except
FLASH_API_KEY. On a Linux server, `loginctl enable-linger` keeps user services running without a login.")]
pub(crate) struct ServiceArgs {
    pub(crate) action: ServiceAction,
    /// install: also start them now; without it they start at the next login
    #[arg(long)]
    pub(crate) now: bool,
    /// Print the files instead of writing them
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// The daemon only, without the gateway
    #[arg(long)]
    pub(crate) daemon_only: bool,
    /// launchd or systemd, for looking at the other one's files
    #[arg(long, hide = true, default_value = if cfg!(target_os = "macos") { "launchd" } else { "systemd" })]
    pub(crate) manager: Manager,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ServiceAction {
    Install,
    Uninstall,
    Status,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Manager {
    Launchd,
    Systemd,
}

/// "30", "90s", "5m", "1.5h", "200ms".
fn parse_time(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("`{unit}` is none of ms, s, m, h")),
    };
    let seconds = number.parse::<f64>().map_err(|_| "not a time such as 30, 90s or 5m".to_owned())?;
    Duration::try_from_secs_f64(seconds * factor).map_err(|error| error.to_string())
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
    fn times_are_read() {
        let check =
            |text: &str, expected: Option<f64>| assert_eq!(parse_time(text).ok().map(|time| time.as_secs_f64()), expected, "{text}");
        check("30", Some(30.0));
        check("90s", Some(90.0));
        check("5m", Some(300.0));
        check("1.5h", Some(5400.0));
        check("200ms", Some(0.2));
        for bad in ["", "s", "-1", "5 parsecs", "1e400", "99999999999999999999999h"] {
            check(bad, None);
        }
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
