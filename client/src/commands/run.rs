//! `flashctl run`: one prompt, one answer. The prompt is put together here; without any, at a terminal, it is a chat.

use std::{
    fs,
    io::{self, IsTerminal},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use flash_proto::v1::{Format, Infill, LoadResponse, format::Kind, generate_request::Prompt};

use super::{not_text, piped_input};
use crate::{
    args::{ChatArgs, Global, RunArgs},
    connect::connect,
    failure::{Failure, exit},
    json::{self, Chunks},
    load, render,
    reply::{self, Reply, Said, Thoughts},
    term::{self, Paint},
};

pub(crate) fn is_chat(args: &RunArgs) -> bool {
    // What a chat knows nothing of is not passed over: it asks for a prompt.
    let RunArgs { raw, suffix, no_stream, timeout, .. } = args;
    let once = *raw || *no_stream || suffix.is_some() || timeout.is_some();
    !once && args.prompt.is_empty() && args.file.is_empty() && io::stdin().is_terminal()
}

impl From<RunArgs> for ChatArgs {
    fn from(run: RunArgs) -> Self {
        let RunArgs { model, system, generation, thinking, settings, stats, format, remote, .. } = run;
        let (resume, session, no_history, file) = (false, None, false, Vec::new());
        Self { model: Some(model), resume, session, file, system, format, generation, thinking, settings, stats, no_history, remote }
    }
}

pub(crate) async fn run(args: RunArgs, global: &Global) -> Result<(), Failure> {
    let mut reply = Reply::default();
    let answer = answer(&args, global, &mut reply);
    let outcome = match args.timeout {
        None => answer.await,
        Some(limit) => tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
            let message = format!("no complete answer within {}", render::milliseconds(1e3 * limit.as_secs_f64()));
            Err(Failure::new(exit::TIMEOUT, "timeout", message).hint("a longer --timeout, or fewer tokens with -n"))
        }),
    };
    if let Err(failure) = &outcome {
        // The partial answer stays; what is said about it begins on a line of its own.
        if streams(&args, global) && !failure.message.is_empty() && !reply.text.is_empty() && !reply.text.ends_with('\n') {
            term::note("");
        }
    }
    outcome
}

fn streams(args: &RunArgs, global: &Global) -> bool {
    !args.no_stream && !global.json
}

async fn answer(args: &RunArgs, global: &Global, reply: &mut Reply) -> Result<(), Failure> {
    let files = args.file.iter().map(|path| read_file(path)).collect::<Result<Vec<_>, _>>()?;
    let stdin = piped_input().await?;
    let prompt = join_prompt(&args.prompt, &files, stdin.as_deref()).ok_or_else(|| {
        Failure::new(exit::USAGE, "usage", "there is no prompt: no arguments, and nothing on standard input")
            .hint("flashctl run MODEL \"…\", or `flashctl chat` to talk in turns")
    })?;
    let format = args.format.as_deref().map(format).transpose()?;
    let daemon = connect(global).await?;
    let loaded = load::load(&daemon, &args.model, &args.settings, global).await?;
    let prompt = if let Some(suffix) = &args.suffix {
        Prompt::Infill(Infill { prefix: prompt, suffix: suffix.clone() })
    } else if args.raw {
        Prompt::Text(prompt)
    } else {
        let system = args.system.as_deref().map(|system| reply::message("system", system));
        Prompt::Chat(reply::thinking_chat(system.into_iter().chain([reply::message("user", &prompt)]).collect(), &args.thinking))
    };
    let mut request = reply::request(&load::name_there(&args.model, global), prompt, &args.generation);
    request.format = format;
    let streaming = streams(args, global);
    let mut chunks = args.stream.then(|| Chunks::new(args.raw || args.suffix.is_some(), now()));
    let mut thoughts = Thoughts::new(&args.thinking);
    let mut sink = |said: Said<'_>| match said {
        said if let Some(chunks) = &mut chunks => chunks.next(said).map_or(Ok(()), |chunk| term::print_json(&chunk)),
        Said::Text(text) if streaming => {
            thoughts.close();
            term::print(text)
        }
        Said::Reasoning(text) if streaming => {
            thoughts.say(text);
            Ok(())
        }
        _ => Ok(()),
    };
    reply::receive(&daemon, request, global, reply, &mut sink).await?;
    thoughts.close();
    if let Some(chunks) = chunks {
        term::print_json(&chunks.last(reply, loaded.cache.as_ref()))?;
    }
    finish(args, reply, &loaded, global)
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

