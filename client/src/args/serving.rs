//! The arguments of what runs in the background, or serves.

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
