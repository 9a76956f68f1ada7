//! Whether a copy still moves. Pure: it is told what was seen and when.
//!
//! A running process is no sign of life, and neither is a progress line: only bytes are.

use std::time::Duration;

use tokio::time::Instant;

/// Size and allocated bytes of the growing file. bbcp's streams write out of order, so that the
/// size may jump to the end at once while the file fills up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Footprint {
    pub(super) size: u64,
    pub(super) allocated: u64,
}

/// What was seen of a copy, and when it last moved.
#[derive(Debug)]
pub(super) struct Watchdog {
    timeout: Duration,
    total: u64,
    moved: Instant,
    percent: u32,
    footprint: Option<Footprint>,
    rate: Option<f64>,
}

impl Watchdog {
    /// At the start of a copy of `total` bytes.
    pub(super) fn new(total: u64, timeout: Duration, now: Instant) -> Self {
        Self {
            timeout,
            total,
            moved: now,
            percent: 0,
            footprint: None,
            rate: None,
        }
    }

    /// bbcp printed a progress line.
    ///
    /// Of 50 TB, one per cent takes hours, so a rate above zero counts as well; it is that since
    /// the last such line.
    pub(super) fn progress(&mut self, percent: Option<u32>, rate: Option<f64>, now: Instant) {
        let percent = percent.unwrap_or(0);
        if percent > self.percent || rate.is_some_and(|rate| rate > 0.0) {
            self.moved = now;
        }
        self.percent = self.percent.max(percent);
        self.rate = rate;
    }

    /// The file was looked at.
    pub(super) fn footprint(&mut self, footprint: Footprint, now: Instant) {
        if self.footprint != Some(footprint) {
            self.moved = now;
        }
        self.footprint = Some(footprint);
    }

    /// Bytes done, as far as is known.
    pub(super) fn bytes_done(&self) -> u64 {
        let told = u128::from(self.total) * u128::from(self.percent.min(100)) / 100;
        let seen = self.footprint.map_or(0, |f| f.size.min(f.allocated));
        u64::try_from(told)
            .unwrap_or(u64::MAX)
            .max(seen)
            .min(self.total)
    }

    /// Bytes per second lately.
    pub(super) fn rate(&self) -> Option<f64> {
        self.rate
    }

    /// How long nothing moved, if that is too long.
    pub(super) fn stalled(&self, now: Instant) -> Option<Duration> {
        let idle = now.duration_since(self.moved);
        (idle >= self.timeout).then_some(idle)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn after(start: Instant, seconds: u32) -> Instant {
        start + SECOND * seconds
    }

    #[test]
    fn only_bytes_are_movement() {
        let start = Instant::now();
        let mut dog = Watchdog::new(1000, SECOND * 10, start);
        assert_eq!(dog.stalled(after(start, 9)), None);
        dog.progress(Some(1), None, after(start, 9));
        assert_eq!(dog.stalled(after(start, 18)), None);
        dog.progress(Some(1), Some(0.0), after(start, 18));
        dog.progress(Some(0), None, after(start, 18));
        assert_eq!(dog.stalled(after(start, 19)), Some(SECOND * 10));
        dog.progress(Some(1), Some(0.1), after(start, 19));
        assert_eq!(dog.stalled(after(start, 28)), None);
    }

    #[test]
    fn a_growing_file_is_movement() {
        let start = Instant::now();
        let mut dog = Watchdog::new(1000, SECOND * 10, start);
        let full = Footprint {
            size: 1000,
            allocated: 0,
        };
        dog.footprint(full, after(start, 5));
        dog.footprint(full, after(start, 9));
        assert_eq!(dog.stalled(after(start, 15)), Some(SECOND * 10));
        let filling = Footprint {
            allocated: 512,
            ..full
        };
        dog.footprint(filling, after(start, 15));
        assert_eq!(dog.stalled(after(start, 15)), None);
        assert_eq!(dog.bytes_done(), 512);
    }

    proptest! {
        #[test]
        fn never_more_than_everything(total: u64, percent: u32, size: u64, allocated: u64) {
            let now = Instant::now();
            let mut dog = Watchdog::new(total, SECOND, now);
            dog.progress(Some(percent), None, now);
            dog.footprint(Footprint { size, allocated }, now);
            prop_assert!(dog.bytes_done() <= total);
        }
    }
}
