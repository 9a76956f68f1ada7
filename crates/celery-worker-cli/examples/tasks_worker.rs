//! A worker of ordinary tasks, with the flags and settings of `celery worker`. It answers Python's producers:
//!
//! ```text
//! cargo run -p celery-worker-cli --example tasks_worker -- -Q tasks -c 4 -E
//! ```

use std::process::ExitCode;
use std::time::Duration;

use celery_worker::prelude::*;
use celery_worker::task::DuplicateTask;
use celery_worker_cli::{Program, WorkerParts, WorkerProgram};
use serde_json::{Value, json};

async fn tasks(_: WorkerParts) -> Result<Registry, DuplicateTask> {
    let mut tasks = Registry::default();
    tasks.register(add)?;
    tasks.register(echo)?;
    tasks.register(fail)?;
    tasks.register(retry)?;
    tasks.register(sleep)?;
    tasks.register(sleep_early)?;
    tasks.register(reject)?;
    tasks.register(ignore)?;
    tasks.register(panic)?;
    tasks.register(update_state)?;
    tasks.register(early)?;
    tasks.register(request)?;
    tasks.register(autoretry)?;
    tasks.register(guarded)?;
    tasks.register(keyword_only)?;
    Ok(tasks)
}

/// Adds numbers of any of JSON's types.
#[task(name = "tasks.add", acks_late)]
async fn add(x: Value, y: Value) -> TaskResult<Value> {
    if let (Some(x), Some(y)) = (x.as_i64(), y.as_i64())
        && let Some(sum) = x.checked_add(y)
    {
        return Ok(sum.into());
    }
    match (x.as_f64(), y.as_f64()) {
        (Some(x), Some(y)) => Ok((x + y).into()),
        _ => Err(Exception::type_error("unsupported operand type(s) for +").into()),
    }
}

#[task(name = "tasks.echo", acks_late)]
async fn echo(value: Value) -> TaskResult<Value> {
    Ok(value)
}

#[task(name = "tasks.fail", acks_late)]
async fn fail(message: String, exc_type: Option<String>) -> TaskResult<()> {
    let class = exc_type.as_deref().unwrap_or("ValueError");
    Err(Exception::builtin(class, message).into())
}

/// Fails until it has been retried `times` times, and returns that number.
#[task(name = "tasks.retry", acks_late)]
async fn retry(
    times: u32,
    countdown: f64,
    max_retries: Option<u32>,
    cx: TaskContext,
) -> TaskResult<u32> {
    let retries = cx.request().retries;
    if retries >= times {
        return Ok(retries);
    }
    let again = cx
        .retry()
        .countdown(seconds(countdown)?)
        .max_retries(max_retries.unwrap_or(3))
        .cause(Exception::builtin("OSError", "temporary failure"));
    Err(again.into())
}

/// Sleeps, and reports its progress unless `progress` is false.
#[task(name = "tasks.sleep", acks_late)]
async fn sleep(seconds: f64, progress: Option<bool>, cx: TaskContext) -> TaskResult<f64> {
    const TICK: Duration = Duration::from_millis(100);
    let progress = progress.unwrap_or(true);
    let mut left = self::seconds(seconds)?;
    while !left.is_zero() {
        let step = left.min(TICK);
        tokio::time::sleep(step).await;
        left -= step;
        if progress {
            cx.progress(json!({"total": seconds, "left": left.as_secs_f64()}));
        }
    }
    Ok(seconds)
}

/// Sleeps until it is cancelled, after its message was acknowledged. Returns a value `finish_in` seconds later, or ends
/// without a value.
#[task(name = "tasks.early", acks_late = false, cooperative)]
async fn early(finish_in: Option<f64>, cx: TaskContext) -> TaskResult<&'static str> {
    cx.cancelled().cancelled().await;
    match finish_in {
        Some(time) => {
            tokio::time::sleep(seconds(time)?).await;
            Ok("finished")
        }
        None => Err(TaskError::Stopped),
    }
}

