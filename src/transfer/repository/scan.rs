//! Scans of the table for transfers that have not ended.

use std::cmp::Reverse;
use std::collections::HashMap;

use entity::{Label, Status, data_transfer};
use sea_orm::sea_query::{Expr, ExprTrait as _, Func, Order, Query, SelectStatement};
use sea_orm::{ConnectionTrait, DbErr, QueryResult};

use super::ends::ID;
use super::schedule::MAX_IDS;
use super::{Repository, delay};
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;

/// Maximum number of rows per statement.
const PAGE: u64 = 10_000;

/// Number of ids below the highest known one that the next scan reads again. An id is assigned when a row is inserted,
/// and the row is visible when its transaction is committed, so a lower id may become visible after a higher one.
const LATE_IDS: i64 = 1_000;

/// Maximum number of single ids in a cursor. For more ids, a scan of all rows is not slower.
const MAX_CURSOR_IDS: usize = 5_000;

/// A transfer that has not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenTransfer {
    /// Id of the transfer.
    pub id: TransferId,
    /// State: PENDING, SCHEDULED or IN_PROGRESS.
    pub status: Status,
    /// Id of the location to copy from.
    pub origin_location_id: Option<i64>,
    /// Id of the location to copy to.
    pub destination_location_id: Option<i64>,
    /// True if the transfer is PENDING with a retry delay that has not passed.
    pub has_delay: bool,
}

/// Result of a scan that limits the rows of the next scan.
///
/// The number of COMPLETED rows grows without limit, and the ops-db has no index to skip them. Therefore they are read
/// only once: a later scan reads the rows that were not COMPLETED, and new rows. If an operator resets a COMPLETED row,
/// only the next scan of all rows finds it.
#[derive(Debug, Clone)]
pub struct ScanCursor {
    highest: TransferId,
    ids: Vec<TransferId>,
}

impl Repository {
    /// Passes every transfer that has not ended to `see`; only transfers from the locations `origins`, if given, and
    /// the lowest id first.
    ///
    /// With the [`ScanCursor`] of the previous scan, it reads only rows that may have changed, and the cost does not
    /// grow with the number of COMPLETED rows. Returns the cursor for the next scan; `None` if a scan of all rows is
    /// not slower.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn scan(
        &self,
        origins: Option<&[i64]>,
        before: Option<&ScanCursor>,
        mut see: impl FnMut(OpenTransfer),
    ) -> Result<Option<ScanCursor>, DatabaseError> {
        let (delays, highest) = self
            .database
            .bounded(async {
                let delays = delay::current_delays(self.database.connection(), None).await?;
                Ok::<_, DatabaseError>((delays, self.highest_id().await?))
            })
            .await?;
        let mut seen = ScannedRows::new(delays);
        // The highest id is lower than before: this is not the database of the previous scan.
        let before = before.filter(|before| before.highest <= highest);
        let mut after = before.map_or(i64::MIN, |before| before.highest.get() - LATE_IDS);
        let watched = before.map_or(&[][..], |before| &before.ids);
        let watched: Vec<_> = watched
            .iter()
            .copied()
            .filter(|id| id.get() <= after)
            .collect();
        for ids in watched.chunks(MAX_IDS) {
            let mut query = self.unfinished(origins);
            query.and_where(id_column().is_in(ids.iter().copied()));
            seen.page(&self.rows(&query).await?, &mut see)
                .map_err(DatabaseError::from)?;
        }
        loop {
            let mut query = self.unfinished(origins);
            // Both bounds are given, so that PostgreSQL knows, even without statistics, that this is a part of the
            // table, and uses the primary key.
            query
                .and_where(id_column().gt(after))
                .and_where(id_column().lte(highest))
                .limit(PAGE);
            let rows = self.rows(&query).await?;
            let last = seen.page(&rows, &mut see).map_err(DatabaseError::from)?;
            match last {
                Some(last) if rows.len() as u64 == PAGE => after = last.get(),
                _ => break,
            }
        }
        Ok(seen.cursor(highest))
    }

    pub(super) async fn rows(
        &self,
        query: &SelectStatement,
    ) -> Result<Vec<QueryResult>, DatabaseError> {
        let reading = async { Ok(self.database.connection().query_all(query).await?) };
        self.database.bounded(reading).await
    }

    /// Query for transfers that are not COMPLETED, lowest id first.
    fn unfinished(&self, origins: Option<&[i64]>) -> SelectStatement {
        use data_transfer::{Column, Entity};
        let number = |column: Column| Expr::col((Entity, column)).cast_as("bigint");
        let mut query = Query::select();
        query
            .from(Entity)
            .expr_as(number(Column::Id), ID)
            .expr_as(number(Column::OriginLocationId), ORIGIN_ID)
            .expr_as(number(Column::DestinationLocationId), DESTINATION_ID)
            .expr_as(number(Column::RetryCount), RETRY_COUNT)
            .expr_as(Expr::col((Entity, Column::Status)).cast_as("text"), STATUS)
            .and_where(self.status_is(&[
                Status::Pending,
                Status::Scheduled,
                Status::InProgress,
                Status::Failed,
            ]))
            .order_by((Entity, Column::Id), Order::Asc);
        if let Some(origins) = origins {
            let origins = origins.iter().copied();
            query.and_where(Expr::col((Entity, Column::OriginLocationId)).is_in(origins));
        }
        query
    }

    async fn highest_id(&self) -> Result<TransferId, DbErr> {
        let query = Query::select()
            .expr(Func::max(id_column()).cast_as("bigint"))
            .from(data_transfer::Entity)
            .to_owned();
        let row = self.database.connection().query_one(&query).await?;
        let highest: Option<TransferId> = row
            .map(|row| row.try_get_by_index(0))
            .transpose()?
            .flatten();
        Ok(highest.unwrap_or(TransferId::new(0)))
    }
}

