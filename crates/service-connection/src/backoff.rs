//! Backoff between attempts at something that will work again some day: growing, with jitter, and
//! never running out.

use std::error::Error;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::error_chain::chain;

/// Minimum interval between log lines for an unchanged error, so that the outage of a night does not fill a log.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// A sequence of pauses.
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

/// State of the attempts at one operation: the next pause, and the error that was logged last.
#[derive(Debug)]
pub struct RetryState {
    range: (Duration, Duration),
    backoff: Backoff,
    /// Error that was logged last, and when.
    logged: Option<(String, Instant)>,
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
            logged: None,
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
        let is_known = |(logged, at): &(String, Instant)| {
            *logged == reason && now.duration_since(*at) < LOG_EVERY
        };
        let should_log = !self.logged.as_ref().is_some_and(is_known);
        if should_log {
            self.logged = Some((reason, now));
        }
        Setback {
            pause: self.backoff.next_pause(),
            should_log,
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
mod tests {
    use super::*;

    #[test]
    fn they_grow_to_a_limit_and_go_on() {
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

    #[test]
    fn seconds_are_short() {
        assert_eq!(in_seconds(Duration::from_millis(1680)).to_string(), "1.68");
        assert_eq!(in_seconds(Duration::ZERO).to_string(), "0");
    }
}
