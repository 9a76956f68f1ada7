//! The holder of a lease: renews it, claims the destination of its copy, and learns what became of the transfer after the
//! lease was lost.

use entity::{Status, transfer_worker_attempt, transfer_worker_lease};
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, SqlErr};

use super::{Repository, column_value, replace_nul};
use crate::clock;
use crate::faults::fault_point;
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::lease::{Lease, LeaseError, LeaseInfo, Snapshot};
use crate::transfer::link::PausedLink;

/// Instruction to the holder of a renewed lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Renewal {
    /// Continue the attempt.
    Continue,
    /// Stop the copy and release the row: an operator has paused the link and wants it free now. The lease is still
    /// valid.
    Stop(PausedLink),
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

impl Repository {
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
            .col_expr(Column::ExpiresAt, Expr::val(clock::after(now, lease.ttl)))
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
        let reading = async {
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
        self.database.bounded(reading).await
    }
}
