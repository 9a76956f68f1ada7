//! A worker of ordinary tasks: what `celery_worker::worker` is without any transfer.
//!
//! It has the flags and settings of `ccat-transfer worker` and answers Python's producers:
//!
//! ```text
//! cargo run --example tasks_worker -- -Q tasks -c 4 -E
//! ```

use std::process::ExitCode;
use std::time::Duration;

use ccat_transfer::cli::{self, Service};
use celery::error::CeleryError;
use celery_protocol::arguments::{Parameter, Signature};
use celery_protocol::exception::{BUILTINS, Exception};
use celery_worker::worker::{Attributes, Control, Failure, Registry, Retry, When};
use serde_json::{Value, json};

/// After the run, as for work that may be done twice but must not be lost.
const LATE: Attributes = Attributes {
    acks_late: Some(true),
    ..Attributes::NONE
};

const fn function(function: &'static str, parameters: &'static [Parameter]) -> Signature {
    Signature {
        function,
        parameters,
        bound: false,
    }
}

async fn tasks(_service: Service) -> Result<Registry, CeleryError> {
    const fn required(name: &'static str) -> Parameter {
        Parameter::required(name)
    }
    const fn optional(name: &'static str) -> Parameter {
        Parameter::optional(name)
    }
    let mut tasks = Registry::default();

    const ADD: Signature = function("add", &[required("x"), required("y")]);
    tasks.function("tasks.add", ADD, LATE, async |(x, y), _| add(&x, &y))?;

    const ECHO: Signature = function("echo", &[required("value")]);
    tasks.function("tasks.echo", ECHO, LATE, async |(value,): (Value,), _| {
        Ok(value)
    })?;

    const FAIL: Signature = function("fail", &[required("message"), optional("exc_type")]);
    tasks.function("tasks.fail", FAIL, LATE, async |arguments, _| {
        let (message, exc_type): (String, Option<String>) = arguments;
        let class = exc_type.as_deref().unwrap_or("ValueError");
        Err::<(), _>(Exception::new(BUILTINS, class, message).into())
    })?;

    const RETRY: Signature = function(
        "retry",
        &[
            required("times"),
            required("countdown"),
            optional("max_retries"),
        ],
    );
    tasks.function("tasks.retry", RETRY, LATE, retry)?;

    const SLEEP: Signature = function("sleep", &[required("seconds")]);
    tasks.function("tasks.sleep", SLEEP, LATE, sleep)?;

    const REJECT: Signature = function("reject", &[optional("requeue")]);
    tasks.function("tasks.reject", REJECT, LATE, async |arguments, _| {
        let (requeue,): (Option<bool>,) = arguments;
        Err::<(), _>(Failure::Rejected {
            reason: json!("as asked"),
            requeue: requeue.unwrap_or(false),
        })
    })?;

    const IGNORE: Signature = function("ignore", &[]);
    tasks.function("tasks.ignore", IGNORE, LATE, async |(): (), _| {
        Err::<(), _>(Failure::Ignored)
    })?;

    const PANIC: Signature = function("panic", &[]);
    #[expect(clippy::panic, reason = "this is what the task is for")]
    tasks.function::<(), (), _>("tasks.panic", PANIC, LATE, async |(), _| panic!("as asked"))?;
    Ok(tasks)
}

/// Numbers, as far as JSON has them.
fn add(x: &Value, y: &Value) -> Result<Value, Failure> {
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

/// Raises until it has been retried so often, and then says how often that was.
async fn retry(
    (times, countdown, max_retries): (u32, f64, Option<u32>),
    control: Control,
) -> Result<u32, Failure> {
    let retries = control.request.retries;
    if retries >= times {
        return Ok(retries);
    }
    Err(Retry {
        exception: Some(Exception::new(BUILTINS, "OSError", "temporary failure")),
        when: Some(When::In(seconds(countdown)?)),
        max_retries: Some(max_retries.unwrap_or(3)),
        ..Retry::default()
    }
    .into())
}

/// Sleeps, and says how far it is.
async fn sleep((time,): (f64,), control: Control) -> Result<f64, Failure> {
    const TICK: Duration = Duration::from_millis(100);
    let mut left = seconds(time)?;
    while !left.is_zero() {
        let step = left.min(TICK);
        tokio::time::sleep(step).await;
        left -= step;
        let progress = json!({"total": time, "left": left.as_secs_f64()});
        control
            .progress
            .report(progress.as_object().cloned().unwrap_or_default());
    }
    Ok(time)
}

fn seconds(number: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(number)
        .map_err(|e| Exception::new(BUILTINS, "ValueError", e.to_string()).into())
}

fn main() -> ExitCode {
    cli::tasks_worker(std::env::args_os(), tasks)
}
