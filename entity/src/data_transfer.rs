//! The transfer of one package from one location to another.

use sea_orm::entity::prelude::*;

use crate::{Label, Status, Timestamp};

/// A row of `data_transfer`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_transfer")]
pub struct Model {
    /// Primary key; the argument of the Celery task.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Id of the package to transfer.
    #[sea_orm(select_as = "bigint")]
    pub data_transfer_package_id: Option<i64>,
    /// Id of the location to copy from.
    #[sea_orm(select_as = "bigint")]
    pub origin_location_id: Option<i64>,
    /// Id of the location to copy to.
    #[sea_orm(select_as = "bigint")]
    pub destination_location_id: Option<i64>,
    /// State of the transfer.
    #[sea_orm(select_as = "text")]
    pub status: Label<Status>,
    /// Number of failed attempts so far; null counts as 0.
    #[sea_orm(select_as = "bigint")]
    pub retry_count: Option<i64>,
    /// Start of the latest attempt.
    #[sea_orm(select_as = "text")]
    pub start_time: Option<Timestamp>,
    /// End of the last attempt; null while further attempts are possible.
    #[sea_orm(select_as = "text")]
    pub end_time: Option<Timestamp>,
    /// Error message of the latest failed attempt.
    pub failure_error_message: Option<String>,
}

/// Columns that the live schema may lack.
#[derive(Debug, Clone, Copy, DeriveIden)]
pub enum Optional {
    /// State of the unpacking at the destination. It belongs to another component: this project writes it only in rows
    /// that it creates.
    UnpackStatus,
    /// Time at which the row was created.
    CreatedAt,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
