//! End of an attempt, written by the holder of the lease.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use entity::{
    Outcome, Status, Timestamp, data_transfer, data_transfer_log, transfer_worker_attempt,
    transfer_worker_lease,
};
use sea_orm::sea_query::{Expr, IntoIden as _};
use sea_orm::{ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter};

use super::{
    Ending, Repository, column_value, delay, end_attempt, find_lease, insert_into, lock, path_text,
    replace_nul, retry_count,
};
use crate::faults::fault_point;
use crate::transfer::database;
use crate::transfer::id::TransferId;
use crate::transfer::lease::{Lease, LeaseError};

/// Result of a copy that has arrived and was verified.
#[derive(Debug, Clone, Default)]
pub struct CompletedCopy {
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Mean rate, in bytes per second.
    pub rate_bytes_per_s: u64,
    /// Digest on which both ends agree, as `algorithm:hex`.
    pub digest: Option<String>,
    /// Description of how both ends were read, for people.
    pub verification: Option<String>,
    /// Log file of the attempt; `None` writes no log row.
    pub log_path: Option<PathBuf>,
}

/// Result of a copy that has failed.
#[derive(Debug, Clone, Default)]
pub struct Failure {
    /// Stable error code, for programs.
    pub error_code: String,
    /// Error message, for people.
    pub message: String,
    /// Bytes copied before the failure.
    pub bytes: u64,
    /// Mean rate, in bytes per second.
    pub rate_bytes_per_s: u64,
    /// Log file of the attempt; `None` writes no log row.
    pub log_path: Option<PathBuf>,
    /// Delay before the next attempt, if one follows.
    pub delay: Duration,
}

/// Changes to the rows of a transfer at the end of an attempt.
struct Settlement<'a> {
    status: Status,
    is_final: bool,
    counts_as_retry: bool,
    message: Message<'a>,
    ending: Ending,
    log_path: Option<&'a Path>,
    /// Zero: no delay, and an earlier one is removed.
    delay: Duration,
}

/// Change of `failure_error_message`.
enum Message<'a> {
    Keep,
    Clear,
    Write(&'a str),
}

impl Repository {
    /// Ends a successful attempt: the row is COMPLETED, the end of the attempt and a log row are written, and the lease
    /// is removed.
    ///
    /// # Errors
    /// [`LeaseError::Lost`], with nothing changed, if the lease is lost or the row is not IN_PROGRESS.
    /// [`LeaseError::Database`]; if the call is repeated after that, it succeeds if the first call was effective.
    pub async fn complete(
        &self,
        lease: &Lease,
        finished: &CompletedCopy,
    ) -> Result<(), LeaseError> {
        let settlement = Settlement {
            status: Status::Completed,
            is_final: true,
            counts_as_retry: false,
            message: Message::Clear,
            ending: Ending {
                outcome: Outcome::Completed,
                error_code: None,
                message: finished.verification.clone(),
                bytes: column_value(finished.bytes),
                rate_bytes_per_s: column_value(finished.rate_bytes_per_s),
                digest: finished.digest.clone(),
            },
            log_path: finished.log_path.as_deref(),
            delay: Duration::ZERO,
        };
        fault_point!(
            Completed,
            self.database.bounded(self.settle(lease, &settlement)).await
        )
    }

    /// Ends a failed attempt that is followed by another one: the row is PENDING with one more failure, and waits for
    /// [`Failure::delay`].
    ///
    /// # Errors
    /// The errors of [`Self::complete`].
    pub async fn reset_for_retry(
        &self,
        lease: &Lease,
        failure: &Failure,
    ) -> Result<(), LeaseError> {
        let settlement = Settlement {
            status: Status::Pending,
            is_final: false,
            counts_as_retry: true,
            message: Message::Write(&failure.message),
            ending: failed(Outcome::Retried, failure),
            log_path: failure.log_path.as_deref(),
            delay: failure.delay,
        };
        fault_point!(
            RetryWritten,
            self.database.bounded(self.settle(lease, &settlement)).await
        )
    }

