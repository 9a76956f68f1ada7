//! Recovery of transfers whose worker died: sweeps of dead leases.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::faults::hang_point;
use crate::settings::Settings;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::lease::Owner;
use crate::transfer::repository::Repository;
use celery_worker::liveness::Liveness;
use service_connection::backoff::RetryState;
use service_connection::error_chain::chain;

/// Sweeps dead leases, as every manager and every worker does; `liveness` ticks for each lease.
///
/// # Errors
/// The database reported an error.
pub async fn recover(
    repository: &Repository,
    observer: &Owner,
    liveness: &Liveness,
) -> Result<Vec<TransferId>, DatabaseError> {
    let sweep = repository
        .sweep_watched(observer, || liveness.tick())
        .await?;
    for (id, error) in &sweep.failed {
        tracing::warn!(
            data_transfer_id = id.get(),
            error = %chain(error),
            "expired lease could not be swept; the next sweep tries again"
        );
    }
    let mut pending = Vec::new();
    for recovered in sweep.recovered {
        let lease = recovered.displaced.lease;
        tracing::warn!(
            data_transfer_id = lease.data_transfer_id.get(),
            attempt = lease.attempt.get(),
            owner = %lease.owner,
            reason = %recovered.displaced.expiry_reason,
            pending = recovered.is_pending,
            "expired lease swept"
        );
        if recovered.is_pending {
            pending.push(lease.data_transfer_id);
        }
    }
    Ok(pending)
}

/// Time limit of a sweep, or of another step of a manager that waits for several answers of the database.
#[must_use]
pub fn max_sweep_duration(settings: &Settings) -> Duration {
    settings.ops_db.acquire_timeout.saturating_mul(10)
}

/// Sweeps dead leases at once and then at the interval `every`, until `stop` is cancelled.
pub async fn sweep_loop(
    repository: &Repository,
    observer: &Owner,
    every: Duration,
    stop: &CancellationToken,
    liveness: &Liveness,
) {
    // No `RetryLoop`: a sweep that succeeds is repeated, too; only the log lines are limited.
    let mut attempts = RetryState::new((every, every));
    loop {
        liveness.tick();
        hang_point!(Sweeper);
        if let Err(error) = recover(repository, observer, liveness).await
            && attempts.failed(&error).should_log
        {
            tracing::warn!(error = %chain(&error), "expired leases could not be swept");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
    }
}
