//! Detection of copies that make no progress, are too slow, or take too long. Pure: the caller reports each observation with
//! its time.
//!
//! Neither a running process nor a progress line counts as progress: only bytes do.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use crate::settings::Slowness;
use crate::transfer::failures::TransferError;
use crate::transfer::plan::Plan;

/// Number of samples per window of the minimum rate.
const SAMPLES: u32 = 60;

/// Size and allocated bytes of the growing file. bbcp's streams write out of order, so the size may jump to its final
/// value at once, while the allocated bytes grow slowly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transfer) struct Footprint {
    pub(in crate::transfer) size: u64,
    pub(in crate::transfer) allocated: u64,
}

/// Limits after which a copy is stopped.
#[derive(Debug, Clone, Copy)]
pub(in crate::transfer) struct Limits {
    /// Maximum time without a moved byte.
    pub(in crate::transfer) stall_timeout: Duration,
    /// Minimum rate and deadline.
    pub(in crate::transfer) slowness: Slowness,
}

impl Limits {
    /// The limits of a plan.
    pub(in crate::transfer) fn of(plan: &Plan) -> Self {
        Self {
            stall_timeout: plan.stall_timeout,
            slowness: plan.slowness,
        }
    }
}

/// Reason to stop a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transfer) enum StopReason {
    /// No byte moved for this time.
    Stalled(Duration),
    /// Number of bytes moved in the window; fewer than the minimum rate requires.
    TooSlow(u64),
    /// The copy reached this time limit.
    Late(Duration),
}

impl StopReason {
    /// The error of a copy that was stopped for this reason.
    pub(in crate::transfer) fn error(
        self,
        bytes_done: u64,
        bytes_total: u64,
        slowness: Slowness,
    ) -> TransferError {
        match self {
            Self::Stalled(idle) => TransferError::Stalled {
                idle: Duration::from_secs(idle.as_secs()),
                bytes_done,
                bytes_total,
            },
            Self::TooSlow(moved) => TransferError::TooSlow {
                moved,
                window: slowness.window,
                least: slowness.min_rate,
                bytes_done,
                bytes_total,
            },
            Self::Late(limit) => TransferError::Deadline {
                limit,
                bytes_done,
                bytes_total,
            },
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stalled(idle) => {
                write!(f, "stopped: no byte moved for {:.1} s", idle.as_secs_f64())
            }
            Self::TooSlow(moved) => {
                write!(f, "stopped: {moved} bytes in the last window are too few")
            }
            Self::Late(_) => f.write_str("stopped at its deadline"),
        }
    }
}

/// Observations of one copy, and the time of its last movement.
#[derive(Debug)]
pub(in crate::transfer) struct Watchdog {
    limits: Limits,
    total: u64,
    /// Bytes of a partial copy that existed at the start.
    offset: u64,
    started: Instant,
    moved: Instant,
    percent: u32,
    footprint: Option<Footprint>,
    rate: Option<f64>,
    /// Moved bytes as the sum of bbcp's rates. The per cents are too coarse: for 50 TB, hours pass between two whole
    /// per cents.
    moved_by_rates: f64,
    /// Time of the last rate that bbcp printed.
    rate_at: Instant,
    /// Number of moved bytes at some moments of the window, oldest first.
    samples: VecDeque<(Instant, u64)>,
}

