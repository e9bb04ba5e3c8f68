//! Replies as text in pieces: what the parser makes of them, whatever the pieces. And replies of the bundled model held to grammars, checked
//! by a validator that is not ours.

mod edges;
mod refused;

use std::{collections::HashMap, fs, sync::Arc};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{
    formats::Dialect,
    parse::{Begun, Parser, Thinking},
};
use crate::{
    CallPart, Chat, Choice, Delivery, Engine, Error, Event, Finish, Format, Message, Options, Parameters, Part, Request, Sampling, Step,
    Text, Tool, ToolChoice, model::tests::bundled,
};

const HERMES: &str = "</think><tool_call>";
const CODER: &str = "<tool_call><function=";
const HARMONY: &str = "<|channel|><|message|>";

/// Every piece that is said, neighbours of one kind joined, and whether a call was left open.
fn read(template: &str, thinking: Thinking, kept: bool, pieces: &[&str]) -> (Vec<Part>, u32) {
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}});
    let schemas = Arc::new(Map::from_iter([("f".to_owned(), schema.clone()), ("g".to_owned(), schema)]));
    let mut parser = Parser::new(Dialect::of(template), schemas, thinking);
    let mut parts: Vec<Part> = Vec::new();
    let mut out = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut out, &mut |begun, _| kept && begun == Begun::Call);
        parts.append(&mut out);
    }
    parser.finish(false, &mut out);
    parts.append(&mut out);
    let text = pieces.concat();
    let places: String = parser.places().map(|place| &text[place]).collect();
    let content: String = parts.iter().map(|part| if let Part::Content(text) = part { text.as_str() } else { "" }).collect();
    // A line's end between two messages stands where the second one's mark ends.
    let same = |(at, said): (u8, u8)| at == said || (at, said) == (b'>', b'\n');
    assert!(places.len() == content.len() && places.bytes().zip(content.bytes()).all(same), "{places} {content}");
    (joined(parts), parser.complete())
}

fn joined(parts: Vec<Part>) -> Vec<Part> {
    let mut joined: Vec<Part> = Vec::new();
    for part in parts {
        match (joined.last_mut(), part) {
            (Some(Part::Content(last)), Part::Content(text)) | (Some(Part::Reasoning(last)), Part::Reasoning(text)) => last.push_str(&text),
            (Some(Part::Call(last)), Part::Call(part)) if part.index == last.index => last.arguments.push_str(&part.arguments),
            (_, part) => joined.push(part),
        }
    }
    joined
}

fn content(text: &str) -> Part {
    Part::Content(text.into())
}

fn reasoning(text: &str) -> Part {
    Part::Reasoning(text.into())
}

fn call(index: u32, name: &str, arguments: &str) -> Part {
    Part::Call(CallPart { index, name: name.into(), arguments: arguments.into() })
}

fn check(template: &str, thinking: Thinking, text: &str, expected: &[Part]) {
    let calls = expected.iter().filter(|part| matches!(part, Part::Call(_))).count() as u32;
    let whole = read(template, thinking, false, &[text]);
    assert_eq!(whole, (expected.to_vec(), calls), "{text}");
    let characters: Vec<String> = text.chars().map(String::from).collect();
    let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
    assert_eq!(read(template, thinking, false, &characters), whole, "{text}");
}

