//! Recorded partial copies: those of one transfer, and those of transfers that have ended, so that no attempt will complete
//! them.

use std::collections::{BTreeSet, HashSet};

use entity::transfer_worker_attempt::Column;
use entity::{Outcome, Status, data_transfer, transfer_worker_attempt};
use sea_orm::sea_query::ExprTrait as _;
use sea_orm::{
    ColumnTrait, Condition, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Select,
};
use serde::Serialize;

use super::Repository;
use super::schedule::MAX_IDS;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::{AttemptNumber, TransferId};

/// Maximum number of recorded names per statement.
const PAGE: u64 = 10_000;

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
    /// Returns the recorded partial copies of a transfer in any state, at most [`PAGE`].
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn partials_of(&self, id: TransferId) -> Result<Vec<RecordedPartial>, DatabaseError> {
        let of_transfer = recorded().filter(Column::DataTransferId.eq(id));
        let reading = async { Ok(self.read_partials(of_transfer).await?) };
        self.database.bounded(reading).await
    }

    /// Returns the recorded partial copies of transfers that are FAILED or COMPLETED, or whose rows no longer exist.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn partials_of_ended(&self) -> Result<Vec<RecordedPartial>, DatabaseError> {
        let mut left = Vec::new();
        let mut page = recorded();
        loop {
            let reading = async {
                let partials = self.read_partials(page).await?;
                let open = self.unfinished_among(&partials).await?;
                Ok::<_, DatabaseError>((partials, open))
            };
            let (partials, open) = self.database.bounded(reading).await?;
            let last = partials.last().filter(|_| partials.len() as u64 == PAGE);
            let next = last.map(|last| recorded().filter(is_after(last)));
            let is_left = |partial: &RecordedPartial| !open.contains(&partial.data_transfer_id);
            left.extend(partials.into_iter().filter(is_left));
            match next {
                Some(next) => page = next,
                None => return Ok(left),
            }
        }
    }

    /// Returns the transfers of partial copies that have not ended.
    async fn unfinished_among(
        &self,
        partials: &[RecordedPartial],
    ) -> Result<HashSet<TransferId>, DbErr> {
        let ids: BTreeSet<TransferId> = partials.iter().map(|p| p.data_transfer_id).collect();
        let ids: Vec<TransferId> = ids.into_iter().collect();
        let mut open = HashSet::new();
        for ids in ids.chunks(MAX_IDS) {
            let has_ended = self.status_is(&[Status::Completed, Status::Failed]);
            let found: Vec<TransferId> = data_transfer::Entity::find()
                .select_only()
                .column(data_transfer::Column::Id)
                .filter(data_transfer::Column::Id.is_in(ids.iter().copied()))
                .filter(has_ended.not().or(data_transfer::Column::Status.is_null()))
                .into_tuple()
                .all(self.database.connection())
                .await?;
            open.extend(found);
        }
        Ok(open)
    }

    /// Reads at most [`PAGE`] recorded names, by transfer and attempt.
    async fn read_partials(
        &self,
        recorded: Select<transfer_worker_attempt::Entity>,
    ) -> Result<Vec<RecordedPartial>, DbErr> {
        let rows = recorded
            .order_by_asc(Column::DataTransferId)
            .order_by_asc(Column::Attempt)
            .limit(PAGE)
            .all(self.database.connection())
            .await?;
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

/// Query for attempts that ended without completing their transfer and have a temporary name on record.
fn recorded() -> Select<transfer_worker_attempt::Entity> {
    transfer_worker_attempt::Entity::find()
        .filter(Column::TemporaryName.is_not_null())
        .filter(Column::Outcome.is_not_null())
        .filter(Column::Outcome.ne(Outcome::Completed))
}

/// Condition for the attempts after `last`, in the order of [`Repository::read_partials`].
fn is_after(last: &RecordedPartial) -> Condition {
    let (id, attempt) = (last.data_transfer_id, last.attempt);
    Condition::any().add(Column::DataTransferId.gt(id)).add(
        Condition::all()
            .add(Column::DataTransferId.eq(id))
            .add(Column::Attempt.gt(attempt)),
    )
}
