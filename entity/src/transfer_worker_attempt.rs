//! The history of a transfer: one row for each attempt.

use sea_orm::entity::prelude::*;
use serde::Serialize;

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumIter, DeriveActiveEnum, Serialize)]
#[sea_orm(rs_type = "String", db_type = "String(StringLen::N(16))")]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The file is at its goal.
    #[sea_orm(string_value = "completed")]
    Completed,
    /// It failed and is tried again.
    #[sea_orm(string_value = "retried")]
    Retried,
    /// It failed for good.
    #[sea_orm(string_value = "failed")]
    Failed,
    /// It was stopped, or its worker died, or someone changed the row meanwhile. Not a failure.
    #[sea_orm(string_value = "interrupted")]
    Interrupted,
}

/// A row of `transfer_worker_attempt`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_attempt")]
pub struct Model {
    /// Key.
    #[sea_orm(primary_key)]
    pub id: i64,
    /// The transfer.
    pub data_transfer_id: i64,
    /// Number of the attempt: 1, 2, … Interrupted ones count.
    pub attempt: i32,
    /// Celery's id of the task.
    pub task_id: String,
    /// Celery's name of the worker.
    pub worker: String,
    /// Begin, by the database's clock.
    pub started_at: DateTimeUtc,
    /// End; none while it runs.
    pub ended_at: Option<DateTimeUtc>,
    /// How it ended; none while it runs.
    pub outcome: Option<Outcome>,
    /// Class of the error, stable and for programs.
    pub error_code: Option<String>,
    /// What happened, for people.
    #[sea_orm(column_type = "Text", nullable)]
    pub message: Option<String>,
    /// Bytes copied.
    pub bytes: Option<i64>,
    /// Mean rate.
    pub rate_bytes_per_s: Option<i64>,
    /// Digest that both ends agreed upon, `algorithm:hex`.
    pub digest: Option<String>,
    /// Path of the log file on the worker's host.
    pub log_path: Option<String>,
    /// Name under which the copy was written, until it was renamed or removed.
    pub temporary_name: Option<String>,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
