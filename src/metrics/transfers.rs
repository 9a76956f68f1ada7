//! Metrics of the transfers in one process, and of a manager.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::{
    Error, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
};

use crate::clock;
use celery_worker_cli::metrics::Registered;

/// Labels for the link of a copy: the short names of both sites.
const LINK: [&str; 2] = ["origin", "destination"];

/// Upper bounds of the histogram of the manager's passes, in seconds.
const PASSES: [f64; 10] = [0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0];

/// Counters of the attempts in one process, and gauges of its running copies. Clones share all values.
#[derive(Debug, Clone)]
pub struct TransferMetrics {
    bytes: IntCounterVec,
    attempts: IntCounterVec,
    copies: IntGaugeVec,
    rate: IntGaugeVec,
    all: Arc<Running>,
}

/// Sums over all copies of the process.
#[derive(Debug, Default)]
struct Running {
    copies: AtomicI64,
    bytes_per_s: AtomicI64,
}

/// A running copy; dropping it records the end.
#[derive(Debug)]
pub struct Copying {
    copies: IntGauge,
    rate: IntGauge,
    all: Arc<Running>,
    /// Rate of this copy, in bytes per second, as included in the sum.
    mine: AtomicI64,
}

impl Copying {
    /// Records the rate of the copy, in bytes per second.
    pub fn rate(&self, bytes_per_s: u64) {
        let now = i64::try_from(bytes_per_s).unwrap_or(i64::MAX);
        let more = now - self.mine.swap(now, Ordering::Relaxed);
        self.rate.add(more);
        self.all.bytes_per_s.fetch_add(more, Ordering::Relaxed);
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.rate(0);
        self.copies.dec();
        self.all.copies.fetch_sub(1, Ordering::Relaxed);
    }
}

impl TransferMetrics {
    /// Creates the metrics of one process.
    ///
    /// # Errors
    /// See [`celery_worker_cli::metrics::Metrics::new`].
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            bytes: IntCounterVec::new(
                Opts::new(
                    "ccat_transfer_bytes_total",
                    "Bytes of packages that were copied, verified and committed.",
                ),
                &LINK,
            )?,
            attempts: IntCounterVec::new(
                Opts::new(
                    "ccat_transfer_attempts_total",
                    "Attempts that have ended, by outcome and error code (empty without an error).",
                ),
                &["outcome", "error"],
            )?,
            copies: IntGaugeVec::new(
                Opts::new(
                    "ccat_transfer_copies_running",
                    "Copies that run in this process.",
                ),
                &LINK,
            )?,
            rate: IntGaugeVec::new(
                Opts::new(
                    "ccat_transfer_rate_bytes_per_second",
                    "Total rate of the copies that run in this process, as bbcp reports.",
                ),
                &LINK,
            )?,
            all: Arc::default(),
        })
    }

    /// Returns all metrics for registration.
    #[must_use]
    pub fn all(&self) -> [Box<dyn Registered>; 4] {
        [
            Box::new(self.bytes.clone()),
            Box::new(self.attempts.clone()),
            Box::new(self.copies.clone()),
            Box::new(self.rate.clone()),
        ]
    }

    /// Records the start of a copy.
    #[must_use]
    pub fn copying(&self, origin: &str, destination: &str) -> Copying {
        let link = [origin, destination];
        // Creates the counter with the value 0, so that monitoring sees the first package as an increase.
        self.bytes.with_label_values(&link);
        let copying = Copying {
            copies: self.copies.with_label_values(&link),
            rate: self.rate.with_label_values(&link),
            all: self.all.clone(),
            mine: AtomicI64::new(0),
        };
        copying.copies.inc();
        copying.all.copies.fetch_add(1, Ordering::Relaxed);
        copying
    }

    /// Counts a package that has arrived.
    pub fn copied(&self, origin: &str, destination: &str, bytes: u64) {
        self.bytes
            .with_label_values(&[origin, destination])
            .inc_by(bytes);
    }

    /// Counts an attempt that has ended.
    pub fn attempt(&self, outcome: &str, error: &str) {
        self.attempts.with_label_values(&[outcome, error]).inc();
    }

    /// Number of running copies, and their total rate in bytes per second.
    #[must_use]
    pub fn running(&self) -> (u64, u64) {
        let read = |number: &AtomicI64| u64::try_from(number.load(Ordering::Relaxed)).unwrap_or(0);
        (read(&self.all.copies), read(&self.all.bytes_per_s))
    }
}

