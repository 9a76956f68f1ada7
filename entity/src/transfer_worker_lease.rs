//! Who is at a transfer now.
//!
//! At most one row for a transfer. There is no foreign key to `data_transfer`: that table's owner
//! must be able to delete rows, and to drop the table, without knowing of this one.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_lease`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_lease")]
pub struct Model {
    /// The transfer.
    #[sea_orm(primary_key, auto_increment = false)]
    pub data_transfer_id: i64,
    /// Secret of the holder: whoever takes the lease over writes a new one.
    pub token: String,
    /// Number of the attempt.
    pub attempt: i32,
    /// Celery's id of the task.
    pub task_id: String,
    /// Celery's name of the worker, `celery@host`.
    pub owner_node: String,
    /// Its host.
    pub owner_host: String,
    /// Its process.
    pub owner_pid: i64,
    /// Boot and PID namespace within which the process id means something.
    pub owner_pid_scope: String,
    /// Start time of the process, in the kernel's units.
    pub owner_started: String,
    /// Begin of the lease, by the database's clock, as all times here.
    pub acquired_at: DateTimeUtc,
    /// Last renewal.
    pub renewed_at: DateTimeUtc,
    /// End, unless it is renewed.
    pub expires_at: DateTimeUtc,
    /// Bytes copied so far.
    pub bytes_done: i64,
    /// Bytes to copy, once known.
    pub bytes_total: Option<i64>,
    /// Current rate.
    pub rate_bytes_per_s: i64,
    /// Where the copy goes, `host:path`, once it is planned. Unique: no two leases have one
    /// destination.
    pub destination: Option<String>,
    /// What the holder is doing, once it has said so.
    pub phase: Option<String>,
    /// Data streams of the copy, once it is planned.
    pub streams: Option<i32>,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
