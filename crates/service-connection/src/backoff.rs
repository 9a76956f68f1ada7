//! Retries of operations on services that will answer again some day: growing pauses with jitter that never run
//! out, and log lines that do not repeat themselves.
//!
//! [`RetryLoop`] repeats one operation until its first success. [`RetryState`] is for loops whose attempts are
//! whole connections: these have no final success, and reset the pauses when they lasted.

use std::error::Error;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder, Retryable};

use crate::error_chain::chain;

/// Minimum interval between log lines for an unchanged error, so that the outage of a night does not fill a log.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// An endless sequence of pauses.
#[derive(Debug)]
pub struct Backoff {
    inner: ExponentialBackoff,
    longest: Duration,
}

impl Backoff {
    /// Creates pauses from about `first` to `longest`.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        let inner = ExponentialBuilder::default()
            .with_min_delay(first)
            .with_max_delay(longest)
            .without_max_times()
            .with_jitter()
            .build();
        Self { inner, longest }
    }

    /// Returns the next pause.
    pub fn next_pause(&mut self) -> Duration {
        // Jitter comes on top of the longest pause.
        let pause = self.inner.next().unwrap_or(self.longest).min(self.longest);
        // Finer than this is noise, in a log line too.
        Duration::from_millis(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX))
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.next_pause())
    }
}

/// Repetition of an operation until it succeeds, fails for good, or a deadline would pass.
///
/// Dropping the future cancels the operation or the pause; so
/// `token.run_until_cancelled(RetryLoop::new(pauses).run(…))` ends both.
#[derive(Debug, Clone, Copy)]
pub struct RetryLoop {
    pauses: (Duration, Duration),
    deadline: Option<Instant>,
}

impl RetryLoop {
    /// Creates a loop with pauses from about `first` to `longest`.
    #[must_use]
    pub const fn new((first, longest): (Duration, Duration)) -> Self {
        Self {
            pauses: (first, longest),
            deadline: None,
        }
    }

    /// Sets the time at which no further attempt may begin.
    #[must_use]
    pub const fn until(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Runs the operation again after each failure that is `worth_retrying`. `log` is called with the failure
    /// and the pause in seconds when the error changed, else at most once a minute.
    ///
    /// # Errors
    /// The last error: one that is not worth a retry, or any once the deadline is near.
    // The first attempt needs neither pauses nor a record of errors: operations succeed, and are part of every task.
    pub async fn run<T, E, F>(
        self,
        mut operation: impl FnMut() -> F,
        mut worth_retrying: impl FnMut(&E) -> bool,
        log: impl FnMut(&E, f64),
    ) -> Result<T, E>
    where
        E: Error + 'static,
        F: Future<Output = Result<T, E>>,
    {
        match operation().await {
            Err(error) if worth_retrying(&error) => {
                Box::pin(self.run_again(error, operation, worth_retrying, log)).await
            }
            first => first,
        }
    }

    /// Continues after a first attempt that failed with `error`.
    async fn run_again<T, E, F>(
        self,
        error: E,
        mut operation: impl FnMut() -> F,
        worth_retrying: impl FnMut(&E) -> bool,
        mut log: impl FnMut(&E, f64),
    ) -> Result<T, E>
    where
        E: Error + 'static,
        F: Future<Output = Result<T, E>>,
    {
        let mut first = Some(error);
        let attempt = move || {
            let next = first.take().map_or_else(|| Ok(operation()), Err);
            async move { next?.await }
        };
        let mut throttle = LogThrottle::default();
        let in_time = move |pause: &Duration| {
            self.deadline
                .is_none_or(|deadline| Instant::now() + *pause < deadline)
        };
        attempt
            .retry(Backoff::new(self.pauses.0, self.pauses.1))
            .when(worth_retrying)
            .adjust(move |_, pause| pause.filter(in_time))
            .notify(move |error, pause| {
                if throttle.should_log(Instant::now(), chain(error).to_string()) {
                    log(error, in_seconds(pause));
                }
            })
            .await
    }
}

/// Error that was logged last, and when.
#[derive(Debug, Default)]
struct LogThrottle(Option<(String, Instant)>);

impl LogThrottle {
    /// Returns true if the error changed or [`LOG_EVERY`] has passed, and then counts it as logged.
    fn should_log(&mut self, now: Instant, reason: String) -> bool {
        let is_known = |(logged, at): &(String, Instant)| {
            *logged == reason && now.duration_since(*at) < LOG_EVERY
        };
        let should_log = !self.0.as_ref().is_some_and(is_known);
        if should_log {
            self.0 = Some((reason, now));
        }
        should_log
    }
}

/// State of a loop that repeats attempts forever: the next pause, and the error that was logged last.
#[derive(Debug)]
pub struct RetryState {
    range: (Duration, Duration),
    backoff: Backoff,
    throttle: LogThrottle,
}

/// Consequences of a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setback {
    /// Pause before the next attempt.
    pub pause: Duration,
    /// True if the failure should be logged: the error changed, or the interval has passed.
    pub should_log: bool,
}

