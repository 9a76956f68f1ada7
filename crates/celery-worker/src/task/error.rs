//! Failures of a task, by value.

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use celery_protocol::exception::Exception;
use celery_protocol::isoformat;
use celery_protocol::retry::Changes;
use chrono::{DateTime, Utc};
use serde_json::Value;
use service_connection::error_chain::chain;

/// Result of a task.
pub type TaskResult<T> = Result<T, TaskError>;

/// Outcome of a task that does not return a value.
///
/// Any [`std::error::Error`] converts into it with `?`. An [`Exception`], a [`Retry`], [`Reject`] and [`Ignore`] keep
/// their meaning; every other error becomes a Python `RuntimeError` whose text is the error with its causes.
/// Because of this conversion `TaskError` does not implement `Error` itself. An `anyhow::Error` does not implement it
/// either: convert it with `.map_err(|error| Exception::runtime_error(format!("{error:#}")))?`.
///
/// A type of your own becomes a Python exception of a class of your choice with `From`, if it does not implement
/// `Error`:
///
/// ```
/// use celery_worker::prelude::*;
///
/// struct SoldOut { left: u32 }
///
/// impl From<SoldOut> for TaskError {
///     fn from(error: SoldOut) -> Self {
///         let exception = Exception::new("shop.errors", "SoldOut", format!("{} left", error.left));
///         exception.with_args(vec![error.left.into()]).into()
///     }
/// }
///
/// fn take(wanted: u32, left: u32) -> TaskResult<u32> {
///     left.checked_sub(wanted).ok_or(SoldOut { left }).map_err(TaskError::from)
/// }
/// # assert!(take(2, 1).is_err());
/// ```
///
/// A retry is an error as well, so that an error can be the reason of the next attempt:
///
/// ```
/// use celery_worker::prelude::*;
/// use std::time::Duration;
///
/// #[task(max_retries = 5)]
/// async fn read(path: String, cx: TaskContext) -> TaskResult<String> {
///     let again = |error| cx.retry().countdown(Duration::from_secs(10)).cause(error);
///     Ok(std::fs::read_to_string(path).map_err(again)?)
/// }
/// # let _ = read;
/// ```
///
/// ```
/// use celery_worker::prelude::*;
///
/// fn parse(text: &str) -> TaskResult<i64> {
///     if text.is_empty() {
///         return Err(Exception::value_error("empty").into());
///     }
///     Ok(text.parse()?)
/// }
///
/// assert!(matches!(parse(""), Err(TaskError::Raised(e)) if e.exc_type == "ValueError"));
/// assert!(matches!(parse("x"), Err(TaskError::Raised(e)) if e.exc_type == "RuntimeError"));
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum TaskError {
    /// The task raised an exception: its state becomes FAILURE.
    Raised(Exception),
    /// The task runs again later.
    Retry(Box<Retry>),
    /// The task refuses its message.
    Reject(Reject),
    /// The message is acknowledged, and nothing is stored.
    Ignore,
    /// The task was stopped before its end, and can run again: with late acknowledgement, its message returns to the
    /// queue and nothing is stored.
    Stopped,
}

impl TaskError {
    /// Former name of [`TaskError::Stopped`].
    #[deprecated(note = "use `TaskError::Stopped`")]
    #[allow(non_upper_case_globals, reason = "it was a variant")]
    pub const Requeue: Self = Self::Stopped;
}

impl<E: Error + Send + Sync + 'static> From<E> for TaskError {
    fn from(error: E) -> Self {
        let mut error = Some(error);
        let any: &mut dyn Any = &mut error;
        if let Some(exception) = taken::<Exception>(any) {
            return Self::Raised(exception);
        }
        if let Some(retry) = taken::<Retry>(any) {
            return Self::Retry(Box::new(retry));
        }
        if let Some(reject) = taken::<Reject>(any) {
            return Self::Reject(reject);
        }
        if taken::<Ignore>(any).is_some() {
            return Self::Ignore;
        }
        let text = error.map(|error| chain(&error).to_string());
        Self::Raised(Exception::runtime_error(text.unwrap_or_default()))
    }
}

/// The value of an `Option<T>` behind `any`, if it is one.
fn taken<T: 'static>(any: &mut dyn Any) -> Option<T> {
    any.downcast_mut::<Option<T>>().and_then(Option::take)
}

/// Type that a function with `#[task]` can return.
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "a task returns `TaskResult<T>`, not `{Self}`",
    label = "not a result of a task",
    note = "return `TaskResult<T>`, or `Result<T, E>` with an error that implements `std::error::Error`"
)]
pub trait TaskReturn {
    /// Value of a task that succeeds.
    type Output;

    /// Converts the error.
    ///
    /// # Errors
    /// The error of the task.
    fn into_task_result(self) -> TaskResult<Self::Output>;
}

