//! The rename to the final name, and the commit of the completed transfer.

use std::path::PathBuf;

use super::AttemptRun;
use super::prepare::Prepared;
use super::verify::VerifiedCopy;
use crate::faults::fault_point;
use crate::transfer::database_retry::write_with_lease;
use crate::transfer::digest::Digest;
use crate::transfer::failures::TransferError;
use crate::transfer::lease::Phase;
use crate::transfer::plan::Plan;
use crate::transfer::repository::CompletedCopy;
use crate::transfer::request::Summary;

impl AttemptRun<'_> {
    /// Gives the copy its final name if the database confirms that this worker still holds the lease.
    pub(super) async fn publish(
        &self,
        prepared: &Prepared,
        verified: &VerifiedCopy,
    ) -> Result<(), TransferError> {
        self.show(Phase::Publishing, self.progress());
        let (service, lease, plan) = (self.service, self.lease, &prepared.plan);
        let snapshot = *self.request.snapshots.borrow();
        write_with_lease(lease, &self.stop, || async {
            // The renewal may report a paused link; a complete copy does not use the link any more, so that is
            // ignored.
            let repository = service.repository();
            fault_point!(LeaseConfirmed, repository.renew(lease, snapshot).await).map(drop)
        })
        .await?;
        match fault_point!(Renamed, plan.target.publish(&verified.facts).await) {
            // The file may be our own: the answer to an earlier rename may have been lost.
            Err(error @ TransferError::DestinationExists { .. }) => {
                let existing = plan.target.inspect().await?.ok_or(error)?;
                self.compare_existing(plan, prepared.source, existing)
                    .await?;
                service.discard(plan).await;
                Ok(())
            }
            published => published,
        }
    }

    /// Writes COMPLETED. From here on only a cold shutdown ends the wait for the database: the file has its final name,
    /// and the next attempt would find it there.
    pub(super) async fn commit(
        &self,
        plan: &Plan,
        digest: &Digest,
        verification: Option<String>,
        log_path: Option<PathBuf>,
    ) -> Result<Summary, TransferError> {
        let (service, lease) = (self.service, self.lease);
        let finished = CompletedCopy {
            bytes: plan.size,
            rate_bytes_per_s: self.progress().rate_bytes_per_s,
            digest: Some(digest.to_string()),
            verification,
            log_path,
        };
        write_with_lease(lease, &self.request.cancelled, || {
            service.repository().complete(lease, &finished)
        })
        .await?;
        let summary = Summary {
            attempt: lease.attempt(),
            bytes: plan.size,
            elapsed: self.started.elapsed(),
            digest: digest.to_string(),
        };
        tracing::info!(
            data_transfer_id = self.request.id.get(),
            attempt = summary.attempt.get(),
            bytes = summary.bytes,
            elapsed_s = summary.elapsed.as_secs_f64(),
            digest = summary.digest,
            "transfer completed"
        );
        Ok(summary)
    }
}
