//! The transfer of one package from one location to another.

use sea_orm::entity::prelude::*;

use crate::{Label, Status, Timestamp};

/// A row of `data_transfer`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_transfer")]
pub struct Model {
    /// Key; the argument of the Celery task.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// What is transferred.
    #[sea_orm(select_as = "bigint")]
    pub data_transfer_package_id: Option<i64>,
    /// From here.
    #[sea_orm(select_as = "bigint")]
    pub origin_location_id: Option<i64>,
    /// To there.
    #[sea_orm(select_as = "bigint")]
    pub destination_location_id: Option<i64>,
    /// How far it is.
    #[sea_orm(select_as = "text")]
    pub status: Label<Status>,
    /// Failures so far; the column may be null, which is none.
    #[sea_orm(select_as = "bigint")]
    pub retry_count: Option<i64>,
    /// Begin of the latest attempt.
    #[sea_orm(select_as = "text")]
    pub start_time: Option<Timestamp>,
    /// End of the last attempt, once there is no further one.
    #[sea_orm(select_as = "text")]
    pub end_time: Option<Timestamp>,
    /// Why the latest attempt failed.
    pub failure_error_message: Option<String>,
}

/// Columns that a schema may lack.
#[derive(Debug, Clone, Copy, DeriveIden)]
pub enum Optional {
    /// State of the unpacking at the destination. Another component's: written only where a row is
    /// created.
    UnpackStatus,
    /// When the row was made.
    CreatedAt,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
