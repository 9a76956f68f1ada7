//! Totals of the table of transfers. Every process that exports them exports the same values: a dashboard must take the
//! maximum, not the sum.

use std::time::Duration;

use prometheus::{Error, Gauge, IntGaugeVec, Opts};

use celery_worker_cli::metrics::Registered;

/// Gauges of the table.
#[derive(Debug, Clone)]
pub struct TableMetrics {
    transfers: IntGaugeVec,
    oldest_pending: Gauge,
    lease_age: Gauge,
}

impl TableMetrics {
    /// Creates the gauges of one database.
    ///
    /// # Errors
    /// See [`celery_worker_cli::metrics::Metrics::new`].
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            transfers: IntGaugeVec::new(
                Opts::new(
                    "ccat_transfer_transfers",
                    "Transfers in the database, by status.",
                ),
                &["status"],
            )?,
            oldest_pending: Gauge::new(
                "ccat_transfer_oldest_pending_seconds",
                "Age of the oldest PENDING transfer in seconds; 0 if there is none, or if the table has no \
                 creation times.",
            )?,
            lease_age: Gauge::new(
                "ccat_transfer_lease_age_seconds",
                "Maximum time since the last renewal of a lease, in seconds; 0 if there is none.",
            )?,
        })
    }

    /// Returns all metrics for registration.
    #[must_use]
    pub fn all(&self) -> [Box<dyn Registered>; 3] {
        [
            Box::new(self.transfers.clone()),
            Box::new(self.oldest_pending.clone()),
            Box::new(self.lease_age.clone()),
        ]
    }

    /// Sets the gauges to the current state of the table.
    pub fn set<'a>(
        &self,
        transfers: impl IntoIterator<Item = (&'a str, u64)>,
        oldest_pending: Option<Duration>,
        oldest_renewal: Option<Duration>,
    ) {
        for (status, count) in transfers {
            self.transfers
                .with_label_values(&[status])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let seconds = |age: Option<Duration>| age.unwrap_or_default().as_secs_f64();
        self.oldest_pending.set(seconds(oldest_pending));
        self.lease_age.set(seconds(oldest_renewal));
    }
}
