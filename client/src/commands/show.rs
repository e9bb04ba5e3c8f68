//! `flashctl show`: one model, with what a listing has no room for.

use flash_proto::v1::{Model, ShowRequest, ShowResponse, StatsRequest};
use serde_json::json;

use super::models::{fits, room};
use crate::{
    args::{Global, ShowArgs},
    connect::connect,
    failure::Failure,
    json, load, render, term,
};

pub(crate) async fn run(args: ShowArgs, global: &Global) -> Result<(), Failure> {
    let daemon = connect(global).await?;
    let failed = |status| daemon.failure(&status, "describing a model");
    let shown = daemon.models().show(ShowRequest { model: load::name_there(&args.model, global) }).await.map_err(failed)?.into_inner();
    if args.template {
        return term::println(shown.chat_template.trim_end());
    }
    let stats = daemon.admin().stats(StatsRequest {}).await.map_err(failed)?.into_inner();
    let room = room(&stats, global);
    if global.json {
        let model = shown.model.unwrap_or_default();
        let mut value = json::model(&model, fits(&model, room));
        value["recommended_expert_cache"] = json!(recommended(&model, room));
        value["chat_template"] = json!(shown.chat_template);
        value["infills"] = json!(shown.infills);
        value["sampling"] = json!({
            "temperature": shown.temperature, "top_k": shown.top_k, "top_p": shown.top_p, "min_p": shown.min_p,
            "repetition_penalty": shown.repetition_penalty,
        });
        return term::print_json(&value);
    }
    term::println(&text(&shown, room))
}

/// Whole bytes of all routed experts, and of those of one token.
fn experts(model: &Model) -> (u64, u64) {
    (model.size_bytes.saturating_sub(model.trunk_bytes), u64::from(model.top_k) * u64::from(model.layers) * model.expert_bytes)
}

/// What to give --expert-cache on this machine; absent: it does not fit.
fn recommended(model: &Model, room: Option<u64>) -> Option<String> {
    let (all, working_set) = experts(model);
    let left = room?.checked_sub(model.trunk_bytes)?;
    match left {
        left if left >= all => Some("100%".into()),
        left if left < working_set => None,
        left => Some(format!("{}%", left.saturating_mul(100).checked_div(all).unwrap_or(100))),
    }
}

fn text(shown: &ShowResponse, room: Option<u64>) -> String {
    let model = shown.model.clone().unwrap_or_default();
    let (all, working_set) = experts(&model);
    let packed = if model.packed { ", experts packed" } else { "" };
    let recommended = match recommended(&model, room) {
        Some(share) => format!("--expert-cache {share} on this machine"),
        None if room.is_some() => "it does not fit this machine".into(),
        None => "auto".into(),
    };
    let can: Vec<&str> = [
        ("a chat template", !shown.chat_template.is_empty()),
        ("tools", model.tools),
        ("thinking", model.reasoning),
        ("filling gaps", shown.infills),
    ]
    .into_iter()
    .filter_map(|(what, has)| has.then_some(what))
    .collect();
    let mut sampling = format!("temperature {}", shown.temperature);
    for (name, value, off) in [("top-p", shown.top_p, 1.0), ("min-p", shown.min_p, 0.0), ("repeat-penalty", shown.repetition_penalty, 1.0)]
    {
        if value != off {
            sampling += &format!(", {name} {value}");
        }
    }
    if shown.top_k > 0 {
        sampling += &format!(", top-k {}", shown.top_k);
    }
    let rows = [
        ("path", model.path.clone()),
        ("architecture", model.arch.clone()),
        ("parameters", format!("{}, {} for a token", render::count(model.params), render::count(model.active_params))),
        ("quantization", format!("{}{packed}", model.quantization)),
        ("size", format!("{} on disk, {} of it always in memory", render::bytes(model.disk_bytes), render::bytes(model.trunk_bytes))),
        ("context", format!("{} tokens, made for {}", model.context_length, model.context_max)),
        (
            "experts",
            format!(
                "{} in each of {} layers, {} for a token; {} each",
                model.experts,
                model.layers,
                model.top_k,
                render::bytes(model.expert_bytes)
            ),
        ),
        ("expert cache", format!("all are {}, one token's {}; {recommended}", render::bytes(all), render::bytes(working_set))),
        ("has", if can.is_empty() { "no chat template".into() } else { can.join(", ") }),
        ("sampling", sampling),
    ];
    let lines = rows.map(|(name, value)| format!("  {name:14}{value}"));
    format!("{}\n{}", model.id, lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_recommended() {
        // 10 of trunk, 90 of experts, a working set of 2 × 3 × 5 = 30.
        let model = Model { size_bytes: 100, trunk_bytes: 10, expert_bytes: 5, top_k: 2, layers: 3, reasoning: true, ..Model::default() };
        let check = |room, expected: Option<&str>| assert_eq!(recommended(&model, room).as_deref(), expected, "{room:?}");
        check(Some(100), Some("100%"));
        check(Some(55), Some("50%"));
        check(Some(39), None);
        check(Some(5), None);
        check(None, None);
        let shown = ShowResponse { model: Some(model), temperature: 0.5, top_p: 1.0, repetition_penalty: 1.0, ..ShowResponse::default() };
        let text = text(&shown, Some(55));
        for part in ["all are 90 B, one token's 30 B; --expert-cache 50%", "has           thinking", "temperature 0.5\n"] {
            assert!((text.clone() + "\n").contains(part), "{part} is not in\n{text}");
        }
    }
}
