//! Partial copies of transfers that have ended, so that no attempt will complete them.

use std::collections::HashSet;

use entity::{Outcome, Status, data_transfer, transfer_worker_attempt};
use sea_orm::{ColumnTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect};
use serde::Serialize;

use super::Repository;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::{AttemptNumber, TransferId};

/// Maximum number of rows per read. More leftovers are cleared in several runs.
const MOST: u64 = 10_000;

/// A recorded temporary name of an attempt that ended without completing the transfer. The file itself may already be
/// removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecordedPartial {
    /// The transfer.
    pub data_transfer_id: TransferId,
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Temporary name.
    pub temporary_name: String,
    /// Bytes that the attempt had copied when it ended.
    pub bytes: u64,
}

impl Repository {
    /// Returns the recorded partial copies of a transfer in any state.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn partials_of(&self, id: TransferId) -> Result<Vec<RecordedPartial>, DatabaseError> {
        let reading = async { Ok(self.read_partials(Some(id)).await?) };
        self.database.bounded(reading).await
    }

    /// Returns the recorded partial copies of transfers that are FAILED or COMPLETED, or whose rows no longer exist.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn leftovers(&self) -> Result<Vec<RecordedPartial>, DatabaseError> {
        let reading = async {
            let partials = self.read_partials(None).await?;
            let ids: HashSet<TransferId> = partials.iter().map(|p| p.data_transfer_id).collect();
            let (mut known, mut ended) = (HashSet::new(), HashSet::new());
            let ids: Vec<TransferId> = ids.into_iter().collect();
            for ids in ids.chunks(500) {
                let of_these = || {
                    data_transfer::Entity::find()
                        .select_only()
                        .column(data_transfer::Column::Id)
                        .filter(data_transfer::Column::Id.is_in(ids.iter().copied()))
                };
                let db = self.database.connection();
                let found: Vec<TransferId> = of_these().into_tuple().all(db).await?;
                known.extend(found);
                let is_over = self.status_is(&[Status::Completed, Status::Failed]);
                let found: Vec<TransferId> =
                    of_these().filter(is_over).into_tuple().all(db).await?;
                ended.extend(found);
            }
            let is_left = |partial: &RecordedPartial| {
                let id = &partial.data_transfer_id;
                ended.contains(id) || !known.contains(id)
            };
            Ok(partials.into_iter().filter(is_left).collect())
        };
        self.database.bounded(reading).await
    }

    async fn read_partials(&self, id: Option<TransferId>) -> Result<Vec<RecordedPartial>, DbErr> {
        use transfer_worker_attempt::{Column, Entity};
        let mut query = Entity::find()
            .filter(Column::TemporaryName.is_not_null())
            .filter(Column::Outcome.is_not_null())
            .filter(Column::Outcome.ne(Outcome::Completed))
            .order_by_asc(Column::DataTransferId)
            .order_by_asc(Column::Attempt)
            .limit(MOST);
        if let Some(id) = id {
            query = query.filter(Column::DataTransferId.eq(id));
        }
        let rows = query.all(self.database.connection()).await?;
        let partial = |row: transfer_worker_attempt::Model| {
            Some(RecordedPartial {
                data_transfer_id: row.data_transfer_id.into(),
                attempt: AttemptNumber::new(row.attempt),
                temporary_name: row.temporary_name?,
                bytes: row.bytes.and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
            })
        };
        Ok(rows.into_iter().filter_map(partial).collect())
    }
}
