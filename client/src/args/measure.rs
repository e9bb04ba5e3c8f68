//! The arguments of `bench` and `trace`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Generation;

/// Measure a model beside what memory and disk allow
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Unloads the loaded model; is refused while requests run. Several values of --io, --policy or --lookahead are compared \
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
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
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
FILE gets a header line, then {\"tok\": …, \"layers\": [[ids], …]} for each token, the \
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
