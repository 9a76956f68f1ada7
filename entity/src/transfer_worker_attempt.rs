//! History of transfers: one row for each attempt.

use sea_orm::entity::prelude::*;
use serde::Serialize;

/// Outcome of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumIter, DeriveActiveEnum, Serialize)]
#[sea_orm(rs_type = "String", db_type = "String(StringLen::N(16))")]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The file is at its destination.
    #[sea_orm(string_value = "completed")]
    Completed,
    /// The attempt failed; another one will follow.
    #[sea_orm(string_value = "retried")]
    Retried,
    /// The attempt failed; no further one will follow.
    #[sea_orm(string_value = "failed")]
    Failed,
    /// The attempt was stopped, its worker died, or the row was changed by an operator or another program. Does not
    /// count as a failure.
    #[sea_orm(string_value = "interrupted")]
    Interrupted,
}

/// A row of `transfer_worker_attempt`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_attempt")]
pub struct Model {
    /// Primary key.
    #[sea_orm(primary_key)]
    pub id: i64,
    /// Id of the transfer.
    pub data_transfer_id: i64,
    /// Number of the attempt: 1, 2, … Interrupted attempts count.
    pub attempt: i32,
    /// Celery's id of the task.
    pub task_id: String,
    /// Celery's name of the worker.
    pub worker: String,
    /// Start of the attempt, by the database's clock.
    pub started_at: DateTimeUtc,
    /// End of the attempt; null while it runs.
    pub ended_at: Option<DateTimeUtc>,
    /// Outcome of the attempt; null while it runs.
    pub outcome: Option<Outcome>,
    /// Stable error code, for programs.
    pub error_code: Option<String>,
    /// Message for people: the error, or how the copy of a completed attempt was verified.
    #[sea_orm(column_type = "Text", nullable)]
    pub message: Option<String>,
    /// Bytes copied.
    pub bytes: Option<i64>,
    /// Mean rate of the copy, in bytes per second.
    pub rate_bytes_per_s: Option<i64>,
    /// Digest on which origin and destination agree, as `algorithm:hex`.
    pub digest: Option<String>,
    /// Path of the log file on the worker's host.
    pub log_path: Option<String>,
    /// Temporary name of the copy at the destination; null after the file was renamed or removed.
    pub temporary_name: Option<String>,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
