//! The arguments of what runs in the background, or serves.

use std::ffi::OsString;

use clap::{Args, Subcommand, ValueEnum};

use super::Settings;

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
    /// Requests computed together, by a daemon that this starts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) parallel: Option<u32>,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// Read and change the settings in flash.toml
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the settings, or the value of one
    #[command(after_help = "These are the values that hold, wherever they come from; they start the daemon if none runs.")]
    Get {
        /// expert_cache, memory, ctx …
        name: Option<String>,
    },
    /// Set one in flash.toml
    #[command(after_help = "\
A value that cannot be one is refused. Comments in the file stay. Flags and FLASH_* variables win over the file.

Example: flashctl config set expert_cache 25% && flashctl daemon restart")]
    Set {
        /// expert_cache, memory, ctx …
        name: String,
        /// Its value; a list is written ['/a', '/b']
        #[arg(allow_hyphen_values = true)]
        value: String,
    },
    /// Take one out of flash.toml, so that the default holds
    Unset {
        /// expert_cache, memory, ctx …
        name: String,
    },
    /// Print where flash.toml is
    Path,
}

/// Start a coding agent that uses this daemon
#[derive(Args, Debug)]
#[command(after_help = "\
Uses the gateway on FLASH_HOST (default 127.0.0.1:8080) if one listens there; else one is started, and ends with the \
agent. The agent's own settings stay as they are; with --print-env Codex has its own folder (CODEX_HOME). FLASH_API_KEY is \
the gateway's key.

Examples:
  flashctl launch claude
  flashctl launch codex --model big-moe -- exec \"Explain this repository\"
  eval \"$(flashctl launch claude --print-env)\" && claude -p \"Explain this repository\"
  flashctl launch continue --print-config > flash.yaml")]
pub(crate) struct LaunchArgs {
    /// Claude Code, Codex, or Continue (cn)
    #[arg(value_name = "claude|codex|continue", hide_possible_values = true)]
    pub(crate) agent: Agent,
    /// Name from `flashctl models`, `local` for the default one, or the path of a checkpoint
    #[arg(short, long, value_name = "MODEL", default_value = "local")]
    pub(crate) model: String,
    /// Print variables for `eval` instead of starting it
    #[arg(long, conflicts_with = "print_config")]
    pub(crate) print_env: bool,
    /// Print its configuration (JSON, TOML or YAML, as it reads it) instead of starting it
    #[arg(long)]
    pub(crate) print_config: bool,
    /// For the agent
    #[arg(last = true, conflicts_with_all = ["print_env", "print_config"])]
    pub(crate) args: Vec<OsString>,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Agent {
    Claude,
    Codex,
    Continue,
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
On macOS the agents are ~/Library/LaunchAgents/dev.flash.{flashd,gateway}.plist, on Linux the units are \
~/.config/systemd/user/{flashd,flash-gateway}.service. FLASH_* settings of this shell are written into them, except \
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
