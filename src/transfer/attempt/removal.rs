//! Removal of files that no attempt will complete: those of earlier attempts, of an attempt that has failed, and of a
//! transfer that has ended.

use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::time::timeout;

use super::AttemptRun;
use crate::faults::fault_point;
use crate::transfer::endpoint::{Target, TemporaryName};
use crate::transfer::failures::TransferError;
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::plan::{Attempt, Plan, PlanInput, file_settings, target};
use crate::transfer::repository::RecordedPartial;
use crate::transfer::service::TransferService;
use service_connection::error_chain::chain;

/// Time limit for removing the files of an attempt or of an earlier one.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(15);

/// Time limit for removing the partial copies of one transfer.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(30);

/// Outcome of removing the partial copies of a transfer.
#[derive(Debug, Default)]
pub struct Cleared {
    /// Copies that were removed from the disk and from the record.
    pub removed: Vec<RecordedPartial>,
    /// Copies that stay, with the reason.
    pub kept: Option<(Vec<RecordedPartial>, String)>,
}

impl Cleared {
    /// Number of freed bytes according to the record.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.removed.iter().map(|partial| partial.bytes).sum()
    }
}

impl AttemptRun<'_> {
    /// Removes files that earlier attempts at this transfer left, except for `spared`. Only the holder of the lease may
    /// use such files. Files that cannot be removed now do not prevent the copy.
    pub(super) async fn remove_earlier_files(&self, plan: &Plan, spared: Option<TemporaryName>) {
        let removing = async {
            let names = plan.target.temporaries().await?.into_iter();
            let obsolete =
                names.filter(|name| *name != plan.target.temporary() && Some(*name) != spared);
            try_join_all(obsolete.map(async |name| {
                plan.target.remove_leftover(name).await?;
                tracing::info!(
                    data_transfer_id = self.request.id.get(),
                    temporary = %name,
                    "temporary file of an earlier attempt removed"
                );
                Ok::<_, TransferError>(())
            }))
            .await
        };
        let failure = match timeout(CLEANUP_TIMEOUT, removing).await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.chain()),
            Err(_) => Some("not in time".into()),
        };
        if let Some(error) = failure {
            return tracing::warn!(
                data_transfer_id = self.request.id.get(),
                error,
                "leftovers of earlier attempts not removed; the next attempt tries again"
            );
        }
        let spared = spared.map(|name| name.to_string());
        for leftover in &self.acquired.leftovers {
            if Some(&leftover.temporary_name) != spared.as_ref() {
                let id = self.request.id;
                self.service.forget_temporary(id, leftover.attempt).await;
            }
        }
    }
}

impl TransferService {
    /// Removes the partial copies on record for a transfer that no worker holds, and deletes their records.
    /// Removes only files in the directory of the package whose names have the form of this worker's temporary
    /// names for this transfer. A copy that cannot be removed stays on record and is logged.
    pub async fn clear_partials(&self, id: TransferId) -> Cleared {
        let partials = match self.repository().partials_of(id).await {
            Ok(partials) if partials.is_empty() => return Cleared::default(),
            Ok(partials) => partials,
            Err(error) => return self.kept(id, Vec::new(), Vec::new(), chain(&error).to_string()),
        };
        let mut removed = Vec::new();
        let clearing = async {
            let target = self.target_of(id).await?;
            for partial in &partials {
                let name = TemporaryName::parse(&partial.temporary_name);
                let mut partial = partial.clone();
                if let Some(name) = name.filter(|name| name.transfer_id() == id) {
                    // The record has only the bytes that bbcp had reported when it was written.
                    partial.bytes = target.leftover_size(name).await?;
                    target.remove_leftover(name).await?;
                    tracing::info!(
                        data_transfer_id = id.get(),
                        temporary = %name,
                        bytes = partial.bytes,
                        "partial copy of an ended transfer removed"
                    );
                }
                self.forget_temporary(id, partial.attempt).await;
                removed.push(partial);
            }
            Ok::<_, TransferError>(())
        };
        let problem = match timeout(REMOVAL_TIMEOUT, clearing).await {
            Ok(Ok(())) => {
                self.forget_blocks(id).await;
                return Cleared {
                    removed,
                    kept: None,
                };
            }
            Ok(Err(error)) => error.chain(),
            Err(_) => format!(
                "no answer within {}",
                humantime::format_duration(REMOVAL_TIMEOUT)
            ),
        };
        let rest = partials[removed.len()..].to_vec();
        self.kept(id, removed, rest, problem)
    }

    fn kept(
        &self,
        id: TransferId,
        removed: Vec<RecordedPartial>,
        rest: Vec<RecordedPartial>,
        error: String,
    ) -> Cleared {
        tracing::warn!(
            data_transfer_id = id.get(),
            error,
            "a partial copy of an ended transfer was not removed"
        );
        Cleared {
            removed,
            kept: Some((rest, error)),
        }
    }

    /// Target of a transfer's package at its destination. This host need not be able to copy to it.
    async fn target_of(&self, id: TransferId) -> Result<Target, TransferError> {
        let record = self.repository().transfer(id).await;
        let record = record.map_err(|error| TransferError::Database {
            source: error.into(),
        })?;
        let record = record.ok_or(TransferError::UnknownTransfer { id })?;
        let input = PlanInput::from_rows(record)?;
        let link = file_settings(self.settings(), &input)?;
        let nameless = TemporaryName::new(id, AttemptNumber::ZERO, uuid::Uuid::nil());
        let (destination, package) = (&input.destination, &input.package);
        target(destination, package, &link.ssh, self.hosts(), nameless)
    }

    /// Removes the partial copy of an attempt if no further attempt will complete it.
    pub async fn discard(&self, plan: &Plan) {
        let removed = timeout(CLEANUP_TIMEOUT, plan.target.remove_temporary()).await;
        let Attempt {
            transfer_id,
            number,
            ..
        } = plan.attempt;
        let error = match removed {
            Ok(Ok(())) => {
                fault_point!(Tidied);
                if plan.may_record_blocks() {
                    self.forget_blocks(transfer_id).await;
                }
                return self.forget_temporary(transfer_id, number).await;
            }
            Ok(Err(error)) => error.chain(),
            Err(_) => "not in time".into(),
        };
        tracing::warn!(
            data_transfer_id = transfer_id.get(),
            path = %plan.target.temporary_path(),
            error,
            "temporary file not removed; the next attempt at this transfer removes it"
        );
    }

    /// Deletes the record of the blocks of a partial copy that no longer exists. Returns false if that failed.
    pub(super) async fn forget_blocks(&self, id: TransferId) -> bool {
        let forgotten = self.repository().forget_blocks(id, 0, 0).await;
        if let Err(error) = &forgotten {
            tracing::debug!(
                data_transfer_id = id.get(),
                error = %chain(error),
                "blocks of a copy that no longer exists are still recorded"
            );
        }
        forgotten.is_ok()
    }

    /// Deletes the record of a temporary file that was removed.
    pub(super) async fn forget_temporary(&self, id: TransferId, attempt: AttemptNumber) {
        if let Err(error) = self.repository().forget_temporary(id, attempt).await {
            tracing::debug!(
                data_transfer_id = id.get(),
                attempt = attempt.get(),
                error = %chain(&error),
                "removed temporary file is still recorded"
            );
        }
    }
}
