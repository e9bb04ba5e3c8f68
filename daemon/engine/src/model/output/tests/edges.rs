//! Where content begins and ends: replies that are cut, and the tokens that are listed with their log-probabilities.

use super::*;
use crate::{
    TokenLogprob,
    model::output::{Added, Output, Reply},
};

#[test]
fn a_reply_that_is_cut_does_not_end_in_half_a_mark() {
    let check = |template: &str, thinking: Thinking, text: &str, expected: &[Part]| {
        let mut parser = Parser::new(Dialect::of(template), Arc::new(Map::from_iter([("f".to_owned(), json!({}))])), thinking);
        let mut out = Vec::new();
        text.chars().for_each(|c| parser.push(&c.to_string(), &mut out, &mut |_, _| false));
        parser.finish(true, &mut out);
        assert_eq!(joined(out), expected, "{text}");
    };
    check(HERMES, Thinking::No, "I see.\n\n<tool_c", &[content("I see.")]);
    check(HERMES, Thinking::No, "a \n<t", &[content("a \n<t")]);
    check(HERMES, Thinking::No, "a <too", &[content("a")]);
    check(HERMES, Thinking::No, "a <tools", &[content("a <tools")]);
    check(HERMES, Thinking::Possible, "\n<thin", &[]);
    check(HERMES, Thinking::Begun, "so\n</thin", &[reasoning("so")]);
    check(HARMONY, Thinking::No, "<|channel|>final<|message|>Hi \n<|retu", &[content("Hi \n")]);
    check("", Thinking::No, "<tool_c", &[content("<tool_c")]);
}

/// What a reply of these tokens says, and the text of those that are listed.
fn follow(text: &Text, reply: Reply, stops: &[&str], tokens: &[u32], finish: Finish) -> (Vec<Part>, String) {
    let mut output = Output::new(reply, stops.iter().map(ToString::to_string).collect());
    let (mut parts, mut listed) = (Vec::new(), Vec::new());
    let mut take = |added: Added| {
        parts.extend(added.parts);
        listed.extend(added.logprobs);
        added.finish.is_some()
    };
    let mut over = false;
    for &id in tokens {
        over = take(output.push(text, id, Some(TokenLogprob { id, logprob: 0.0, top: Vec::new() })).unwrap());
        if over {
            break;
        }
    }
    if !over {
        let mut added = Added::default();
        output.end(&mut added, finish);
        take(added);
    }
    let bytes: Vec<u8> = listed.iter().flat_map(|found| text.token_bytes(found.id).to_vec()).collect();
    (joined(parts), String::from_utf8_lossy(&bytes).into_owned())
}

fn tooled(thinking: Thinking) -> Reply {
    let schemas = Arc::new(Map::from_iter([("f".to_owned(), json!({}))]));
    Reply { dialect: Dialect::of(HERMES), thinking, schemas, ..Reply::default() }
}

#[test]
fn a_reply_that_is_cut_does_not_end_in_half_a_character() {
    let text = Text::open(&bundled()).unwrap();
    let tokens = text.encode("a\u{1f600}").unwrap();
    let tokens = &tokens[..tokens.len() - 1];
    for reply in [Reply::default(), tooled(Thinking::No)] {
        // Its bytes are listed all the same.
        let cut = (vec![content("a")], "a\u{fffd}".to_owned());
        assert_eq!(follow(&text, reply.clone(), &[], tokens, Finish::Length), cut);
        let ended = (vec![content("a\u{fffd}")], "a\u{fffd}".to_owned());
        assert_eq!(follow(&text, reply, &[], tokens, Finish::Stop(None)), ended);
    }
}

#[test]
fn only_tokens_of_the_content_are_listed() {
    let text = Text::open(&bundled()).unwrap();
    let check = |reply: Reply, stops: &[&str], says: &str, said: &str| {
        // A character is one token or several, so that nothing overlaps.
        let tokens: Vec<u32> = says.chars().flat_map(|c| text.encode(&c.to_string()).unwrap()).collect();
        let (parts, found) = follow(&text, reply, stops, &tokens, Finish::Stop(None));
        let told: String = parts.iter().map(|part| if let Part::Content(text) = part { text.as_str() } else { "" }).collect();
        assert_eq!((told.as_str(), found.as_str()), (said, said), "{says}");
    };
    let call = "<tool_call>{\"name\": \"f\"}</tool_call>";
    check(Reply::default(), &[], "Pip \u{1f600} ran.\n", "Pip \u{1f600} ran.\n");
    check(Reply::default(), &["END"], "An E, the EN and the END.", "An E, the EN and the ");
    check(Reply::default(), &["END"], "the EN", "the EN");
    check(tooled(Thinking::No), &[], &format!("Look. \n{call}\n\u{fc} <tool {call} "), "Look.\u{fc} <tool");
    check(tooled(Thinking::No), &["."], &format!("a {call} b. c"), "ab");
    check(tooled(Thinking::Begun), &[], "so <th\n</think>\n\nYes </th", "Yes </th");
    check(tooled(Thinking::No), &[], "a <tool_call> f(1)</tool_call> b", "a<tool_call> f(1)</tool_call> b");
    let harmony = Reply { dialect: Dialect::of(HARMONY), ..tooled(Thinking::No) };
    check(harmony.clone(), &[], "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi <|", "Hi <|");
    check(harmony, &[], "<|channel|>commentary to=functions.f<|message|>{no}<|call|>", "{no}");
    // A token that ends behind what is said.
    let tokens = text.encode("Once").unwrap();
    let (parts, listed) = follow(&text, Reply::default(), &["e"], &tokens, Finish::Length);
    assert_eq!((parts, listed.as_str()), (vec![content("Onc")], "Once"));
}

#[test]
fn reasoning_ends_with_its_budget() {
    let text = Text::open(&bundled()).unwrap();
    // The model says the first of `says`, and the next one wherever it is interrupted.
    let check = |calls: bool, says: &[&str], expected: &[Part]| {
        let dialect = Dialect::of(HARMONY);
        let closings = dialect.closings(calls).iter().map(|closing| text.encode(closing).unwrap()).collect();
        let mut output = Output::new(Reply { dialect, budget: Some((5, closings)), ..tooled(Thinking::No) }, Vec::new());
        let (mut parts, mut added) = (Vec::new(), Added::default());
        for says in says {
            for c in says.chars() {
                for token in text.encode(&c.to_string()).unwrap() {
                    parts.extend(output.push(&text, token, None).unwrap().parts);
                }
                let mut interrupted = false;
                while let Some(token) = output.forced() {
                    parts.extend(output.push(&text, token, None).unwrap().parts);
                    interrupted = true;
                }
                if interrupted {
                    break;
                }
            }
        }
        output.end(&mut added, Finish::Stop(None));
        parts.extend(added.parts);
        assert_eq!(joined(parts), expected, "{says:?}");
    };
    let (thought, again) = ("<|channel|>analysis<|message|>One, two", "<|channel|>analysis<|message|>Three");
    check(false, &[thought, "Four."], &[reasoning("One, "), content("Four.")]);
    check(true, &[thought, again, "Four."], &[reasoning("One, "), content("Four.")]);
    let called = "<|channel|>commentary to=functions.f<|message|>{}<|call|>";
    check(true, &[thought, called], &[reasoning("One, "), call(0, "f", "{}")]);
}
