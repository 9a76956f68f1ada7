//! Recovering transfers whose worker is gone.

use entity::{Status, data_transfer, transfer_worker_lease};
use sea_orm::{
    ColumnTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
};
use serde::Serialize;

use super::{Displaced, Repository, displace, find_lease, lock};
use crate::faults::fault_point;
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::TransferId;
use crate::transfer::lease::{ExpiryReason, LeaseInfo, Owner};

/// What a sweep has done.
#[derive(Debug, Default)]
pub struct Sweep {
    /// Transfers that are PENDING again, and leases that were removed since the transfer's status
    /// had been changed already.
    pub recovered: Vec<Recovered>,
    /// Transfers that could not be recovered this time, and why.
    pub failed: Vec<(TransferId, DatabaseError)>,
}

/// A lease that was removed.
#[derive(Debug, Clone, Serialize)]
pub struct Recovered {
    /// The lease, and why it was dead.
    #[serde(flatten)]
    pub displaced: Displaced,
    /// Whether the transfer went back to PENDING: not where somebody had changed it before.
    pub is_pending: bool,
}

impl Repository {
    /// Removes every dead lease and puts its transfer back to PENDING.
    ///
    /// Stopping is not failing: the count of failures stays. Dead is what
    /// [`LeaseInfo::demise`] says, as `observer` sees it, and never an age alone; a transfer
    /// without a lease is never touched. One transfer that cannot be recovered does not keep the
    /// others from it.
    ///
    /// # Errors
    /// The error of the database if it cannot be asked for the leases or refuses to change any of them.
    pub async fn sweep(&self, observer: &Owner) -> Result<Sweep, DatabaseError> {
        self.sweep_watched(observer, || {}).await
    }

    /// Sweeps as [`Self::sweep`] and calls `progress` before each lease, since there may be many and each may
    /// take a while.
    ///
    /// # Errors
    /// As [`Self::sweep`].
    pub async fn sweep_watched(
        &self,
        observer: &Owner,
        progress: impl Fn(),
    ) -> Result<Sweep, DatabaseError> {
        let candidates = self.database.bounded(self.candidates(observer)).await?;
        let mut sweep = Sweep::default();
        for id in candidates {
            progress();
            let recovering = || self.database.bounded(self.recover(id, observer));
            match fault_point!(SweepCommitted, recovering().await) {
                Ok(recovered) => sweep.recovered.extend(recovered),
                // Another transaction has locked the row, or its values do not fit.
                Err(error) if error.is_unreachable() || error.is_of_one_row() => {
                    sweep.failed.push((id, error));
                }
                Err(error) if sweep.recovered.is_empty() => return Err(error),
                Err(error) => {
                    sweep.failed.push((id, error));
                    return Ok(sweep);
                }
            }
        }
        Ok(sweep)
    }

    /// Transfers whose lease seems dead. Looked at without a lock, so [`Self::recover`] looks again.
    async fn candidates(&self, observer: &Owner) -> Result<Vec<TransferId>, DatabaseError> {
        use transfer_worker_lease::{Column, Entity};
        let db = self.database.connection();
        let now = database::now(db).await?;
        let leases = Entity::find()
            .order_by_asc(Column::DataTransferId)
            .all(db)
            .await?;
        // By their keys: the table of transfers is long, and there are as many leases as copies run.
        let ids = leases.iter().map(|lease| lease.data_transfer_id);
        let in_progress: Vec<TransferId> = data_transfer::Entity::find()
            .select_only()
            .column(data_transfer::Column::Id)
            .filter(data_transfer::Column::Id.is_in(ids))
            .filter(self.status_is(&[Status::InProgress]))
            .into_tuple()
            .all(db)
            .await?;
        let is_candidate = |lease: &&transfer_worker_lease::Model| {
            LeaseInfo::from(*lease).demise(now, observer).is_some()
                || !in_progress.contains(&lease.data_transfer_id.into())
        };
        let candidates = leases.iter().filter(is_candidate);
        Ok(candidates
            .map(|lease| lease.data_transfer_id.into())
            .collect())
    }

    async fn recover(
        &self,
        id: TransferId,
        observer: &Owner,
    ) -> Result<Option<Recovered>, DatabaseError> {
        let recovering = async |tx: &DatabaseTransaction| {
            Ok(fault_point!(
                SweepWritten,
                self.recover_in(tx, id, observer).await
            )?)
        };
        self.database.write(recovering).await
    }

    async fn recover_in(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        observer: &Owner,
    ) -> Result<Option<Recovered>, DbErr> {
        let row = lock(tx, id).await?;
        let now = database::now(tx).await?;
        let Some(held) = find_lease(tx, id).await? else {
            return Ok(None);
        };
        let is_pending = row.is_some_and(|row| row.status.means(Status::InProgress));
        let demise = if is_pending {
            LeaseInfo::from(&held).demise(now, observer)
        } else {
            Some(ExpiryReason::StatusChanged)
        };
        let displaced = match demise {
            Some(demise) => displace(tx, &held, demise, now).await?,
            None => None,
        };
        if displaced.is_some() && is_pending {
            self.set_status(id, Status::Pending).exec(tx).await?;
        }
        Ok(displaced.map(|displaced| Recovered {
            displaced,
            is_pending,
        }))
    }
}
