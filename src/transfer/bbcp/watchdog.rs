//! Whether a copy still moves, and fast enough. Pure: it is told what was seen and when.
//!
//! A running process is no sign of life, and neither is a progress line: only bytes are.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::settings::Slowness;

/// Looks that are kept for one window of the least rate.
const SAMPLES: u32 = 60;

/// Size and allocated bytes of the growing file. bbcp's streams write out of order, so that the
/// size may jump to the end at once while the file fills up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Footprint {
    pub(super) size: u64,
    pub(super) allocated: u64,
}

/// When a copy is stopped.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// It may stand still for so long.
    pub(super) stall_timeout: Duration,
    /// And may not be slower.
    pub(super) slowness: Slowness,
}

/// Why a copy is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Nothing moved for so long.
    Stalled(Duration),
    /// So few bytes moved in the window.
    TooSlow(u64),
    /// It took so long.
    Late(Duration),
}

/// What was seen of a copy, and when it last moved.
#[derive(Debug)]
pub(super) struct Watchdog {
    limits: Limits,
    total: u64,
    /// Bytes that were there before.
    offset: u64,
    started: Instant,
    moved: Instant,
    percent: u32,
    footprint: Option<Footprint>,
    rate: Option<f64>,
    /// Bytes that moved, as bbcp's rates add up: between two whole per cent of 50 TB lie hours.
    told: f64,
    /// When bbcp last told a rate.
    told_at: Instant,
    /// Bytes moved at some moments of the window, oldest first.
    samples: VecDeque<(Instant, u64)>,
}

