//! Signs of life of workers and managers.
//!
//! The table is for people: nothing is decided by it. Without it (in a database that an older version of this program
//! migrated), nothing is written.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use entity::transfer_worker_program;
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict};
use sea_orm::{
    ColumnTrait, DatabaseTransaction, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set,
};
use uuid::Uuid;

use super::{Repository, replace_nul};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::lease::Owner;

/// Interval between two signs of life.
pub const PROGRAM_INTERVAL: Duration = Duration::from_secs(30);

/// Age of the last sign of life after which a row is removed.
const KEPT: TimeDelta = TimeDelta::days(7);

/// Maximum number of programs in a list.
const LISTED: u64 = 500;

/// Kind of a program that gives signs of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramKind {
    /// Runs transfers.
    Worker,
    /// Schedules transfers.
    Manager,
}

impl ProgramKind {
    /// Name of the kind, as stored in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Manager => "manager",
        }
    }
}

/// A process that gives signs of life.
#[derive(Debug, Clone)]
pub struct ProgramProcess {
    /// The process.
    pub owner: Owner,
    /// Kind of the program.
    pub kind: ProgramKind,
    /// Version of the program.
    pub version: &'static str,
    /// Unique word of the process.
    pub token: Uuid,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramRecord {
    /// Celery's name of the node.
    pub name: String,
    /// `worker` or `manager`.
    pub kind: String,
    /// Host of the process.
    pub host: String,
    /// Version of the program.
    pub version: String,
    /// Start of the process.
    pub started_at: DateTime<Utc>,
    /// Last sign of life.
    pub seen_at: DateTime<Utc>,
    /// End of the process; `None` while it runs, and if it has not ended in order.
    pub ended_at: Option<DateTime<Utc>>,
}

impl Repository {
    /// Returns true if the database has the table of signs of life.
    pub fn has_programs(&self) -> bool {
        self.schema.has_programs
    }

    /// Writes the first sign of life of a process, and removes old rows.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn start_program(&self, process: &ProgramProcess) -> Result<(), DatabaseError> {
        use transfer_worker_program::{ActiveModel, Column, Entity};
        if !self.schema.has_programs {
            return Ok(());
        }
        let starting = async |tx: &DatabaseTransaction| {
            let now = database::now(tx).await?;
            let row = ActiveModel {
                name: Set(replace_nul(&process.owner.node)),
                token: Set(process.token.to_string()),
                kind: Set(process.kind.as_str().to_owned()),
                host: Set(replace_nul(&process.owner.host)),
                pid: Set(process.owner.pid.into()),
                version: Set(process.version.to_owned()),
                started_at: Set(now),
                seen_at: Set(now),
                ended_at: Set(None),
            };
            let again = OnConflict::column(Column::Name)
                .update_columns([
                    Column::Token,
                    Column::Kind,
                    Column::Host,
                    Column::Pid,
                    Column::Version,
                    Column::StartedAt,
                    Column::SeenAt,
                    Column::EndedAt,
                ])
                .to_owned();
            Entity::insert(row)
                .on_conflict(again)
                .exec_without_returning(tx)
                .await?;
            Entity::delete_many()
                .filter(Column::SeenAt.lt(now - KEPT))
                .exec(tx)
                .await?;
            Ok(())
        };
        self.database.bounded(self.database.write(starting)).await
    }

    /// Writes a further sign of life. Returns false if the process has no row (any more): it was removed, or another
    /// process has the same name.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn continue_program(&self, process: &ProgramProcess) -> Result<bool, DatabaseError> {
        use transfer_worker_program::Column;
        self.update_program(process, Column::SeenAt).await
    }

    /// Records the end of a process.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn end_program(&self, process: &ProgramProcess) -> Result<(), DatabaseError> {
        use transfer_worker_program::Column;
        self.update_program(process, Column::EndedAt)
            .await
            .map(drop)
    }

    /// Sets a time of a process to the current time.
    async fn update_program(
        &self,
        process: &ProgramProcess,
        time: transfer_worker_program::Column,
    ) -> Result<bool, DatabaseError> {
        use transfer_worker_program::{Column, Entity};
        if !self.schema.has_programs {
            return Ok(true);
        }
        let updating = async {
            let db = self.database.connection();
            let now = database::now(db).await?;
            let updated = Entity::update_many()
                .col_expr(time, Expr::val(now))
                .filter(Column::Name.eq(replace_nul(&process.owner.node)))
                .filter(Expr::col(Column::Token).eq(process.token.to_string()))
                .exec(db)
                .await?;
            Ok(updated.rows_affected > 0)
        };
        self.database.bounded(updating).await
    }

    /// Returns the workers and managers of the last days, by kind and name; `None` if the database has no table for them.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn programs(&self) -> Result<Option<Vec<ProgramRecord>>, DatabaseError> {
        use transfer_worker_program::{Column, Entity};
        if !self.schema.has_programs {
            return Ok(None);
        }
        let reading = async {
            let rows = Entity::find()
                .order_by_asc(Column::Kind)
                .order_by_asc(Column::Name)
                .limit(LISTED)
                .all(self.database.connection())
                .await?;
            Ok(Some(rows.into_iter().map(ProgramRecord::from).collect()))
        };
        self.database.bounded(reading).await
    }
}

impl From<transfer_worker_program::Model> for ProgramRecord {
    fn from(row: transfer_worker_program::Model) -> Self {
        Self {
            name: row.name,
            kind: row.kind,
            host: row.host,
            version: row.version,
            started_at: row.started_at,
            seen_at: row.seen_at,
            ended_at: row.ended_at,
        }
    }
}
