//! Start of an attempt.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use entity::{Status, Timestamp, data_transfer, transfer_worker_attempt, transfer_worker_lease};
use sea_orm::sea_query::Expr;
use sea_orm::{
    ColumnTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
    Set, SqlErr,
};
use serde::Serialize;
use uuid::Uuid;

use super::{
    Repository, column_value, delay, displace, find_lease, lease_exists, lock, path_text,
    replace_nul,
};
use crate::faults::fault_point;
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::lease::{ExpiryReason, Lease, LeaseError, LeaseInfo, Owner, Phase, Snapshot};
use crate::transfer::link::{ClosedLink, PausedLink};

/// Result of trying to acquire the lease.
#[derive(Debug)]
pub enum Acquisition {
    /// The caller holds the lease, and the row is IN_PROGRESS.
    Acquired(Acquired),
    /// The transfer does not exist.
    Missing,
    /// The transfer is already completed: the message was delivered again.
    Completed,
    /// The transfer is FAILED.
    Failed {
        /// Error message of the row.
        message: Option<String>,
    },
    /// Another worker holds the lease, which is not dead.
    Held(LeaseInfo),
    /// The retry delay of the transfer has not passed; the row is PENDING.
    NotDue {
        /// End of the delay, by the database's clock.
        not_before: DateTime<Utc>,
    },
    /// The link is paused or has reached its limit. The row is PENDING (again), with an unchanged count of failures.
    /// The manager sends a message when the link is open.
    LinkClosed(ClosedLink),
    /// The row is IN_PROGRESS without a lease: a worker that does not use leases may be copying. Such a row is never
    /// changed.
    Untracked,
    /// The row has a status that this program does not know.
    UnknownStatus(String),
}

/// Instruction to the holder of a renewed lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Renewal {
    /// Continue the attempt.
    Continue,
    /// Stop the copy and release the row: an operator has paused the link and wants it free now. The lease is still
    /// valid.
    Stop(PausedLink),
}

/// Arguments of an acquisition.
struct AcquireRequest<'a> {
    owner: &'a Owner,
    task_id: &'a str,
    ttl: Duration,
    /// True if a person requested the attempt; the limit of the link is then ignored.
    by_hand: bool,
}

/// A lease, and the findings of its acquisition.
#[derive(Debug)]
pub struct Acquired {
    /// The lease.
    pub lease: Lease,
    /// The lease that this one replaced, if one existed.
    pub displaced: Option<Displaced>,
    /// Temporary files that earlier attempts may have left at the destination.
    pub leftovers: Vec<Leftover>,
}

/// State of a transfer after a lease on it was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Successor {
    /// An attempt for the same task exists: its message was delivered again.
    SameTask,
    /// The transfer was completed for another task.
    Completed,
    /// No later attempt for the same task exists, and the transfer is not completed.
    None,
}

/// Error of claiming the destination of a lease.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another lease has the same destination; the lease, unless it has been removed since.
    #[error("another transfer copies to this destination")]
    Taken(Option<LeaseInfo>),
    /// The lease is lost, or its state is unknown.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for ClaimError {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        Self::Lease(lost.into())
    }
}

impl From<DatabaseError> for ClaimError {
    fn from(error: DatabaseError) -> Self {
        Self::Lease(error.into())
    }
}

/// A lease that was taken from its holder.
#[derive(Debug, Clone, Serialize)]
pub struct Displaced {
    /// The lease.
    pub lease: LeaseInfo,
    /// Reason why it was no longer valid.
    pub expiry_reason: ExpiryReason,
}

/// A temporary file of an earlier attempt; see [`Repository::forget_temporary`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Name of the file, as recorded.
    pub temporary_name: String,
}

