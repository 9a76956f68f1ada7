//! Renewal of the lease while an attempt runs, independently of what the attempt waits for.
//!
//! A lost lease stops the attempt. A database that is unreachable or refuses the renewal does not stop it: the lease
//! may still be valid, and the attempt renews it once more before it publishes anything.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::lease::{Lease, LeaseError, Phase, Snapshot};
use super::link::PausedLink;
use super::repository::{Renewal, Repository};
use service_connection::error_chain::chain;

/// Minimum duration of a phase before an extra renewal writes it. Small packages take less time, and need no extra
/// renewal.
const PHASE_SETTLE_TIME: Duration = Duration::from_millis(250);

/// Renews one lease.
pub(super) struct LeaseRenewer {
    pub(super) repository: Repository,
    pub(super) lease: Lease,
    pub(super) interval: Duration,
    /// State of the attempt; each renewal writes it.
    pub(super) snapshots: watch::Receiver<Snapshot>,
    /// Phase of the attempt. It is separate from `snapshots`, because a change of progress must not cause a renewal.
    pub(super) phases: watch::Receiver<Phase>,
    /// Cancelled when the attempt has to stop.
    pub(super) stop: CancellationToken,
    /// Cancelled when the lease is lost.
    pub(super) lost: CancellationToken,
    /// Set when the link is paused and running copies have to stop.
    pub(super) paused: Arc<OnceLock<PausedLink>>,
}

impl LeaseRenewer {
    /// Renews until the lease is lost, or the future is dropped.
    pub(super) async fn run(mut self) {
        // The acquisition of the lease wrote this phase.
        let mut written = Phase::Preparing;
        loop {
            self.wait_until_due(written).await;
            let lease = &self.lease;
            let snapshot = *self.snapshots.borrow();
            let progress = snapshot.progress;
            // If this renewal fails, the next regular renewal writes the phase.
            written = snapshot.phase;
            match self.repository.renew(lease, snapshot).await {
                Ok(renewal) => {
                    tracing::debug!(
                        data_transfer_id = lease.data_transfer_id().get(),
                        attempt = lease.attempt().get(),
                        bytes = progress.bytes_done,
                        bytes_total = progress.bytes_total,
                        rate_bytes_per_s = progress.rate_bytes_per_s,
                        "progress"
                    );
                    if let Renewal::Stop(paused) = renewal {
                        self.stop_for_paused_link(paused);
                    }
                }
                Err(LeaseError::Lost) => {
                    tracing::warn!(
                        data_transfer_id = lease.data_transfer_id().get(),
                        attempt = lease.attempt().get(),
                        "lease lost: another worker or an operator took the transfer; stopping"
                    );
                    self.lost.cancel();
                    return self.stop.cancel();
                }
                Err(LeaseError::Database(error)) => tracing::warn!(
                    data_transfer_id = lease.data_transfer_id().get(),
                    error = %chain(&error),
                    "lease could not be renewed; the copy continues"
                ),
            }
        }
    }

    /// Waits until the lease has to be renewed: the interval has passed, or the attempt has been in another phase than
    /// `written` for [`PHASE_SETTLE_TIME`], so that people do not see an outdated phase.
    async fn wait_until_due(&mut self, written: Phase) {
        let another_phase = async {
            // The attempt itself renews its lease before it publishes.
            let is_unwritten = |phase: &Phase| ![written, Phase::Publishing].contains(phase);
            let changed = self.phases.wait_for(is_unwritten).await.map(drop);
            sleep(PHASE_SETTLE_TIME).await;
            changed
        };
        tokio::select! {
            () = sleep(self.interval) => {}
            Ok(()) = another_phase => {}
        }
    }

    /// Stops the copy because its link is paused. The lease is still renewed: the stop takes some time, and the row has
    /// to be released.
    fn stop_for_paused_link(&self, paused: PausedLink) {
        if self.paused.get().is_some() {
            return;
        }
        tracing::warn!(
            data_transfer_id = self.lease.data_transfer_id().get(),
            attempt = self.lease.attempt().get(),
            link = %paused.name,
            paused_by = paused.pause.by,
            reason = paused.pause.reason,
            "the link is paused; stopping the copy"
        );
        // No other code sets it.
        let _ = self.paused.set(paused);
        self.stop.cancel();
    }
}
