//! Schedule records: for each SCHEDULED row, the time and the message.
//!
//! Only the manager makes a row SCHEDULED, together with a confirmed message and a record. Messages can still be lost
//! (a purged queue, a message that expires, a worker that acknowledges early and dies), and other programs set
//! SCHEDULED without a record. With the records, the manager finds rows that no worker has taken for too long, see
//! [`crate::manager`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use entity::{Status, Timestamp, data_transfer, transfer_worker_lease, transfer_worker_schedule};
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict, Query};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QueryOrder,
    Set,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::schedule::MAX_IDS;
use super::{Repository, TransferSummary, delay, find_lease, lock, replace_nul};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::TransferId;

/// Record of a row, valid while the row is SCHEDULED.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ScheduleRecord {
    /// The transfer.
    pub data_transfer_id: TransferId,
    /// Time at which the row became SCHEDULED, or at which a manager first saw it in this state. By the database's
    /// clock.
    pub scheduled_at: DateTime<Utc>,
    /// Queue of the message; `None` if another program sent it.
    pub queue: Option<String>,
    /// Celery's id of the task; `None` if another program sent it.
    pub task_id: Option<String>,
    /// Number of times that the row was made PENDING because its message was lost, since a worker last took it.
    pub resent: i64,
}

impl From<transfer_worker_schedule::Model> for ScheduleRecord {
    fn from(row: transfer_worker_schedule::Model) -> Self {
        Self {
            data_transfer_id: row.data_transfer_id.into(),
            scheduled_at: row.scheduled_at,
            queue: row.queue,
            task_id: row.task_id,
            resent: row.resent,
        }
    }
}

/// Next state of a transfer whose message was consumed without running its task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Withdrawal {
    /// PENDING: the manager sends another message.
    Pending,
    /// FAILED, with this reason.
    Failed(String),
}

impl Repository {
    /// Returns true if the database has the table of schedule records.
    pub fn has_schedule(&self) -> bool {
        self.schema.has_schedule
    }

