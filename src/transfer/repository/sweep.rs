//! Recovery of transfers whose worker no longer exists.

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

/// Result of a sweep.
#[derive(Debug, Default)]
pub struct Sweep {
    /// Transfers that are PENDING again, and transfers with another status whose leases were removed.
    pub recovered: Vec<Recovered>,
    /// Transfers that could not be recovered this time, and the errors.
    pub failed: Vec<(TransferId, DatabaseError)>,
}

/// A lease that was removed.
#[derive(Debug, Clone, Serialize)]
pub struct Recovered {
    /// The lease, and the reason why it was no longer valid.
    #[serde(flatten)]
    pub displaced: Displaced,
    /// True if the transfer went back to PENDING; false if its status had already been changed.
    pub is_pending: bool,
}

impl Repository {
    /// Removes every dead lease and puts its transfer back to PENDING. Also removes the leases of transfers that are
    /// no longer IN_PROGRESS, without changing these transfers.
    ///
    /// The count of failures does not change, because the loss of a worker is not a failure of the transfer. A lease is
    /// dead if [`LeaseInfo::expiry_reason`] returns a reason for `observer`, never because of its age alone. A transfer
    /// without a lease is never changed. A transfer that cannot be recovered does not stop the recovery of the others.
    ///
    /// # Errors
    /// The database cannot be asked for the leases, or refuses to change any of them.
    pub async fn sweep(&self, observer: &Owner) -> Result<Sweep, DatabaseError> {
        self.sweep_watched(observer, || {}).await
    }

    /// Sweeps as [`Self::sweep`] does, and calls `progress` before each lease, since many leases may exist and each may
    /// take some time.
    ///
    /// # Errors
    /// The errors of [`Self::sweep`].
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
                // Another transaction has locked the row, or its values are not valid.
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

    /// Returns transfers whose lease may be dead. The leases are read without a lock, so [`Self::recover`] checks
    /// again.
    async fn candidates(&self, observer: &Owner) -> Result<Vec<TransferId>, DatabaseError> {
        use transfer_worker_lease::{Column, Entity};
        let db = self.database.connection();
        let now = database::now(db).await?;
        let leases = Entity::find()
            .order_by_asc(Column::DataTransferId)
            .all(db)
            .await?;
        // By their primary keys: the table of transfers is large, but only one lease exists for each running copy.
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
            LeaseInfo::from(*lease)
                .expiry_reason(now, observer)
                .is_some()
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
        let expiry_reason = if is_pending {
            LeaseInfo::from(&held).expiry_reason(now, observer)
        } else {
            Some(ExpiryReason::StatusChanged)
        };
        let displaced = match expiry_reason {
            Some(expiry_reason) => displace(tx, &held, expiry_reason, now).await?,
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