/// Counters of the passes of a manager.
#[derive(Debug, Clone)]
pub struct ManagerMetrics {
    duration: Histogram,
    failed: IntCounter,
    last: Gauge,
    scheduled: IntCounter,
    refused: IntCounter,
    recovered: IntCounter,
    resent: IntCounter,
    overdue: IntGauge,
}

/// Results of one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassCounts {
    /// Transfers for which a message was sent.
    pub scheduled: usize,
    /// Transfers that could not be scheduled.
    pub refused: usize,
    /// Transfers of dead workers that were made PENDING again.
    pub recovered: usize,
    /// Transfers that were made PENDING again because their message was lost.
    pub resent: usize,
    /// Transfers that have been SCHEDULED for longer than `manager.reconcile_after`.
    pub overdue: usize,
}

impl ManagerMetrics {
    /// Creates the metrics of one manager.
    ///
    /// # Errors
    /// See [`celery_worker_cli::metrics::Metrics::new`].
    pub fn new() -> Result<Self, Error> {
        let counter = |name: &str, help: &str| IntCounter::new(name, help);
        Ok(Self {
            duration: Histogram::with_opts(
                HistogramOpts::new(
                    "ccat_transfer_manager_pass_duration_seconds",
                    "Duration of the manager's passes, including failed ones.",
                )
                .buckets(PASSES.to_vec()),
            )?,
            failed: counter(
                "ccat_transfer_manager_passes_failed_total",
                "Failed passes of the manager.",
            )?,
            last: Gauge::new(
                "ccat_transfer_manager_last_pass_timestamp_seconds",
                "End of the manager's last successful pass, in seconds since 1970; 0 if there was none.",
            )?,
            scheduled: counter(
                "ccat_transfer_manager_scheduled_total",
                "Transfers that the manager has sent to a queue.",
            )?,
            refused: counter(
                "ccat_transfer_manager_refused_total",
                "Times that a pass found a transfer that it could not schedule.",
            )?,
            recovered: counter(
                "ccat_transfer_manager_recovered_total",
                "Transfers of dead workers that the manager has set to PENDING.",
            )?,
            resent: counter(
                "ccat_transfer_manager_resent_total",
                "SCHEDULED transfers with a lost message that the manager has set to PENDING.",
            )?,
            overdue: IntGauge::new(
                "ccat_transfer_manager_overdue",
                "Transfers that are SCHEDULED for longer than manager.reconcile_after without a worker, as \
                 of the last pass.",
            )?,
        })
    }

    /// Returns all metrics for registration.
    #[must_use]
    pub fn all(&self) -> [Box<dyn Registered>; 8] {
        [
            Box::new(self.duration.clone()),
            Box::new(self.failed.clone()),
            Box::new(self.last.clone()),
            Box::new(self.scheduled.clone()),
            Box::new(self.refused.clone()),
            Box::new(self.recovered.clone()),
            Box::new(self.resent.clone()),
            Box::new(self.overdue.clone()),
        ]
    }

    /// Number of transfers that the manager has sent to a queue.
    #[must_use]
    pub fn scheduled(&self) -> u64 {
        self.scheduled.get()
    }

    /// Records a pass; `None` for a pass that failed.
    pub fn pass(&self, took: Duration, did: Option<PassCounts>) {
        self.duration.observe(took.as_secs_f64());
        let Some(did) = did else {
            return self.failed.inc();
        };
        let now = SystemTime::from(clock::now()).duration_since(UNIX_EPOCH);
        self.last.set(now.unwrap_or_default().as_secs_f64());
        self.overdue
            .set(i64::try_from(did.overdue).unwrap_or(i64::MAX));
        for (counter, count) in [
            (&self.scheduled, did.scheduled),
            (&self.refused, did.refused),
            (&self.recovered, did.recovered),
            (&self.resent, did.resent),
        ] {
            counter.inc_by(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_copies_are_summed_and_ended_ones_removed() -> Result<(), Error> {
        let metrics = TransferMetrics::new()?;
        let (one, two) = (metrics.copying("a", "b"), metrics.copying("a", "b"));
        let other = metrics.copying("a", "c");
        one.rate(10);
        one.rate(30);
        two.rate(4);
        other.rate(1);
        let link = metrics.rate.with_label_values(&["a", "b"]);
        assert_eq!((metrics.running(), link.get()), ((3, 35), 34));
        drop(one);
        assert_eq!((metrics.running(), link.get()), ((2, 5), 4));
        drop((two, other));
        assert_eq!((metrics.running(), link.get()), ((0, 0), 0));
        assert_eq!(metrics.copies.with_label_values(&["a", "b"]).get(), 0);
        Ok(())
    }
}