/// Sleeps. Its message is acknowledged before.
#[task(name = "tasks.sleep_early")]
async fn sleep_early(seconds: f64) -> TaskResult<f64> {
    tokio::time::sleep(self::seconds(seconds)?).await;
    Ok(seconds)
}

#[task(name = "tasks.reject", acks_late)]
async fn reject(requeue: Option<bool>) -> TaskResult<()> {
    Err(match requeue {
        Some(true) => Reject::requeue("as asked"),
        _ => Reject::new("as asked"),
    }
    .into())
}

#[task(name = "tasks.ignore", acks_late)]
async fn ignore() -> TaskResult<()> {
    Err(Ignore.into())
}

#[task(name = "tasks.panic", acks_late)]
#[expect(clippy::panic, reason = "this is what the task is for")]
async fn panic() -> TaskResult<()> {
    panic!("as asked")
}

/// Sets a state and ends without a result, so that the state stays.
#[task(name = "tasks.update_state", acks_late)]
async fn update_state(state: String, meta: Value, cx: TaskContext) -> TaskResult<()> {
    cx.update_state(&state, meta).await?;
    tracing::warn!(state, "state was set");
    Err(Ignore.into())
}

/// Returns what a task sees of its message and its time limits.
#[task(
    name = "tasks.request",
    acks_late,
    time_limit = 60,
    soft_time_limit = 45
)]
async fn request(cx: TaskContext) -> TaskResult<Value> {
    let properties = cx.properties();
    Ok(json!({
        "app_id": properties.app_id,
        "message_id": properties.message_id,
        "type": properties.message_type,
        "exchange": cx.exchange(),
        "routing_key": cx.routing_key(),
        "priority": properties.priority,
        "redelivered": cx.redelivered(),
        "time_limit": cx.time_limit().map(|limit| limit.as_secs_f64()),
        "soft_time_limit": cx.soft_time_limit().map(|limit| limit.as_secs_f64()),
    }))
}

/// Fails until it has been retried `times` times, and returns that number.
#[task(
    name = "tasks.autoretry",
    acks_late,
    autoretry_for = ["OSError"],
    dont_autoretry_for = ["FileNotFoundError"],
    retry_backoff,
    retry_jitter = false,
    max_retries = 2
)]
async fn autoretry(times: u32, exc_type: String, cx: TaskContext) -> TaskResult<u32> {
    match cx.request().retries {
        retries if retries >= times => Ok(retries),
        _ => Err(Exception::builtin(&exc_type, "temporary failure").into()),
    }
}

/// Sleeps; at the soft time limit, it sets the state CAUGHT, sleeps for another time, and returns.
#[task(name = "tasks.guarded", acks_late, cooperative)]
async fn guarded(
    seconds: f64,
    #[default = 0.0] after: f64,
    cx: TaskContext,
) -> TaskResult<&'static str> {
    tokio::select! {
        () = tokio::time::sleep(self::seconds(seconds)?) => return Ok("slept"),
        () = cx.cancelled().cancelled() => {}
    }
    if !cx.soft_time_limit_exceeded().is_cancelled() {
        return Err(TaskError::Stopped);
    }
    cx.update_state("CAUGHT", ()).await?;
    tokio::select! {
        () = tokio::time::sleep(self::seconds(after)?) => Ok("caught"),
        () = cx.must_stop().cancelled() => Err(TaskError::Stopped),
    }
}

#[task(name = "tasks.keyword_only", acks_late)]
async fn keyword_only(
    x: Value,
    #[keyword_only] y: Value,
    #[keyword_only]
    #[default = 5]
    z: i64,
) -> TaskResult<Value> {
    Ok(json!([x, y, z]))
}

fn seconds(number: f64) -> TaskResult<Duration> {
    Duration::try_from_secs_f64(number).map_err(|e| Exception::value_error(e.to_string()).into())
}

fn main() -> ExitCode {
    let program = Program::new("tasks-worker", env!("CARGO_PKG_VERSION"));
    WorkerProgram::new(program).run(std::env::args_os(), tasks)
}