fn finish(args: &RunArgs, reply: &Reply, loaded: &LoadResponse, global: &Global) -> Result<(), Failure> {
    if global.json {
        if !args.stream {
            term::print_json(&json::completion(reply, args.raw || args.suffix.is_some(), now(), loaded.cache.as_ref()))?;
        }
    } else {
        if args.no_stream {
            term::print(&reply.text)?;
        }
        if !reply.text.ends_with('\n') {
            term::print("\n")?;
        }
    }
    if args.stats || (io::stderr().is_terminal() && !global.quiet && !global.json) {
        let paint = Paint::stderr();
        for line in render::summary(reply, loaded).lines() {
            term::note(&paint.dim(line));
        }
    }
    Ok(())
}

/// `json`, or a schema that the answer keeps to the letter: in a file, or as it is.
pub(super) fn format(wanted: &Path) -> Result<Format, Failure> {
    let kind = if wanted.as_os_str() == "json" {
        Kind::JsonObject(true)
    } else {
        let written = wanted.to_str().filter(|text| text.trim_start().starts_with('{'));
        let schema = written.map_or_else(|| read_file(wanted), |schema| Ok(schema.to_owned()))?;
        serde_json::from_str::<serde::de::IgnoredAny>(&schema).map_err(|error| {
            let message = format!("{} is no JSON schema: {error}", wanted.display());
            Failure::new(exit::BAD_DATA, "invalid_schema", message).hint("correct it, or ask for any object with --format json")
        })?;
        Kind::JsonSchema(schema)
    };
    Ok(Format { kind: Some(kind), strict: true })
}

pub(super) fn read_file(path: &Path) -> Result<String, Failure> {
    let bytes =
        fs::read(path).map_err(|error| Failure::new(exit::NO_INPUT, "input", format!("cannot read {}: {error}", path.display())))?;
    String::from_utf8(bytes).map_err(|error| not_text(&path.display().to_string(), error.utf8_error()))
}

/// Arguments, files, standard input, with a blank line between them; what is empty counts as not given.
pub(super) fn join_prompt(words: &[String], files: &[String], stdin: Option<&str>) -> Option<String> {
    let words = words.join(" ");
    let parts = [words.as_str()].into_iter().chain(files.iter().map(String::as_str)).chain(stdin);
    // A lone part goes as it is; between parts the final newline of a file would make two blank lines.
    let parts: Vec<&str> = parts.filter(|part| !part.trim().is_empty()).collect();
    match parts.as_slice() {
        [] => None,
        [only] => Some((*only).into()),
        [.., last] => {
            let trimmed: Vec<&str> = parts[..parts.len() - 1].iter().map(|part| part.trim_end_matches('\n')).collect();
            Some(format!("{}\n\n{last}", trimmed.join("\n\n")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_put_together() {
        let check = |words: &[&str], files: &[&str], stdin: Option<&str>, expected: Option<&str>| {
            let own = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
            assert_eq!(join_prompt(&own(words), &own(files), stdin).as_deref(), expected);
        };
        check(&[], &[], None, None);
        check(&[], &[], Some(""), None);
        check(&["", " "], &[], Some("\n"), None);
        check(&["Tell", "me"], &[], None, Some("Tell me"));
        check(&["Tell", "me"], &[], Some(""), Some("Tell me"));
        check(&[], &[], Some("once\n"), Some("once\n"));
        check(&["Shorten:"], &[], Some("a diff\n"), Some("Shorten:\n\na diff\n"));
        check(&["Shorten:"], &["one\n", "", "two\n"], Some("three"), Some("Shorten:\n\none\n\ntwo\n\nthree"));
    }
}
