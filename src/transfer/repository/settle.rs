//! Ending an attempt, by its holder.

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
    Ending, Repository, column_value, delay, end_attempt, find_lease, insert_into, lock,
    retry_count, storable, storable_path,
};
use crate::faults::fault_point;
use crate::transfer::database;
use crate::transfer::id::TransferId;
use crate::transfer::lease::{Lease, LeaseError};

/// A copy that has arrived and was verified.
#[derive(Debug, Clone, Default)]
pub struct Finished {
    /// Its size.
    pub bytes: u64,
    /// Its mean rate.
    pub rate_bytes_per_s: u64,
    /// The digest that both ends agreed upon, as `algorithm:hex`.
    pub digest: Option<String>,
    /// The attempt's log file; none makes no log row.
    pub log_path: Option<PathBuf>,
}

/// A copy that has failed.
#[derive(Debug, Clone, Default)]
pub struct Failure {
    /// Class of the error, stable and for programs.
    pub error_code: String,
    /// What happened, for people.
    pub message: String,
    /// Bytes that were copied before.
    pub bytes: u64,
    /// Their mean rate.
    pub rate_bytes_per_s: u64,
    /// The attempt's log file; none makes no log row.
    pub log_path: Option<PathBuf>,
    /// How long the transfer waits before it is tried again, if it is.
    pub delay: Duration,
}

/// What becomes of the transfer's row.
struct Settlement<'a> {
    status: Status,
    is_final: bool,
    counts_as_retry: bool,
    message: Message<'a>,
    ending: Ending,
    log_path: Option<&'a Path>,
    /// Zero: due at once.
    delay: Duration,
}

/// What becomes of `failure_error_message`.
enum Message<'a> {
    Keep,
    Clear,
    Write(&'a str),
}

impl Repository {
    /// The copy is at its goal: the row says COMPLETED, the attempt and a log row are written, the
    /// lease is gone.
    ///
    /// # Errors
    /// [`LeaseError::Lost`], with nothing changed, unless the lease stands and the row says
    /// IN_PROGRESS. Made again after an error, it succeeds if the first call did its work.
    pub async fn complete(&self, lease: &Lease, finished: &Finished) -> Result<(), LeaseError> {
        let settlement = Settlement {
            status: Status::Completed,
            is_final: true,
            counts_as_retry: false,
            message: Message::Clear,
            ending: Ending {
                outcome: Outcome::Completed,
                error_code: None,
                message: None,
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

    /// The copy failed and is to be tried again: the row says PENDING with one more failure, and
    /// waits for [`Failure::delay`].
    ///
    /// # Errors
    /// As [`Self::complete`].
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

    /// The copy failed for good: the row says FAILED.
    ///
    /// # Errors
    /// As [`Self::complete`].
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

    /// Something kept the transfer from being done that is no failure of its own: the row says
    /// PENDING, with the count of failures as it is, and waits for [`Failure::delay`].
    ///
    /// # Errors
    /// As [`Self::release`].
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

    /// The worker stops, and the copy with it. That is no failure: the count of failures and the
    /// last failure's message stay as they are.
    ///
    /// The row becomes PENDING even if the worker returns its message to the queue, because a worker cannot
    /// know that the broker still has that message. The broker may have closed the connection long ago and given
    /// the message to another worker, which found the transfer held and acknowledged it. A redelivered message
    /// takes a PENDING row as well, and a second message from the manager does no harm.
    ///
    /// # Errors
    /// [`LeaseError::Lost`], with nothing changed, unless the lease stands and the row says
    /// IN_PROGRESS.
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

    /// Whether the lease stood; nothing is written if it did not.
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
        self.change_row(tx, &row, settlement, now).await?;
        let failures = retry_count(&row).saturating_add(settlement.counts_as_retry.into());
        let code = settlement.ending.error_code.as_deref().unwrap_or_default();
        delay::write(tx, id, now, settlement.delay, failures, code).await?;
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
        now: DateTime<Utc>,
    ) -> Result<(), DbErr> {
        use data_transfer::Column;
        let mut update = self.set_status(row.id.into(), settlement.status);
        if settlement.is_final {
            update = update.col_expr(Column::EndTime, Expr::val(Timestamp(now)));
        }
        if settlement.counts_as_retry {
            let count = i64::from(retry_count(row)).saturating_add(1);
            update = update.col_expr(Column::RetryCount, Expr::val(count));
        }
        update = match settlement.message {
            Message::Keep => update,
            Message::Clear => {
                update.col_expr(Column::FailureErrorMessage, Expr::val(None::<String>))
            }
            Message::Write(message) => {
                let message = self.schema.fit_failure_message(storable(message));
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
            (
                Column::LogPath.into_iden(),
                Expr::val(storable_path(log_path)),
            ),
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

/// Deletes a lease, if it is still its holder's.
async fn delete_lease(tx: &DatabaseTransaction, lease: &Lease) -> Result<bool, DbErr> {
    use transfer_worker_lease::{Column, Entity};
    let deleted = Entity::delete_many()
        .filter(Column::DataTransferId.eq(lease.data_transfer_id))
        .filter(Column::Token.eq(lease.token.to_string()))
        .exec(tx)
        .await?;
    Ok(deleted.rows_affected == 1)
}

/// Whether the holder itself has settled its attempt in this way, in a call whose answer it did
/// not get. Nobody else writes these outcomes; `interrupted` is written by others too, and proves
/// nothing.
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