impl Repository {
    /// Acquires the lease on a transfer, for `ttl` from now by the database's clock.
    ///
    /// * A PENDING or SCHEDULED row is free, even if a lease exists: an operator has reset the row, and the operator's
    ///   decision takes precedence.
    /// * A PENDING row with a [delay](Acquisition::NotDue) is not free: the manager sends a message when it is due. A
    ///   SCHEDULED row is free despite a delay.
    /// * An IN_PROGRESS row is taken over if its lease is [dead](LeaseInfo::expiry_reason), and then stays IN_PROGRESS.
    ///
    /// If a lease existed, the attempt of its holder is ended as interrupted, and its token is no longer valid.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn acquire(
        &self,
        id: TransferId,
        owner: &Owner,
        task_id: &str,
        ttl: Duration,
    ) -> Result<Acquisition, DatabaseError> {
        let request = AcquireRequest {
            owner,
            task_id,
            ttl,
            by_hand: false,
        };
        self.acquire_for(id, &request).await
    }

    /// Acquires the lease as [`Self::acquire`] does, but ignores the limit of the link, because a person requested the
    /// attempt. A pause of the link still applies.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn acquire_by_hand(
        &self,
        id: TransferId,
        owner: &Owner,
        task_id: &str,
        ttl: Duration,
    ) -> Result<Acquisition, DatabaseError> {
        let request = AcquireRequest {
            owner,
            task_id,
            ttl,
            by_hand: true,
        };
        self.acquire_for(id, &request).await
    }

    async fn acquire_for(
        &self,
        id: TransferId,
        request: &AcquireRequest<'_>,
    ) -> Result<Acquisition, DatabaseError> {
        let acquiring =
            async |tx: &DatabaseTransaction| Ok(self.acquire_in(tx, id, request).await?);
        let acquiring = || self.database.bounded(self.database.write(acquiring));
        fault_point!(LeaseTaken, acquiring().await)
    }

    async fn acquire_in(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        request: &AcquireRequest<'_>,
    ) -> Result<Acquisition, DbErr> {
        let Some(row) = lock(tx, id).await? else {
            return Ok(Acquisition::Missing);
        };
        let now = database::now(tx).await?;
        let held = find_lease(tx, id).await?;
        if row.status.means(Status::Pending)
            && let Some(delay) = delay::current_delay(tx, &row, now).await?
        {
            return Ok(Acquisition::NotDue {
                not_before: delay.not_before,
            });
        }
        let displaced = match decide(&row, held.as_ref(), now, request.owner) {
            ControlFlow::Break(answer) => return Ok(answer),
            ControlFlow::Continue(None) => None,
            ControlFlow::Continue(Some((held, expiry_reason))) => {
                match displace(tx, held, expiry_reason, now).await? {
                    Some(displaced) => Some(displaced),
                    None => return Ok(Acquisition::Held(held.into())),
                }
            }
        };
        if let Some(closed) = self.closed_link(tx, id, now, !request.by_hand).await? {
            if !row.status.means(Status::Pending) {
                self.set_status(id, Status::Pending).exec(tx).await?;
            }
            self.forget_schedule(tx, id).await?;
            return Ok(Acquisition::LinkClosed(closed));
        }
        delay::forget(tx, id).await?;
        self.forget_schedule(tx, id).await?;
        let lease = self.begin_attempt(tx, id, request, now).await?;
        let leftovers = leftovers(tx, &lease).await?;
        Ok(Acquisition::Acquired(Acquired {
            lease,
            displaced,
            leftovers,
        }))
    }

    /// Writes the start of an attempt: the transfer's row, the lease and the history.
    async fn begin_attempt(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        request: &AcquireRequest<'_>,
        now: DateTime<Utc>,
    ) -> Result<Lease, DbErr> {
        let AcquireRequest {
            owner,
            task_id,
            ttl,
            ..
        } = *request;
        let attempt = last_attempt(tx, id).await?.next();
        let lease = Lease {
            data_transfer_id: id,
            attempt,
            token: Uuid::new_v4(),
            ttl,
        };
        self.set_status(id, Status::InProgress)
            .col_expr(data_transfer::Column::StartTime, Expr::val(Timestamp(now)))
            .col_expr(data_transfer::Column::EndTime, Expr::val(None::<Timestamp>))
            .exec(tx)
            .await?;
        let row = transfer_worker_lease::ActiveModel {
            data_transfer_id: Set(id.get()),
            token: Set(lease.token.to_string()),
            attempt: Set(attempt.get()),
            task_id: Set(replace_nul(task_id)),
            owner_node: Set(owner.node.clone()),
            owner_host: Set(owner.host.clone()),
            owner_pid: Set(owner.pid.into()),
            owner_pid_scope: Set(owner.pid_scope.clone()),
            owner_started: Set(owner.started.clone()),
            acquired_at: Set(now),
            renewed_at: Set(now),
            expires_at: Set(expiry(now, ttl)),
            bytes_done: Set(0),
            bytes_total: Set(None),
            rate_bytes_per_s: Set(0),
            destination: Set(None),
            phase: Set(Some(Phase::Preparing.as_str().to_owned())),
            streams: Set(None),
        };
        transfer_worker_lease::Entity::insert(row)
            .exec_without_returning(tx)
            .await?;
        let row = transfer_worker_attempt::ActiveModel {
            data_transfer_id: Set(id.get()),
            attempt: Set(attempt.get()),
            task_id: Set(replace_nul(task_id)),
            worker: Set(owner.node.clone()),
            started_at: Set(now),
            ..Default::default()
        };
        transfer_worker_attempt::Entity::insert(row)
            .exec_without_returning(tx)
            .await?;
        Ok(lease)
    }

    /// Renews a lease and records the phase and the progress of the attempt.
    ///
    /// A lease that has expired is renewed, too, if no other worker has taken it.
    ///
    /// # Errors
    /// [`LeaseError::Lost`] if the token has changed, or if the transfer is no longer IN_PROGRESS;
    /// [`LeaseError::Database`] if the state is unknown: the lease stays valid until its expiry time.
    pub async fn renew(&self, lease: &Lease, seen: Snapshot) -> Result<Renewal, LeaseError> {
        self.database
            .bounded(self.renew_unbounded(lease, seen))
            .await
    }

    async fn renew_unbounded(&self, lease: &Lease, seen: Snapshot) -> Result<Renewal, LeaseError> {
        use transfer_worker_lease::{Column, Entity};
        let Snapshot { phase, progress } = seen;
        let db = self.database.connection();
        let now = database::now(db).await?;
        let renewed = Entity::update_many()
            .col_expr(Column::RenewedAt, Expr::val(now))
            .col_expr(Column::Phase, Expr::val(phase.as_str()))
            .col_expr(Column::ExpiresAt, Expr::val(expiry(now, lease.ttl)))
            .col_expr(
                Column::BytesDone,
                Expr::val(column_value(progress.bytes_done)),
            )
            .col_expr(
                Column::BytesTotal,
                Expr::val(progress.bytes_total.map(column_value)),
            )
            .col_expr(
                Column::RateBytesPerS,
                Expr::val(column_value(progress.rate_bytes_per_s)),
            )
            .filter(Column::DataTransferId.eq(lease.data_transfer_id))
            .filter(Column::Token.eq(lease.token.to_string()))
            .filter(Expr::exists(self.in_progress(lease.data_transfer_id)))
            .exec(db)
            .await?;
        if renewed.rows_affected == 0 {
            return Err(LeaseError::Lost);
        }
        let paused = self.stopped_link(db, lease.data_transfer_id).await?;
        Ok(paused.map_or(Renewal::Continue, Renewal::Stop))
    }

    /// Claims the destination path of a lease's copy and records its number of data streams. No two leases have the
    /// same destination, so that two transfers never write the same file at the same time.
    ///
    /// # Errors
    /// [`ClaimError::Taken`], [`ClaimError::Lease`].
    pub async fn claim_destination(
        &self,
        lease: &Lease,
        destination: &str,
        streams: u8,
    ) -> Result<(), ClaimError> {
        use transfer_worker_lease::{Column, Entity};
        let claiming = || async {
            let db = self.database.connection();
            let claimed = Entity::update_many()
                .col_expr(Column::Destination, Expr::val(replace_nul(destination)))
                .col_expr(Column::Streams, Expr::val(i32::from(streams)))
                .filter(Column::DataTransferId.eq(lease.data_transfer_id))
                .filter(Column::Token.eq(lease.token.to_string()))
                .filter(Expr::exists(self.in_progress(lease.data_transfer_id)))
                .exec(db)
                .await;
            match claimed {
                Ok(claimed) if claimed.rows_affected == 0 => Err(LeaseError::Lost.into()),
                Ok(_) => Ok(()),
                Err(error) => match error.sql_err() {
                    Some(SqlErr::UniqueConstraintViolation(_)) => {
                        let holder = Entity::find()
                            .filter(Column::Destination.eq(replace_nul(destination)))
                            .one(db)
                            .await
                            .map_err(LeaseError::from)?;
                        Err(ClaimError::Taken(holder.as_ref().map(LeaseInfo::from)))
                    }
                    _ => Err(LeaseError::from(error).into()),
                },
            }
        };
        fault_point!(Claimed, self.database.bounded(claiming()).await)
    }

    /// Records the files of an attempt before they are created, so that the next attempt finds them after a crash.
    ///
    /// # Errors
    /// [`LeaseError::Lost`]; the caller must then create no file. [`LeaseError::Database`].
    pub async fn record_files(
        &self,
        lease: &Lease,
        temporary_name: &str,
        log_path: &Path,
    ) -> Result<(), LeaseError> {
        let recording = || self.record(lease, temporary_name, Some(log_path));
        fault_point!(FilesRecorded, recording().await)
    }

    /// Records the name of an attempt's marker before the marker is created. An attempt that only inspects its
    /// destination has no log.
    ///
    /// # Errors
    /// The errors of [`Self::record_files`].
    pub(in crate::transfer) async fn record_marker(
        &self,
        lease: &Lease,
        temporary_name: &str,
    ) -> Result<(), LeaseError> {
        self.record(lease, temporary_name, None).await
    }

    async fn record(
        &self,
        lease: &Lease,
        temporary_name: &str,
        log_path: Option<&Path>,
    ) -> Result<(), LeaseError> {
        use transfer_worker_attempt::{Column, Entity};
        let recording = async {
            let mut update = Entity::update_many().col_expr(
                Column::TemporaryName,
                Expr::val(replace_nul(temporary_name)),
            );
            if let Some(log_path) = log_path {
                update = update.col_expr(Column::LogPath, Expr::val(path_text(log_path)));
            }
            let recorded = update
                .filter(Column::DataTransferId.eq(lease.data_transfer_id))
                .filter(Column::Attempt.eq(lease.attempt))
                .filter(Column::Outcome.is_null())
                .filter(Expr::exists(lease_exists(lease)))
                .filter(Expr::exists(self.in_progress(lease.data_transfer_id)))
                .exec(self.database.connection())
                .await?;
            if recorded.rows_affected == 0 {
                Err(LeaseError::Lost)
            } else {
                Ok(())
            }
        };
        self.database.bounded(recording).await
    }

    /// Returns the state of a transfer after its lease was lost, as seen by the task that held the lease.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn successor(
        &self,
        lease: &Lease,
        task_id: &str,
    ) -> Result<Successor, DatabaseError> {
        use transfer_worker_attempt::{Column, Entity};
        let looking = async {
            let db = self.database.connection();
            let later = Entity::find()
                .filter(Column::DataTransferId.eq(lease.data_transfer_id))
                .filter(Column::Attempt.gt(lease.attempt))
                .filter(Column::TaskId.eq(replace_nul(task_id)))
                .one(db)
                .await?;
            if later.is_some() {
                return Ok(Successor::SameTask);
            }
            let row = self.row(lease.data_transfer_id).await?;
            Ok(match row {
                Some(row) if row.status.means(Status::Completed) => Successor::Completed,
                _ => Successor::None,
            })
        };
        self.database.bounded(looking).await
    }

    /// Records that the temporary file of an attempt was removed; it is no longer a [`Leftover`].
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn forget_temporary(
        &self,
        id: TransferId,
        attempt: AttemptNumber,
    ) -> Result<(), DatabaseError> {
        use transfer_worker_attempt::{Column, Entity};
        let noting = async {
            Entity::update_many()
                .col_expr(Column::TemporaryName, Expr::val(None::<String>))
                .filter(Column::DataTransferId.eq(id))
                .filter(Column::Attempt.eq(attempt))
                .exec(self.database.connection())
                .await?;
            Ok(())
        };
        self.database.bounded(noting).await
    }
}

