//! Retries of a failed task by its options `autoretry_for`, `retry_backoff` and so on.

use std::time::Duration;

use celery_protocol::exception::{BUILTINS, Exception};

use super::{Retry, TaskOptions};

/// Celery's own default, in seconds.
const LONGEST_PAUSE: u64 = 600;

/// Python's own exceptions with their direct base, where this is another one than `Exception`.
const BASES: [(&str, &str); 28] = [
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
    ("UnboundLocalError", "NameError"),
    ("UnicodeDecodeError", "UnicodeError"),
    ("UnicodeEncodeError", "UnicodeError"),
    ("UnicodeError", "ValueError"),
    ("UnicodeTranslateError", "UnicodeError"),
    ("ZeroDivisionError", "ArithmeticError"),
];

/// The rule by which a task is retried after an exception, from its options.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Autoretry {
    after: Vec<Class>,
    not_after: Vec<Class>,
    /// Pauses that grow; `None` for the task's `default_retry_delay`.
    backoff: Option<Backoff>,
}

/// A class of exceptions, as an option names it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Class {
    /// Every exception.
    Any,
    Named {
        /// `None` for a class of this name in any module.
        module: Option<&'static str>,
        name: &'static str,
    },
}

/// Pauses that double with each retry, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Backoff {
    first: u64,
    longest: u64,
    /// True if a pause is a random part of its time.
    jitter: bool,
}

impl Autoretry {
    pub(crate) fn new(options: &TaskOptions) -> Self {
        let classes = |names: Option<&'static [&'static str]>| {
            let names = names.unwrap_or_default().iter();
            names.map(|name| Class::new(name)).collect()
        };
        Self {
            after: classes(options.autoretry_for),
            not_after: classes(options.dont_autoretry_for),
            backoff: options.retry_backoff.map(|first| Backoff {
                first: first.as_secs().max(1),
                longest: options
                    .retry_backoff_max
                    .map_or(LONGEST_PAUSE, |longest| longest.as_secs()),
                jitter: options.retry_jitter.unwrap_or(true),
            }),
        }
    }

    /// The retry of a run that failed with `exception` after `retries` earlier ones; `None` if it is not retried.
    pub(crate) fn retry(&self, retries: u32, exception: &Exception) -> Option<Retry> {
        let is_one_of = |classes: &[Class]| classes.iter().any(|class| class.includes(exception));
        if !is_one_of(&self.after) || is_one_of(&self.not_after) {
            return None;
        }
        let retry = Retry {
            exception: Some(exception.clone()),
            ..Retry::default()
        };
        Some(match self.backoff {
            Some(backoff) => {
                let pause = backoff.pause(retries, |pauses| fastrand::u64(0..pauses));
                retry.countdown(pause)
            }
            None => retry,
        })
    }
}

impl Class {
    fn new(name: &'static str) -> Self {
        let (module, name) = match name.rsplit_once('.') {
            Some((module, name)) => (Some(module), name),
            None => (None, name),
        };
        match module {
            None | Some(BUILTINS) if name == "Exception" => Self::Any,
            None | Some(BUILTINS) => Self::Named {
                module,
                name: canonical(name),
            },
            Some(_) => Self::Named { module, name },
        }
    }

    /// True if the exception is of this class, as far as this is known. Of other classes than Python's own, it is known
    /// that they are exceptions.
    fn includes(&self, exception: &Exception) -> bool {
        let Self::Named { module, name } = self else {
            return true;
        };
        let (is_in, class) = (exception.exc_module.as_str(), exception.exc_type.as_str());
        if module.is_some_and(|module| module != is_in) {
            return false;
        }
        if is_in != BUILTINS {
            return class == *name;
        }
        let mut base = Some(canonical(class));
        while let Some(class) = base {
            if class == *name {
                return true;
            }
            let found = BASES.iter().find(|(known, _)| *known == class);
            base = found.map(|(_, base)| *base);
        }
        false
    }
}

