//! The arguments of the commands that talk to a model, and what they share: sampling, thinking, the daemon's settings.

use std::{
    hash::{BuildHasher, RandomState},
    num::ParseIntError,
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::Remote;

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
    /// Write what stands between the prompt and this text, with a model that can
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["system", "raw"])]
    pub(crate) suffix: Option<String>,
    /// Print speed and cache figures to standard error afterwards (at a terminal they always are)
    #[arg(short = 'v', long, visible_alias = "verbose")]
    pub(crate) stats: bool,
    /// Print the answer when it is complete
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// With --json: a line for each piece of the answer as it comes, instead of one object
    #[arg(long, requires = "json", conflicts_with = "no_stream")]
    pub(crate) stream: bool,
    /// What the answer must be: `json` for any JSON object, or a JSON schema: a file, or {…} itself
    #[arg(long, value_name = "json|SCHEMA")]
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
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// Talk to a model in turns
#[derive(Args, Debug)]
#[command(after_help = "\
In the chat, /help lists the commands, \"\"\" begins and ends a message of several lines, Ctrl-C stops an answer, \
Ctrl-D leaves. The conversation is kept in $FLASH_HOME/sessions, where only you can read it, and never shortened \
without being asked to; of those without a name the latest 100 are kept.")]
pub(crate) struct ChatArgs {
    /// Name from `flashctl models`, `local` for the default one, or the path of a checkpoint [default: local, or the one
    /// that the conversation had]
    pub(crate) model: Option<String>,
    /// Go on with the conversation used last
    #[arg(short = 'c', long = "continue", conflicts_with = "session")]
    pub(crate) resume: bool,
    /// Go on with the conversation of this name, or begin it
    #[arg(long, value_name = "NAME")]
    pub(crate) session: Option<String>,
    /// Add a file to the first message; may be repeated
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Vec<PathBuf>,
    /// System prompt
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// What each answer must be: `json` for any JSON object, or a JSON schema: a file, or {…} itself
    #[arg(long, value_name = "json|SCHEMA")]
    pub(crate) format: Option<PathBuf>,
    /// Print speed and cache figures after each answer
    #[arg(short = 'v', long, visible_alias = "verbose")]
    pub(crate) stats: bool,
    /// Keep neither what is typed nor the conversation, unless that has a name
    #[arg(long)]
    pub(crate) no_history: bool,
    #[command(flatten)]
    pub(crate) generation: Generation,
    #[command(flatten)]
    pub(crate) thinking: Thinking,
    #[command(flatten)]
    pub(crate) settings: Settings,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// Absent values are the model's own.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct Generation {
    /// Randomness; 0 always takes the most likely token
    #[arg(short, long, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Keep the most likely tokens up to this share of probability
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Keep the K most likely tokens; 0 = all
    #[arg(short = 'k', long, value_name = "K", value_parser = top_k, allow_negative_numbers = true)]
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
    #[arg(long, value_name = "N", value_parser = seed, allow_negative_numbers = true)]
    pub(crate) seed: Option<u64>,
    /// End the answer after N tokens
    #[arg(short = 'n', long, value_name = "N", value_parser = max_tokens, allow_negative_numbers = true)]
    pub(crate) max_tokens: Option<u32>,
    /// End the answer before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

impl Generation {
    /// These, and `other`'s where they are absent.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            temperature: self.temperature.or(other.temperature),
            top_p: self.top_p.or(other.top_p),
            top_k: self.top_k.or(other.top_k),
            min_p: self.min_p.or(other.min_p),
            repeat_penalty: self.repeat_penalty.or(other.repeat_penalty),
            frequency_penalty: self.frequency_penalty.or(other.frequency_penalty),
            presence_penalty: self.presence_penalty.or(other.presence_penalty),
            seed: self.seed.or(other.seed),
            max_tokens: self.max_tokens.or(other.max_tokens),
            stop: if self.stop.is_empty() { other.stop } else { self.stop },
        }
    }
}

/// For models that think before they answer.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[command(next_help_heading = "Thinking")]
pub(crate) struct Thinking {
    /// Let the model think first, with this effort if it knows efforts: low, medium or high
    #[arg(long, value_name = "EFFORT", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = effort, conflicts_with = "no_think")]
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
    /// Tokens of a conversation, answers included: 8192, or auto for the model's maximum, at most 32768
    #[arg(long, value_name = "TOKENS", value_parser = ctx)]
    pub(crate) ctx: Option<String>,
    /// How long an idle model stays loaded: 5m, 0, -1 for ever
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(crate) keep_alive: Option<String>,
}

impl Settings {
    fn each(&mut self) -> [&mut Option<String>; 4] {
        [&mut self.expert_cache, &mut self.memory, &mut self.ctx, &mut self.keep_alive]
    }

    /// `begun`, and has the daemon take back what else these have set.
    pub(crate) fn back_to(mut self, begun: &Self) -> Self {
        for (value, begun) in self.each().into_iter().zip(begun.clone().each()) {
            *value = begun.take().or(value.take().map(|_| "default".into()));
        }
        self
    }

    /// What stays asked for once the daemon has heard of it.
    pub(crate) fn kept(mut self) -> Self {
        self.each().into_iter().for_each(|value| *value = value.take().filter(|value| value != "default"));
        self
    }
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
    #[command(flatten)]
    pub(crate) remote: Remote,
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

/// What `--ctx` and `/set ctx` take.
pub(crate) fn ctx(text: &str) -> Result<String, String> {
    let known = ["auto", "default"].contains(&text) || text.parse().is_ok_and(|tokens: u32| tokens > 0);
    if known { Ok(text.into()) } else { Err("a number of tokens, or auto".into()) }
}

fn effort(text: &str) -> Result<String, String> {
    if ["", "low", "medium", "high"].contains(&text) { Ok(text.into()) } else { Err("low, medium or high".into()) }
}

// -1 is how ollama and llama.cpp say "whatever": all tokens, any seed, as many as fit.

fn top_k(text: &str) -> Result<u32, ParseIntError> {
    if text == "-1" { Ok(0) } else { text.parse() }
}

fn seed(text: &str) -> Result<u64, ParseIntError> {
    // RandomState is seeded by the operating system.
    if text == "-1" { Ok(RandomState::new().hash_one(0)) } else { text.parse() }
}

fn max_tokens(text: &str) -> Result<u32, ParseIntError> {
    if text == "-1" { Ok(u32::MAX) } else { text.parse() }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