/// Decides if a lease can be acquired. `Continue` contains the lease to replace, if one exists, and the reason.
fn decide<'a>(
    row: &data_transfer::Model,
    held: Option<&'a transfer_worker_lease::Model>,
    now: DateTime<Utc>,
    observer: &Owner,
) -> ControlFlow<Acquisition, Option<(&'a transfer_worker_lease::Model, ExpiryReason)>> {
    let Some(status) = row.status.known() else {
        return ControlFlow::Break(Acquisition::UnknownStatus(row.status.to_string()));
    };
    match (status, held) {
        (Status::Completed, _) => ControlFlow::Break(Acquisition::Completed),
        (Status::Failed, _) => ControlFlow::Break(Acquisition::Failed {
            message: row.failure_error_message.clone(),
        }),
        (Status::Pending | Status::Scheduled, held) => {
            ControlFlow::Continue(held.map(|held| (held, ExpiryReason::StatusChanged)))
        }
        (Status::InProgress, None) => ControlFlow::Break(Acquisition::Untracked),
        (Status::InProgress, Some(held)) => {
            match LeaseInfo::from(held).expiry_reason(now, observer) {
                Some(expiry_reason) => ControlFlow::Continue(Some((held, expiry_reason))),
                None => ControlFlow::Break(Acquisition::Held(held.into())),
            }
        }
    }
}