// So that the message for another error type is the one above.
#[diagnostic::do_not_recommend]
impl<T, E: Into<TaskError>> TaskReturn for Result<T, E> {
    type Output = T;

    fn into_task_result(self) -> TaskResult<T> {
        self.map_err(Into::into)
    }
}

impl TaskReturn for () {
    type Output = ();

    fn into_task_result(self) -> TaskResult<()> {
        Ok(())
    }
}

/// Request to run a task again later. Made by [`TaskContext::retry`](super::TaskContext::retry).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Retry {
    /// Cause; it becomes the result once no more retries are left.
    pub exception: Option<Exception>,
    /// Time of the next run; by default after the task's `default_retry_delay`.
    pub when: Option<When>,
    /// Maximum number of retries, in place of the task's own. `u32::MAX` is without limit.
    pub max_retries: Option<u32>,
    /// Differences of the next message from this one.
    pub changes: Changes,
}

impl Retry {
    /// Sets the pause before the next run.
    #[must_use]
    pub fn countdown(mut self, pause: Duration) -> Self {
        self.when = Some(When::In(pause));
        self
    }

    /// Sets the time of the next run.
    #[must_use]
    pub fn eta(mut self, time: DateTime<Utc>) -> Self {
        self.when = Some(When::At(time));
        self
    }

    /// Sets the maximum number of retries.
    #[must_use]
    pub fn max_retries(mut self, retries: u32) -> Self {
        self.max_retries = Some(retries);
        self
    }

    /// Removes the limit on the number of retries.
    #[must_use]
    pub fn without_limit(self) -> Self {
        self.max_retries(u32::MAX)
    }

    /// Sets the cause. It becomes the result once no more retries are left.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<TaskError>) -> Self {
        self.exception = match cause.into() {
            TaskError::Raised(exception) => Some(exception),
            _ => None,
        };
        self
    }

    /// Sets other positional arguments for the next run.
    #[must_use]
    pub fn args(mut self, args: Vec<Value>) -> Self {
        self.changes.args = Some(args);
        self
    }
}

impl fmt::Display for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("retry")?;
        self.when.map_or(Ok(()), |when| write!(f, " {when}"))
    }
}

impl Error for Retry {}

/// Time of a retry.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum When {
    /// After this time (`countdown`).
    In(Duration),
    /// At this time (`eta`).
    At(DateTime<Utc>),
}

impl fmt::Display for When {
    /// In Celery's words for a `Retry`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(delay) => write!(f, "in {}s", delay.as_secs_f64()),
            Self::At(eta) => write!(f, "at {}", isoformat(*eta).replacen('T', " ", 1)),
        }
    }
}

/// Refusal of a message: to the dead-letter exchange, or back to the queue. It has an effect with late
/// acknowledgement only.
#[derive(Debug, Clone, PartialEq)]
pub struct Reject {
    /// Reason, for logs.
    pub reason: Value,
    /// True if the message returns to its queue.
    pub requeue: bool,
}

impl Reject {
    /// A refusal that sends the message to the dead-letter exchange of its queue.
    pub fn new(reason: impl Into<Value>) -> Self {
        Self {
            reason: reason.into(),
            requeue: false,
        }
    }

    /// A refusal that returns the message to its queue.
    pub fn requeue(reason: impl Into<Value>) -> Self {
        Self {
            reason: reason.into(),
            requeue: true,
        }
    }
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "message rejected: {}", self.reason)
    }
}

impl Error for Reject {}

/// End of a task without a result: the message is acknowledged and nothing is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ignore;

impl fmt::Display for Ignore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("task ignored")
    }
}

impl Error for Ignore {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typed_errors_keep_their_meaning() {
        let exception = Exception::new("shop.errors", "SoldOut", "none left");
        assert_eq!(
            TaskError::from(exception.clone()),
            TaskError::Raised(exception.clone())
        );
        let retry = Retry::default()
            .countdown(Duration::from_secs(3))
            .cause(exception.clone());
        assert_eq!(retry.exception, Some(exception));
        assert_eq!(
            TaskError::from(retry.clone()),
            TaskError::Retry(retry.into())
        );
        let reject = Reject::new("broken");
        assert_eq!(TaskError::from(reject.clone()), TaskError::Reject(reject));
        assert_eq!(TaskError::from(Ignore), TaskError::Ignore);
    }

    /// Code for the former name compiles, and matches.
    #[test]
    #[expect(deprecated, reason = "this is the former name")]
    fn stopped_has_its_former_name() {
        assert!(matches!(TaskError::Stopped, TaskError::Requeue));
        assert_eq!(TaskError::Requeue, TaskError::Stopped);
    }

    #[test]
    fn other_errors_become_a_runtime_error_with_their_causes() {
        let cause = std::io::Error::other("disk on fire");
        let error = std::io::Error::other(cause);
        let expected = Exception::runtime_error(chain(&error).to_string());
        assert_eq!(TaskError::from(error), TaskError::Raised(expected));
    }
}
