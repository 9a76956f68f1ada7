//! Tasks that fail, run again, or refuse their message.

#![allow(
    clippy::disallowed_names,
    reason = "callers give these arguments by their names"
)]

use std::time::Duration;

use celery_worker::prelude::*;
use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use crate::INTEGRATION;
use crate::canvas::task;
use crate::values::seconds;

fn expected(args: Vec<Value>) -> Exception {
    Exception::new(INTEGRATION, "ExpectedException", "").with_args(args)
}

fn unpickleable(foo: Value) -> Exception {
    Exception::new(INTEGRATION, "UnpickleableException", "").with_args(vec![foo])
}

/// Requests another run at once, `countdown` seconds later.
fn again(cx: &TaskContext, countdown: f64) -> Retry {
    cx.retry().countdown(seconds(countdown))
}

#[task]
pub(crate) async fn raise_error(#[args] _rest: Vec<Value>) -> TaskResult<()> {
    Err(Exception::value_error("deliberate error").into())
}

#[task]
pub(crate) async fn fail(#[args] args: Vec<Value>) -> TaskResult<()> {
    let mut args = args;
    args.insert(0, json!("Task expected to fail"));
    Err(expected(args).into())
}

#[task]
pub(crate) async fn fail_unpickleable(foo: Value, bar: Value) -> TaskResult<()> {
    let _ = bar;
    Err(unpickleable(foo).into())
}

#[task]
pub(crate) async fn fail_replaced(#[args] args: Vec<Value>, cx: TaskContext) -> TaskResult<()> {
    cx.replace(task(fail::NAME).args(args).immutable()).await
}

/// Fails after three retries, unless it has a value to return.
#[task(default_retry_delay = 1)]
pub(crate) async fn retry(return_value: Option<Value>, cx: TaskContext) -> TaskResult<Value> {
    match return_value {
        Some(value) if cx.request().retries >= 3 => Ok(value),
        _ => Err(again(&cx, 5.0).cause(expected(Vec::new())).into()),
    }
}

#[task(default_retry_delay = 1)]
pub(crate) async fn retry_unpickleable(
    foo: Value,
    bar: Value,
    #[keyword_only] retry_kwargs: RetryArguments,
    cx: TaskContext,
) -> TaskResult<()> {
    let _ = bar;
    let next = again(&cx, retry_kwargs.countdown).cause(unpickleable(foo));
    Err(next.max_retries(retry_kwargs.max_retries).into())
}

#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct RetryArguments {
    countdown: f64,
    max_retries: u32,
}

#[task(max_retries = 1)]
pub(crate) async fn retry_with_args_after_kwargs(
    foo: i64,
    bar: i64,
    label: Option<String>,
    cx: TaskContext,
) -> TaskResult<Value> {
    let retries = cx.request().retries;
    if retries == 0 {
        let args = vec![json!(foo + 1), json!(bar + 1)];
        return Err(again(&cx, 0.0).args(args).into());
    }
    Ok(json!({"foo": foo, "bar": bar, "label": label, "retries": retries, "is_eager": false}))
}

#[task(max_retries = 1)]
pub(crate) async fn retry_with_kwargs_after_args(
    foo: i64,
    bar: i64,
    cx: TaskContext,
) -> TaskResult<Value> {
    let retries = cx.request().retries;
    if retries == 0 {
        let mut next = again(&cx, 0.0);
        next.changes.kwargs = Some(Map::from_iter([("foo".to_owned(), json!(foo + 1))]));
        return Err(next.into());
    }
    Ok(json!({"foo": foo, "bar": bar, "retries": retries, "is_eager": false}))
}

/// Runs a second time, and returns the number of retries. `expires` is in seconds.
#[task(max_retries = 1)]
pub(crate) async fn retry_once(
    #[args] _rest: Vec<Value>,
    expires: Option<f64>,
    #[default = 1] max_retries: u32,
    #[default = 0.1] countdown: f64,
    cx: TaskContext,
) -> TaskResult<u32> {
    let retries = cx.request().retries;
    if retries > 0 {
        return Ok(retries);
    }
    let mut next = again(&cx, countdown).max_retries(max_retries);
    next.changes.expires = expires.map(after);
    Err(next.into())
}

