//! `flashctl tokenize`: the ids of a text, without entering the queue.

use flash_proto::v1::{TokenizeRequest, tokenize_request::Prompt};
use serde_json::json;

use super::piped_input;
use crate::{
    args::{Global, TokenizeArgs},
    connect::connect,
    failure::{Failure, exit},
    load, reply, term,
};

pub(crate) async fn run(args: TokenizeArgs, global: &Global) -> Result<(), Failure> {
    let piped = if args.text.is_empty() { piped_input().await? } else { None };
    let text = text(&args.text, piped)?;
    let daemon = connect(global).await?;
    let prompt = if args.chat { Prompt::Chat(reply::chat(vec![reply::message("user", &text)])) } else { Prompt::Text(text) };
    let request = TokenizeRequest { model: load::name_there(&args.model, global), prompt: Some(prompt) };
    let answer = daemon.generate().tokenize(request).await;
    let answer = answer.map_err(|status| daemon.failure(&status, "tokenizing"))?.into_inner();
    if global.json {
        let value = json!({"model": answer.model, "count": answer.ids.len(), "context_length": answer.context_length, "ids": answer.ids});
        return term::print_json(&value);
    }
    let ids: Vec<String> = answer.ids.iter().map(u32::to_string).collect();
    term::println(&ids.join(" "))?;
    if !global.quiet {
        term::note(&term::Paint::stderr().dim(&format!("{} tokens of {}", answer.ids.len(), answer.context_length)));
    }
    Ok(())
}

/// `piped` is absent at a terminal.
fn text(words: &[String], piped: Option<String>) -> Result<String, Failure> {
    if !words.is_empty() {
        return Ok(words.join(" "));
    }
    piped.ok_or_else(|| {
        Failure::new(exit::USAGE, "usage", "there is no text: no arguments, and standard input is a terminal")
            .hint("flashctl tokenize MODEL \"…\", or flashctl tokenize MODEL < FILE")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_no_text() {
        let check = |words: &[&str], piped: Option<&str>, expected: Result<&str, u8>| {
            let words: Vec<String> = words.iter().map(|&word| word.into()).collect();
            let found = text(&words, piped.map(String::from)).map_err(|failure| failure.exit);
            assert_eq!(found, expected.map(String::from));
        };
        check(&["two", "words"], None, Ok("two words"));
        check(&[], Some("piped\n"), Ok("piped\n"));
        check(&[], Some(""), Ok(""));
        check(&[], None, Err(exit::USAGE));
    }
}
