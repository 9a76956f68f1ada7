//! Attempts that ended since some time, for reports.

use std::collections::{BTreeSet, HashMap};

use chrono::{DateTime, Utc};
use entity::{Outcome, Timestamp, data_transfer, transfer_worker_attempt};
use sea_orm::sea_query::{Expr, ExprTrait as _, Query};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
};

use super::Repository;
use super::ends::TransferEnd;
use super::schedule::MAX_IDS;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::link::LinkName;

/// An attempt that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedAttempt {
    /// The transfer.
    pub data_transfer_id: TransferId,
    /// Link of the transfer; `None` if its row, or the row of one of its sites, no longer exists.
    pub link: Option<LinkName>,
    /// Creation time of the transfer; `None` if the database does not have it.
    pub created_at: Option<DateTime<Utc>>,
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Start of the attempt.
    pub started_at: DateTime<Utc>,
    /// End of the attempt.
    pub ended_at: DateTime<Utc>,
    /// Outcome of the attempt.
    pub outcome: Outcome,
    /// Stable error code, for programs.
    pub error_code: Option<String>,
    /// Bytes copied.
    pub bytes: u64,
    /// Mean rate of the copy, in bytes per second.
    pub rate_bytes_per_s: u64,
}

/// Columns of an attempt.
type Row = (
    TransferId,
    i32,
    DateTime<Utc>,
    DateTime<Utc>,
    Outcome,
    Option<String>,
    Option<i64>,
    Option<i64>,
);

/// Columns of a transfer that its attempts need.
struct Transfer {
    link: Option<LinkName>,
    created_at: Option<DateTime<Utc>>,
}

impl Repository {
    /// Returns the attempts that have ended since a time, in the order of their ends.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn ended_attempts(
        &self,
        since: DateTime<Utc>,
    ) -> Result<Vec<EndedAttempt>, DatabaseError> {
        let ends = self.transfer_ends().await?;
        let reading = async {
            let rows = self.ended_rows(since).await?;
            let ids: BTreeSet<TransferId> = rows.iter().map(|row| row.0).collect();
            let ids: Vec<TransferId> = ids.into_iter().collect();
            let mut transfers = HashMap::new();
            for ids in ids.chunks(MAX_IDS) {
                transfers.extend(self.transfers_of(ids, &ends).await?);
            }
            Ok(rows
                .into_iter()
                .map(|row| attempt(row, &transfers))
                .collect())
        };
        self.database.bounded(reading).await
    }

    async fn ended_rows(&self, since: DateTime<Utc>) -> Result<Vec<Row>, DbErr> {
        use transfer_worker_attempt::{Column, Entity};
        Entity::find()
            .select_only()
            .columns([
                Column::DataTransferId,
                Column::Attempt,
                Column::StartedAt,
                Column::EndedAt,
                Column::Outcome,
                Column::ErrorCode,
                Column::Bytes,
                Column::RateBytesPerS,
            ])
            .filter(Column::EndedAt.gte(since))
            .filter(Column::Outcome.is_not_null())
            .order_by_asc(Column::EndedAt)
            .into_tuple()
            .all(self.database.connection())
            .await
    }

    async fn transfers_of(
        &self,
        ids: &[TransferId],
        ends: &HashMap<i64, TransferEnd>,
    ) -> Result<HashMap<TransferId, Transfer>, DbErr> {
        use data_transfer::{Column, Entity, Optional};
        let mut query = Query::select();
        for column in [
            Column::Id,
            Column::OriginLocationId,
            Column::DestinationLocationId,
        ] {
            query.expr(Expr::col(column).cast_as("bigint"));
        }
        if self.schema.has_transfer_created_at {
            query.expr(Expr::col(Optional::CreatedAt).cast_as("text"));
        }
        query
            .from(Entity)
            .and_where(Expr::col(Column::Id).is_in(ids.iter().copied()));
        let mut found = HashMap::new();
        for row in self.database.connection().query_all(&query).await? {
            let id: i64 = row.try_get_by_index(0)?;
            let site = |index| {
                let location: Option<i64> = row.try_get_by_index(index)?;
                let end = location.and_then(|location| ends.get(&location));
                Ok::<_, DbErr>(end.map(|end| end.site.clone()))
            };
            let created_at: Option<Timestamp> = match self.schema.has_transfer_created_at {
                // A time that cannot be read is not worth more than the rest of the report.
                true => row.try_get_by_index(3).ok().flatten(),
                false => None,
            };
            let sites = site(1)?.zip(site(2)?);
            let transfer = Transfer {
                link: sites.map(|(origin, destination)| LinkName {
                    origin,
                    destination,
                }),
                created_at: created_at.map(|Timestamp(time)| time),
            };
            found.insert(TransferId::new(id), transfer);
        }
        Ok(found)
    }
}

fn attempt(row: Row, transfers: &HashMap<TransferId, Transfer>) -> EndedAttempt {
    let (id, number, started_at, ended_at, outcome, error_code, bytes, rate) = row;
    let transfer = transfers.get(&id);
    let count = |value: Option<i64>| value.and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
    EndedAttempt {
        data_transfer_id: id,
        link: transfer.and_then(|transfer| transfer.link.clone()),
        created_at: transfer.and_then(|transfer| transfer.created_at),
        attempt: AttemptNumber::new(number),
        started_at,
        ended_at,
        outcome,
        error_code,
        bytes: count(bytes),
        rate_bytes_per_s: count(rate),
    }
}
