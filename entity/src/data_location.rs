//! A storage location at a site.
//!
//! Base class of a joined-table inheritance in SQLAlchemy: `storage_type` selects the kind, and a location on a disk
//! has one more row in [`crate::disk_data_location`]. The tables of the other kinds are not read, because bbcp cannot
//! reach such locations.

use sea_orm::entity::prelude::*;

use crate::{Label, LocationType, StorageType};

/// A row of `data_location`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_location")]
pub struct Model {
    /// Primary key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Name, as used in queue names.
    pub name: String,
    /// Purpose of the location.
    #[sea_orm(select_as = "text")]
    pub location_type: Label<LocationType>,
    /// Kind of storage.
    #[sea_orm(select_as = "text")]
    pub storage_type: Label<StorageType>,
    /// Order of use among the locations of one site, lowest first.
    #[sea_orm(select_as = "bigint")]
    pub priority: Option<i64>,
    /// Id of the site.
    #[sea_orm(select_as = "bigint")]
    pub site_id: i64,
}

/// Columns that the live schema may lack.
#[derive(Debug, Clone, Copy, DeriveIden)]
pub enum Optional {
    /// True if the location is in use. Without the column, every location is in use.
    Active,
}

/// Relations to other tables.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {
    /// The site of the location.
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
