//! Forms that cannot be enforced, or not as they are: refused before a request is accepted, made laxer, or bearable.

use super::*;
use crate::model::output::rules;

#[test]
fn stop_strings_win_and_unlike_forms_are_refused() {
    let dir = speaking(CHATML, true);
    let mut engine = Engine::load(dir.path(), &Options::default(), &mut |_| ()).unwrap();
    let text = engine.text();
    let any = Format::JsonObject;
    let stopped = Request { stop: vec!["{".into()], ..request(&text, &ask("x"), Some(&any), 3).unwrap() };
    let said = run(&mut engine, vec![stopped]).remove(0);
    assert_eq!((said.parts, said.finish), (Vec::new(), Finish::Stop(Some("{".into()))));

    let refused = |chat: &Chat, format: Option<&Format>, says: &str| {
        let error = request(&text, chat, format, 1).expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
        assert!(!error.contains('\n'), "{error}");
    };
    let schema = |schema: Value, strict| Format::JsonSchema { schema, strict };
    let odd = json!({"type": "object", "propertyNames": {"pattern": "^a"}});
    refused(&ask("x"), Some(&schema(odd.clone(), true)), "propertyNames");
    request(&text, &ask("x"), Some(&schema(odd.clone(), false)), 1).unwrap();
    // Which would take ten seconds and half a gigabyte.
    let steps = json!({"type": "integer", "multipleOf": 999_983});
    refused(&ask("x"), Some(&schema(steps.clone(), true)), "multipleOf: numbers of more than 20000 remainders");
    request(&text, &ask("x"), Some(&schema(steps.clone(), false)), 1).unwrap();
    refused(&ask("x"), Some(&Format::Lark(format!("start: %json {steps}"))), "multipleOf");
    refused(&ask("x"), Some(&schema(json!({"type": "string", "pattern": "^a{2}{b"}), true)), "^a{2}{b: repetition quantifier");
    refused(&ask("x"), Some(&schema(json!({"type": "sausage"}), false)), "sausage");
    let relaxed = |schema: Value, expected: bool| {
        let strict = Format::JsonSchema { schema: schema.clone(), strict: true };
        assert_eq!(request(&text, &ask("x"), Some(&strict), 1).is_err(), expected, "{schema}");
        let lenient = Format::JsonSchema { schema: schema.clone(), strict: false };
        assert_eq!(request(&text, &ask("x"), Some(&lenient), 1).unwrap().reply.relaxed(), expected, "{schema}");
    };
    relaxed(json!({"type": "object", "properties": {"type": {"const": "sausage"}}}), false);
    relaxed(odd.clone(), true);
    // As zod writes a record.
    let record = json!({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}});
    relaxed(json!({"type": "array", "uniqueItems": false, "items": {"allOf": [record]}}), false);
    relaxed(json!({"type": "array", "items": {"$ref": "https://example.com/item.json"}}), true);
    relaxed(json!({"$ref": "#"}), true);
    // What compiles, and has no first token.
    let circle = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
    for circle in [json!({"$ref": "#"}), circle] {
        refused(&ask("x"), Some(&schema(circle.clone(), true)), "response_format: ");
        let tools = |strict| Chat { tools: vec![Tool { strict, ..tool("f", circle.clone()) }], ..ask("x") };
        refused(&tools(true), None, "tools: f: ");
        request(&text, &tools(false), None, 1).unwrap();
    }
    let optional = |count: usize| {
        let properties: Map<String, Value> = (0..count).map(|i| (format!("p{i}"), json!({"type": "integer"}))).collect();
        json!({"type": "object", "properties": properties})
    };
    request(&text, &ask("x"), Some(&schema(optional(2000), true)), 1).unwrap();
    refused(&ask("x"), Some(&schema(optional(6400), true)), "response_format: ");
    let far = json!({"type": "integer", "minimum": -9_223_372_036_854_775_807_i64, "maximum": 1e30});
    request(&text, &ask("x"), Some(&schema(far, false)), 1).unwrap();
    refused(&ask("x"), Some(&Format::Lark("start: (".into())), "response_format");
    refused(&ask("x"), Some(&Format::Regex("(".into())), "response_format");
    let mut deep = json!({"type": "integer"});
    for _ in 0..100 {
        deep = json!({"type": "array", "items": deep});
    }
    request(&text, &ask("x"), Some(&schema(deep, true)), 1).unwrap();
    let mut chat = Chat { tools: vec![Tool { strict: true, ..tool("f", odd.clone()) }], ..ask("x") };
    refused(&chat, None, "tools: f: ");
    chat.tools[0].strict = false;
    request(&text, &chat, None, 1).unwrap();
    chat.choice.mode = Choice::Required;
    refused(&chat, Some(&any), "tool_choice");
    // Each is bearable, all are not.
    let stepping = json!({"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 9001}}});
    let stepping = |strict| ["f", "g", "h"].map(|name| Tool { strict, ..tool(name, stepping.clone()) }).to_vec();
    let many = |strict| Chat { tools: stepping(strict), ..chat.clone() };
    request(&text, &many(false), None, 1).unwrap();
    refused(&many(true), None, "tools: multipleOf");
    refused(&Chat { tools: Vec::new(), ..chat.clone() }, None, "tool_choice");
    // A template that shows none.
    let plain = Text::open(&bundled()).unwrap();
    assert!(plain.render(&chat).unwrap_err().to_string().contains("tools: this model's chat template does not show them"));
    chat.choice.mode = Choice::None;
    plain.render(&chat).unwrap();
}

#[test]
fn remainders_are_counted_before_they_are_made() {
    let of = |schema: Value| rules::remainders(&format!("start: a\na: {}\n", rules::inline(&schema, false)));
    let each = |number: Value| json!({"type": "number", "multipleOf": number});
    for (number, expected) in [(json!(5), 5), (json!(0.01), 1), (json!(12.5), 125), (json!(1e6), 1_000_000), (json!(2.5e-7), 25)] {
        assert_eq!(of(each(number.clone())), expected, "{number}");
    }
    assert_eq!(of(each(json!(1e300))), u128::MAX);
    assert_eq!(of(json!({"description": "%json {}", "multipleOf": 999_983})), 999_983);
    assert_eq!(of(json!({"properties": {"multipleOf": {"type": "integer"}}, "enum": ["\"multipleOf\": 9"]})), 0);
    let two = [each(json!(1009)), each(json!(1013))];
    assert_eq!(of(json!({"items": two[0], "properties": {"enum": two[1]}})), 2022);
    assert_eq!(of(json!({"allOf": two})), 1009 * 1013);
    assert_eq!(of(json!({"$ref": "#/$defs/a", "multipleOf": 1013, "$defs": {"a": two[0]}})), 1009 * 1013);
    // 1000, and they have as many remainders each for themselves.
    assert_eq!(of(json!({"allOf": [each(json!(0.01)), each(json!(1000)), each(json!(0.25)), each(json!(50))]})), 1 + 1000 + 25 + 50);
    assert_eq!(of(json!({"allOf": [each(json!(0)), each(json!(1e-300)), each(json!(7))]})), u128::MAX);
}

/// Arguments are an object, whatever the tool's schema leaves open or asks for.
#[test]
fn arguments_are_an_object() {
    let object = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    for schema in [
        json!({"type": "string"}),
        json!({"type": ["object", "null"]}),
        json!({"description": "x"}),
        json!({"enum": ["abc", {"a": 1}]}),
        json!({"type": "array"}),
        json!({"anyOf": [{"type": "string"}, object]}),
        json!({"$ref": "#/$defs/o", "$defs": {"o": object}}),
    ] {
        for says in [
            "<tool_call>\n{\"name\": \"f\", \"arguments\": \"abc\"}\n</tool_call>",
            "<tool_call>\n{\"name\": \"f\", \"arguments\": [1]}\n</tool_call>",
        ] {
            let said = say(CHATML, says, |chat| chat.tools = vec![tool("f", schema.clone())], None);
            let Some(Part::Call(call)) = said.parts.first() else { panic!("{schema}: {said:?}") };
            let whole = || serde_json::from_str::<Value>(&call.arguments).is_ok_and(|arguments| arguments.is_object());
            assert!(if said.finish == Finish::Length { call.arguments.starts_with('{') } else { whole() }, "{schema}: {call:?}");
        }
    }
}

/// As deep and as wide as a request may be: an error or a grammar, and the process lives.
#[test]
fn hostile_grammars_are_bearable() {
    let dir = speaking(CHATML, true);
    let text = Arc::new(Text::open(dir.path()).unwrap());
    let nested = |open: &str, close: &str, depth: usize| format!("{}\"a\"{}", open.repeat(depth), close.repeat(depth));
    let chain: String = (0..5000).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let grammars = [
        format!("start: {}", nested("(", ")", 30_000)),
        format!("start: {}", nested("(", ")*", 20_000)),
        format!("start: T\nT: {}", nested("(", ")", 30_000)),
        format!("start: r0\n{chain}r5000: \"a\"\n"),
        format!("start: {}", "\"a\"? ".repeat(10_000)),
        format!("start: /{}/", nested("(", ")*", 20_000).replace('"', "")),
        "start: (\"a\"{0,1000}){0,1000}".into(),
        "start: /(a{0,1000}){0,1000}/".into(),
    ];
    for grammar in grammars {
        let _ = request(&text, &ask("x"), Some(&Format::Lark(grammar)), 1);
    }
    let mut deep = json!({"type": "integer"});
    for _ in 0..60 {
        deep = json!({"anyOf": [deep, {"type": "string"}]});
    }
    let properties: Map<String, Value> = (0..5000).map(|i| (format!("p{i}"), json!({"type": "integer"}))).collect();
    let wide = json!({"type": "object", "properties": properties});
    for schema in [wide, json!({"type": "array", "prefixItems": vec![json!({"type": "integer"}); 4000], "minItems": 4000}), deep] {
        let _ = request(&text, &ask("x"), Some(&Format::JsonSchema { schema, strict: true }), 1);
    }
    for pattern in [format!("{}a{}", "(".repeat(20_000), ")".repeat(20_000)), "a".repeat(100_000)] {
        let _ = request(&text, &ask("x"), Some(&Format::Regex(pattern)), 1);
    }
}
