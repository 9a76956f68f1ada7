//! Pauses between attempts at something that will work again some day: growing, with jitter, and
//! never running out.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

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
        self.inner.next().unwrap_or(self.longest).min(self.longest)
    }
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
}
