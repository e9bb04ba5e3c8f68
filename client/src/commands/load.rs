//! `flashctl load`: makes a model ready ahead of the first request, or changes the settings of the loaded one.

use serde_json::json;

use crate::{
    args::{Global, LoadArgs},
    connect::connect,
    failure::Failure,
    json, load, render, term,
};

pub(crate) async fn run(args: LoadArgs, global: &Global) -> Result<(), Failure> {
    let daemon = connect(global).await?;
    let loaded = load::load(&daemon, &args.model, &args.settings, global).await?;
    let name = loaded.model.as_ref().map_or(args.model.as_str(), |model| model.id.as_str());
    if global.json {
        let cache = loaded.cache.as_ref().map(json::cache);
        let value = json!({
            "name": name, "loaded_now": loaded.loaded_now, "load_ms": loaded.load_ms, "expert_cache": cache, "warnings": loaded.warnings,
        });
        return term::print_json(&value);
    }
    let how = if loaded.loaded_now { format!("loaded in {}", render::milliseconds(loaded.load_ms)) } else { "was loaded already".into() };
    let cache = loaded.cache.as_ref().map(|cache| {
        let size = render::cache_size(cache, loaded.model.as_ref().map(|model| model.experts));
        format!(" · expert cache {size}, {}", render::bytes(cache.budget_bytes))
    });
    term::println(&format!("{name} {how}{}", cache.unwrap_or_default()))
}
