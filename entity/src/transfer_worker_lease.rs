//! Leases: the workers that currently run attempts.
//!
//! A transfer has at most one lease. The table has no foreign key to `data_transfer`: the owner of that table must be
//! able to delete rows, and to drop the table, without knowing about this one.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_lease`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_lease")]
pub struct Model {
    /// Id of the transfer.
    #[sea_orm(primary_key, auto_increment = false)]
    pub data_transfer_id: i64,
    /// Secret of the holder. A worker that takes the lease over writes a new token.
    pub token: String,
    /// Number of the attempt.
    pub attempt: i32,
    /// Celery's id of the task.
    pub task_id: String,
    /// Celery's name of the worker, `celery@host`.
    pub owner_node: String,
    /// Host of the worker.
    pub owner_host: String,
    /// Process id of the worker.
    pub owner_pid: i64,
    /// Boot id and PID namespace in which the process id is valid.
    pub owner_pid_scope: String,
    /// Start time of the process, in the kernel's units (clock ticks since boot).
    pub owner_started: String,
    /// Start of the lease. All times of this table are by the database's clock.
    pub acquired_at: DateTimeUtc,
    /// Time of the last renewal.
    pub renewed_at: DateTimeUtc,
    /// Expiry time, unless the lease is renewed before.
    pub expires_at: DateTimeUtc,
    /// Bytes copied so far.
    pub bytes_done: i64,
    /// Bytes to copy; null until known.
    pub bytes_total: Option<i64>,
    /// Current rate of the copy, in bytes per second.
    pub rate_bytes_per_s: i64,
    /// Path of the copy, as `host:path`; null until the copy is planned. Unique, so that no two leases have the same
    /// destination.
    pub destination: Option<String>,
    /// Current phase of the attempt; null in rows of older workers.
    pub phase: Option<String>,
    /// Number of data streams of the copy; null until the copy is planned.
    pub streams: Option<i32>,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
