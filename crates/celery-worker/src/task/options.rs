//! Options of a task.

use std::time::Duration;

use super::RateLimit;

/// Options of a task, by Celery's names. An option that is not set is left to the configuration of the worker.
///
/// ```
/// use std::time::Duration;
///
/// use celery_worker::task::TaskOptions;
///
/// const OPTIONS: TaskOptions = TaskOptions::DEFAULT
///     .acks_late(true)
///     .max_retries(5)
///     .time_limit(Duration::from_secs(600));
/// # assert_ne!(OPTIONS, TaskOptions::DEFAULT);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TaskOptions {
    pub(crate) acks_late: Option<bool>,
    pub(crate) acks_on_failure: Option<bool>,
    pub(crate) acks_on_timeout: Option<bool>,
    pub(crate) ignore_result: Option<bool>,
    pub(crate) store_errors_even_if_ignored: Option<bool>,
    pub(crate) track_started: Option<bool>,
    pub(crate) time_limit: Option<Duration>,
    pub(crate) soft_time_limit: Option<Duration>,
    pub(crate) max_retries: Option<u32>,
    pub(crate) default_retry_delay: Option<Duration>,
    pub(crate) rate_limit: Option<RateLimit>,
    pub(crate) autoretry_for: Option<&'static [&'static str]>,
    pub(crate) dont_autoretry_for: Option<&'static [&'static str]>,
    pub(crate) retry_backoff: Option<Duration>,
    pub(crate) retry_backoff_max: Option<Duration>,
    pub(crate) retry_jitter: Option<bool>,
    pub(crate) cooperative: bool,
}

/// Methods that set one option each; constant, so that they can define [`Task::OPTIONS`](super::Task::OPTIONS).
macro_rules! setters {
    ($($(#[$doc:meta])* $option:ident: $value:ty),* $(,)?) => {
        $(
            $(#[$doc])*
            #[must_use]
            pub const fn $option(mut self, $option: $value) -> Self {
                self.$option = Some($option);
                self
            }
        )*
    };
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
        autoretry_for: None,
        dont_autoretry_for: None,
        retry_backoff: None,
        retry_backoff_max: None,
        retry_jitter: None,
        cooperative: false,
    };

    setters! {
        /// If true, the message is acknowledged after the run rather than before.
        acks_late: bool,
        /// With late acknowledgement, acknowledges the message of a failed run (true) or rejects it (false).
        acks_on_failure: bool,
        /// With late acknowledgement, acknowledges the message of a run that exceeded its time limit (true) or requeues
        /// it (false).
        acks_on_timeout: bool,
        /// If true, no result is stored, unless the message states it.
        ignore_result: bool,
        /// If true, failures are stored even if results are ignored.
        store_errors_even_if_ignored: bool,
        /// If true, the state STARTED is stored.
        track_started: bool,
        /// Limits the time of a run, unless the message has a limit; zero for no limit.
        time_limit: Duration,
        /// Limits the time after which a run is asked to end, unless the message has such a limit; zero for no limit.
        soft_time_limit: Duration,
        /// Sets the maximum number of retries. Celery's default is 3.
        max_retries: u32,
        /// Sets the pause before a retry that names none. Celery's default is 180 s.
        default_retry_delay: Duration,
        /// Limits the rate at which tasks of this name start.
        rate_limit: RateLimit,
        /// Retries a run that fails with one of these exceptions, until no retries are left. An exception is given by the
        /// name of its class, with or without its module: `"TimeoutError"`, `"requests.exceptions.Timeout"`. A class of
        /// Python's own includes those that are derived from it: `"OSError"` includes `ConnectionError`, and `"Exception"`
        /// is every failure.
        autoretry_for: &'static [&'static str],
        /// Does not retry after these exceptions, although [`TaskOptions::autoretry_for`] includes them.
        dont_autoretry_for: &'static [&'static str],
        /// Pause before the first retry by [`TaskOptions::autoretry_for`]; each further one is twice as long. Whole
        /// seconds, at least one, as in Celery. Without it, the pause is always `default_retry_delay`.
        retry_backoff: Duration,
        /// Limits the pause of [`TaskOptions::retry_backoff`]. Celery's default is 600 s.
        retry_backoff_max: Duration,
        /// If true, as by default, a pause of [`TaskOptions::retry_backoff`] is a random part of it, so that tasks which
        /// fail together do not return together.
        retry_jitter: bool,
    }

    /// For a task that observes [`TaskContext::cancelled`](super::TaskContext::cancelled) and ends by itself, for example
    /// to stop a child process. Any other task is dropped at the point where it waits.
    #[must_use]
    pub const fn cooperative(mut self, cooperative: bool) -> Self {
        self.cooperative = cooperative;
        self
    }
}
