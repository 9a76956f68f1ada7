//! Tasks that compute a value, wait or sleep.

use std::io::Write as _;
use std::time::Duration;

use celery_worker::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};
use tokio::time::sleep;

/// The sum of two values of JSON, as by Python's `+`.
pub(crate) fn plus(x: &Value, y: &Value) -> TaskResult<Value> {
    let sum = match (x, y) {
        (Value::Number(x), Value::Number(y)) => match (x.as_i64(), y.as_i64()) {
            (Some(x), Some(y)) => x.checked_add(y).map(Number::from),
            _ => x
                .as_f64()
                .zip(y.as_f64())
                .and_then(|(x, y)| Number::from_f64(x + y)),
        }
        .map(Value::Number),
        (Value::String(x), Value::String(y)) => Some(json!(format!("{x}{y}"))),
        (Value::Array(x), Value::Array(y)) => Some(json!([x.as_slice(), y.as_slice()].concat())),
        _ => None,
    };
    sum.ok_or_else(|| Exception::type_error("unsupported operand type(s) for +").into())
}

fn sum<'a>(numbers: impl IntoIterator<Item = &'a Value>) -> TaskResult<Value> {
    let mut numbers = numbers.into_iter();
    numbers.try_fold(json!(0), |sum, number| plus(&sum, number))
}

pub(crate) fn seconds(number: f64) -> Duration {
    Duration::try_from_secs_f64(number).unwrap_or_default()
}

#[task]
pub(crate) async fn identity(x: Value) -> TaskResult<Value> {
    Ok(x)
}

#[task]
pub(crate) async fn add(x: Value, y: Value, z: Option<Value>) -> TaskResult<Value> {
    let sum = plus(&x, &y)?;
    match z {
        Some(z) => plus(&sum, &z),
        None => Ok(sum),
    }
}

#[task]
pub(crate) async fn mul(x: i64, y: i64) -> TaskResult<i64> {
    Ok(x.saturating_mul(y))
}

#[task(ignore_result)]
pub(crate) async fn add_ignore_result(x: Value, y: Value) -> TaskResult<Value> {
    plus(&x, &y)
}

#[task(ignore_result = false)]
pub(crate) async fn add_with_result(x: Value, y: Value) -> TaskResult<Value> {
    plus(&x, &y)
}

#[task]
pub(crate) async fn add_two(x: Value, y: Value) -> TaskResult<Value> {
    plus(&x, &y)
}

#[task]
pub(crate) async fn write_to_file_and_return_int(file_name: String, i: i64) -> TaskResult<i64> {
    let mut file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(file_name)?;
    writeln!(file, "{i}")?;
    Ok(i)
}

#[task]
pub(crate) async fn delayed_sum(
    numbers: Vec<Value>,
    #[default = 1.0] pause_time: f64,
) -> TaskResult<Value> {
    sleep(seconds(pause_time)).await;
    sum(&numbers)
}

#[task(cooperative)]
pub(crate) async fn delayed_sum_with_soft_guard(
    numbers: Vec<Value>,
    #[default = 1.0] pause_time: f64,
    cx: TaskContext,
) -> TaskResult<Value> {
    tokio::select! {
        () = sleep(seconds(pause_time)) => sum(&numbers),
        () = cx.soft_time_limit_exceeded().cancelled() => Ok(json!(0)),
    }
}

#[task]
pub(crate) async fn tsum(nums: Vec<Value>) -> TaskResult<Value> {
    sum(&nums)
}

/// Sums numbers and lists of numbers.
#[task]
pub(crate) async fn xsum(nums: Vec<Value>) -> TaskResult<Value> {
    let flat = nums.iter().flat_map(|num| match num {
        Value::Array(list) => list.as_slice(),
        number => std::slice::from_ref(number),
    });
    sum(flat)
}

#[task]
pub(crate) async fn print_unicode(
    #[default = "håå®ƒ valmuefrø".into()] log_message: String,
    #[default = "hiöäüß".into()] print_message: String,
) -> TaskResult<()> {
    tracing::warn!(text = log_message, "text to log");
    println!("{print_message}");
    Ok(())
}

#[task]
pub(crate) async fn return_exception(e: Value) -> TaskResult<(Value, bool)> {
    Ok((e, true))
}

#[task]
pub(crate) async fn sleeping(i: f64, #[kwargs] _more: Map<String, Value>) -> TaskResult<()> {
    sleep(seconds(i)).await;
    Ok(())
}

#[derive(Serialize, Deserialize)]
pub(crate) struct AddParameters {
    x: i64,
    y: i64,
}

#[derive(Serialize)]
pub(crate) struct AddResult {
    result: i64,
}

#[task]
pub(crate) async fn add_pydantic(data: AddParameters) -> TaskResult<AddResult> {
    Ok(AddResult {
        result: data.x.saturating_add(data.y),
    })
}

#[task]
pub(crate) async fn noop(
    #[args] _rest: Vec<Value>,
    #[kwargs] _more: Map<String, Value>,
) -> TaskResult<()> {
    Ok(())
}

#[task]
pub(crate) async fn long_running_task(
    #[default = 1.0] seconds: f64,
    #[default] verbose: bool,
) -> TaskResult<bool> {
    tracing::info!(seconds, verbose, "long task started");
    sleep(self::seconds(seconds.trunc())).await;
    tracing::info!("long task finished");
    Ok(true)
}

#[task(soft_time_limit = 2, time_limit = 1)]
pub(crate) async fn soft_time_limit_must_exceed_time_limit() -> TaskResult<()> {
    Ok(())
}

#[task(soft_time_limit = 3, time_limit = 5)]
pub(crate) async fn soft_time_limit_lower_than_time_limit() -> TaskResult<()> {
    sleep(Duration::from_secs(4)).await;
    Ok(())
}

#[task(time_limit = 2)]
pub(crate) async fn self_termination_delay_timeout() -> TaskResult<()> {
    sleep(Duration::from_secs(4)).await;
    Ok(())
}
