//! `/v1/responses/{id}/input_items`: what a kept response was asked with, as items that have ids, a page at a time. Pure.

use std::collections::HashMap;

use serde_json::{Value, json};

/// A response's input as a list of items; those without an id get one that goes with the response's.
pub(super) fn of(input: &Value, response: &str) -> Value {
    let said = match input {
        Value::String(text) => vec![json!({"role": "user", "content": text})],
        Value::Array(items) => items.clone(),
        _ => Vec::new(),
    };
    said.into_iter().enumerate().map(|(at, item)| whole(item, at, response)).collect()
}

fn whole(mut item: Value, at: usize, response: &str) -> Value {
    let or = |item: &mut Value, key: &str, value: Value| {
        if item[key].is_null() {
            item[key] = value;
        }
    };
    if !item.is_object() {
        return item;
    }
    or(&mut item, "type", "message".into());
    let prefix = match item["type"].as_str() {
        Some("message") => "msg",
        Some("reasoning") => "rs",
        Some("function_call") => "fc",
        Some("custom_tool_call") => "ctc",
        _ => "item",
    };
    if prefix == "msg" {
        or(&mut item, "status", "completed".into());
        if let Some(text) = item["content"].as_str() {
            item["content"] = match item["role"].as_str() {
                Some("assistant") => json!([{"type": "output_text", "text": text, "annotations": []}]),
                _ => json!([{"type": "input_text", "text": text}]),
            };
        }
    }
    or(&mut item, "id", format!("{prefix}_{response}_in_{at}").into());
    item
}

/// As `order` (the latest first, unless `asc`), `after` and `limit` ask.
pub(super) fn page(items: &str, query: &HashMap<String, String>) -> Value {
    let mut items: Vec<Value> = serde_json::from_str(items).expect("it was a list when it was kept");
    if query.get("order").is_none_or(|order| order != "asc") {
        items.reverse();
    }
    let after = query.get("after").and_then(|id| items.iter().position(|item| item["id"] == **id));
    items.drain(..after.map_or(0, |at| at + 1));
    let limit = query.get("limit").and_then(|limit| limit.parse().ok()).filter(|limit| (1..=100).contains(limit)).unwrap_or(20);
    let has_more = items.len() > limit;
    items.truncate(limit);
    let id = |item: Option<&Value>| item.map(|item| item["id"].clone());
    json!({"object": "list", "first_id": id(items.first()), "last_id": id(items.last()), "has_more": has_more, "data": items})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_listed_as_items() {
        let message = |id: &str, role: &str, content: Value| json!({"role": role, "content": content, "type": "message", "status": "completed", "id": id});
        let said = |kind: &str, text: &str| json!([{"type": kind, "text": text}]);
        assert_eq!(of(&json!("hi"), "r"), json!([message("msg_r_in_0", "user", said("input_text", "hi"))]));
        assert_eq!(of(&Value::Null, "r"), json!([]));
        let call = json!({"type": "function_call", "id": "own", "name": "f"});
        let output = json!({"type": "function_call_output", "call_id": "1", "output": "x"});
        let mut named = output.clone();
        named["id"] = "item_r_in_2".into();
        let items = of(&json!([{"role": "developer", "content": said("input_text", "d")}, call, output]), "r");
        assert_eq!(items, json!([message("msg_r_in_0", "developer", said("input_text", "d")), call, named]));
    }

    #[test]
    fn pages_follow_each_other() {
        let items: Value = (0..30).map(|id| json!({"id": id.to_string()})).collect();
        let check = |query: &[(&str, &str)], ids: &[i32], has_more: bool| {
            let query = query.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
            let page = page(&items.to_string(), &query);
            let found: Vec<_> = page["data"].as_array().expect("items").iter().map(|item| item["id"].clone()).collect();
            let ids: Vec<_> = ids.iter().map(|id| json!(id.to_string())).collect();
            assert_eq!((&found, &page["has_more"]), (&ids, &json!(has_more)), "{query:?}");
            assert_eq!((&page["first_id"], &page["last_id"]), (ids.first().unwrap_or(&Value::Null), ids.last().unwrap_or(&Value::Null)));
        };
        check(&[("limit", "2")], &[29, 28], true);
        check(&[("limit", "2"), ("order", "asc"), ("after", "27")], &[28, 29], false);
        check(&[("after", "0")], &[], false);
        check(&[], &(10..30).rev().collect::<Vec<_>>(), true);
    }
}