    /// Returns all records, the oldest first; also those of rows that are no longer SCHEDULED.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn schedule_records(&self) -> Result<Vec<ScheduleRecord>, DatabaseError> {
        use transfer_worker_schedule::{Column, Entity};
        if !self.schema.has_schedule {
            return Ok(Vec::new());
        }
        let reading = async {
            let rows = Entity::find()
                .order_by_asc(Column::ScheduledAt)
                .order_by_asc(Column::DataTransferId)
                .all(self.database.connection())
                .await?;
            Ok(rows.into_iter().map(ScheduleRecord::from).collect())
        };
        self.database.bounded(reading).await
    }

    /// Adds the records of SCHEDULED transfers to a list.
    pub(super) async fn add_schedules(&self, to: &mut [TransferSummary]) -> Result<(), DbErr> {
        let is_scheduled = |transfer: &TransferSummary| transfer.status.means(Status::Scheduled);
        if !self.schema.has_schedule || !to.iter().any(is_scheduled) {
            return Ok(());
        }
        // As many rows as transfers that wait for a worker.
        let rows = transfer_worker_schedule::Entity::find()
            .all(self.database.connection())
            .await?;
        let mut records: HashMap<_, _> = rows
            .into_iter()
            .map(ScheduleRecord::from)
            .map(|record| (record.data_transfer_id, record))
            .collect();
        for transfer in to.iter_mut().filter(|transfer| is_scheduled(transfer)) {
            transfer.schedule = records.remove(&transfer.id);
        }
        Ok(())
    }

    /// Condition: the transfer has a record that is older than `age`.
    pub(super) fn is_scheduled_since(&self, age: Duration, now: DateTime<Utc>) -> Expr {
        use transfer_worker_schedule::{Column, Entity};
        if !self.schema.has_schedule {
            return Expr::val(1).eq(0);
        }
        let since = TimeDelta::from_std(age)
            .ok()
            .and_then(|age| now.checked_sub_signed(age))
            .unwrap_or(DateTime::<Utc>::MIN_UTC);
        let recorded = Query::select()
            .column(Column::DataTransferId)
            .from(Entity)
            .and_where(Expr::col(Column::ScheduledAt).lte(since))
            .to_owned();
        Expr::col((data_transfer::Entity, data_transfer::Column::Id)).in_subquery(recorded)
    }

    /// Returns the record of one SCHEDULED transfer.
    pub(super) async fn schedule_record(
        &self,
        id: TransferId,
    ) -> Result<Option<ScheduleRecord>, DbErr> {
        if !self.schema.has_schedule {
            return Ok(None);
        }
        let row = transfer_worker_schedule::Entity::find_by_id(id)
            .one(self.database.connection())
            .await?;
        Ok(row.map(ScheduleRecord::from))
    }

    /// Adds records, with the current time, for SCHEDULED rows without one.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn record_scheduled(&self, ids: &[TransferId]) -> Result<(), DatabaseError> {
        use transfer_worker_schedule::{Column, Entity};
        let recording = async {
            let db = self.database.connection();
            let now = database::now(db).await?;
            for ids in ids.chunks(MAX_IDS) {
                let rows = ids.iter().map(|id| record(*id, now, None));
                let existing = OnConflict::column(Column::DataTransferId)
                    .do_nothing()
                    .to_owned();
                Entity::insert_many(rows)
                    .on_conflict(existing)
                    .exec_without_returning(db)
                    .await?;
            }
            Ok(())
        };
        self.database.bounded(recording).await
    }

    /// Returns those of the transfers that are SCHEDULED and have no lease.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn still_scheduled(
        &self,
        ids: &[TransferId],
    ) -> Result<HashSet<TransferId>, DatabaseError> {
        use data_transfer::{Column, Entity};
        let mut found = HashSet::new();
        for ids in ids.chunks(MAX_IDS) {
            let id = || Expr::col((Entity, Column::Id));
            let leased = Query::select()
                .expr(Expr::val(1))
                .from(transfer_worker_lease::Entity)
                .and_where(
                    Expr::col((
                        transfer_worker_lease::Entity,
                        transfer_worker_lease::Column::DataTransferId,
                    ))
                    .equals((Entity, Column::Id)),
                )
                .to_owned();
            let query = Query::select()
                .expr(id().cast_as("bigint"))
                .from(Entity)
                .and_where(id().is_in(ids.iter().copied()))
                .and_where(self.status_is(&[Status::Scheduled]))
                .and_where(Expr::exists(leased).not())
                .to_owned();
            for row in self.rows(&query).await? {
                found.insert(row.try_get_by_index(0).map_err(DatabaseError::from)?);
            }
        }
        Ok(found)
    }

    /// Makes a row PENDING because its message is lost, so that the manager sends another one by the rules of the link.
    /// Returns false if the row has changed since `seen` was read.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn send_again(&self, seen: &ScheduleRecord) -> Result<bool, DatabaseError> {
        let changing = async |tx: &DatabaseTransaction| Ok(self.send_again_in(tx, seen).await?);
        self.database.bounded(self.database.write(changing)).await
    }

    async fn send_again_in(
        &self,
        tx: &DatabaseTransaction,
        seen: &ScheduleRecord,
    ) -> Result<bool, DbErr> {
        use transfer_worker_schedule::{Column, Entity};
        let id = seen.data_transfer_id;
        if !self.lock_if_scheduled(tx, id).await? {
            return Ok(false);
        }
        let counted = Entity::update_many()
            .col_expr(Column::Resent, Expr::val(seen.resent.saturating_add(1)))
            .filter(Column::DataTransferId.eq(id))
            .filter(Column::ScheduledAt.eq(seen.scheduled_at))
            .filter(Column::Resent.eq(seen.resent))
            .exec(tx)
            .await?;
        // Another manager has changed the record since it was read.
        if counted.rows_affected == 0 {
            return Ok(false);
        }
        delay::forget(tx, id).await?;
        self.set_status(id, Status::Pending).exec(tx).await?;
        Ok(true)
    }

    /// Changes a SCHEDULED row whose message was consumed without running its task. Returns false if the row is not
    /// SCHEDULED, if it has a lease, or if it has another message.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn withdraw(
        &self,
        id: TransferId,
        task_id: &str,
        withdrawal: &Withdrawal,
    ) -> Result<bool, DatabaseError> {
        let changing = async |tx: &DatabaseTransaction| {
            Ok(self.withdraw_in(tx, id, task_id, withdrawal).await?)
        };
        self.database.bounded(self.database.write(changing)).await
    }

    async fn withdraw_in(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        task_id: &str,
        withdrawal: &Withdrawal,
    ) -> Result<bool, DbErr> {
        use data_transfer::Column;
        if !self.lock_if_scheduled(tx, id).await? {
            return Ok(false);
        }
        if self.schema.has_schedule {
            let record = transfer_worker_schedule::Entity::find_by_id(id)
                .one(tx)
                .await?;
            let known = record.and_then(|record| record.task_id);
            if known.is_some_and(|known| known != replace_nul(task_id)) {
                return Ok(false);
            }
        }
        self.forget_schedule(tx, id).await?;
        let update = match withdrawal {
            Withdrawal::Pending => self.set_status(id, Status::Pending),
            Withdrawal::Failed(reason) => {
                let now = database::now(tx).await?;
                let message = self.schema.fit_failure_message(replace_nul(reason));
                self.set_status(id, Status::Failed)
                    .col_expr(Column::EndTime, Expr::val(Timestamp(now)))
                    .col_expr(Column::FailureErrorMessage, Expr::val(message))
            }
        };
        update.exec(tx).await?;
        Ok(true)
    }

    /// Locks a row; returns true if it is SCHEDULED and has no lease.
    async fn lock_if_scheduled(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
    ) -> Result<bool, DbErr> {
        let row = lock(tx, id).await?;
        let is_scheduled = row.is_some_and(|row| row.status.means(Status::Scheduled));
        Ok(is_scheduled && find_lease(tx, id).await?.is_none())
    }

    /// Removes records of rows that are neither PENDING nor SCHEDULED: they have ended, or another program's worker has
    /// taken them.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn forget_stale_schedules(&self) -> Result<(), DatabaseError> {
        use data_transfer::{Column, Entity};
        use transfer_worker_schedule::{Column as Recorded, Entity as Records};
        let open = Query::select()
            .expr(Expr::val(1))
            .from(Entity)
            .and_where(Expr::col((Entity, Column::Id)).equals((Records, Recorded::DataTransferId)))
            .and_where(self.status_is(&[Status::Pending, Status::Scheduled]))
            .to_owned();
        let removing = async {
            Records::delete_many()
                .filter(Expr::exists(open).not())
                .exec(self.database.connection())
                .await?;
            Ok(())
        };
        self.database.bounded(removing).await
    }

    /// Removes the record of a transfer that leaves SCHEDULED.
    pub(super) async fn forget_schedule(
        &self,
        db: &impl ConnectionTrait,
        id: TransferId,
    ) -> Result<(), DbErr> {
        if self.schema.has_schedule {
            transfer_worker_schedule::Entity::delete_by_id(id)
                .exec(db)
                .await?;
        }
        Ok(())
    }

    /// Writes the records of rows that become SCHEDULED, before their messages are sent: without a record, no message
    /// must be sent.
    pub(super) async fn begin_schedule(
        &self,
        tx: &DatabaseTransaction,
        queues: &[(TransferId, Arc<str>)],
    ) -> Result<(), DbErr> {
        use transfer_worker_schedule::{Column, Entity};
        if !self.schema.has_schedule || queues.is_empty() {
            return Ok(());
        }
        let now = database::now(tx).await?;
        let rows = queues
            .iter()
            .map(|(id, queue)| record(*id, now, Some(queue)));
        // `resent` is kept until a worker takes the row.
        let again = OnConflict::column(Column::DataTransferId)
            .update_columns([Column::ScheduledAt, Column::Queue, Column::TaskId])
            .to_owned();
        Entity::insert_many(rows)
            .on_conflict(again)
            .exec_without_returning(tx)
            .await
            .map(drop)
    }

    /// Adds the ids of the sent tasks to the records.
    pub(super) async fn complete_schedule(
        &self,
        tx: &DatabaseTransaction,
        sent: &HashMap<TransferId, String>,
    ) -> Result<(), DbErr> {
        use transfer_worker_schedule::{Column, Entity};
        if !self.schema.has_schedule || sent.is_empty() {
            return Ok(());
        }
        let task_id = sent.iter().fold(
            sea_orm::sea_query::CaseStatement::new(),
            |case, (id, task_id)| {
                let is_it = Expr::col(Column::DataTransferId).eq(*id);
                case.case(is_it, Expr::val(replace_nul(task_id)))
            },
        );
        Entity::update_many()
            .col_expr(Column::TaskId, task_id.into())
            .filter(Column::DataTransferId.is_in(sent.keys().copied()))
            .exec(tx)
            .await
            .map(drop)
    }
}

fn record(
    id: TransferId,
    now: DateTime<Utc>,
    queue: Option<&str>,
) -> transfer_worker_schedule::ActiveModel {
    transfer_worker_schedule::ActiveModel {
        data_transfer_id: Set(id.get()),
        scheduled_at: Set(now),
        queue: Set(queue.map(replace_nul)),
        task_id: Set(None),
        resent: Set(0),
    }
}
