//! The lists of models as LM Studio's server gives them; its other routes are OpenAI's. Of the formats that its clients know ours is
//! MLX's.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use flash_proto::v1::{self, model};
use serde_json::{Value, json};

use crate::{
    App,
    error::Failure,
    ollama::parameters,
    openai::models::{not_found, resolve},
};

/// `GET /api/v0/models`.
pub(crate) async fn list_v0(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let list = app.upstream.models().await?;
    Ok(Json(json!({"object": "list", "data": list.models.iter().map(v0).collect::<Vec<_>>()})))
}

/// `GET /api/v0/models/{id}`.
pub(crate) async fn one_v0(State(app): State<Arc<App>>, id: Result<Path<String>, PathRejection>) -> Result<Json<Value>, Failure> {
    let id = id.map_or_else(|_| "\u{fffd}".to_owned(), |Path(id)| id);
    let list = app.upstream.models().await?;
    resolve(&id, &list).map(|model| Json(v0(model))).ok_or_else(|| not_found(&id, &list))
}

/// `GET /api/v1/models`.
pub(crate) async fn list_v1(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let list = app.upstream.models().await?;
    Ok(Json(json!({"models": list.models.iter().map(described).collect::<Vec<_>>()})))
}

fn publisher(model: &v1::Model) -> &str {
    model.id.split_once('/').map_or("local", |(publisher, _)| publisher)
}

fn v0(model: &v1::Model) -> Value {
    let state = if model.state() == model::State::Ready { "loaded" } else { "not-loaded" };
    json!({
        "id": model.id, "object": "model", "type": "llm", "publisher": publisher(model), "arch": model.arch,
        "compatibility_type": "mlx", "quantization": model.quantization, "state": state,
        "max_context_length": model.context_length, "capabilities": if model.tools { &["tool_use"][..] } else { &[] },
    })
}

fn described(model: &v1::Model) -> Value {
    // "4-bit g64" → 4, "bf16" → 16.
    let digits: String = model.quantization.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    let loaded =
        (model.state() == model::State::Ready).then(|| json!({"id": model.id, "config": {"context_length": model.context_length}}));
    json!({
        "type": "llm", "publisher": publisher(model), "key": model.id,
        "display_name": model.id.rsplit('/').next().unwrap_or(&model.id), "architecture": model.arch,
        "quantization": {"name": model.quantization, "bits_per_weight": digits.parse::<u32>().ok()},
        "size_bytes": model.disk_bytes, "params_string": parameters(model.params),
        "loaded_instances": loaded.into_iter().collect::<Vec<_>>(), "max_context_length": model.context_length,
        "format": "mlx", "capabilities": {"vision": false, "trained_for_tool_use": model.tools},
    })
}