/// The name of a class of Python's own that has several.
fn canonical(name: &str) -> &str {
    match name {
        "IOError" | "EnvironmentError" => "OSError",
        name => name,
    }
}

impl Backoff {
    /// Pause before the next run. `random` chooses a number below its argument.
    fn pause(self, retries: u32, random: impl FnOnce(u64) -> u64) -> Duration {
        let pause = 1_u64
            .checked_shl(retries)
            .and_then(|factor| self.first.checked_mul(factor))
            .map_or(self.longest, |pause| pause.min(self.longest));
        Duration::from_secs(match self.jitter {
            false => pause,
            true => random(pause.saturating_add(1)),
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn sold_out() -> Exception {
        Exception::new("shop.errors", "SoldOut", "")
    }

    #[rstest]
    #[case("ValueError", Exception::value_error(""), true)]
    #[case("OSError", Exception::builtin("ConnectionResetError", ""), true)]
    #[case(
        "builtins.OSError",
        Exception::builtin("ConnectionResetError", ""),
        true
    )]
    #[case("IOError", Exception::builtin("TimeoutError", ""), true)]
    #[case("builtins.IOError", Exception::builtin("OSError", ""), true)]
    #[case("OSError", Exception::builtin("IOError", ""), true)]
    #[case("LookupError", Exception::key_error(""), true)]
    #[case("KeyError", Exception::builtin("LookupError", ""), false)]
    #[case("ImportError", Exception::builtin("ModuleNotFoundError", ""), true)]
    #[case("Exception", sold_out(), true)]
    #[case("builtins.Exception", sold_out(), true)]
    #[case("SoldOut", sold_out(), true)]
    #[case("shop.errors.SoldOut", sold_out(), true)]
    #[case("other.SoldOut", sold_out(), false)]
    #[case("shop.errors.Exception", sold_out(), false)]
    #[case("OSError", Exception::new("shop.errors", "TimeoutError", ""), false)]
    #[case(
        "builtins.OSError",
        Exception::new("shop.errors", "OSError", ""),
        false
    )]
    fn class_of_an_exception(
        #[case] name: &'static str,
        #[case] exception: Exception,
        #[case] expected: bool,
    ) {
        assert_eq!(Class::new(name).includes(&exception), expected);
    }

    /// The values of `celery.utils.time.get_exponential_backoff_interval`.
    #[test]
    fn pauses_double_up_to_the_limit() {
        let seconds = Duration::from_secs;
        let options = TaskOptions::DEFAULT
            .retry_backoff(seconds(3))
            .retry_jitter(false);
        let pause = |options: &TaskOptions, retries| {
            let backoff = Autoretry::new(options).backoff;
            backoff.map(|backoff| backoff.pause(retries, |pauses| pauses - 1).as_secs())
        };
        let pauses = |options: &TaskOptions| {
            [0, 1, 2, 7, 8, 64, u32::MAX].map(|retries| pause(options, retries).unwrap_or_default())
        };
        assert_eq!(pauses(&options), [3, 6, 12, 384, 600, 600, 600]);
        let options = options.retry_backoff_max(seconds(10));
        assert_eq!(pauses(&options), [3, 6, 10, 10, 10, 10, 10]);
        assert_eq!(pauses(&options.retry_jitter(true)), pauses(&options));
        assert_eq!(pause(&TaskOptions::DEFAULT, 0), None);
    }

    #[test]
    fn only_the_named_exceptions_are_retried() {
        let options = TaskOptions::DEFAULT
            .autoretry_for(&["Exception"])
            .dont_autoretry_for(&["KeyError"]);
        let retried = |options: &TaskOptions, exception| {
            let retry = Autoretry::new(options).retry(0, &exception);
            retry.map(|retry| retry.when)
        };
        assert_eq!(retried(&options, Exception::value_error("")), Some(None));
        assert_eq!(retried(&options, Exception::key_error("")), None);
        let none = TaskOptions::DEFAULT;
        assert_eq!(retried(&none, Exception::value_error("")), None);
    }
}
