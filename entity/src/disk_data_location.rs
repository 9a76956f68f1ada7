//! What a location on a disk has beyond [`crate::data_location`].

use sea_orm::entity::prelude::*;

/// A row of `disk_data_location`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "disk_data_location")]
pub struct Model {
    /// Key, and that of the location.
    #[sea_orm(primary_key, auto_increment = false, select_as = "bigint")]
    pub data_location_id: i64,
    /// The host; none where it is the one that looks.
    pub host: Option<String>,
    /// The root directory.
    pub path: String,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
