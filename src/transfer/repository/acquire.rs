//! Beginning an attempt.

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
    Repository, column_value, delay, displace, find_lease, lock, standing, storable, storable_path,
};
use crate::faults::fault_point;
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::lease::{ExpiryReason, Lease, LeaseError, LeaseInfo, Owner, Phase, Snapshot};
use crate::transfer::link::{ClosedLink, PausedLink};

/// What became of the wish to work on a transfer.
#[derive(Debug)]
pub enum Acquisition {
    /// The transfer is the caller's, and its row says IN_PROGRESS.
    Acquired(Acquired),
    /// There is no such transfer.
    Missing,
    /// It is done already: the message was delivered again.
    Completed,
    /// It was given up.
    Failed {
        /// Why.
        message: Option<String>,
    },
    /// Somebody else is at it, and alive.
    Held(LeaseInfo),
    /// It failed a while ago and waits to be tried again; its row is PENDING.
    NotDue {
        /// Until when, by the database's clock.
        not_before: DateTime<Utc>,
    },
    /// Its link is paused, or has as many copies as it may: the row is PENDING (again), with the count
    /// of failures as it was. The manager sends a message when the link is open.
    LinkClosed(ClosedLink),
    /// The row says IN_PROGRESS and there is no lease: a worker that knows nothing of leases may
    /// be at it. Such a row is never touched.
    Untracked,
    /// The row has a status that this program does not know.
    UnknownStatus(String),
}

/// What the holder of a renewed lease is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Renewal {
    /// Go on.
    GoOn,
    /// Stop the copy and give the row back: somebody has paused the link and wants it free now. The
    /// lease is the holder's all the same.
    Stop(PausedLink),
}

/// Who wants a lease.
struct Taker<'a> {
    owner: &'a Owner,
    task_id: &'a str,
    ttl: Duration,
    /// Somebody wants this transfer now, whatever its link's limit is.
    by_hand: bool,
}

/// A lease, and what was found on the way to it.
#[derive(Debug)]
pub struct Acquired {
    /// The lease.
    pub lease: Lease,
    /// The lease that was there before.
    pub displaced: Option<Displaced>,
    /// Temporary files that earlier attempts may have left at the destination.
    pub leftovers: Vec<Leftover>,
}

/// State of a transfer after a lease on it was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Successor {
    /// An attempt for the same task: its message was delivered again.
    SameTask,
    /// The transfer is completed, for another task.
    Completed,
    /// Neither of these so far.
    None,
}

/// Why a lease's destination could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another copy goes there; whose, unless that has ended since.
    #[error("another copy has this destination")]
    Taken(Option<LeaseInfo>),
    /// The lease is lost, or that could not be found out.
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
    /// Why it was of no more use.
    pub demise: ExpiryReason,
}

/// A temporary file of an earlier attempt; see [`Repository::forget_temporary`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// The attempt.
    pub attempt: AttemptNumber,
    /// The name, as it was recorded.
    pub temporary_name: String,
}

impl Repository {
    /// Takes a transfer for an attempt, for `ttl` from now by the database's clock.
    ///
    /// A row that is PENDING or SCHEDULED is free, even if a lease stands: an operator has reset
    /// the row, and the operator's word counts. A PENDING row that [waits](Acquisition::NotDue) is
    /// not: the manager sends a message when it is due. One that somebody has made SCHEDULED is. A row that is IN_PROGRESS is taken over if its
    /// lease is [dead](LeaseInfo::demise), and then stays IN_PROGRESS. In either case the old
    /// holder's attempt is closed as interrupted and its token is worth nothing from then on.
    ///
    /// # Errors
    /// The error of the database.
    pub async fn acquire(
        &self,
        id: TransferId,
        owner: &Owner,
        task_id: &str,
        ttl: Duration,
    ) -> Result<Acquisition, DatabaseError> {
        let taker = Taker {
            owner,
            task_id,
            ttl,
            by_hand: false,
        };
        self.acquire_for(id, &taker).await
    }

    /// As [`Self::acquire`], but also where the link has as many copies as it may: somebody wants this
    /// one now. A pause holds all the same.
    ///
    /// # Errors
    /// The error of the database.
    pub async fn acquire_by_hand(
        &self,
        id: TransferId,
        owner: &Owner,
        task_id: &str,
        ttl: Duration,
    ) -> Result<Acquisition, DatabaseError> {
        let taker = Taker {
            owner,
            task_id,
            ttl,
            by_hand: true,
        };
        self.acquire_for(id, &taker).await
    }

    async fn acquire_for(
        &self,
        id: TransferId,
        taker: &Taker<'_>,
    ) -> Result<Acquisition, DatabaseError> {
        let acquiring = async |tx: &DatabaseTransaction| Ok(self.acquire_in(tx, id, taker).await?);
        let acquiring = || self.database.bounded(self.database.write(acquiring));
        fault_point!(LeaseTaken, acquiring().await)
    }