/// Rows that a scan has read.
struct ScannedRows {
    delays: HashMap<TransferId, i64>,
    open: Vec<TransferId>,
    failed: Vec<TransferId>,
}

impl ScannedRows {
    fn new(delays: HashMap<TransferId, i64>) -> Self {
        Self {
            delays,
            open: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Passes the rows of one statement to `see`; returns the id of the last row.
    fn page(
        &mut self,
        rows: &[QueryResult],
        see: &mut impl FnMut(OpenTransfer),
    ) -> Result<Option<TransferId>, DbErr> {
        let mut last = None;
        for row in rows {
            let id: TransferId = row.try_get("", ID)?;
            last = Some(id);
            let status: Label<Status> = row.try_get("", STATUS)?;
            match status.known() {
                Some(Status::Failed) => self.failed.push(id),
                Some(status) => {
                    // One id more than the maximum is stored, as a mark for too many ids.
                    if self.open.len() <= MAX_CURSOR_IDS {
                        self.open.push(id);
                    }
                    let retry_count = row.try_get("", RETRY_COUNT)?;
                    see(OpenTransfer {
                        id,
                        status,
                        origin_location_id: row.try_get("", ORIGIN_ID)?,
                        destination_location_id: row.try_get("", DESTINATION_ID)?,
                        has_delay: status == Status::Pending
                            && has_delay(&self.delays, id, retry_count),
                    });
                }
                None => {}
            }
        }
        Ok(last)
    }

    /// Fills the cursor with FAILED rows up to its maximum, the highest ids first, because operators reset such rows.
    fn cursor(mut self, highest: TransferId) -> Option<ScanCursor> {
        let room = MAX_CURSOR_IDS.checked_sub(self.open.len())?;
        self.failed.sort_unstable_by_key(|id| Reverse(*id));
        self.failed.truncate(room);
        let mut ids = self.open;
        ids.append(&mut self.failed);
        ids.sort_unstable();
        Some(ScanCursor { highest, ids })
    }
}

/// Returns true if a delay applies to a transfer with this `retry_count`.
pub(super) fn has_delay(
    delays: &HashMap<TransferId, i64>,
    id: TransferId,
    retry_count: Option<i64>,
) -> bool {
    // Same conversion as for `retry_count` of a row.
    delays.get(&id) == Some(&Ord::max(retry_count.unwrap_or(0), 0))
}

pub(super) fn id_column() -> Expr {
    Expr::col((data_transfer::Entity, data_transfer::Column::Id))
}

/// Names of the columns that [`Repository::scan`] selects.
pub(super) const RETRY_COUNT: &str = "retry_count";
const STATUS: &str = "status";
const ORIGIN_ID: &str = "origin_id";
const DESTINATION_ID: &str = "destination_id";
