//! `/v1/models` and `/v1/models/{id}`: one body that OpenAI's and Anthropic's SDKs both read, and the rules by which a
//! client's name for a model finds an installed one.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Json,
    extract::{Path, Query, State, rejection::PathRejection},
    http::Uri,
};
use flash_proto::v1::{self, model};
use serde_json::{Value, json};

use crate::{
    App,
    error::{Code, Failure},
};

/// `GET /v1/models`.
pub(crate) async fn list(State(app): State<Arc<App>>, uri: Uri) -> Result<Json<Value>, Failure> {
    let query = Query::<HashMap<String, String>>::try_from_uri(&uri).map(|Query(query)| query).unwrap_or_default();
    Ok(Json(page(&*app.upstream.models().await?, &query)))
}

/// `GET /v1/models/{id}`; the id may hold slashes, raw or as `%2F`.
pub(crate) async fn one(State(app): State<Arc<App>>, id: Result<Path<String>, PathRejection>) -> Result<Json<Value>, Failure> {
    // An id that is not UTF-8 names nothing.
    let id = id.map_or_else(|_| "\u{fffd}".to_owned(), |Path(id)| id);
    let list = app.upstream.models().await?;
    let found = resolve(&id, &list).ok_or_else(|| not_found(&id, &list))?;
    Ok(Json(describe(found, &list)))
}

/// The installed model that a client means, or nothing.
///
/// Only what the daemon lists can be reached from here: HTTP clients must not make it open paths.
pub(crate) fn resolve<'a>(requested: &str, list: &'a v1::ListResponse) -> Option<&'a v1::Model> {
    let models = &list.models;
    if is_default(requested) {
        return models.iter().find(|model| model.id == list.default_model);
    }
    let named =
        |wanted: &dyn Fn(&str) -> bool| models.iter().find(|model| wanted(&model.id) || model.aliases.iter().any(|alias| wanted(alias)));
    let wanted = loose(requested);
    exact(requested, list)
        .or_else(|| named(&|name| name == requested))
        .or_else(|| named(&|name| requested.len() <= NAME_MAX && glob(name, requested)))
        .or_else(|| named(&|name| loose(name) == wanted))
}

/// Of names that are compared with patterns.
const NAME_MAX: usize = 200;

/// Whether a name fits a pattern in which `*` stands for anything.
fn glob(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(head) else { return false };
    rest.char_indices().map(|(at, _)| at).chain([rest.len()]).any(|at| glob(tail, &rest[at..]))
}

/// Gives an installed model a further name; one that is not installed has no use for it.
pub(crate) fn name(alias: &str, model: &str, list: &mut v1::ListResponse) {
    let Some(id) = resolve(model, list).map(|model| model.id.clone()) else { return };
    list.models.iter_mut().filter(|model| model.id == id).for_each(|model| model.aliases.push(alias.to_owned()));
}

/// As [`resolve`], by its very id: whatever else is installed meanwhile, nothing is closer.
pub(crate) fn exact<'a>(requested: &str, list: &'a v1::ListResponse) -> Option<&'a v1::Model> {
    list.models.iter().find(|model| model.id == requested)
}

/// What names that mean one model have in common.
fn loose(name: &str) -> String {
    let name = name.to_lowercase();
    let name = name.strip_suffix(":latest").unwrap_or(&name);
    name.rsplit('/').next().unwrap_or(name).to_owned()
}

pub(crate) fn is_default(requested: &str) -> bool {
    matches!(requested, "" | "local" | "default")
}

pub(crate) fn not_found(requested: &str, list: &v1::ListResponse) -> Failure {
    let name: String = requested.chars().take(200).collect();
    let installed: Vec<_> = list.models.iter().map(|model| model.id.as_str()).collect();
    let message = if installed.is_empty() {
        format!("The model '{name}' does not exist: no model is installed.")
    } else {
        format!("The model '{name}' does not exist. Installed: {}.", installed.join(", "))
    };
    Failure::at(Code::ModelNotFound, "model", message)
}

/// Loaded models first, then a page of them as `limit`, `after`/`after_id` and `before_id` ask.
fn page(list: &v1::ListResponse, query: &HashMap<String, String>) -> Value {
    let mut models: Vec<_> = list.models.iter().collect();
    models.sort_by_key(|model| model.state() == model::State::NotLoaded);
    let position = |key: &str| query.get(key).and_then(|id| models.iter().position(|model| model.id == *id));
    let after = position("after_id").or_else(|| position("after")).map(|at| at + 1);
    let before = position("before_id");
    let (start, end) = (after.unwrap_or(0), before.unwrap_or(models.len()).max(after.unwrap_or(0)));
    let limit = query.get("limit").and_then(|limit| limit.parse().ok()).filter(|&limit| limit > 0).unwrap_or(usize::MAX);
    // A page before an id is the last one of what lies there, and more of it is still before that.
    let (shown, more) = match (after, before) {
        (None, Some(_)) => (end.saturating_sub(limit)..end, end > limit),
        _ => (start..end.min(start.saturating_add(limit)), end - start > limit),
    };
    let shown = &models[shown];
    json!({
        "object": "list",
        "has_more": more,
        "first_id": shown.first().map(|model| &model.id),
        "last_id": shown.last().map(|model| &model.id),
        "data": shown.iter().map(|model| describe(model, list)).collect::<Vec<_>>(),
    })
}

