//! Tasks that write to the suite's Redis.

use celery_worker::prelude::*;
use redis::AsyncCommands as _;
use redis::aio::MultiplexedConnection;
use serde_json::Value;

use crate::canvas::task;
use crate::values::plus;

/// Appends text to a list; another value in JSON, as Python's client writes numbers.
async fn push(redis: &MultiplexedConnection, key: &str, value: &Value) -> TaskResult<()> {
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let () = redis.clone().rpush(key, text).await?;
    Ok(())
}

async fn count(redis: &MultiplexedConnection, key: &str) -> TaskResult<()> {
    let () = redis.clone().incr(key, 1).await?;
    Ok(())
}

#[task]
pub(crate) async fn sum_and_record(
    values: Vec<Value>,
    redis_key: String,
    #[state] redis: &MultiplexedConnection,
    cx: TaskContext,
) -> TaskResult<Value> {
    let mut sum = Value::from(0);
    for value in &values {
        sum = plus(&sum, value)?;
    }
    push(redis, &redis_key, &cx.request().id.as_str().into()).await?;
    Ok(sum)
}

#[task]
pub(crate) async fn redis_echo(
    message: Value,
    #[default = "redis-echo".into()] redis_key: String,
    #[state] redis: &MultiplexedConnection,
) -> TaskResult<()> {
    push(redis, &redis_key, &message).await
}

#[task]
pub(crate) async fn redis_echo_group_id(
    _previous: Value,
    #[default = "redis-group-ids".into()] redis_key: String,
    #[state] redis: &MultiplexedConnection,
    cx: TaskContext,
) -> TaskResult<()> {
    let group = cx.request().group.clone().unwrap_or_default();
    push(redis, &redis_key, &group.into()).await
}

#[task]
pub(crate) async fn redis_count(
    #[default = "redis-count".into()] redis_key: String,
    #[state] redis: &MultiplexedConnection,
) -> TaskResult<()> {
    count(redis, &redis_key).await
}

/// The second run of a task that replaces itself.
fn then(name: &str) -> Signature {
    task(name).kwarg("state", true).immutable()
}

#[task]
pub(crate) async fn second_order_replace1(
    #[default] state: bool,
    #[state] redis: &MultiplexedConnection,
    cx: TaskContext,
) -> TaskResult<()> {
    if state {
        return push(redis, "redis-echo", &"Out A".into()).await;
    }
    push(redis, "redis-echo", &"In A".into()).await?;
    let then = then(second_order_replace1::NAME);
    cx.replace(task(second_order_replace2::NAME) | then).await
}

#[task]
pub(crate) async fn second_order_replace2(
    #[default] state: bool,
    #[state] redis: &MultiplexedConnection,
    cx: TaskContext,
) -> TaskResult<()> {
    if state {
        return push(redis, "redis-echo", &"Out B".into()).await;
    }
    push(redis, "redis-echo", &"In B".into()).await?;
    let echo = task(redis_echo::NAME).arg("In/Out C");
    cx.replace(echo | then(second_order_replace2::NAME)).await
}

#[task]
pub(crate) async fn errback(
    request_id: String,
    #[state] redis: &MultiplexedConnection,
) -> TaskResult<String> {
    count(redis, &request_id).await?;
    Ok(request_id)
}

#[task]
pub(crate) async fn errback_with_args(
    request_id: String,
    label: Value,
    #[state] redis: &MultiplexedConnection,
) -> TaskResult<()> {
    push(redis, &request_id, &label).await
}
