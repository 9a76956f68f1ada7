//! Digests of the blocks of large files: recorded while a copy runs, so that the attempt that completes it does not read
//! these blocks again.

use entity::{FileEnd, Status, data_transfer, transfer_worker_digest};
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoIden as _, OnConflict, Query};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder,
};

use super::{Repository, column_value, lease_exists, replace_nul};
use crate::transfer::database::DatabaseError;
use crate::transfer::digest::{BlockCount, Digest, ReadBlock};
use crate::transfer::id::TransferId;
use crate::transfer::lease::{Lease, LeaseError};

/// A recorded block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedBlock {
    /// End at which the block was read.
    pub end: FileEnd,
    /// The version of the file that was read.
    pub version: String,
    /// The block.
    pub block: ReadBlock,
}

impl Repository {
    /// Returns true if the database has the table of digests.
    pub fn has_digests(&self) -> bool {
        self.schema.has_digests
    }

    /// Records the digest of a block; replaces an earlier one.
    ///
    /// # Errors
    /// [`LeaseError::Lost`], with nothing recorded; [`LeaseError::Database`].
    pub async fn record_block(
        &self,
        lease: &Lease,
        end: FileEnd,
        version: &str,
        block: &ReadBlock,
    ) -> Result<(), LeaseError> {
        use transfer_worker_digest::{Column, Entity};
        let cells = [
            (Column::DataTransferId, Expr::val(lease.data_transfer_id)),
            (Column::FileEnd, Expr::val(end)),
            (Column::Block, Expr::val(column_value(block.index))),
            (Column::FileVersion, Expr::val(replace_nul(version))),
            (Column::Digest, Expr::val(block.digest.to_string())),
            (Column::State, Expr::val(block.state.clone())),
        ];
        let mut values = Query::select();
        let mut columns = Vec::with_capacity(cells.len());
        for (column, value) in cells {
            columns.push(column.into_iden());
            values.expr(value);
        }
        values.and_where(Expr::exists(lease_exists(lease)));
        let again = OnConflict::columns([Column::DataTransferId, Column::FileEnd, Column::Block])
            .update_columns([Column::FileVersion, Column::Digest, Column::State])
            .to_owned();
        let recording = async {
            let mut insert = Query::insert();
            insert
                .into_table(Entity)
                .columns(columns)
                .select_from(values)
                .map_err(|error| DbErr::Custom(error.to_string()))?
                .on_conflict(again);
            let recorded = self.database.connection().execute(&insert).await?;
            match recorded.rows_affected() {
                0 => Err(LeaseError::Lost),
                _ => Ok(()),
            }
        };
        self.database.bounded(recording).await
    }

    /// Returns the recorded blocks of a transfer by their numbers. Rows that this program cannot read are left out.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn recorded_blocks(
        &self,
        id: TransferId,
    ) -> Result<Vec<RecordedBlock>, DatabaseError> {
        self.database
            .bounded(async { Ok(self.read_blocks(id).await?) })
            .await
    }

    async fn read_blocks(&self, id: TransferId) -> Result<Vec<RecordedBlock>, DbErr> {
        use transfer_worker_digest::{Column, Entity};
        if !self.schema.has_digests {
            return Ok(Vec::new());
        }
        let rows = Entity::find()
            .filter(Column::DataTransferId.eq(id))
            .order_by_asc(Column::Block)
            .all(self.database.connection())
            .await?;
        Ok(rows.into_iter().filter_map(from_row).collect())
    }

    /// Number of bytes of a file of `file_bytes` on which both ends agree; `None` without recorded blocks, or if the size
    /// is unknown.
    pub(super) async fn verified_bytes(
        &self,
        id: TransferId,
        file_bytes: Option<u64>,
    ) -> Result<Option<u64>, DbErr> {
        let blocks = self.read_blocks(id).await?;
        let Some(size) = file_bytes.filter(|_| !blocks.is_empty()) else {
            return Ok(None);
        };
        let mut count = BlockCount::new(size);
        for RecordedBlock { end, block, .. } in blocks {
            count.add(end, block.index, block.digest);
        }
        Ok(Some(count.verified_bytes()))
    }

    /// Deletes the recorded blocks of a transfer, except for the first ones of each end.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn forget_blocks(
        &self,
        id: TransferId,
        kept_of_origin: u64,
        kept_of_destination: u64,
    ) -> Result<(), DatabaseError> {
        use transfer_worker_digest::{Column, Entity};
        if !self.schema.has_digests {
            return Ok(());
        }
        let behind = |end: FileEnd, kept: u64| {
            let of_end = Condition::all().add(Column::FileEnd.eq(end));
            of_end.add(Column::Block.gte(column_value(kept)))
        };
        let obsolete = Condition::any()
            .add(behind(FileEnd::Origin, kept_of_origin))
            .add(behind(FileEnd::Destination, kept_of_destination));
        let forgetting = async {
            Entity::delete_many()
                .filter(Column::DataTransferId.eq(id))
                .filter(obsolete)
                .exec(self.database.connection())
                .await?;
            Ok(())
        };
        self.database.bounded(forgetting).await
    }

    /// Deletes the recorded blocks of transfers that are COMPLETED or FAILED, or whose rows no longer exist. A worker that
    /// died after the commit, or an older worker, has left them.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn forget_blocks_of_ended(&self) -> Result<(), DatabaseError> {
        use transfer_worker_digest::{Column, Entity};
        if !self.schema.has_digests {
            return Ok(());
        }
        let open = Query::select()
            .expr(Expr::col(data_transfer::Column::Id).cast_as("bigint"))
            .from(data_transfer::Entity)
            .and_where(
                self.status_is(&[Status::Completed, Status::Failed])
                    .not()
                    .or(Expr::col(data_transfer::Column::Status).is_null()),
            )
            .to_owned();
        let forgetting = async {
            Entity::delete_many()
                .filter(Expr::col(Column::DataTransferId).not_in_subquery(open))
                .exec(self.database.connection())
                .await?;
            Ok(())
        };
        self.database.bounded(forgetting).await
    }
}

fn from_row(row: transfer_worker_digest::Model) -> Option<RecordedBlock> {
    Some(RecordedBlock {
        end: row.file_end,
        version: row.file_version,
        block: ReadBlock {
            index: u64::try_from(row.block).ok()?,
            digest: Digest::recorded(&row.digest)?,
            state: row.state,
        },
    })
}
