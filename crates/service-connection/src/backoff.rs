//! Pauses between attempts at something that will work again some day: growing, with jitter, and
//! never running out.

use std::error::Error;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::error_chain::chain;

/// How often a reason that stays the same is told: an outage of a night is not to fill a log.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// A sequence of pauses.
#[derive(Debug)]
pub struct Pauses {
    inner: ExponentialBackoff,
    longest: Duration,
}

impl Pauses {
    /// From about `first` to `longest`.
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

    /// The next one.
    pub fn next_pause(&mut self) -> Duration {
        // Jitter comes on top of the longest pause.
        let pause = self.inner.next().unwrap_or(self.longest).min(self.longest);
        // Finer than this is noise, in a log line too.
        Duration::from_millis(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Attempts at one thing, each of which may fail.
#[derive(Debug)]
pub struct Attempts {
    range: (Duration, Duration),
    pauses: Pauses,
    /// The reason that was told last, and when.
    told: Option<(String, Instant)>,
}

/// What follows from an attempt that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setback {
    /// Until the next one.
    pub pause: Duration,
    /// Whether it is to be told: the reason is another one, or the last word of it is a minute old.
    pub is_news: bool,
}

impl Attempts {
    /// With pauses from about `first` to `longest`.
    #[must_use]
    pub fn new((first, longest): (Duration, Duration)) -> Self {
        Self {
            range: (first, longest),
            pauses: Pauses::new(first, longest),
            told: None,
        }
    }

    /// Notes a success whose result (a connection, say) lasted for a time. Resets the pauses only if that time
    /// was long enough: a connection that ends soon after it was opened counts as a failure. Returns true if
    /// the pauses were reset.
    pub fn succeeded_for(&mut self, time: Duration) -> bool {
        let is_good = time >= self.range.1 * 2;
        if is_good {
            *self = Self::new(self.range);
        }
        is_good
    }

    /// One failed.
    pub fn failed(&mut self, error: &(dyn Error + 'static)) -> Setback {
        self.failed_at(Instant::now(), chain(error).to_string())
    }

    fn failed_at(&mut self, now: Instant, reason: String) -> Setback {
        let is_known = |(told, at): &(String, Instant)| {
            *told == reason && now.duration_since(*at) < TOLD_EVERY
        };
        let is_news = !self.told.as_ref().is_some_and(is_known);
        if is_news {
            self.told = Some((reason, now));
        }
        Setback {
            pause: self.pauses.next_pause(),
            is_news,
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
        let mut pauses = Pauses::new(first, longest);
        assert!(pauses.next_pause() >= first);
        let later: Vec<Duration> = (0..100).map(|_| pauses.next_pause()).collect();
        assert!(later.iter().all(|pause| *pause <= longest));
        assert_eq!(later.last(), Some(&longest));
    }

    #[test]
    fn a_reason_is_told_once_a_minute() {
        let mut attempts = Attempts::new((Duration::from_millis(1), Duration::from_millis(2)));
        let start = Instant::now();
        let mut is_news = |second, reason: &str| {
            attempts
                .failed_at(start + Duration::from_secs(second), reason.into())
                .is_news
        };
        assert!(is_news(0, "refused"));
        assert!(!is_news(5, "refused"));
        assert!(is_news(10, "timed out"));
        assert!(!is_news(69, "timed out"));
        assert!(is_news(70, "timed out"));
        assert!(is_news(71, "refused"));
    }

    #[test]
    fn success_counts_when_it_lasts() {
        let seconds = Duration::from_secs;
        let mut attempts = Attempts::new((Duration::from_millis(250), seconds(5)));
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
