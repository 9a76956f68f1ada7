//! Files of attempts: their names are recorded before they are created, so that a later attempt finds what a crash left.

use std::path::Path;

use entity::transfer_worker_attempt;
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QueryOrder};
use serde::Serialize;

use super::{Repository, lease_exists, path_text, replace_nul};
use crate::faults::fault_point;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::lease::{Lease, LeaseError};

/// A temporary file of an earlier attempt; see [`Repository::forget_temporary`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Name of the file, as recorded.
    pub temporary_name: String,
}

impl Repository {
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

/// Temporary files that earlier attempts recorded, the oldest attempt first.
pub(super) async fn leftovers(
    tx: &DatabaseTransaction,
    lease: &Lease,
) -> Result<Vec<Leftover>, DbErr> {
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