fn describe(model: &v1::Model, list: &v1::ListResponse) -> Value {
    let state = match model.state() {
        model::State::NotLoaded => "not-loaded",
        model::State::Loading => "loading",
        model::State::Ready => "loaded",
    };
    let mut aliases = model.aliases.clone();
    if model.id == list.default_model && !aliases.iter().any(|alias| alias == "local") {
        aliases.push("local".to_owned());
    }
    let name = model.id.rsplit('/').next().unwrap_or(&model.id);
    json!({
        "id": model.id, "object": "model", "type": "model",
        "created": model.modified, "created_at": rfc3339(model.modified), "owned_by": "local",
        "display_name": if model.quantization.is_empty() { name.to_owned() } else { format!("{name} ({})", model.quantization) },
        "context_length": model.context_length, "max_model_len": model.context_length, "max_output_tokens": model.context_length,
        "loaded": state == "loaded", "state": state, "aliases": aliases,
        "problem": Some(&model.problem).filter(|problem| !problem.is_empty()),
        // Of this gateway with this model: what the routes refuse is not promised.
        "capabilities": {
            "tools": model.tools, "vision": false, "reasoning": model.reasoning, "json_schema": true, "embeddings": false, "completion": true,
        },
        "meta": {
            "arch": model.arch, "n_params": model.params, "n_active_params": model.active_params, "n_experts": model.experts,
            "top_k": model.top_k, "quant": model.quantization, "size_bytes": model.size_bytes, "vocab_size": model.vocab_size,
            "n_ctx_train": model.context_max,
        },
    })
}

/// Days → civil date by the 400-year cycle, which begins in March so that leap days come last.
pub(crate) fn rfc3339(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (date, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn installed() -> v1::ListResponse {
        let model = |id: &str, aliases: &[&str], state: model::State| v1::Model {
            id: id.into(),
            aliases: aliases.iter().map(ToString::to_string).collect(),
            state: state.into(),
            ..Default::default()
        };
        let models = vec![
            model("Org/Big-MoE", &["claude-sonnet"], model::State::NotLoaded),
            model("flash-tiny-moe", &[], model::State::Ready),
            model("big-moe", &[], model::State::NotLoaded),
        ];
        v1::ListResponse { models, default_model: "flash-tiny-moe".into() }
    }

    #[test]
    fn names_find_models() {
        let mut list = installed();
        let check = |list: &v1::ListResponse, requested: &str, wanted: Option<&str>| {
            assert_eq!(resolve(requested, list).map(|model| model.id.as_str()), wanted, "{requested}");
        };
        for default in ["", "local", "default"] {
            check(&list, default, Some("flash-tiny-moe"));
        }
        check(&list, "Org/Big-MoE", Some("Org/Big-MoE"));
        check(&list, "big-moe", Some("big-moe"));
        check(&list, "BIG-MOE:latest", Some("Org/Big-MoE"));
        check(&list, "claude-sonnet", Some("Org/Big-MoE"));
        check(&list, "Claude-Sonnet", Some("Org/Big-MoE"));
        check(&list, "mlx-community/Flash-Tiny-MoE", Some("flash-tiny-moe"));
        check(&list, "/etc/passwd", None);
        check(&list, "gpt-4o", None);
        for (alias, model) in [("gpt-*", "local"), ("gpt-4o", "big-moe"), ("claude-*-4*", "big-moe"), ("o3", "nobody")] {
            name(alias, model, &mut list);
        }
        check(&list, "gpt-5", Some("flash-tiny-moe"));
        check(&list, "gpt-4o", Some("big-moe"));
        check(&list, "claude-sonnet-4-5", Some("big-moe"));
        check(&list, "claude-sonnet", Some("Org/Big-MoE"));
        check(&list, "claude-opus", None);
        check(&list, "o3", None);
    }

    #[test]
    fn pages_follow_each_other() {
        let check = |query: &[(&str, &str)], ids: &[&str], more: bool| {
            let query = query.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
            let page = page(&installed(), &query);
            let found: Vec<_> = page["data"].as_array().expect("data").iter().map(|model| model["id"].as_str().expect("id")).collect();
            assert_eq!((found.as_slice(), &page["has_more"]), (ids, &json!(more)));
            assert_eq!(page["first_id"].as_str(), ids.first().copied());
        };
        check(&[], &["flash-tiny-moe", "Org/Big-MoE", "big-moe"], false);
        check(&[("limit", "1000")], &["flash-tiny-moe", "Org/Big-MoE", "big-moe"], false);
        check(&[("limit", "1")], &["flash-tiny-moe"], true);
        check(&[("limit", "1"), ("after_id", "flash-tiny-moe")], &["Org/Big-MoE"], true);
        check(&[("after", "big-moe")], &[], false);
        check(&[("before_id", "Org/Big-MoE")], &["flash-tiny-moe"], false);
        check(&[("before_id", "big-moe"), ("limit", "1")], &["Org/Big-MoE"], true);
        check(&[("before_id", "big-moe"), ("after_id", "flash-tiny-moe"), ("limit", "1")], &["Org/Big-MoE"], false);
        check(&[("limit", "x")], &["flash-tiny-moe", "Org/Big-MoE", "big-moe"], false);
    }

    #[test]
    fn dates() {
        for (seconds, wanted) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_760_000_000, "2025-10-09T08:53:20Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), wanted);
        }
    }
}