impl Watchdog {
    /// Starts the watch over a copy of `total` bytes.
    pub(in crate::transfer) fn new(total: u64, limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            total,
            offset: 0,
            started: now,
            moved: now,
            percent: 0,
            footprint: None,
            rate: None,
            moved_by_rates: 0.0,
            rate_at: now,
            samples: VecDeque::from([(now, 0)]),
        }
    }

    /// Records that bbcp completes a copy that has `offset` bytes; bbcp's per cents refer to the rest.
    pub(in crate::transfer) fn resumed_at(&mut self, offset: u64) {
        self.offset = offset.min(self.total);
    }

    /// Records a progress line of bbcp.
    ///
    /// A rate above zero counts as movement too, since one per cent of 50 TB takes hours. The rate is the average since
    /// the last progress line.
    pub(in crate::transfer) fn progress(
        &mut self,
        percent: Option<u32>,
        rate: Option<f64>,
        now: Instant,
    ) {
        let percent = percent.unwrap_or(0);
        if percent > self.percent || rate.is_some_and(|rate| rate > 0.0) {
            self.moved = now;
        }
        self.percent = self.percent.max(percent);
        self.moved_by_rates += rate.unwrap_or(0.0) * now.duration_since(self.rate_at).as_secs_f64();
        self.rate_at = now;
        self.rate = rate;
    }

    /// Records an observation of the growing file.
    pub(in crate::transfer) fn footprint(&mut self, footprint: Footprint, now: Instant) {
        if self.footprint != Some(footprint) {
            self.moved = now;
        }
        self.footprint = Some(footprint);
    }

    /// Number of bytes done, as far as known.
    pub(in crate::transfer) fn bytes_done(&self) -> u64 {
        let rest = u128::from(self.total - self.offset);
        let by_percent = rest * u128::from(self.percent.min(100)) / 100;
        let seen = self.footprint.map_or(0, |f| f.size.min(f.allocated));
        u64::try_from(by_percent)
            .unwrap_or(u64::MAX)
            .saturating_add(self.offset)
            .max(seen)
            .min(self.total)
    }

    /// Most recent rate that bbcp printed, in bytes per second.
    pub(in crate::transfer) fn rate(&self) -> Option<f64> {
        self.rate
    }

    /// Returns the reason to stop the copy, if any.
    pub(in crate::transfer) fn stop_reason(&mut self, now: Instant) -> Option<StopReason> {
        let idle = now.duration_since(self.moved);
        if idle >= self.limits.stall_timeout {
            return Some(StopReason::Stalled(idle));
        }
        let slowness = self.limits.slowness;
        if let Some(limit) = slowness.deadline(self.total - self.offset)
            && now.duration_since(self.started) >= limit
        {
            return Some(StopReason::Late(limit));
        }
        if slowness.min_rate == 0 {
            return None;
        }
        let moved = self.bytes_moved();
        let step = slowness.window / SAMPLES;
        if (self.samples.back()).is_none_or(|(at, _)| now.duration_since(*at) >= step) {
            self.samples.push_back((now, moved));
        }
        // The oldest sample stays while it is the only one that is a whole window old.
        let old = |at: &Instant| now.duration_since(*at) >= slowness.window;
        while self.samples.get(1).is_some_and(|(at, _)| old(at)) {
            self.samples.pop_front();
        }
        let (at, before) = self.samples.front()?;
        let gained = moved.saturating_sub(*before);
        let span = now.duration_since(*at);
        let least = u128::from(slowness.min_rate) * span.as_millis() / 1000;
        (old(at) && u128::from(gained) < least).then_some(StopReason::TooSlow(gained))
    }

    /// Number of bytes moved since the start: the largest of all observations.
    fn bytes_moved(&self) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "casts saturate"
        )]
        let by_rates = self.moved_by_rates as u64;
        by_rates.max(self.bytes_done() - self.offset)
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
    fn only_bytes_count_as_progress() {
        let start = Instant::now();
        let mut dog = Watchdog::new(1000, limits(10), start);
        assert_eq!(dog.stop_reason(after(start, 9)), None);
        dog.progress(Some(1), None, after(start, 9));
        assert_eq!(dog.stop_reason(after(start, 18)), None);
        dog.progress(Some(1), Some(0.0), after(start, 18));
        dog.progress(Some(0), None, after(start, 18));
        assert_eq!(
            dog.stop_reason(after(start, 19)),
            Some(StopReason::Stalled(SECOND * 10))
        );
        dog.progress(Some(1), Some(0.1), after(start, 19));
        assert_eq!(dog.stop_reason(after(start, 28)), None);
    }

    #[test]
    fn growing_file_counts_as_progress() {
        let start = Instant::now();
        let mut dog = Watchdog::new(1000, limits(10), start);
        let full = Footprint {
            size: 1000,
            allocated: 0,
        };
        dog.footprint(full, after(start, 5));
        dog.footprint(full, after(start, 9));
        assert_eq!(
            dog.stop_reason(after(start, 15)),
            Some(StopReason::Stalled(SECOND * 10))
        );
        let filling = Footprint {
            allocated: 512,
            ..full
        };
        dog.footprint(filling, after(start, 15));
        assert_eq!(dog.stop_reason(after(start, 15)), None);
        assert_eq!(dog.bytes_done(), 512);
    }

    #[test]
    fn a_copy_may_move_and_be_too_slow() {
        let start = Instant::now();
        let mut limits = limits(1000);
        limits.slowness.min_rate = 100;
        let mut dog = Watchdog::new(u64::MAX, limits, start);
        // The per cents never grow, but the rates show movement: 200 bytes/s for five minutes, then 50.
        for second in (10..=300).step_by(10) {
            dog.progress(Some(0), Some(200.0), after(start, second));
            assert_eq!(dog.stop_reason(after(start, second)), None, "{second}");
        }
        let reasons: Vec<_> = (310..=400)
            .step_by(10)
            .map(|second| {
                dog.progress(Some(0), Some(50.0), after(start, second));
                (second, dog.stop_reason(after(start, second)))
            })
            .filter_map(|(second, stop_reason)| Some((second, stop_reason?)))
            .collect();
        // After 350 s, the last 60 s consist of 10 s at 200 and 50 s at 50 bytes/s.
        assert_eq!(reasons.first(), Some(&(350, StopReason::TooSlow(4500))));
    }

    #[test]
    fn deadline_is_for_the_remaining_bytes() {
        let start = Instant::now();
        let mut limits = limits(1000);
        limits.slowness.deadline_rate = 10;
        let mut dog = Watchdog::new(1000, limits, start);
        assert_eq!(dog.stop_reason(after(start, 109)), None);
        assert_eq!(
            dog.stop_reason(after(start, 110)),
            Some(StopReason::Late(SECOND * 110))
        );
        dog.resumed_at(600);
        assert_eq!(dog.stop_reason(after(start, 49)), None);
        assert_eq!(
            dog.stop_reason(after(start, 50)),
            Some(StopReason::Late(SECOND * 50))
        );
        dog.progress(Some(50), None, after(start, 50));
        assert_eq!(dog.bytes_done(), 800);
    }

    proptest! {
        #[test]
        fn progress_never_exceeds_the_size(
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
