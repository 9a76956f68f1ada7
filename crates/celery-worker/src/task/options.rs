//! Options of a task.

use std::time::Duration;

use super::RateLimit;

/// Options of a task, by Celery's names. `None` leaves an option to the configuration of the worker.
///
/// ```
/// use celery_worker::task::TaskOptions;
///
/// const OPTIONS: TaskOptions = TaskOptions {
///     acks_late: Some(true),
///     max_retries: Some(5),
///     ..TaskOptions::DEFAULT
/// };
/// # assert_eq!(OPTIONS.max_retries, Some(5));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TaskOptions {
    /// True if the message is acknowledged after the run rather than before.
    pub acks_late: Option<bool>,
    /// Whether, with late acknowledgement, a failure is acknowledged rather than rejected.
    pub acks_on_failure: Option<bool>,
    /// Whether, with late acknowledgement, a run that exceeded its time limit is acknowledged rather than
    /// requeued.
    pub acks_on_timeout: Option<bool>,
    /// True if no result is stored, unless the message states it.
    pub ignore_result: Option<bool>,
    /// True if failures are stored even if results are ignored.
    pub store_errors_even_if_ignored: Option<bool>,
    /// True if the state STARTED is stored.
    pub track_started: Option<bool>,
    /// Time limit in seconds, unless the message has one.
    pub time_limit: Option<f64>,
    /// Soft time limit in seconds, unless the message has one.
    pub soft_time_limit: Option<f64>,
    /// Maximum number of retries. Celery's default is 3.
    pub max_retries: Option<u32>,
    /// Pause before a retry that names none. Celery's default is 180 s.
    pub default_retry_delay: Option<Duration>,
    /// Maximum rate at which tasks of this name start.
    pub rate_limit: Option<RateLimit>,
    /// True if the task observes [`TaskContext::cancelled`](super::TaskContext::cancelled) and ends by itself,
    /// for example to stop a child process. Any other task is dropped at the point where it waits.
    pub cooperative: bool,
}

impl TaskOptions {
    /// Options that leave everything to the configuration of the worker.
    pub const DEFAULT: Self = Self {
        acks_late: None,
        acks_on_failure: None,
        acks_on_timeout: None,
        ignore_result: None,
        store_errors_even_if_ignored: None,
        track_started: None,
        time_limit: None,
        soft_time_limit: None,
        max_retries: None,
        default_retry_delay: None,
        rate_limit: None,
        cooperative: false,
    };
}
