//! Further columns of a [`crate::data_location`] that is on a disk.

use sea_orm::entity::prelude::*;

/// A row of `disk_data_location`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "disk_data_location")]
pub struct Model {
    /// Primary key; equal to the id of the location.
    #[sea_orm(primary_key, auto_increment = false, select_as = "bigint")]
    pub data_location_id: i64,
    /// Host with the disk; null if the disk is mounted on the host that reads the row.
    pub host: Option<String>,
    /// Root directory of the location.
    pub path: String,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