impl Watchdog {
    /// At the start of a copy of `total` bytes.
    pub(super) fn new(total: u64, limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            total,
            offset: 0,
            started: now,
            moved: now,
            percent: 0,
            footprint: None,
            rate: None,
            told: 0.0,
            told_at: now,
            samples: VecDeque::from([(now, 0)]),
        }
    }

    /// bbcp completes a copy of which so many bytes are there; its per cents are of the rest.
    pub(super) fn resumed_at(&mut self, offset: u64) {
        self.offset = offset.min(self.total);
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
        self.told += rate.unwrap_or(0.0) * now.duration_since(self.told_at).as_secs_f64();
        self.told_at = now;
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
        let rest = u128::from(self.total - self.offset);
        let told = rest * u128::from(self.percent.min(100)) / 100;
        let seen = self.footprint.map_or(0, |f| f.size.min(f.allocated));
        u64::try_from(told)
            .unwrap_or(u64::MAX)
            .saturating_add(self.offset)
            .max(seen)
            .min(self.total)
    }

    /// Bytes per second lately.
    pub(super) fn rate(&self) -> Option<f64> {
        self.rate
    }

    /// Why the copy has to be stopped, if it has.
    pub(super) fn trouble(&mut self, now: Instant) -> Option<Trouble> {
        let idle = now.duration_since(self.moved);
        if idle >= self.limits.stall_timeout {
            return Some(Trouble::Stalled(idle));
        }
        let slowness = self.limits.slowness;
        if let Some(limit) = slowness.deadline(self.total - self.offset)
            && now.duration_since(self.started) >= limit
        {
            return Some(Trouble::Late(limit));
        }
        if slowness.min_rate == 0 {
            return None;
        }
        let moved = self.bytes_moved();
        let step = slowness.window / SAMPLES;
        if (self.samples.back()).is_none_or(|(at, _)| now.duration_since(*at) >= step) {
            self.samples.push_back((now, moved));
        }
        // The first one stays as long as it alone is old enough to judge by.
        let old = |at: &Instant| now.duration_since(*at) >= slowness.window;
        while self.samples.get(1).is_some_and(|(at, _)| old(at)) {
            self.samples.pop_front();
        }
        let (at, before) = self.samples.front()?;
        let gained = moved.saturating_sub(*before);
        let span = now.duration_since(*at);
        let least = u128::from(slowness.min_rate) * span.as_millis() / 1000;
        (old(at) && u128::from(gained) < least).then_some(Trouble::TooSlow(gained))
    }

    /// Bytes that moved since the start, by whichever witness saw the most.
    fn bytes_moved(&self) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "casts saturate"
        )]
        let told = self.told as u64;
        told.max(self.bytes_done() - self.offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limits(seconds: u32) -> Limits {
        Limits {
            stall_timeout: SECOND * seconds,
            slowness: Slowness {
                min_rate: 0,
                window: SECOND * 60,
                deadline_rate: 0,
                deadline_grace: SECOND * 10,
            },
        }
    }

    fn after(start: Instant, seconds: u32) -> Instant {
        start + SECOND * seconds
    }

    #[test]
    fn only_bytes_are_movement() {
        let start = Instant::now();
        let mut dog = Watchdog::new(1000, limits(10), start);
        assert_eq!(dog.trouble(after(start, 9)), None);
        dog.progress(Some(1), None, after(start, 9));
        assert_eq!(dog.trouble(after(start, 18)), None);
        dog.progress(Some(1), Some(0.0), after(start, 18));
        dog.progress(Some(0), None, after(start, 18));
        assert_eq!(
            dog.trouble(after(start, 19)),
            Some(Trouble::Stalled(SECOND * 10))
        );
        dog.progress(Some(1), Some(0.1), after(start, 19));
        assert_eq!(dog.trouble(after(start, 28)), None);
    }

    #[test]
    fn a_growing_file_is_movement() {
        let start = Instant::now();
        let mut dog = Watchdog::new(1000, limits(10), start);
        let full = Footprint {
            size: 1000,
            allocated: 0,
        };
        dog.footprint(full, after(start, 5));
        dog.footprint(full, after(start, 9));
        assert_eq!(
            dog.trouble(after(start, 15)),
            Some(Trouble::Stalled(SECOND * 10))
        );
        let filling = Footprint {
            allocated: 512,
            ..full
        };
        dog.footprint(filling, after(start, 15));
        assert_eq!(dog.trouble(after(start, 15)), None);
        assert_eq!(dog.bytes_done(), 512);
    }

    #[test]
    fn a_copy_may_move_and_be_too_slow() {
        let start = Instant::now();
        let mut limits = limits(1000);
        limits.slowness.min_rate = 100;
        let mut dog = Watchdog::new(u64::MAX, limits, start);
        // Per cents that never come, and rates: 200 bytes/s for five minutes, then 50.
        for second in (10..=300).step_by(10) {
            dog.progress(Some(0), Some(200.0), after(start, second));
            assert_eq!(dog.trouble(after(start, second)), None, "{second}");
        }
        let troubles: Vec<_> = (310..=400)
            .step_by(10)
            .map(|second| {
                dog.progress(Some(0), Some(50.0), after(start, second));
                (second, dog.trouble(after(start, second)))
            })
            .filter_map(|(second, trouble)| Some((second, trouble?)))
            .collect();
        // After 350 s, 60 s have seen 10 s at 200 and 50 s at 50.
        assert_eq!(troubles.first(), Some(&(350, Trouble::TooSlow(4500))));
    }

    #[test]
    fn a_deadline_is_for_what_is_left() {
        let start = Instant::now();
        let mut limits = limits(1000);
        limits.slowness.deadline_rate = 10;
        let mut dog = Watchdog::new(1000, limits, start);
        assert_eq!(dog.trouble(after(start, 109)), None);
        assert_eq!(
            dog.trouble(after(start, 110)),
            Some(Trouble::Late(SECOND * 110))
        );
        dog.resumed_at(600);
        assert_eq!(dog.trouble(after(start, 49)), None);
        assert_eq!(
            dog.trouble(after(start, 50)),
            Some(Trouble::Late(SECOND * 50))
        );
        dog.progress(Some(50), None, after(start, 50));
        assert_eq!(dog.bytes_done(), 800);
    }

    proptest! {
        #[test]
        fn never_more_than_everything(
            total: u64,
            offset: u64,
            percent: u32,
            size: u64,
            allocated: u64,
        ) {
            let now = Instant::now();
            let mut dog = Watchdog::new(total, limits(1), now);
            dog.resumed_at(offset);
            dog.progress(Some(percent), None, now);
            dog.footprint(Footprint { size, allocated }, now);
            prop_assert!(dog.bytes_done() <= total);
        }
    }
}