#[expect(clippy::disallowed_methods, reason = "a program may read the clock")]
fn after(time: f64) -> DateTime<Utc> {
    Utc::now() + seconds(time)
}

#[task(ignore_result)]
pub(crate) async fn retry_once_ignore_result(cx: TaskContext) -> TaskResult<u32> {
    once(&cx)
}

#[task(ignore_result = false)]
pub(crate) async fn retry_once_with_result(cx: TaskContext) -> TaskResult<u32> {
    once(&cx)
}

fn once(cx: &TaskContext) -> TaskResult<u32> {
    match cx.request().retries {
        0 => Err(again(cx, 0.0).into()),
        retries => Ok(retries),
    }
}

/// Runs a second time, and returns the priority of its message.
#[task(max_retries = 1)]
pub(crate) async fn retry_once_priority(
    #[args] _rest: Vec<Value>,
    #[default = 60.0] expires: f64,
    #[default = 1] max_retries: u32,
    #[default = 0.1] countdown: f64,
    cx: TaskContext,
) -> TaskResult<Option<u8>> {
    let _ = expires;
    match cx.request().retries {
        0 => Err(again(&cx, countdown).max_retries(max_retries).into()),
        _ => Ok(cx.request().priority),
    }
}

/// Runs a second time, and returns the headers of its message.
#[task(max_retries = 1)]
pub(crate) async fn retry_once_headers(
    #[args] _rest: Vec<Value>,
    #[default = 1] max_retries: u32,
    #[default = 0.1] countdown: f64,
    cx: TaskContext,
) -> TaskResult<Value> {
    match cx.request().retries {
        0 => Err(again(&cx, countdown).max_retries(max_retries).into()),
        _ => Ok(Value::Object(Map::clone(&cx.request().headers))),
    }
}

#[task(autoretry_for = ["ValueError"], retry_backoff, max_retries = 1)]
pub(crate) async fn auto_retry_class_task(cx: TaskContext) -> TaskResult<u32> {
    match cx.request().retries {
        0 => Err(Exception::value_error("").into()),
        retries => Ok(retries),
    }
}

/// Stores a success and returns the message to its queue; the second delivery is a success already.
#[task(acks_late)]
pub(crate) async fn store_success_then_reject(cx: TaskContext) -> TaskResult<&'static str> {
    if cx.redelivered() {
        return Ok("dedup-pass");
    }
    cx.update_state("SUCCESS", "first-pass").await?;
    Err(Reject::requeue("first delivery").into())
}

#[task(acks_late)]
pub(crate) async fn reject_then_succeed(cx: TaskContext) -> TaskResult<&'static str> {
    match cx.redelivered() {
        true => Ok("second-pass"),
        false => Err(Reject::requeue("first delivery").into()),
    }
}

#[task]
pub(crate) async fn reject_without_requeue() -> TaskResult<()> {
    Err(Reject::new("rejected").into())
}

#[task(default_retry_delay = 3, max_retries = 1)]
pub(crate) async fn countdown_task_with_retry(cx: TaskContext) -> TaskResult<u32> {
    match cx.request().retries {
        0 => Err(cx.retry().cause(simulated()).into()),
        retries => Ok(retries),
    }
}

#[task(max_retries = 2)]
pub(crate) async fn non_eta_task_with_retries(cx: TaskContext) -> TaskResult<u32> {
    let pause = Duration::from_secs(3);
    match cx.request().retries {
        0 | 1 => Err(cx.retry().countdown(pause).cause(simulated()).into()),
        retries => Ok(retries),
    }
}

fn simulated() -> Exception {
    Exception::builtin("Exception", "Simulated failure")
}
