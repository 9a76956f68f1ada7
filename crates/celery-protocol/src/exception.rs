//! Python exceptions in results.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::message::TaskMessage;
use super::repr;

/// Module of Python's own exceptions.
pub const BUILTINS: &str = "builtins";

/// Module of the exceptions of time limits.
const BILLIARD: &str = "billiard.exceptions";

/// An exception that a Python reader re-creates: class, module and constructor arguments.
///
/// A Celery client imports `exc_module` and calls the class with the arguments; if it cannot, it creates a class of
/// that name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exception {
    /// Class name inside the module.
    pub exc_type: String,
    /// The exception's `args`.
    pub exc_message: Vec<Value>,
    /// Module of the class.
    pub exc_module: String,
}

impl Exception {
    /// An exception with one text as its argument.
    pub fn new(module: &str, class: &str, message: impl Into<String>) -> Self {
        Self {
            exc_type: class.into(),
            exc_message: vec![Value::String(message.into())],
            exc_module: module.into(),
        }
    }

    /// An exception of Python's own module `builtins`, e.g. `ValueError`, with one text as its argument.
    pub fn builtin(class: &str, message: impl Into<String>) -> Self {
        Self::new(BUILTINS, class, message)
    }

    /// The exception with other constructor arguments.
    #[must_use]
    pub fn with_args(mut self, args: Vec<Value>) -> Self {
        self.exc_message = args;
        self
    }

    /// `ValueError`.
    pub fn value_error(message: impl Into<String>) -> Self {
        Self::builtin("ValueError", message)
    }

    /// `KeyError`.
    pub fn key_error(message: impl Into<String>) -> Self {
        Self::builtin("KeyError", message)
    }

    /// `RuntimeError`.
    pub fn runtime_error(message: impl Into<String>) -> Self {
        Self::builtin("RuntimeError", message)
    }

    /// A `TypeError`, as Python raises for wrong arguments.
    pub fn type_error(message: impl Into<String>) -> Self {
        Self::new(BUILTINS, "TypeError", message)
    }

    /// `NotRegistered`, for a message that names an unknown task.
    #[must_use]
    pub fn not_registered(task: &str) -> Self {
        Self::new("celery.exceptions", "NotRegistered", task)
    }

    /// `InvalidTaskError`, for a message with an id that is not a valid task.
    pub fn invalid_task(message: impl Into<String>) -> Self {
        Self::new("celery.exceptions", "InvalidTaskError", message)
    }

    /// `TaskRevokedError`, the result of a task that will not run; `reason` is `revoked`,
    /// `expired` or `terminated`.
    #[must_use]
    pub fn revoked(reason: &str) -> Self {
        Self::new("celery.exceptions", "TaskRevokedError", reason)
    }

    /// `SoftTimeLimitExceeded`, which Python raises inside the task.
    #[must_use]
    pub fn soft_time_limit_exceeded() -> Self {
        Self {
            exc_type: "SoftTimeLimitExceeded".into(),
            exc_message: Vec::new(),
            exc_module: BILLIARD.into(),
        }
    }

    /// `TimeLimitExceeded`, for a task that was stopped by force. Its argument is the limit in seconds in the sender's
    /// notation: `1`, not `1.0`.
    #[must_use]
    pub fn time_limit_exceeded(seconds: f64) -> Self {
        Self {
            exc_type: "TimeLimitExceeded".into(),
            exc_message: vec![seconds_value(seconds)],
            exc_module: BILLIARD.into(),
        }
    }

    /// `Retry`, which a task raises to run again `when` (`in 1.5s`), because of `cause`.
    #[must_use]
    pub fn retry(when: &str, cause: Option<&Self>) -> Self {
        let text = match cause {
            Some(cause) => format!("Retry {when}: {}", cause.repr()),
            None => format!("Retry {when}"),
        };
        Self::new("celery.exceptions", "Retry", text)
    }

    /// `MaxRetriesExceededError`, for a task that names no cause itself.
    #[must_use]
    pub fn max_retries_exceeded(message: &TaskMessage) -> Self {
        Self::new(
            "celery.exceptions",
            "MaxRetriesExceededError",
            format!(
                "Can't retry {}[{}] args:{} kwargs:{}",
                message.task,
                message.id,
                repr::value(&message.args),
                repr::value(&message.kwargs),
            ),
        )
    }

    /// The value for `None`, which Python stores as the exception of a retry without one.
    #[must_use]
    pub fn none() -> Self {
        Self {
            exc_type: "NoneType".into(),
            exc_message: Vec::new(),
            exc_module: BUILTINS.into(),
        }
    }

    /// The last line of a Python traceback: `module.Class: message`, without the module for
    /// builtins.
    #[must_use]
    pub fn headline(&self) -> String {
        let class = self.class();
        match self.exc_message.as_slice() {
            [] => class,
            _ => format!("{class}: {}", self.text()),
        }
    }

    /// The class, with its module, except for builtins.
    #[must_use]
    pub fn class(&self) -> String {
        match self.exc_module == BUILTINS {
            true => self.exc_type.clone(),
            false => format!("{}.{}", self.exc_module, self.exc_type),
        }
    }

    /// `str(exception)`.
    #[must_use]
    pub fn text(&self) -> String {
        match self.exc_message.as_slice() {
            [] => String::new(),
            // The only class of Python whose text is the `repr` of its argument.
            [key] if self.class() == "KeyError" => repr::value(key),
            [Value::String(text)] => text.clone(),
            [one] => repr::value(one),
            many => repr::tuple(many),
        }
    }

    /// `repr(exception)`: the bare class name and the arguments.
    #[must_use]
    pub fn repr(&self) -> String {
        match self.exc_message.as_slice() {
            // Classes with a `repr` of their own.
            [reason, requeue] if self.exc_type == "Reject" => format!(
                "reject requeue={}: {}",
                repr::value(requeue),
                reason
                    .as_str()
                    .map_or_else(|| repr::value(reason), str::to_owned)
            ),
            [] if self.exc_type == "NoneType" => "None".into(),
            [one] => format!("{}({})", self.exc_type, repr::value(one)),
            many => format!("{}{}", self.exc_type, repr::tuple(many)),
        }
    }

    /// A text in the form of a Python traceback, which readers expect in a failure. In place of Python's stack frames
    /// it has one line with the place where the exception was raised.
    #[must_use]
    pub fn traceback(&self, place: &str) -> String {
        format!(
            "Traceback (most recent call last):\n  {place}\n{}\n",
            self.headline()
        )
    }
}

/// A number of seconds in the producer's notation: without a fraction as an integer.
fn seconds_value(seconds: f64) -> Value {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "it has no fraction, and a cast saturates"
    )]
    match seconds.fract() == 0.0 {
        true => (seconds as i64).into(),
        false => seconds.into(),
    }
}

impl std::fmt::Display for Exception {
    /// Writes the last line of a Python traceback, see [`Exception::headline`].
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.headline())
    }
}

impl std::error::Error for Exception {}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn headlines_are_those_of_python() {
        let of = |module: &str, args: Value| {
            Exception {
                exc_type: "E".into(),
                exc_message: serde_json::from_value(args).unwrap_or_default(),
                exc_module: module.into(),
            }
            .headline()
        };
        assert_eq!(of("builtins", json!(["it broke"])), "E: it broke");
        assert_eq!(of("a.b", json!(["it broke"])), "a.b.E: it broke");
        assert_eq!(of("builtins", json!([])), "E");
        assert_eq!(of("builtins", json!([1])), "E: 1");
        assert_eq!(of("builtins", json!(["a", false])), "E: ('a', False)");
    }
}
