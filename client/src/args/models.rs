//! The arguments of the commands about models that are installed or loaded.

use clap::{Args, Subcommand};

use super::{Remote, Settings};

/// Load a model, or change the settings of the loaded one
#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    /// Name, `local`, or the path of a checkpoint
    #[arg(default_value = "local")]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// Show one model: size, experts, memory it wants, template
#[derive(Args, Debug)]
pub(crate) struct ShowArgs {
    /// Name, `local`, or the path of a checkpoint
    #[arg(default_value = "local")]
    pub(crate) model: String,
    /// Print its chat template and nothing else
    #[arg(long, conflicts_with = "json")]
    pub(crate) template: bool,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// Copy a model's folder under another name
#[derive(Args, Debug)]
#[command(after_help = "The copy goes to $FLASH_HOME/models; it shares disk space with the first one where the file system can.")]
pub(crate) struct CpArgs {
    /// Name, `local`, or the path of a checkpoint
    pub(crate) model: String,
    /// Name of the copy
    pub(crate) name: String,
}

/// Delete a model's folder
#[derive(Args, Debug)]
#[command(after_help = "\
Asks first; without a terminal it needs --yes (exit 64). Models in another program's folders (Hugging Face's cache, LM \
Studio's) and loaded ones are left alone.")]
pub(crate) struct RmArgs {
    /// Name exactly as in `flashctl models`
    pub(crate) model: String,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
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
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// Pack a model's experts into records that are read in one piece
#[derive(Args, Debug)]
#[command(after_help = "\
Writes experts.flash beside the checkpoint: one aligned, checksummed record per expert. The checkpoint stays as it is \
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
Beginnings of prompts are kept so that a request that begins alike need not read them again: in \
memory, and on disk those that came twice. `flashctl stats` shows how much. flashd --no-disk-cache \
keeps none on disk, --prefix-cache 0 none at all.")]
    Clear,
}