/// Expiry time of a lease that is renewed now; the maximum date if `ttl` exceeds the calendar.
fn expiry(now: DateTime<Utc>, ttl: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(ttl)
        .ok()
        .and_then(|ttl| now.checked_add_signed(ttl))
        .unwrap_or(DateTime::<Utc>::MAX_UTC)
}

/// Number of the latest attempt; 0 without attempts.
async fn last_attempt(tx: &DatabaseTransaction, id: TransferId) -> Result<AttemptNumber, DbErr> {
    use transfer_worker_attempt::{Column, Entity};
    let last: Option<Option<AttemptNumber>> = Entity::find()
        .select_only()
        .column_as(Column::Attempt.max(), "last")
        .filter(Column::DataTransferId.eq(id))
        .into_tuple()
        .one(tx)
        .await?;
    Ok(last.flatten().unwrap_or(AttemptNumber::ZERO))
}

/// Temporary files that earlier attempts recorded.
async fn leftovers(tx: &DatabaseTransaction, lease: &Lease) -> Result<Vec<Leftover>, DbErr> {
    use transfer_worker_attempt::{Column, Entity};
    let attempts = Entity::find()
        .filter(Column::DataTransferId.eq(lease.data_transfer_id))
        .filter(Column::Attempt.lt(lease.attempt))
        .filter(Column::TemporaryName.is_not_null())
        .order_by_asc(Column::Attempt)
        .all(tx)
        .await?;
    let leftover = |row: transfer_worker_attempt::Model| {
        row.temporary_name.map(|temporary_name| Leftover {
            attempt: AttemptNumber::new(row.attempt),
            temporary_name,
        })
    };
    Ok(attempts.into_iter().filter_map(leftover).collect())
}
