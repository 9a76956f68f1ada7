//! Signs of life of workers and managers: one row for each node name.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_program`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_program")]
pub struct Model {
    /// Celery's name of the node, `name@host`. A new process of the same name replaces the row.
    #[sea_orm(primary_key, auto_increment = false, column_type = "Text")]
    pub name: String,
    /// Unique word of the process: a process changes only its own row.
    #[sea_orm(column_type = "Text")]
    pub token: String,
    /// `worker` or `manager`.
    pub kind: String,
    /// Host of the process.
    #[sea_orm(column_type = "Text")]
    pub host: String,
    /// Process id.
    pub pid: i64,
    /// Version of the program.
    #[sea_orm(column_type = "Text")]
    pub version: String,
    /// Start of the process, by the database's clock.
    pub started_at: DateTimeUtc,
    /// Last sign of life.
    pub seen_at: DateTimeUtc,
    /// End of the process; null while it runs, and if it has not ended in order.
    pub ended_at: Option<DateTimeUtc>,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