    /// Ends a failed attempt that is not followed by another one: the row is FAILED.
    ///
    /// # Errors
    /// The errors of [`Self::complete`].
    pub async fn mark_permanent_failure(
        &self,
        lease: &Lease,
        failure: &Failure,
    ) -> Result<(), LeaseError> {
        let settlement = Settlement {
            status: Status::Failed,
            is_final: true,
            counts_as_retry: false,
            message: Message::Write(&failure.message),
            ending: failed(Outcome::Failed, failure),
            log_path: failure.log_path.as_deref(),
            delay: Duration::ZERO,
        };
        fault_point!(
            FailureWritten,
            self.database.bounded(self.settle(lease, &settlement)).await
        )
    }

    /// Ends an attempt that could not proceed for a reason outside of the transfer: the row is PENDING with an
    /// unchanged count of failures, and waits for [`Failure::delay`].
    ///
    /// # Errors
    /// The errors of [`Self::release`].
    pub async fn postpone(&self, lease: &Lease, failure: &Failure) -> Result<(), LeaseError> {
        let settlement = Settlement {
            status: Status::Pending,
            is_final: false,
            counts_as_retry: false,
            message: Message::Keep,
            ending: failed(Outcome::Interrupted, failure),
            log_path: None,
            delay: failure.delay,
        };
        fault_point!(
            Postponed,
            self.database.bounded(self.settle(lease, &settlement)).await
        )
    }

    /// Ends an attempt because the worker stops the copy. This is not a failure: the count of failures and the message
    /// of the last failure do not change.
    ///
    /// The row becomes PENDING even if the worker returns its message to the queue, because a worker cannot know that
    /// the broker still has that message. The broker may have closed the connection long ago and delivered the message
    /// to another worker, which found the transfer held and acknowledged the message. A redelivered message accepts a
    /// PENDING row as well, and a second message from the manager does no harm.
    ///
    /// # Errors
    /// [`LeaseError::Lost`], with nothing changed, if the lease is lost or the row is not IN_PROGRESS;
    /// [`LeaseError::Database`].
    pub async fn release(&self, lease: &Lease, reason: &str) -> Result<(), LeaseError> {
        let releasing = || async {
            let progress = find_lease(self.database.connection(), lease.data_transfer_id).await?;
            let settlement = Settlement {
                status: Status::Pending,
                is_final: false,
                counts_as_retry: false,
                message: Message::Keep,
                ending: Ending {
                    outcome: Outcome::Interrupted,
                    error_code: None,
                    message: Some(reason.to_owned()),
                    bytes: progress.as_ref().map_or(0, |lease| lease.bytes_done),
                    rate_bytes_per_s: progress.as_ref().map_or(0, |lease| lease.rate_bytes_per_s),
                    digest: None,
                },
                log_path: None,
                delay: Duration::ZERO,
            };
            self.settle(lease, &settlement).await
        };
        fault_point!(Released, self.database.bounded(releasing()).await)
    }

    async fn settle(&self, lease: &Lease, settlement: &Settlement<'_>) -> Result<(), LeaseError> {
        let settling = async |tx: &DatabaseTransaction| {
            let settled = fault_point!(
                SettlementWritten,
                self.settle_in(tx, lease, settlement).await
            )?;
            Ok::<_, LeaseError>(settled || is_settled(tx, lease, settlement.ending.outcome).await?)
        };
        let settled = self.database.write(settling).await?;
        if settled {
            Ok(())
        } else {
            Err(LeaseError::Lost)
        }
    }