    async fn acquire_in(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        taker: &Taker<'_>,
    ) -> Result<Acquisition, DbErr> {
        let Some(row) = lock(tx, id).await? else {
            return Ok(Acquisition::Missing);
        };
        let now = database::now(tx).await?;
        let held = find_lease(tx, id).await?;
        if row.status.means(Status::Pending)
            && let Some(delay) = delay::standing(tx, &row, now).await?
        {
            return Ok(Acquisition::NotDue {
                not_before: delay.not_before,
            });
        }
        let displaced = match judge(&row, held.as_ref(), now, taker.owner) {
            ControlFlow::Break(answer) => return Ok(answer),
            ControlFlow::Continue(None) => None,
            ControlFlow::Continue(Some((held, demise))) => {
                match displace(tx, held, demise, now).await? {
                    Some(displaced) => Some(displaced),
                    None => return Ok(Acquisition::Held(held.into())),
                }
            }
        };
        if let Some(closed) = self.closed_link(tx, id, now, !taker.by_hand).await? {
            if !row.status.means(Status::Pending) {
                self.set_status(id, Status::Pending).exec(tx).await?;
            }
            self.forget_schedule(tx, id).await?;
            return Ok(Acquisition::LinkClosed(closed));
        }
        delay::forget(tx, id).await?;
        self.forget_schedule(tx, id).await?;
        let lease = self.begin_attempt(tx, id, taker, now).await?;
        let leftovers = leftovers(tx, &lease).await?;
        Ok(Acquisition::Acquired(Acquired {
            lease,
            displaced,
            leftovers,
        }))
    }

    /// Writes that an attempt begins: the row, the lease, the history.
    async fn begin_attempt(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        taker: &Taker<'_>,
        now: DateTime<Utc>,
    ) -> Result<Lease, DbErr> {
        let Taker {
            owner,
            task_id,
            ttl,
            ..
        } = *taker;
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
            task_id: Set(storable(task_id)),
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
            task_id: Set(storable(task_id)),
            worker: Set(owner.node.clone()),
            started_at: Set(now),
            ..Default::default()
        };
        transfer_worker_attempt::Entity::insert(row)
            .exec_without_returning(tx)
            .await?;
        Ok(lease)
    }

    /// Renews a lease and notes what its holder is doing and how far the copy is.
    ///
    /// A lease that has expired, but that nobody has taken, is renewed too.
    ///
    /// # Errors
    /// [`LeaseError::Lost`] if the token is no longer the own one, or if the transfer is no longer
    /// IN_PROGRESS; [`LeaseError::Database`] if that cannot be found out: the lease goes on living
    /// until its end.
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
        Ok(paused.map_or(Renewal::GoOn, Renewal::Stop))
    }

    /// Claims the place that a lease's copy goes to, by so many data streams. No two leases have one destination, so that two
    /// transfers of one file never run side by side.
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
                .col_expr(Column::Destination, Expr::val(storable(destination)))
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
                            .filter(Column::Destination.eq(storable(destination)))
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

    /// Records the files of an attempt before they are made, so that the next attempt finds them after
    /// a crash.
    ///
    /// # Errors
    /// [`LeaseError::Lost`], and then no file must be made; or what the database says.
    pub async fn record_files(
        &self,
        lease: &Lease,
        temporary_name: &str,
        log_path: &Path,
    ) -> Result<(), LeaseError> {
        let recording = || self.record(lease, temporary_name, Some(log_path));
        fault_point!(FilesRecorded, recording().await)
    }

    /// Records the name of an attempt's marker before the marker is made. An attempt that only looks at
    /// its destination has no log.
    ///
    /// # Errors
    /// As [`Self::record_files`].
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
            let mut update = Entity::update_many()
                .col_expr(Column::TemporaryName, Expr::val(storable(temporary_name)));
            if let Some(log_path) = log_path {
                update = update.col_expr(Column::LogPath, Expr::val(storable_path(log_path)));
            }
            let recorded = update
                .filter(Column::DataTransferId.eq(lease.data_transfer_id))
                .filter(Column::Attempt.eq(lease.attempt))
                .filter(Column::Outcome.is_null())
                .filter(Expr::exists(standing(lease)))
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

    /// The state of a transfer after its lease was lost, as seen by the task that held the lease.
    ///
    /// # Errors
    /// The error of the database.
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
                .filter(Column::TaskId.eq(storable(task_id)))
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

    /// Notes that the temporary file of an attempt is gone; it is no longer a [`Leftover`].
    ///
    /// # Errors
    /// The error of the database.
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

/// Whether a transfer can be taken, and which lease is in the way.
fn judge<'a>(
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
        (Status::InProgress, Some(held)) => match LeaseInfo::from(held).demise(now, observer) {
            Some(demise) => ControlFlow::Continue(Some((held, demise))),
            None => ControlFlow::Break(Acquisition::Held(held.into())),
        },
    }
}

/// The end of a lease that is renewed now; far away where `ttl` is beyond the calendar.
fn expiry(now: DateTime<Utc>, ttl: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(ttl)
        .ok()
        .and_then(|ttl| now.checked_add_signed(ttl))
        .unwrap_or(DateTime::<Utc>::MAX_UTC)
}

/// Number of the latest attempt; 0 if there was none.
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

/// Temporary files that attempts before this one have noted.
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
