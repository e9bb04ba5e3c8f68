//! `flashctl tokenize`: the ids of a text, without entering the queue.

use flash_proto::v1::{TokenizeRequest, tokenize_request::Prompt};
use serde_json::json;

use super::piped_input;
use crate::{
    args::{Global, TokenizeArgs},
    connect::connect,
    failure::Failure,
    load, reply, term,
};

pub(crate) async fn run(args: TokenizeArgs, global: &Global) -> Result<(), Failure> {
    let text = if args.text.is_empty() { piped_input().await?.unwrap_or_default() } else { args.text.join(" ") };
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
