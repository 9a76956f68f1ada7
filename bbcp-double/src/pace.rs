//! Rate limit, and sleep in short steps so that a lost peer is detected.

use std::time::{Duration, Instant};

/// Longest sleep without a check.
pub(crate) const SLICE: Duration = Duration::from_millis(40);

/// A limit in bytes per second, measured from the start of a file.
pub(crate) struct Pace {
    rate: Option<u64>,
    started: Instant,
    bytes: u64,
}

impl Pace {
    /// Creates the limit; `None` for no limit.
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Self {
            rate: rate.filter(|rate| *rate > 0),
            started: Instant::now(),
            bytes: 0,
        }
    }

    /// Size of one read: the bytes of a twentieth of a second, so that a slow copy is smooth.
    pub(crate) fn read_size(&self, largest: usize) -> usize {
        match self.rate {
            Some(rate) => usize::try_from(rate / 20)
                .unwrap_or(largest)
                .clamp(1, largest),
            None => largest,
        }
    }

    /// Returns the wait that is due after `bytes` more.
    pub(crate) fn pause_after(&mut self, bytes: usize) -> Duration {
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        self.bytes += bytes as u64;
        let due = Duration::from_secs_f64(self.bytes as f64 / rate as f64);
        due.saturating_sub(self.started.elapsed())
    }
}
