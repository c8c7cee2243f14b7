//! Calls about what is kept here: pins, and the cache.

use axum::{
    Json, Router,
    extract::State,
    response::Response,
    routing::{get, post},
};
use serde_json::json;

use super::{
    Answer, Body_, Targets,
    report::{report, report_under_way},
    understood,
};
use crate::{
    failure::{Code, Failure},
    node::{CacheLimit, Node, PinScope, Trim, WarmScope, in_words},
};

pub(super) fn routes() -> Router<Node> {
    Router::new()
        .route("/v1/pins", get(pins).post(pin))
        .route("/v1/unpin", post(unpin))
        .route("/v1/pins/deleted", post(deleted))
        .route("/v1/pins/accept", post(accept))
        .route("/v1/warm", post(warm))
        .route("/v1/cache", get(cache))
        .route("/v1/cache/trim", post(trim))
        .route("/v1/cache/limit", post(limit))
}

async fn pins(State(node): State<Node>) -> Answer {
    Ok(Json(json!(node.pins().await?)))
}

async fn pin(State(node): State<Node>, body: Body_<PinScope>) -> Result<Response, Failure> {
    let scope = understood(body)?;
    some(&scope.targets)?;
    let command = in_words("pin", &scope.targets);
    Ok(report_under_way(&node.clone(), command, async move |reporter| node.pin(scope, &reporter).await))
}

async fn unpin(State(node): State<Node>, body: Body_<Targets>) -> Answer {
    let targets = understood(body)?.targets;
    some(&targets)?;
    Ok(Json(json!(node.unpin(targets).await?)))
}

async fn deleted(State(node): State<Node>, body: Body_<Targets>) -> Result<Response, Failure> {
    let targets = understood(body)?.targets;
    Ok(report(async move |reporter| node.list_deleted(targets, &reporter).await))
}

async fn accept(State(node): State<Node>, body: Body_<Targets>) -> Result<Response, Failure> {
    let targets = understood(body)?.targets;
    some(&targets)?;
    Ok(report(async move |reporter| node.accept_deletions(targets, &reporter).await))
}

async fn warm(State(node): State<Node>, body: Body_<WarmScope>) -> Result<Response, Failure> {
    let scope = understood(body)?;
    some(&scope.targets)?;
    let command = in_words("warm", &scope.targets);
    Ok(report_under_way(&node.clone(), command, async move |reporter| node.warm(scope, &reporter).await))
}

async fn cache(State(node): State<Node>) -> Answer {
    Ok(Json(json!(node.cache_stat().await?)))
}

async fn trim(State(node): State<Node>, body: Body_<Trim>) -> Answer {
    Ok(Json(json!(node.trim_cache(understood(body)?).await?)))
}

async fn limit(State(node): State<Node>, body: Body_<CacheLimit>) -> Answer {
    if let Some(bytes) = understood(body)?.bytes {
        node.limit_cache(bytes).await?;
    }
    cache(State(node)).await
}

fn some<T>(targets: &[T]) -> Result<(), Failure> {
    match targets {
        [] => Err(Failure::new(Code::Usage, "no target is named")),
        _ => Ok(()),
    }
}
