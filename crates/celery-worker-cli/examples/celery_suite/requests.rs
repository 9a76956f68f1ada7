//! Tasks that return a part of their request.

use celery_worker::prelude::*;
use celery_worker::protocol::isoformat;
use serde_json::{Value, json};

#[task]
pub(crate) async fn ids(i: Value, cx: TaskContext) -> TaskResult<Value> {
    let request = cx.request();
    Ok(json!([request.root_id, request.parent_id, i]))
}

#[task]
pub(crate) async fn collect_ids(res: Value, i: Value, cx: TaskContext) -> TaskResult<Value> {
    let request = cx.request();
    Ok(json!([res, [request.root_id, request.parent_id, i]]))
}

#[task]
pub(crate) async fn return_priority(
    #[args] _rest: Vec<Value>,
    cx: TaskContext,
) -> TaskResult<String> {
    let priority = cx.request().priority;
    let text = priority.map_or_else(|| "None".to_owned(), |number| number.to_string());
    Ok(format!("Priority: {text}"))
}

#[task]
pub(crate) async fn return_request_eta(cx: TaskContext) -> TaskResult<Option<String>> {
    Ok(cx.request().eta.map(isoformat))
}

#[task]
pub(crate) async fn return_properties(cx: TaskContext) -> TaskResult<Value> {
    let properties = cx.properties();
    Ok(json!({"app_id": properties.app_id, "correlation_id": properties.correlation_id}))
}

#[task]
pub(crate) async fn return_request_time_limits(cx: TaskContext) -> TaskResult<Value> {
    Ok(time_limits(&cx))
}

#[task(time_limit = 60, soft_time_limit = 45)]
pub(crate) async fn task_with_declared_time_limits(cx: TaskContext) -> TaskResult<Value> {
    Ok(time_limits(&cx))
}

fn time_limits(cx: &TaskContext) -> Value {
    let [hard, soft] = [cx.time_limit(), cx.soft_time_limit()];
    json!({"time_limit": hard.map(|limit| limit.as_secs()), "soft_time_limit": soft.map(|limit| limit.as_secs())})
}
