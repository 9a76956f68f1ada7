//! Start of an attempt: acquires the lease on a transfer.

use std::ops::ControlFlow;
use std::time::Duration;

use chrono::{DateTime, Utc};
use entity::{Status, Timestamp, data_transfer, transfer_worker_attempt, transfer_worker_lease};
use sea_orm::sea_query::Expr;
use sea_orm::{
    ColumnTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QuerySelect, Set,
};
use serde::Serialize;
use uuid::Uuid;

use super::{Repository, delay, displace, find_lease, lock, replace_nul};
use crate::clock;
use crate::faults::fault_point;
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::lease::{ExpiryReason, Lease, LeaseInfo, Owner, Phase};
use crate::transfer::link::ClosedLink;

use super::files::{Leftover, leftovers};

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
    /// Temporary files that earlier attempts may have left at the destination, the oldest attempt first.
    pub leftovers: Vec<Leftover>,
}

/// A lease that was taken from its holder.
#[derive(Debug, Clone, Serialize)]
pub struct Displaced {
    /// The lease.
    pub lease: LeaseInfo,
    /// Reason why it was no longer valid.
    pub expiry_reason: ExpiryReason,
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
            expires_at: Set(clock::after(now, ttl)),
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
