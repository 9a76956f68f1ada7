//! Where the log of an attempt is.

use sea_orm::entity::prelude::*;

use crate::Timestamp;

/// A row of `data_transfer_log`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_transfer_log")]
pub struct Model {
    /// Key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// The transfer.
    #[sea_orm(select_as = "bigint")]
    pub data_transfer_id: i64,
    /// When the row was made.
    #[sea_orm(select_as = "text")]
    pub timestamp: Option<Timestamp>,
    /// Path of the log file, on the worker's host.
    pub log_path: String,
}

/// Columns that a schema may lack.
#[derive(Debug, Clone, Copy, DeriveIden)]
pub enum Optional {
    /// [`crate::Status`] that the attempt led to.
    Status,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
