//! Delay before the next attempt of a failed transfer.
//!
//! The delay is in the database, not in the memory of a manager, because managers restart and several may run. It is
//! valid only while the transfer is PENDING with the `retry_count` with which the delay was written, so that a change
//! of the row by an operator ends it.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use entity::{data_transfer, transfer_worker_delay};
use sea_orm::sea_query::{Expr, ExprTrait as _, Func, OnConflict, Query, SelectStatement};
use sea_orm::{ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QuerySelect, Set};

use super::{Repository, replace_nul, retry_count};
use crate::clock;
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::TransferId;

/// Replaces the delay of a transfer by one of `wait` from `now`; zero removes it.
pub(super) async fn replace(
    db: &impl ConnectionTrait,
    id: TransferId,
    now: DateTime<Utc>,
    wait: Duration,
    retry_count: u32,
    error_code: &str,
) -> Result<(), DbErr> {
    use transfer_worker_delay::{ActiveModel, Column, Entity};
    if wait.is_zero() {
        return forget(db, id).await;
    }
    let row = ActiveModel {
        data_transfer_id: Set(id.get()),
        not_before: Set(clock::after(now, wait)),
        retry_count: Set(retry_count.into()),
        error_code: Set(replace_nul(error_code)),
    };
    let again = OnConflict::column(Column::DataTransferId)
        .update_columns([Column::NotBefore, Column::RetryCount, Column::ErrorCode])
        .to_owned();
    Entity::insert(row)
        .on_conflict(again)
        .exec_without_returning(db)
        .await
        .map(drop)
}

/// Removes the delay of a transfer.
pub(super) async fn forget(db: &impl ConnectionTrait, id: TransferId) -> Result<(), DbErr> {
    transfer_worker_delay::Entity::delete_by_id(id)
        .exec(db)
        .await
        .map(drop)
}

/// Returns the delay that currently applies to the transfer of this row.
pub(super) async fn current_delay(
    db: &impl ConnectionTrait,
    row: &data_transfer::Model,
    now: DateTime<Utc>,
) -> Result<Option<transfer_worker_delay::Model>, DbErr> {
    use transfer_worker_delay::{Column, Entity};
    Entity::find_by_id(row.id)
        .filter(Column::RetryCount.eq(i64::from(retry_count(row))))
        .filter(Column::NotBefore.gt(now))
        .one(db)
        .await
}

/// Returns the `retry_count` of each delay that has not passed, by transfer; of all transfers, or of `ids`.
pub(super) async fn current_delays(
    db: &impl ConnectionTrait,
    ids: Option<&[TransferId]>,
) -> Result<HashMap<TransferId, i64>, DbErr> {
    use transfer_worker_delay::{Column, Entity};
    let now = database::now(db).await?;
    let mut query = Entity::find()
        .select_only()
        .column(Column::DataTransferId)
        .column(Column::RetryCount)
        .filter(Column::NotBefore.gt(now));
    if let Some(ids) = ids {
        query = query.filter(Column::DataTransferId.is_in(ids.iter().copied()));
    }
    let rows: Vec<(TransferId, i64)> = query.into_tuple().all(db).await?;
    Ok(rows.into_iter().collect())
}

/// Subquery: a delay applies at `now` to the transfer of the outer query.
pub(super) fn delay_applies(now: DateTime<Utc>) -> SelectStatement {
    use data_transfer::{Column as Transfer, Entity as Transfers};
    use transfer_worker_delay::{Column, Entity};
    let count = Func::coalesce([Expr::col((Transfers, Transfer::RetryCount)), Expr::val(0)]);
    Query::select()
        .expr(Expr::val(1))
        .from(Entity)
        .and_where(Expr::col((Entity, Column::DataTransferId)).equals((Transfers, Transfer::Id)))
        .and_where(Expr::col((Entity, Column::NotBefore)).gt(now))
        .and_where(Expr::col((Entity, Column::RetryCount)).eq(count))
        .to_owned()
}

impl Repository {
    /// Removes the delay of a transfer that a person starts by hand.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn forget_delay(&self, id: TransferId) -> Result<(), DatabaseError> {
        let forgetting = async { Ok(forget(self.database.connection(), id).await?) };
        self.database.bounded(forgetting).await
    }
}
