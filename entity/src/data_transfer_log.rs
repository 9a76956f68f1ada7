//! Location of the log file of an attempt.

use sea_orm::entity::prelude::*;

use crate::Timestamp;

/// A row of `data_transfer_log`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_transfer_log")]
pub struct Model {
    /// Primary key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Id of the transfer.
    #[sea_orm(select_as = "bigint")]
    pub data_transfer_id: i64,
    /// Time at which the row was created.
    #[sea_orm(select_as = "text")]
    pub timestamp: Option<Timestamp>,
    /// Path of the log file on the worker's host.
    pub log_path: String,
}

/// Columns that the live schema may lack.
#[derive(Debug, Clone, Copy, DeriveIden)]
pub enum Optional {
    /// [`crate::Status`] of the transfer after the attempt.
    Status,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
