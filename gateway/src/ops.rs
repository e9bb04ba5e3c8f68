//! Routes for whoever runs the gateway: probes, health, metrics. Health looks through to the daemon, liveness does not.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use flash_proto::v1::loaded_model;
use serde_json::{Value, json};

use crate::{App, error::Dialect};

/// `/` and `/api/hello`, which clients probe.
pub(crate) async fn hello() -> Json<Value> {
    Json(json!({"name": "flash-gateway", "version": env!("CARGO_PKG_VERSION")}))
}

pub(crate) async fn livez() -> Response {
    uncached(StatusCode::OK, json!({"status": "ok"}))
}

/// `/health` and `/readyz`: whether a request sent now would be taken.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    let version = match app.upstream.version().await {
        Ok(version) => version.version,
        Err(failure) => {
            return uncached(failure.status(Dialect::OpenAi), json!({"status": "down", "daemon": "down", "message": failure.message}));
        }
    };
    let snapshot = match app.upstream.stats().await {
        Ok(snapshot) => snapshot,
        Err(failure) => {
            return uncached(failure.status(Dialect::OpenAi), json!({"status": "down", "daemon": "down", "message": failure.message}));
        }
    };
    let model = snapshot.model.as_ref();
    let loading = model.filter(|model| model.state() == loaded_model::State::Loading);
    let (code, status) = match loading {
        _ if app.draining() => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        None => (StatusCode::OK, "ok"),
    };
    let mut body = json!({
        "status": status,
        "model": model.map(|model| &model.id),
        "daemon": "up",
        "queue": snapshot.requests.unwrap_or_default().waiting,
        "version": version,
    });
    if let Some(model) = loading {
        body["progress"] = model.progress.into();
    }
    uncached(code, body)
}

fn uncached(code: StatusCode, body: Value) -> Response {
    (code, [(header::CACHE_CONTROL, "no-store")], Json(body)).into_response()
}

pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let snapshot = app.upstream.stats().await.ok();
    match app.metrics.text(snapshot.as_ref()) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
