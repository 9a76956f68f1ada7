//! A place at a site where packages are.
//!
//! The base class of a joined-table inheritance: `storage_type` tells which kind it is, and a disk
//! has a further row in [`crate::disk_data_location`]. The tables of the other kinds are not read;
//! bbcp cannot reach them.

use sea_orm::entity::prelude::*;

use crate::{Label, LocationType, StorageType};

/// A row of `data_location`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_location")]
pub struct Model {
    /// Key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Name in queue names.
    pub name: String,
    /// What it is for.
    #[sea_orm(select_as = "text")]
    pub location_type: Label<LocationType>,
    /// What it is made of.
    #[sea_orm(select_as = "text")]
    pub storage_type: Label<StorageType>,
    /// Order of use among a site's locations.
    #[sea_orm(select_as = "bigint")]
    pub priority: Option<i64>,
    /// The site.
    #[sea_orm(select_as = "bigint")]
    pub site_id: i64,
}

/// Columns that a schema may lack.
#[derive(Debug, Clone, Copy, DeriveIden)]
pub enum Optional {
    /// Whether the location is in use; it is where the column is missing.
    Active,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {
    /// The site.
    #[sea_orm(
        belongs_to = "super::site::Entity",
        from = "Column::SiteId",
        to = "super::site::Column::Id"
    )]
    Site,
}

impl Related<super::site::Entity> for Entity {
    fn to() -> RelationDef {
        Relation::Site.def()
    }
}

impl ActiveModelBehavior for ActiveModel {}