    /// Returns true if the lease was valid; otherwise nothing is written.
    async fn settle_in(
        &self,
        tx: &DatabaseTransaction,
        lease: &Lease,
        settlement: &Settlement<'_>,
    ) -> Result<bool, DbErr> {
        let id = lease.data_transfer_id;
        let row = lock(tx, id).await?;
        let Some(row) = row.filter(|row| row.status.means(Status::InProgress)) else {
            return Ok(false);
        };
        if !delete_lease(tx, lease).await? {
            return Ok(false);
        }
        let now = database::now(tx).await?;
        let failures = retry_count(&row).saturating_add(settlement.counts_as_retry.into());
        self.change_row(tx, &row, settlement, failures, now).await?;
        let code = settlement.ending.error_code.as_deref().unwrap_or_default();
        delay::replace(tx, id, now, settlement.delay, failures, code).await?;
        end_attempt(tx, id, lease.attempt, now, &settlement.ending).await?;
        if let Some(log_path) = settlement.log_path {
            self.insert_log(tx, id, settlement.status, log_path, now)
                .await?;
        }
        Ok(true)
    }

    async fn change_row(
        &self,
        tx: &DatabaseTransaction,
        row: &data_transfer::Model,
        settlement: &Settlement<'_>,
        failures: u32,
        now: DateTime<Utc>,
    ) -> Result<(), DbErr> {
        use data_transfer::Column;
        let mut update = self.set_status(row.id.into(), settlement.status);
        if settlement.is_final {
            update = update.col_expr(Column::EndTime, Expr::val(Timestamp(now)));
        }
        if settlement.counts_as_retry {
            update = update.col_expr(Column::RetryCount, Expr::val(i64::from(failures)));
        }
        update = match settlement.message {
            Message::Keep => update,
            Message::Clear => {
                update.col_expr(Column::FailureErrorMessage, Expr::val(None::<String>))
            }
            Message::Write(message) => {
                let message = self.schema.fit_failure_message(replace_nul(message));
                update.col_expr(Column::FailureErrorMessage, Expr::val(message))
            }
        };
        update.exec(tx).await.map(drop)
    }

    async fn insert_log(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        status: Status,
        log_path: &Path,
        now: DateTime<Utc>,
    ) -> Result<(), DbErr> {
        use data_transfer_log::{Column, Entity, Optional};
        let mut cells = vec![
            (Column::DataTransferId.into_iden(), Expr::val(id)),
            (Column::Timestamp.into_iden(), Expr::val(Timestamp(now))),
            (Column::LogPath.into_iden(), Expr::val(path_text(log_path))),
        ];
        if let Some(column) = &self.schema.log_status {
            cells.push((Optional::Status.into_iden(), column.write(status)));
        }
        tx.execute(&insert_into(Entity, cells)).await.map(drop)
    }
}

fn failed(outcome: Outcome, failure: &Failure) -> Ending {
    Ending {
        outcome,
        error_code: Some(failure.error_code.clone()),
        message: Some(failure.message.clone()),
        bytes: column_value(failure.bytes),
        rate_bytes_per_s: column_value(failure.rate_bytes_per_s),
        digest: None,
    }
}

/// Deletes a lease; returns false if its token has changed or it does not exist.
async fn delete_lease(tx: &DatabaseTransaction, lease: &Lease) -> Result<bool, DbErr> {
    use transfer_worker_lease::{Column, Entity};
    let deleted = Entity::delete_many()
        .filter(Column::DataTransferId.eq(lease.data_transfer_id))
        .filter(Column::Token.eq(lease.token.to_string()))
        .exec(tx)
        .await?;
    Ok(deleted.rows_affected == 1)
}

/// Returns true if the holder itself has already ended its attempt with this outcome, in a call whose answer was lost.
/// Only the holder writes these outcomes; `interrupted` is also written by others, and proves nothing.
async fn is_settled(
    tx: &DatabaseTransaction,
    lease: &Lease,
    outcome: Outcome,
) -> Result<bool, DbErr> {
    use transfer_worker_attempt::{Column, Entity};
    if outcome == Outcome::Interrupted {
        return Ok(false);
    }
    let attempt = Entity::find()
        .filter(Column::DataTransferId.eq(lease.data_transfer_id))
        .filter(Column::Attempt.eq(lease.attempt))
        .one(tx)
        .await?;
    Ok(attempt.is_some_and(|attempt| attempt.outcome == Some(outcome)))
}
