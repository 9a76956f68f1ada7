//! A way from site to site.

use sea_orm::entity::prelude::*;

use crate::{Label, RouteType};

/// A row of `data_transfer_route`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_transfer_route")]
pub struct Model {
    /// Key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// From here.
    #[sea_orm(select_as = "bigint")]
    pub origin_site_id: i64,
    /// To there.
    #[sea_orm(select_as = "bigint")]
    pub destination_site_id: i64,
    /// By which program, e.g. `bbcp`.
    #[sea_orm(select_as = "text")]
    pub method: Option<String>,
    /// How it leads.
    #[sea_orm(select_as = "text")]
    pub route_type: Label<RouteType>,
    /// Only from this location, where it is set.
    #[sea_orm(select_as = "bigint")]
    pub origin_location_id: Option<i64>,
    /// Only to this location, where it is set.
    #[sea_orm(select_as = "bigint")]
    pub destination_location_id: Option<i64>,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