impl RetryState {
    /// Creates a state with pauses from about `first` to `longest`.
    #[must_use]
    pub fn new((first, longest): (Duration, Duration)) -> Self {
        Self {
            range: (first, longest),
            backoff: Backoff::new(first, longest),
            throttle: LogThrottle::default(),
        }
    }

    /// Records a success whose result (a connection, say) lasted for a time. Resets the pauses only if that time
    /// was long enough: a connection that ends soon after it was opened counts as a failure. Returns true if
    /// the pauses were reset.
    pub fn succeeded_for(&mut self, time: Duration) -> bool {
        let is_good = time >= self.range.1 * 2;
        if is_good {
            *self = Self::new(self.range);
        }
        is_good
    }

    /// Records a failure.
    pub fn failed(&mut self, error: &(dyn Error + 'static)) -> Setback {
        self.failed_at(Instant::now(), chain(error).to_string())
    }

    fn failed_at(&mut self, now: Instant, reason: String) -> Setback {
        Setback {
            pause: self.backoff.next_pause(),
            should_log: self.throttle.should_log(now, reason),
        }
    }
}

/// A pause for a log line, in seconds: 1.68, where [`Duration::as_secs_f64`] makes 1.6800000000000002 of it.
#[must_use]
pub fn in_seconds(pause: Duration) -> f64 {
    let millis = u32::try_from(pause.as_millis()).unwrap_or(u32::MAX);
    f64::from(millis) / 1000.0
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::cell::Cell;
    use std::future::ready;
    use std::io;

    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(2));
        let mut pauses = Backoff::new(first, longest);
        assert!(pauses.next_pause() >= first);
        let later: Vec<Duration> = (0..100).map(|_| pauses.next_pause()).collect();
        assert!(later.iter().all(|pause| *pause <= longest));
        assert_eq!(later.last(), Some(&longest));
    }

    #[test]
    fn an_unchanged_error_is_logged_once_a_minute() {
        let mut attempts = RetryState::new((Duration::from_millis(1), Duration::from_millis(2)));
        let start = Instant::now();
        let mut should_log = |second, reason: &str| {
            attempts
                .failed_at(start + Duration::from_secs(second), reason.into())
                .should_log
        };
        assert!(should_log(0, "refused"));
        assert!(!should_log(5, "refused"));
        assert!(should_log(10, "timed out"));
        assert!(!should_log(69, "timed out"));
        assert!(should_log(70, "timed out"));
        assert!(should_log(71, "refused"));
    }

    #[test]
    fn success_counts_when_it_lasts() {
        let seconds = Duration::from_secs;
        let mut attempts = RetryState::new((Duration::from_millis(250), seconds(5)));
        let mut pause = |lasted| {
            attempts.succeeded_for(lasted);
            attempts.failed(&std::io::Error::other("gone")).pause
        };
        let pauses: Vec<_> = (0..10).map(|_| pause(seconds(1))).collect();
        assert_eq!(pauses[9], seconds(5));
        assert!(pause(seconds(10)) < Duration::from_millis(500));
    }

    const QUICK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(2));

    #[tokio::test]
    async fn a_loop_ends_with_the_first_success() {
        let (tries, mut logged) = (Cell::new(0), Vec::new());
        let operation = || {
            tries.set(tries.get() + 1);
            ready(match tries.get() {
                1 | 2 => Err(io::Error::other("refused")),
                3 => Err(io::Error::other("timed out")),
                last => Ok(last),
            })
        };
        let log = |error: &io::Error, _: f64| logged.push(error.to_string());
        let done = RetryLoop::new(QUICK).run(operation, |_| true, log).await;
        assert_eq!(done.unwrap(), 4);
        assert_eq!(logged, ["refused", "timed out"]);
    }

    #[tokio::test]
    async fn loop_ends_with_a_permanent_failure() {
        let tries = Cell::new(0);
        let operation = || {
            tries.set(tries.get() + 1);
            ready(Err::<(), _>(io::Error::other(tries.get().to_string())))
        };
        let should_retry = |error: &io::Error| error.to_string() != "2";
        let done = RetryLoop::new(QUICK)
            .run(operation, should_retry, |_, _| {})
            .await;
        assert_eq!(done.unwrap_err().to_string(), "2");
    }

    #[tokio::test]
    async fn a_loop_does_not_begin_after_its_deadline() {
        let began = Instant::now();
        let deadline = began + Duration::from_millis(60);
        let mut last = began;
        let operation = || {
            last = Instant::now();
            ready(Err::<(), _>(io::Error::other("refused")))
        };
        let retry = RetryLoop::new((Duration::from_millis(20), Duration::from_millis(20)));
        let done = retry.until(deadline).run(operation, |_| true, |_, _| {});
        assert!(done.await.is_err());
        assert!(last > began && last < deadline, "{:?}", last - began);
    }

    #[test]
    fn seconds_are_short() {
        assert_eq!(in_seconds(Duration::from_millis(1680)).to_string(), "1.68");
        assert_eq!(in_seconds(Duration::ZERO).to_string(), "0");
    }
}
