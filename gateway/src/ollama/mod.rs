//! Ollama's dialect, for clients that know nothing else: handlers that join the pure translations to the daemon and the
//! wire, and what Ollama says about models.

mod reply;
mod request;

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use flash_proto::v1::{self, loaded_model};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::{
    reply::{Lines, Style},
    request::{Request, Task},
};
use crate::{
    App,
    call::{self, Asked, Call, Framing},
    error::{Code, Failure},
    json::Node,
    openai::models::{not_found, resolve, rfc3339},
};

/// The version of Ollama whose interface this is; clients ask for a lowest one.
const API: &str = "0.13.4";

/// `GET /api/version`.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": API}))
}

/// `GET /api/tags`: under their bare ids, which clients compare.
pub(crate) async fn tags(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let list = app.upstream.models().await?;
    Ok(Json(json!({"models": list.models.iter().map(tag).collect::<Vec<_>>()})))
}

/// `GET /api/ps`.
pub(crate) async fn ps(State(app): State<Arc<App>>) -> Result<Json<Value>, Failure> {
    let list = app.upstream.models().await?;
    let snapshot = app.upstream.stats().await?;
    let running = snapshot.model.filter(|model| model.state() != loaded_model::State::Loading);
    let described = running.and_then(|loaded| {
        let mut entry = tag(list.models.iter().find(|model| model.id == loaded.id)?);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds from now, and the cast saturates")]
        let left = loaded.unload_in_s.map_or(100 * 365 * 86_400, |seconds| seconds as u64);
        entry["expires_at"] = rfc3339(call::now().saturating_add(left)).into();
        entry["size_vram"] = snapshot.memory.unwrap_or_default().process_bytes.into();
        entry["context_length"] = loaded.context_length.into();
        Some(entry)
    });
    Ok(Json(json!({"models": described.into_iter().collect::<Vec<_>>()})))
}

/// `POST /api/show`.
pub(crate) async fn show(Asked { call, body }: Asked) -> Result<Json<Value>, Failure> {
    let list = call.app.upstream.models().await?;
    let name = named(&body)?;
    let model = resolve(name, &list).ok_or_else(|| not_found(name, &list))?;
    let of = |key: &str| format!("{}.{key}", model.arch);
    let info = json!({
        "general.architecture": model.arch, "general.parameter_count": model.params, of("context_length"): model.context_length,
        of("block_count"): model.layers, of("expert_count"): model.experts, of("expert_used_count"): model.top_k,
        of("vocab_size"): model.vocab_size,
    });
    let more = call.app.upstream.show(&model.id).await?;
    let able = [(true, "completion"), (model.tools, "tools"), (more.infills, "insert"), (model.reasoning, "thinking")];
    let capabilities: Vec<_> = able.into_iter().filter(|(able, _)| *able).map(|(_, name)| name).collect();
    let parameters = format!(
        "temperature {}\ntop_k {}\ntop_p {}\nmin_p {}\nrepeat_penalty {}",
        more.temperature, more.top_k, more.top_p, more.min_p, more.repetition_penalty
    );
    Ok(Json(json!({
        "license": "", "modelfile": "", "parameters": parameters, "template": more.chat_template, "details": details(model), "model_info": info,
        "capabilities": capabilities, "modified_at": rfc3339(model.modified),
    })))
}

/// `POST /api/pull`: nothing is fetched from here, and nothing needs to be if the model is there.
pub(crate) async fn pull(Asked { call, body }: Asked) -> Result<Response, Failure> {
    let name = named(&body)?;
    call.resolve(name).await?;
    let mut top = Node::root(&body).object()?;
    let status = json!({"status": "success"}).to_string();
    Ok(match top.read("stream", |node| node.flag())?.unwrap_or(true) {
        true => ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from(status + "\n")).into_response(),
        false => ([(header::CONTENT_TYPE, "application/json")], Body::from(status)).into_response(),
    })
}

/// `POST /api/embed` and `/api/embeddings`.
pub(crate) async fn embed(Asked { call, body }: Asked) -> Result<Response, Failure> {
    call.resolve(named(&body)?).await?;
    Err(Failure::at(Code::EmbeddingsNotSupported, "model", "this model does not support embeddings"))
}

/// `POST /api/chat`.
pub(crate) async fn chat(Asked { call, body }: Asked) -> Result<Response, Failure> {
    answer(&call, request::chat(&body)?, true).await
}

/// `POST /api/generate`.
pub(crate) async fn generate(Asked { call, body }: Asked) -> Result<Response, Failure> {
    answer(&call, request::generate(&body)?, false).await
}

async fn answer(call: &Call, request: Request, chat: bool) -> Result<Response, Failure> {
    let Request { generate, task, stream, unknown } = request;
    call.app.note_unknown(&unknown)?;
    let style = Style { model: call::shown(&generate.model), chat, arrived: call.arrived };
    let patience = call.app.config.timing.load_wait;
    match task {
        Task::Generate if stream => {
            let mut lines = Lines::new(style);
            call.stream(vec![generate], Framing::Lines, move |item, out| lines.write(item, out)).await
        }
        Task::Generate => {
            let replies = call.collect(vec![generate]).await?;
            Ok(call::json(&style.whole(&replies[0])))
        }
        Task::Load => {
            let model = call.resolve(&generate.model).await?;
            call.app.upstream.load(&model, generate.keep_alive, patience).await?;
            Ok(Json(style.idle("load")).into_response())
        }
        Task::Unload => {
            let model = call.resolve(&generate.model).await?;
            call.app.upstream.unload(&model, patience).await?;
            Ok(Json(style.idle("unload")).into_response())
        }
    }
}

/// The model's name, under the key of today or of before.
fn named(body: &Value) -> Result<&str, Failure> {
    let mut top = Node::root(body).object()?;
    let new = top.read("model", |node| node.text())?;
    let old = top.read("name", |node| node.text())?;
    Ok(new.or(old).unwrap_or_default())
}

fn tag(model: &v1::Model) -> Value {
    let digest: String =
        Sha256::digest(format!("{} {} {}", model.id, model.modified, model.size_bytes)).iter().map(|byte| format!("{byte:02x}")).collect();
    json!({
        "name": model.id, "model": model.id, "modified_at": rfc3339(model.modified), "size": model.disk_bytes, "digest": digest,
        "details": details(model),
    })
}

fn details(model: &v1::Model) -> Value {
    json!({
        "parent_model": "", "format": "safetensors", "family": model.arch, "families": [model.arch],
        "parameter_size": parameters(model.params), "quantization_level": model.quantization,
    })
}

/// 30.5B, 13.4M.
pub(crate) fn parameters(count: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let count = count as f64;
    if count >= 1e9 { format!("{:.1}B", count / 1e9) } else { format!("{:.1}M", count / 1e6) }
}
