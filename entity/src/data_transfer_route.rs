//! A route between two sites.

use sea_orm::entity::prelude::*;

use crate::{Label, RouteType};

/// A row of `data_transfer_route`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_transfer_route")]
pub struct Model {
    /// Primary key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Id of the site to copy from.
    #[sea_orm(select_as = "bigint")]
    pub origin_site_id: i64,
    /// Id of the site to copy to.
    #[sea_orm(select_as = "bigint")]
    pub destination_site_id: i64,
    /// Program that makes the copies, e.g. `bbcp`.
    #[sea_orm(select_as = "text")]
    pub method: Option<String>,
    /// Kind of route.
    #[sea_orm(select_as = "text")]
    pub route_type: Label<RouteType>,
    /// Only location to copy from; null if the route is valid for all locations of the site.
    #[sea_orm(select_as = "bigint")]
    pub origin_location_id: Option<i64>,
    /// Only location to copy to; null if the route is valid for all locations of the site.
    #[sea_orm(select_as = "bigint")]
    pub destination_location_id: Option<i64>,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
