//! Retries of a failed task by its options `autoretry_for`, `retry_backoff` and so on.

use std::time::Duration;

use celery_protocol::exception::{BUILTINS, Exception};

use crate::task::{Retry, TaskOptions};

/// Celery's own default.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Python's own exceptions whose bases a task may name, with their direct base.
const BASES: [(&str, &str); 32] = [
    ("ArithmeticError", "Exception"),
    ("AssertionError", "Exception"),
    ("AttributeError", "Exception"),
    ("BlockingIOError", "OSError"),
    ("BrokenPipeError", "ConnectionError"),
    ("ChildProcessError", "OSError"),
    ("ConnectionAbortedError", "ConnectionError"),
    ("ConnectionError", "OSError"),
    ("ConnectionRefusedError", "ConnectionError"),
    ("ConnectionResetError", "ConnectionError"),
    ("FileExistsError", "OSError"),
    ("FileNotFoundError", "OSError"),
    ("FloatingPointError", "ArithmeticError"),
    ("ImportError", "Exception"),
    ("IndexError", "LookupError"),
    ("InterruptedError", "OSError"),
    ("IsADirectoryError", "OSError"),
    ("KeyError", "LookupError"),
    ("ModuleNotFoundError", "ImportError"),
    ("NotADirectoryError", "OSError"),
    ("NotImplementedError", "RuntimeError"),
    ("OverflowError", "ArithmeticError"),
    ("PermissionError", "OSError"),
    ("ProcessLookupError", "OSError"),
    ("RecursionError", "RuntimeError"),
    ("TimeoutError", "OSError"),
    ("UnicodeDecodeError", "UnicodeError"),
    ("UnicodeEncodeError", "UnicodeError"),
    ("UnicodeError", "ValueError"),
    ("UnicodeTranslateError", "UnicodeError"),
    ("UnboundLocalError", "NameError"),
    ("ZeroDivisionError", "ArithmeticError"),
];

/// The retry of a run that failed with `exception` after `retries` earlier ones; `None` if the options have none.
pub(super) fn retry(options: &TaskOptions, retries: u32, exception: &Exception) -> Option<Retry> {
    let is_one_of = |names: Option<&[&str]>| {
        names
            .unwrap_or_default()
            .iter()
            .any(|name| is_a(exception, name))
    };
    if !is_one_of(options.autoretry_for) || is_one_of(options.dont_autoretry_for) {
        return None;
    }
    let retry = Retry {
        exception: Some(exception.clone()),
        ..Retry::default()
    };
    Some(match options.retry_backoff {
        Some(_) => retry.countdown(pause(options, retries, |pauses| fastrand::u64(0..pauses))),
        None => retry,
    })
}

/// Pause before the next run. `random` chooses a number below its argument.
fn pause(options: &TaskOptions, retries: u32, random: impl FnOnce(u64) -> u64) -> Duration {
    let first = options.retry_backoff.unwrap_or_default().as_secs().max(1);
    let longest = options.retry_backoff_max.unwrap_or(LONGEST_PAUSE).as_secs();
    let pause = 1_u64
        .checked_shl(retries)
        .and_then(|factor| first.checked_mul(factor))
        .map_or(longest, |pause| pause.min(longest));
    Duration::from_secs(match options.retry_jitter {
        Some(false) => pause,
        _ => random(pause.saturating_add(1)),
    })
}

/// True if the exception is of the class `name`, as far as this is known. Of other classes than Python's own, it is known
/// that they are exceptions.
fn is_a(exception: &Exception, name: &str) -> bool {
    let class = exception.exc_type.as_str();
    if name == "Exception" || name == class {
        return true;
    }
    if let Some(module) = name
        .strip_suffix(class)
        .and_then(|rest| rest.strip_suffix('.'))
    {
        return module == exception.exc_module;
    }
    let mut base = (exception.exc_module == BUILTINS).then_some(class);
    while let Some(class) = base {
        if class == name {
            return true;
        }
        base = BASES
            .iter()
            .find(|(known, _)| *known == class)
            .map(|(_, base)| *base);
    }
    false
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("ValueError", Exception::value_error(""), true)]
    #[case("OSError", Exception::builtin("ConnectionResetError", ""), true)]
    #[case("LookupError", Exception::key_error(""), true)]
    #[case("KeyError", Exception::builtin("LookupError", ""), false)]
    #[case("Exception", Exception::new("shop.errors", "SoldOut", ""), true)]
    #[case("SoldOut", Exception::new("shop.errors", "SoldOut", ""), true)]
    #[case(
        "shop.errors.SoldOut",
        Exception::new("shop.errors", "SoldOut", ""),
        true
    )]
    #[case("other.SoldOut", Exception::new("shop.errors", "SoldOut", ""), false)]
    #[case("OSError", Exception::new("shop.errors", "TimeoutError", ""), false)]
    fn class_of_an_exception(
        #[case] name: &str,
        #[case] exception: Exception,
        #[case] expected: bool,
    ) {
        assert_eq!(is_a(&exception, name), expected);
    }

    /// The values of `celery.utils.time.get_exponential_backoff_interval`.
    #[test]
    fn pauses_double_up_to_the_limit() {
        let seconds = |seconds| Duration::from_secs(seconds);
        let options = TaskOptions::DEFAULT
            .retry_backoff(seconds(3))
            .retry_jitter(false);
        let pauses = |options: &TaskOptions| {
            [0, 1, 2, 7, 8, 64, u32::MAX].map(|retries| pause(options, retries, |_| 0).as_secs())
        };
        assert_eq!(pauses(&options), [3, 6, 12, 384, 600, 600, 600]);
        let options = options.retry_backoff_max(seconds(10));
        assert_eq!(pauses(&options), [3, 6, 10, 10, 10, 10, 10]);
        let options = options.retry_jitter(true);
        assert_eq!(pause(&options, 1, |pauses| pauses - 1), seconds(6));
    }

    #[test]
    fn only_the_named_exceptions_are_retried() {
        let options = TaskOptions::DEFAULT
            .autoretry_for(&["Exception"])
            .dont_autoretry_for(&["KeyError"]);
        let retried = |exception| retry(&options, 0, &exception).map(|retry| retry.when);
        assert_eq!(retried(Exception::value_error("")), Some(None));
        assert_eq!(retried(Exception::key_error("")), None);
        assert_eq!(
            retry(&TaskOptions::DEFAULT, 0, &Exception::value_error("")),
            None
        );
    }
}
