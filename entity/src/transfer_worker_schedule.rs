//! Schedule records: time since which a transfer is SCHEDULED, and its message.
//!
//! A record is written in the transaction that sets SCHEDULED, and removed when a worker takes the transfer. If another
//! program made the row SCHEDULED, a manager writes the record when it first sees the row. In other states a record
//! holds only the number of times that the transfer was sent again.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_schedule`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_schedule")]
pub struct Model {
    /// Id of the transfer.
    #[sea_orm(primary_key, auto_increment = false)]
    pub data_transfer_id: i64,
    /// Time at which the row became SCHEDULED, or at which a manager first saw it in this state. By the database's
    /// clock.
    pub scheduled_at: DateTimeUtc,
    /// Queue of the message; null if another program sent it.
    pub queue: Option<String>,
    /// Celery's id of the task; null if another program sent it.
    pub task_id: Option<String>,
    /// Number of times that the row was made PENDING because its message was lost, since a worker last took it.
    pub resent: i64,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