#[test]
fn reasoning_and_calls_are_told_from_content() {
    use Thinking::{Begun, No, Possible};
    let f = |n: u32| format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {{\"n\": {n}}}}}\n</tool_call>");
    check(HERMES, No, "a < b\n\n", &[content("a < b\n\n")]);
    check(HERMES, Possible, "<think>\nso\n\n</think>\n\nHi <think> ", &[reasoning("so"), content("Hi <think> ")]);
    check(HERMES, Possible, "\n<thin", &[content("\n<thin")]);
    check(HERMES, Possible, "<think>\n\n</think>\n\nHi", &[content("Hi")]);
    check(HERMES, Begun, "so\nfar </thin", &[reasoning("so\nfar </thin")]);
    check(HERMES, Begun, "x</think>y", &[reasoning("x"), content("y")]);
    check(
        HERMES,
        No,
        &format!("I call.\n\n{}\n{}\n", f(1), f(2)),
        &[content("I call."), call(0, "f", "{\"n\":1}"), call(1, "f", "{\"n\":2}")],
    );
    let marked = "<tool_call>{\"name\": \"f\", \"arguments\": {\"s\": \"</tool_call>\"}}</tool_call>";
    check(HERMES, No, marked, &[call(0, "f", "{\"s\":\"</tool_call>\"}")]);
    // The end of the turn is as good as the mark.
    check(HERMES, No, "<tool_call>{\"name\": \"g\"}", &[call(0, "g", "{}")]);
    for wrong in ["<tool_call>f(1)</tool_call>", "<tool_call>{\"name\": \"h\"}</tool_call> x", "<tool_call>{\"name\": \"f\"", "<tool_call>"]
    {
        check(HERMES, No, wrong, &[content(wrong)]);
    }
    let xml = "ok\n<tool_call>\n<function=f>\n<parameter=n>\n5\n</parameter>\n<parameter=s>\n</tool_call> a\n</parameter>\n</function>\n</tool_call>";
    check(CODER, No, xml, &[content("ok"), call(0, "f", "{\"n\":5,\"s\":\"</tool_call> a\"}")]);
    check(CODER, No, "<tool_call>\nno\n</tool_call>", &[content("<tool_call>\nno\n</tool_call>")]);
    let thought = "<|channel|>analysis<|message|>hm <|end|><|start|>assistant";
    check(HARMONY, No, &format!("{thought}<|channel|>final<|message|>Hi"), &[reasoning("hm "), content("Hi")]);
    check(
        HARMONY,
        No,
        &format!("{thought}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{\"n\": 1}}"),
        &[reasoning("hm "), call(0, "f", "{\"n\":1}")],
    );
    check(HARMONY, No, "<|channel|>commentary to=functions.h<|message|>{}<|call|>", &[content("{}")]);
    check(HARMONY, No, "just text", &[content("just text")]);
    // Messages of one kind are apart.
    let says = |text: &str| text.replace('[', "<|end|><|start|>assistant<|channel|>").replace(']', "<|message|>");
    check(HARMONY, No, &says("<|channel|>analysis]a[analysis][analysis]b[commentary]c[final]d"), &[reasoning("a\nb"), content("c\nd")]);
    check("", No, &f(1), &[content(&f(1))]);
}

#[test]
fn arguments_that_keep_to_a_grammar_are_passed_on_as_they_come() {
    let text = "so\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"n\": \"}\\\"\"}}\n</tool_call>\n";
    let expected = (vec![content("so"), call(0, "f", "{\"n\": \"}\\\"\"}")], 1);
    assert_eq!(read(HERMES, Thinking::No, true, &[text]), expected);
    let mut parser = Parser::new(Dialect::of(HERMES), Arc::new(Map::from_iter([("f".to_owned(), json!({}))])), Thinking::No);
    let mut out = Vec::new();
    parser.push(&text[..text.find("}\\").unwrap()], &mut out, &mut |_, _| true);
    assert_eq!(out, [content("so"), call(0, "f", "{\"n\": \"")]);
    parser.finish(true, &mut out);
    assert_eq!(parser.complete(), 0);
    let message = "<|channel|>commentary to=functions.f<|message|>{\"n\": 1}<|call|>";
    assert_eq!(read(HARMONY, Thinking::No, true, &[message]), (vec![call(0, "f", "{\"n\": 1}")], 1));
}

proptest! {
    /// Texts made of marks, their beginnings and what lies between, cut anywhere.
    #[test]
    fn pieces_do_not_change_what_is_said(
        words in prop::collection::vec(prop::sample::select(vec![
            "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "</", "<", " ", "\n", "a", "é", "{\"name\": \"f\", \"arguments\": {\"n\": 1}}",
            "{\"name\": \"f\"}", "{", "}", "\"", "<function=f>", "<parameter=n>", "</parameter>", "</function>", "<|channel|>", "<|message|>",
            "<|end|>", "<|start|>", "<|call|>", "analysis", "final", "commentary to=functions.f ", "assistant",
        ]), 0..16),
        cuts in prop::collection::vec(0usize..400, 0..12),
        template in prop::sample::select(vec![HERMES, CODER, HARMONY, ""]),
        thinking in prop::sample::select(vec![Thinking::No, Thinking::Possible, Thinking::Begun]),
    ) {
        let text = words.concat();
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|at| text.is_char_boundary(*at) && *at <= text.len()).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
        prop_assert_eq!(read(template, thinking, false, &pieces), read(template, thinking, false, &[&text]));
    }
}

// ---- with the bundled model ----

/// The bundled model's text files with another template, and its weights if they are asked for.
fn speaking(template: &str, weights: bool) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(bundled()).unwrap().flatten() {
        let name = file.file_name().into_string().unwrap();
        if name == "chat_template.jinja" || !file.path().is_file() || (name.contains("safetensors") && !weights) {
            continue;
        }
        fs::copy(file.path(), dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    dir
}

const CHATML: &str = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const CODER_CHAT: &str = "{% if tools %}{{ tools | tojson }}<tool_call>\n<function=x>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const THINKING_CHAT: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";

fn ask(text: &str) -> Chat {
    Chat::of(vec![Message { role: "user".into(), content: text.into(), ..Message::default() }])
}

fn tool(name: &str, schema: Value) -> Tool {
    let Value::Object(schema) = schema else { panic!("an object") };
    Tool { name: name.into(), description: "d".into(), parameters: Parameters::Schema(schema), strict: false, hidden: false }
}

fn request(text: &Text, chat: &Chat, format: Option<&Format>, seed: u64) -> Result<Request, Error> {
    let prompt = text.render(chat)?;
    let reply = text.reply(chat, &prompt, format)?;
    let sampling = Sampling { temperature: 1.0, seed: Some(seed), ..Sampling::greedy() };
    Ok(Request { sampling, reply, max_tokens: Some(200), ..Request::greedy(text.encode(&prompt)?) })
}

#[derive(Debug)]
struct Said {
    parts: Vec<Part>,
    finish: Finish,
    logprobs: Vec<crate::TokenLogprob>,
}

/// Runs all of them, some at a time.
fn run(engine: &mut Engine, requests: Vec<Request>) -> Vec<Said> {
    let mut said = HashMap::new();
    let mut order = Vec::new();
    for request in requests {
        let (id, _) = engine.admit(request).unwrap();
        order.push(id);
        said.insert(id, Said { parts: Vec::new(), finish: Finish::Length, logprobs: Vec::new() });
    }
    let mut deliver = |id, event| {
        let said = said.get_mut(&id).unwrap();
        match event {
            Event::Token { parts, logprobs, .. } => {
                said.parts.extend(parts);
                said.logprobs.extend(logprobs);
            }
            Event::Done(done) => said.finish = done.finish,
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
        Delivery::Taken
    };
    while engine.step(&mut deliver) == Step::Worked {}
    order.into_iter().map(|id| said.remove(&id).unwrap()).map(|said| Said { parts: joined(said.parts), ..said }).collect()
}

fn text_of(said: &Said) -> String {
    match &said.parts[..] {
        [] => String::new(),
        [Part::Content(text)] => text.clone(),
        parts => panic!("content only: {parts:?}"),
    }
}

/// A schema of a few levels, with the keywords that clients send.
fn schema(rng: &mut impl FnMut(u32) -> u32, depth: u32) -> Value {
    let kinds = if depth == 0 { 7 } else { 10 };
    match rng(kinds) {
        0 => json!({"type": "string", "maxLength": 1 + rng(12)}),
        1 => json!({"type": "string", "minLength": 2, "maxLength": 4, "description": "short"}),
        2 => json!({"type": "integer", "minimum": 0, "maximum": rng(1000)}),
        3 => json!({"type": "number", "minimum": -5, "exclusiveMaximum": 5}),
        4 => json!({"type": ["boolean", "null"]}),
        5 => json!({"enum": ["red", 7, null, "gr\"ün"]}),
        6 => json!({"type": "string", "pattern": "^[a-f]{2,5}$"}),
        7 => json!({"type": "array", "items": schema(rng, depth - 1), "minItems": rng(2), "maxItems": 2 + rng(2)}),
        8 => json!({"anyOf": [schema(rng, depth - 1), {"type": "null"}]}),
        _ => {
            let count = rng(4);
            let properties: Map<String, Value> = (0..count).map(|i| (format!("key{i}"), schema(rng, depth - 1))).collect();
            let required: Vec<&String> = properties.keys().take(rng(count + 1) as usize).collect();
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        }
    }
}

#[test]
fn replies_of_the_bundled_model_are_valid_for_200_schemas() {
    let options = Options { parallel: 8, queue: 256, ..Options::default() };
    let mut engine = Engine::load(&bundled(), &options, &mut |_| ()).unwrap();
    let text = engine.text();
    let mut state = 7u64;
    let mut rng = |below: u32| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % u64::from(below.max(1))) as u32
    };
    let schemas: Vec<Value> = (0..200)
        .map(|_| {
            let inner = [schema(&mut rng, 2), schema(&mut rng, 1)];
            json!({"type": "object", "properties": {"a": inner[0], "b": inner[1]}, "required": ["a", "b"], "additionalProperties": false})
        })
        .collect();
    let of = |(seed, schema): (u64, &Value)| {
        let format = Format::JsonSchema { schema: schema.clone(), strict: true };
        request(&text, &ask("Tell me about it."), Some(&format), seed).unwrap()
    };
    let requests = (0u64..).zip(&schemas).map(of).collect();
    let mut whole = 0;
    for (schema, said) in schemas.iter().zip(run(&mut engine, requests)) {
        if said.finish == Finish::Length {
            continue;
        }
        whole += 1;
        let reply = text_of(&said);
        let value: Value = serde_json::from_str(&reply).unwrap_or_else(|error| panic!("{error}: {reply}"));
        let validator = jsonschema::validator_for(schema).unwrap();
        assert!(validator.is_valid(&value), "{reply} is not valid for {schema}");
    }
    assert!(whole > 150, "{whole} of 200 came to an end");
}

/// What is guessed first is what the mask would have allowed: at every step of replies in several forms, for every token there is.
#[test]
fn a_token_is_allowed_alone_as_it_is_in_the_mask() {
    let text = Text::open(&bundled()).unwrap();
    let schema = json!({"type": "object", "properties": {"s": {"type": "string", "maxLength": 9}, "n": {"type": "number"}}});
    let cases = [
        (Format::JsonObject, "{\"a\": [1, \"tw\u{f6}\", {}], \"b\": null}"),
        (Format::JsonSchema { schema, strict: true }, "{\"s\":\"Pip ran\",\"n\":-1.5e3}"),
        (Format::Regex("([a-z]+ ){2,5}[0-9]{3}".into()), "one two three 123"),
        (Format::Lark("start: \"<\" word \">\"\nword: /[^<>]*/".into()), "<any w\u{f6}rd>"),
    ];
    for (format, says) in cases {
        let chat = ask("x");
        let prompt = text.render(&chat).unwrap();
        let mut output = super::Output::new(text.reply(&chat, &prompt, Some(&format)).unwrap(), Vec::new());
        for token in text.encode(says).unwrap() {
            let mask = output.mask(&text).unwrap().unwrap().clone();
            for id in 0..text.vocab_size() as u32 + 2 {
                let masked = (id as usize) < mask.len() && mask.is_allowed(id);
                assert_eq!(output.allows(&text, id).unwrap(), masked, "{format:?}, {says}: token {id} before {token}");
            }
            output.push(&text, token, None).unwrap();
        }
    }
}

#[test]
fn calls_are_forced_named_and_typed() {
    for template in [CHATML, CODER_CHAT] {
        let dir = speaking(template, true);
        let mut engine = Engine::load(dir.path(), &Options { parallel: 4, ..Options::default() }, &mut |_| ()).unwrap();
        let text = engine.text();
        let short = json!({"type": "string", "maxLength": 8});
        let f = json!({"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}, "s": short}, "required": ["n"], "additionalProperties": false});
        let g = json!({"type": "object", "properties": {}, "additionalProperties": false});
        let tools = vec![tool("f", f.clone()), tool("g", g)];
        let forced = |names: &[&str], single| Chat {
            tools: tools.clone(),
            choice: ToolChoice { mode: Choice::Required, names: names.iter().map(ToString::to_string).collect(), single },
            ..ask("Go.")
        };
        let chats = [forced(&["f"], true), forced(&["g"], true), forced(&[], true), forced(&[], false)];
        let requests = (0u64..).zip(&chats).map(|(seed, chat)| request(&text, chat, None, seed).unwrap()).collect();
        for (index, said) in run(&mut engine, requests).into_iter().enumerate() {
            if said.finish == Finish::Length {
                // Text in XML has no length to it, and a random walk may not find its end.
                assert!(template == CODER_CHAT || index == 3, "{index}: {:?}", said.parts);
                continue;
            }
            assert_eq!(said.finish, Finish::ToolCalls, "{template} {index}: {:?}", said.parts);
            for part in &said.parts {
                let Part::Call(call) = part else { panic!("only calls: {part:?}") };
                assert!(index > 1 || call.name == ["f", "g"][index], "{call:?}");
                let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
                if call.name == "f" && template == CHATML {
                    assert!(jsonschema::validator_for(&f).unwrap().is_valid(&arguments), "{call:?}");
                }
                assert!(call.name != "f" || arguments["n"].is_u64(), "{call:?}");
            }
            assert!(index == 3 || said.parts.len() == 1);
        }
    }
}

const HARMONY_CHAT: &str = "{{ tools | tojson }}{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant{# <|channel|> #}";

/// Says what a text's tokens say, then ends the turn.
fn scripted(text: &Arc<Text>, says: &'static str) -> crate::Script {
    let ids = text.encode(says).unwrap();
    let end = text.end_ids()[0];
    crate::Script(Arc::new(move |tokens, prompt, logits| {
        let next = ids.get(tokens.len() - prompt).copied().unwrap_or(end);
        logits.fill(0.0);
        logits[next as usize] = 100.0;
    }))
}

fn say(template: &str, says: &'static str, change: impl FnOnce(&mut Chat), format: Option<&Format>) -> Said {
    let dir = speaking(template, true);
    let text = Arc::new(Text::open(dir.path()).unwrap());
    let options = Options { script: Some(scripted(&text, says)), ..Options::default() };
    let mut engine = Engine::load(dir.path(), &options, &mut |_| ()).unwrap();
    let mut chat = ask("Go.");
    change(&mut chat);
    let request = Request { top_logprobs: Some(2), sampling: Sampling::greedy(), ..request(&text, &chat, format, 1).unwrap() };
    run(&mut engine, vec![request]).remove(0)
}

#[test]
fn grammars_begin_where_they_should() {
    // Free until the mark, then held to the tools: the unknown argument cannot be said.
    let f = || {
        vec![tool(
            "f",
            json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}),
        )]
    };
    let said = say(CHATML, "I see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"n\":5}}\n</tool_call>", |chat| chat.tools = f(), None);
    assert_eq!((said.parts, said.finish), (vec![content("I see."), call(0, "f", "{\"n\":5}")], Finish::ToolCalls));
    let said = say(CHATML, "<tool_call>\n{\"name\": \"evil\", \"arguments\": {\"n\": 5}}", |chat| chat.tools = f(), None);
    assert!(matches!(&said.parts[..], [Part::Call(call)] if call.name == "f"), "{:?}", said.parts);
    // Shown and not to be called: a call is text.
    let says = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"n\": 5}}\n</tool_call>";
    let none = |chat: &mut Chat| (chat.tools, chat.choice.mode) = (f(), Choice::None);
    assert_eq!(say(CHATML, says, none, None).parts, [content(says)]);
    // After thinking, and not before.
    let colour = Format::JsonSchema { schema: json!({"enum": ["red"]}), strict: true };
    let said = say(THINKING_CHAT, "Is it {blue}?\n</think>\n\n\"red\" or so", |_| (), Some(&colour));
    assert_eq!((said.parts, said.finish), (vec![reasoning("Is it {blue}?"), content("\"red\"")], Finish::Stop(None)));
    // Sooner, if the budget for thinking is spent.
    let budget = |tokens: usize| move |chat: &mut Chat| _ = chat.kwargs.insert("thinking_budget".into(), tokens.into());
    let said = say(THINKING_CHAT, "Is it {blue}? Is it green, or is it a colour that nobody has seen?", budget(3), Some(&colour));
    assert_eq!(said.parts.last(), Some(&content("\"red\"")), "{:?}", said.parts);
    let says = "One, two, three, four, five, six, seven and so on.";
    let said = say(THINKING_CHAT, says, budget(4), None);
    let [Part::Reasoning(thought), Part::Content(answer)] = &said.parts[..] else { panic!("{:?}", said.parts) };
    assert!(says.starts_with(thought.as_str()) && says.ends_with(answer.as_str()) && thought.len() + answer.len() < says.len(), "{said:?}");
    assert_eq!(say(THINKING_CHAT, says, budget(100), None).parts, [reasoning(says)]);
    // In Harmony the answer follows.
    let says = &*format!("<|channel|>analysis<|message|>One, two, three, {}", "four, ".repeat(40)).leak();
    let said = say(HARMONY_CHAT, says, budget(4), None);
    let [Part::Reasoning(thought), Part::Content(answer)] = &said.parts[..] else { panic!("{:?}", said.parts) };
    assert!(thought.starts_with("One, ") && thought.len() < 20 && answer.contains("four, four"), "{said:?}");
    // In XML, where values are typed; and in Harmony, where thinking and calls are messages.
    let text = json!({"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}, "required": ["s"]});
    let mixed = |chat: &mut Chat| chat.tools = vec![tool("f", text.clone())];
    let says = "Well.\n<tool_call>\n<function=f>\n<parameter=n>\n5\n</parameter>\n<parameter=s>\n<b>\n</b>\n</parameter>\n</function>\n</tool_call>";
    let said = say(CODER_CHAT, says, mixed, None);
    let expected = vec![content("Well."), call(0, "f", "{\"n\":5,\"s\":\"<b>\\n</b>\"}")];
    assert_eq!((said.parts, said.finish), (expected, Finish::ToolCalls));
    let says = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"n\": 5}";
    let forced = |chat: &mut Chat| (chat.tools, chat.choice.mode) = (f(), Choice::Required);
    for change in [&forced as &dyn Fn(&mut Chat), &|chat: &mut Chat| chat.tools = f()] {
        let said = say(HARMONY_CHAT, says, change, None);
        assert_eq!((said.parts, said.finish), (vec![reasoning("Hm."), call(0, "f", "{\"n\": 5}")], Finish::ToolCalls));
    }
    // A call that nobody has asked for is held to its own tool's schema.
    let g = json!({"type": "object", "properties": {"s": {"enum": ["red"]}}, "required": ["s"], "additionalProperties": false});
    let says = "<|channel|>commentary to=functions.g <|constrain|>json<|message|>{\"n\": 5}";
    let said = say(HARMONY_CHAT, says, |chat| chat.tools = [f(), vec![tool("g", g.clone())]].concat(), None);
    assert!(
        matches!(&said.parts[..], [Part::Call(call)] if call.name == "g" && call.arguments.replace(' ', "") == "{\"s\":\"red\"}"),
        "{:?}",
        said.parts
    );
    // In XML, texts are held to their choices and lengths, of characters and not of bytes.
    let texts = json!({"type": "object", "properties": {"e": {"type": "string", "enum": ["a", "b"]}, "s": {"type": "string", "minLength": 2, "maxLength": 4}, "n": {"type": "integer"}}, "required": ["e", "s"]});
    for (e, s, valid) in [
        ("a", "\u{fc}\u{fc}\u{fc}\n", true),
        ("b", "1</p", true),
        ("b", "\u{fc}12", true),
        ("c", "xyz", false),
        ("a", "x", false),
        ("b", "12345", false),
    ] {
        let says = format!(
            "<tool_call>\n<function=f>\n<parameter=e>\n{e}\n</parameter>\n<parameter=s>\n{s}\n</parameter>\n</function>\n</tool_call>"
        );
        let said = say(CODER_CHAT, says.leak(), |chat| chat.tools = vec![tool("f", texts.clone())], None);
        let Some(Part::Call(call)) = said.parts.first() else { panic!("{e} {s}: {said:?}") };
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
        assert!(jsonschema::validator_for(&texts).unwrap().is_valid(&arguments), "{call:?}");
        assert_eq!(arguments["e"] == e && arguments["s"] == s, valid, "{call:?}");
    }
    // And to patterns; a custom tool's text to its grammar.
    let patterned = json!({"type": "object", "properties": {"s": {"type": "string", "pattern": "^[a-z]+-[0-9]{2}$"}, "t": {"type": "string", "pattern": "b/|c", "maxLength": 5}}, "required": ["s", "t"]});
    for (s, t, valid) in
        [("ab-12", "a b/", true), ("x-00", "\n\nc\n", true), ("ab-1", "b/", false), ("ab-12", "xyz", false), ("ab-12", "abcdef", false)]
    {
        let says = format!(
            "<tool_call>\n<function=f>\n<parameter=s>\n{s}\n</parameter>\n<parameter=t>\n{t}\n</parameter>\n</function>\n</tool_call>"
        );
        let said = say(CODER_CHAT, says.leak(), |chat| chat.tools = vec![tool("f", patterned.clone())], None);
        let Some(Part::Call(call)) = said.parts.first() else { panic!("{s} {t}: {said:?}") };
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
        assert_eq!(arguments["s"] == s && arguments["t"] == t, valid, "{call:?}");
        assert!(arguments["s"].as_str().unwrap().contains('-') && arguments["t"].as_str().unwrap().contains(['/', 'c']), "{call:?}");
    }
    for pattern in ["(?=a)b", "^a|b$|[|]", r"y|\|$", r"(a|n)y$"] {
        let beyond = json!({"type": "object", "properties": {"s": {"type": "string", "pattern": pattern}}, "required": ["s"]});
        let says = "<tool_call>\n<function=f>\n<parameter=s>\nany\n</parameter>\n</function>\n</tool_call>";
        let said = say(CODER_CHAT, says, |chat| chat.tools = vec![tool("f", beyond.clone())], None);
        assert_eq!(said.parts, [call(0, "f", "{\"s\":\"any\"}")], "{pattern}");
    }
    let grammar = Format::Lark("start: \"<\" word \">\" line*\nword: /[a-z]+/\nline: /\\n[0-9]/".into());
    for (format, text, valid) in [
        (&grammar, "<ab>\n1\n2", true),
        (&grammar, "<>", false),
        (&Format::Regex("a+|b+".into()), "bb", true),
        (&Format::Regex("a+|b+".into()), "ab", false),
        (&Format::Lark("start: (".into()), "what cannot be enforced\nis free", true),
    ] {
        let says = format!("<tool_call>\n<function=f>\n<parameter=input>\n{text}\n</parameter>\n</function>\n</tool_call>");
        let custom = |chat: &mut Chat| {
            chat.tools = vec![Tool { parameters: Parameters::Text(Some(format.clone())), ..tool("f", json!({})) }];
        };
        let said = say(CODER_CHAT, says.leak(), custom, None);
        let Some(Part::Call(call)) = said.parts.first() else { panic!("{text}: {said:?}") };
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
        assert_eq!(arguments["input"] == text, valid, "{call:?}");
    }
    let said = say(HARMONY_CHAT, "<|channel|>final<|message|>\"red\" or so", |_| (), Some(&colour));
    assert_eq!((said.parts, said.finish), (vec![content("\"red\"")], Finish::Stop(None)));
    // What the grammar forbids has no probability.
    let said = say(CHATML, "blue", |_| (), Some(&colour));
    assert_eq!(said.parts, [content("\"red\"")]);
    assert!(said.logprobs.iter().any(|token| token.top.iter().any(|(_, logprob)| *logprob == -9999.0)), "{:?}", said.logprobs);
}

#[test]
fn tools_and_calls_are_shown_to_templates_as_transformers_does() {
    let template = "{{ tools | tojson }}\n{% for m in messages %}{{ m | tojson }}\n{% endfor %}<tool_call>";
    let text = Text::open(speaking(template, false).path()).unwrap();
    let arguments = Map::from_iter([("b".to_owned(), json!(1)), ("a".to_owned(), json!(2))]);
    let mut chat = ask("x");
    chat.tools = vec![tool("f", json!({"type": "object", "b": 1, "a": 2})), Tool { hidden: true, ..tool("g", json!({})) }];
    chat.messages.push(Message {
        role: "assistant".into(),
        reasoning: Some("hm".into()),
        tool_calls: vec![crate::ToolCall { id: "c1".into(), name: "f".into(), arguments }],
        ..Message::default()
    });
    chat.messages.push(Message {
        role: "tool".into(),
        content: "7".into(),
        tool_call_id: Some("c1".into()),
        name: Some("f".into()),
        ..Message::default()
    });
    let expected = r#"[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "b": 1, "a": 2}}}]
{"role": "user", "content": "x"}
{"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"b": 1, "a": 2}}}]}
{"role": "tool", "content": "7", "name": "f", "tool_call_id": "c1"}
<tool_call>"#;
    assert_eq!(text.render(&chat).unwrap(), expected);
}

#[test]
fn messages_that_a_template_refuses_are_shown_otherwise() {
    let strict = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must be first') }}{% endif %}{% if not loop.first and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    let none = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    let check = |template: &str, messages: &[(&str, &str)], expected: Result<&str, &str>| {
        let text = Text::open(speaking(template, false).path()).unwrap();
        let of = |(role, content): &(&str, &str)| Message { role: (*role).into(), content: (*content).into(), ..Message::default() };
        match (text.render(&Chat::of(messages.iter().map(of).collect())), expected) {
            (Ok(text), Ok(expected)) => assert_eq!(text, expected),
            (Err(error), Err(says)) => assert!(error.to_string().contains(says), "{error}"),
            (found, expected) => panic!("{found:?}, expected {expected:?}"),
        }
    };
    check(strict, &[("system", "s"), ("user", "a"), ("assistant", "b")], Ok("[system]s[user]a[assistant]b"));
    check(
        strict,
        &[("user", "a"), ("assistant", "b"), ("system", "s"), ("assistant", "c")],
        Ok("[user]a[assistant]b[user]<system-reminder>\ns\n</system-reminder>[assistant]c"),
    );
    check(strict, &[("user", "a"), ("user", "b"), ("system", "s")], Ok("[user]a\n\nb\n\n<system-reminder>\ns\n</system-reminder>"));
    check(none, &[("system", "s"), ("user", "a")], Ok("[user]<system-reminder>\ns\n</system-reminder>\n\na"));
    check("{{ raise_exception('never') }}", &[("user", "a")], Err("never"));
}
