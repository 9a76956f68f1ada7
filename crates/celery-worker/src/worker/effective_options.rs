//! Options for one run of a task: from the message, else from the task, else from the settings.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::task::RateLimit;
use crate::task::TaskOptions;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::State;

/// Celery's own defaults.
const MAX_RETRIES: u32 = 3;
const RETRY_DELAY: Duration = Duration::from_secs(180);

/// Default options of all tasks, by the names of Celery's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct DefaultOptions {
    /// `task_acks_late`.
    pub acks_late: bool,
    /// `task_acks_on_failure`.
    pub acks_on_failure: bool,
    /// `task_acks_on_timeout`.
    pub acks_on_timeout: bool,
    /// `task_ignore_result`.
    pub ignore_result: bool,
    /// `task_store_errors_even_if_ignored`.
    pub store_errors_even_if_ignored: bool,
    /// `task_track_started`.
    pub track_started: bool,
    /// `task_time_limit`.
    pub time_limit: Option<Duration>,
    /// `task_soft_time_limit`.
    pub soft_time_limit: Option<Duration>,
    /// `task_default_rate_limit`.
    pub rate_limit: Option<RateLimit>,
}

impl Default for DefaultOptions {
    /// Celery's defaults.
    fn default() -> Self {
        Self {
            acks_late: false,
            acks_on_failure: true,
            acks_on_timeout: true,
            ignore_result: false,
            store_errors_even_if_ignored: false,
            track_started: false,
            time_limit: None,
            soft_time_limit: None,
            rate_limit: None,
        }
    }
}

/// Options for one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct EffectiveOptions {
    pub(crate) acks_late: bool,
    pub(crate) acks_on_failure: bool,
    pub(crate) acks_on_timeout: bool,
    pub(crate) track_started: bool,
    /// Time limit in seconds.
    pub(crate) time_limit: Option<f64>,
    /// Soft time limit in seconds.
    pub(crate) soft_time_limit: Option<f64>,
    pub(crate) max_retries: u32,
    pub(crate) retry_delay: Duration,
    pub(crate) ignore_result: bool,
    store_errors: bool,
}

impl EffectiveOptions {
    pub(crate) fn new(
        message: &TaskMessage,
        options: &TaskOptions,
        limits: Option<Limits>,
        defaults: &DefaultOptions,
    ) -> Self {
        let ignore_result = message
            .ignore_result
            .or(options.ignore_result)
            .unwrap_or(defaults.ignore_result);
        let own = limits.unwrap_or(Limits {
            hard: options.time_limit.or(defaults.time_limit).map(seconds),
            soft: (options.soft_time_limit.or(defaults.soft_time_limit)).map(seconds),
        });
        let (hard, soft) = message.time_limit;
        // Zero means no limit, as in Python.
        let given = |limit: Option<f64>| limit.filter(|seconds| *seconds > 0.0);
        Self {
            acks_late: options.acks_late.unwrap_or(defaults.acks_late),
            acks_on_failure: options.acks_on_failure.unwrap_or(defaults.acks_on_failure),
            acks_on_timeout: options.acks_on_timeout.unwrap_or(defaults.acks_on_timeout),
            track_started: options.track_started.unwrap_or(defaults.track_started)
                && !ignore_result,
            time_limit: given(hard).or(given(own.hard)),
            soft_time_limit: given(soft).or(given(own.soft)),
            max_retries: options.max_retries.unwrap_or(MAX_RETRIES),
            retry_delay: options.default_retry_delay.unwrap_or(RETRY_DELAY),
            ignore_result,
            store_errors: options
                .store_errors_even_if_ignored
                .unwrap_or(defaults.store_errors_even_if_ignored),
        }
    }

    /// Options for a message whose task is not registered here.
    pub(crate) fn of_stranger(message: &TaskMessage, defaults: &DefaultOptions) -> Self {
        Self::new(message, &TaskOptions::DEFAULT, None, defaults)
    }

    /// Returns true if a state is stored.
    pub(crate) fn stores(&self, state: &State) -> bool {
        let error = matches!(state, State::Failure { .. } | State::Revoked(_));
        !self.ignore_result || (error && self.store_errors)
    }
}

fn seconds(limit: Duration) -> f64 {
    limit.as_secs_f64()
}

/// A task's time limits, in seconds, as set by remote control.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Limits {
    pub(crate) hard: Option<f64>,
    pub(crate) soft: Option<f64>,
}

/// Time limits set by remote control, by task.
#[derive(Default)]
pub(crate) struct TimeLimits(Mutex<HashMap<String, Limits>>);

impl TimeLimits {
    pub(crate) fn set(&self, task: &str, limits: Limits) {
        // No code panics while it holds the lock, and the map would still be whole.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(task.to_owned(), limits);
    }

    pub(crate) fn get(&self, task: &str) -> Option<Limits> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(task).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn effective(
        message: &TaskMessage,
        options: &TaskOptions,
        defaults: &DefaultOptions,
    ) -> EffectiveOptions {
        EffectiveOptions::new(message, options, None, defaults)
    }

    #[test]
    fn the_most_specific_option_applies() {
        let (mut message, mut options) = (TaskMessage::default(), TaskOptions::DEFAULT);
        let mut defaults = DefaultOptions {
            time_limit: Some(Duration::from_secs(30)),
            ..DefaultOptions::default()
        };
        let limit = |m: &_, a: &_, d: &_| effective(m, a, d).time_limit;
        assert_eq!(limit(&message, &options, &defaults), Some(30.0));
        options.time_limit = Some(Duration::from_secs(20));
        assert_eq!(limit(&message, &options, &defaults), Some(20.0));
        message.time_limit = (Some(10.0), None);
        assert_eq!(limit(&message, &options, &defaults), Some(10.0));

        let success = State::Success(Value::Null);
        defaults.ignore_result = true;
        assert!(!effective(&message, &options, &defaults).stores(&success));
        message.ignore_result = Some(false);
        assert!(effective(&message, &options, &defaults).stores(&success));
    }

    #[test]
    fn errors_can_be_stored_where_nothing_else_is() {
        let message = TaskMessage {
            ignore_result: Some(true),
            ..TaskMessage::default()
        };
        let defaults = DefaultOptions {
            store_errors_even_if_ignored: true,
            ..DefaultOptions::default()
        };
        let options = effective(&message, &TaskOptions::DEFAULT, &defaults);
        assert!(!options.stores(&State::Success(Value::Null)));
        assert!(options.stores(&State::Revoked(celery_protocol::result::Cause::Expired)));
    }
}
