//! Time since which a transfer is SCHEDULED, and its message.
//!
//! A record is written with SCHEDULED, in one transaction, and removed when a worker takes the transfer. A row
//! that another program made SCHEDULED gets its record when a manager first sees it. In other states a record
//! holds only the number of times that the transfer was sent again.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_schedule`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_schedule")]
pub struct Model {
    /// The transfer.
    #[sea_orm(primary_key, auto_increment = false)]
    pub data_transfer_id: i64,
    /// Time at which it became SCHEDULED, or was first seen so. By the database's clock.
    pub scheduled_at: DateTimeUtc,
    /// Queue of its message; none where another program sent it.
    pub queue: Option<String>,
    /// Celery's id of the task; none where another program sent it.
    pub task_id: Option<String>,
    /// Times that the row was made PENDING because its message was lost, since a worker last took it.
    pub resent: i64,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
