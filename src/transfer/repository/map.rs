//! The locations of all sites and the links between them, for checks of the whole system.

use std::collections::{HashMap, HashSet};

use entity::{
    Status, data_location, data_transfer, data_transfer_package, data_transfer_route, site,
};
use sea_orm::sea_query::{Expr, ExprTrait as _, JoinType, Query};
use sea_orm::{ConnectionTrait, DbErr, EntityTrait, QueryOrder};

use super::{LocationRecord, Repository};
use crate::transfer::database::DatabaseError;
use crate::transfer::link::{Link, LinkName, Overrides};

/// All locations and routes.
#[derive(Debug, Clone)]
pub struct LocationMap {
    /// Locations, by site and order of use.
    pub locations: Vec<LocationRecord>,
    /// Links with a route, each once for each method.
    pub links: Vec<RoutedLink>,
    /// Links with a row of their own, which may override settings.
    pub limited_links: Vec<Link>,
    /// Size in bytes of the largest package that waits for each location, by the location's id.
    pub largest_waiting: HashMap<i64, u64>,
    /// Ids of the locations from which transfers wait to be copied.
    pub waiting_origins: HashSet<i64>,
}

/// A link that has a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutedLink {
    /// Name of the link.
    pub name: LinkName,
    /// Program that makes the copies, e.g. `bbcp`.
    pub method: Option<String>,
}

impl LocationMap {
    /// Settings of a link that its row overrides.
    #[must_use]
    pub fn overrides(&self, name: &LinkName) -> Overrides {
        let link = self.limited_links.iter().find(|link| link.name == *name);
        link.map(|link| link.overrides.clone()).unwrap_or_default()
    }
}

impl Repository {
    /// Returns all locations and links.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn map(&self) -> Result<LocationMap, DatabaseError> {
        self.database
            .bounded(async { Ok(self.read_map().await?) })
            .await
    }

    async fn read_map(&self) -> Result<LocationMap, DbErr> {
        let db = self.database.connection();
        let rows = data_location::Entity::find()
            .order_by_asc(data_location::Column::SiteId)
            .order_by_asc(data_location::Column::Priority)
            .order_by_asc(data_location::Column::Id)
            .all(db)
            .await?;
        let mut locations = Vec::new();
        for row in rows {
            locations.extend(self.location(Some(row.id)).await?);
        }
        Ok(LocationMap {
            locations,
            links: self.read_routed_links().await?,
            limited_links: self.read_links().await?,
            largest_waiting: self.largest_waiting().await?,
            waiting_origins: self.waiting_origins().await?,
        })
    }

    /// Returns the links that have a route, each once for each method.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn routed_links(&self) -> Result<Vec<RoutedLink>, DatabaseError> {
        self.database
            .bounded(async { Ok(self.read_routed_links().await?) })
            .await
    }

    async fn read_routed_links(&self) -> Result<Vec<RoutedLink>, DbErr> {
        let sites = self.short_names().await?;
        let routes = data_transfer_route::Entity::find()
            .order_by_asc(data_transfer_route::Column::Id)
            .all(self.database.connection())
            .await?;
        let mut links: Vec<RoutedLink> = Vec::new();
        for route in routes {
            let ends = sites
                .get(&route.origin_site_id)
                .zip(sites.get(&route.destination_site_id));
            let Some((origin, destination)) = ends else {
                continue;
            };
            let link = RoutedLink {
                name: LinkName {
                    origin: origin.clone(),
                    destination: destination.clone(),
                },
                method: route.method,
            };
            if !links.contains(&link) {
                links.push(link);
            }
        }
        Ok(links)
    }

    /// Returns the short names of all sites, by id.
    pub(super) async fn short_names(&self) -> Result<HashMap<i64, String>, DbErr> {
        let sites = site::Entity::find().all(self.database.connection()).await?;
        Ok(sites
            .into_iter()
            .map(|site| (site.id, site.short_name))
            .collect())
    }

    async fn waiting_origins(&self) -> Result<HashSet<i64>, DbErr> {
        use data_transfer::{Column, Entity};
        let query = Query::select()
            .distinct()
            .expr_as(
                Expr::col((Entity, Column::OriginLocationId)).cast_as("bigint"),
                "location",
            )
            .from(Entity)
            .and_where(self.status_is(&[Status::Pending, Status::Scheduled]))
            .and_where(Expr::col((Entity, Column::OriginLocationId)).is_not_null())
            .to_owned();
        let rows = self.database.connection().query_all(&query).await?;
        rows.iter().map(|row| row.try_get("", "location")).collect()
    }

    async fn largest_waiting(&self) -> Result<HashMap<i64, u64>, DbErr> {
        use data_transfer::{Column, Entity};
        use data_transfer_package::{Column as PackageColumn, Entity as Packages};
        let query = Query::select()
            .expr_as(
                Expr::col((Entity, Column::DestinationLocationId)).cast_as("bigint"),
                "location",
            )
            .expr_as(
                Expr::col((Packages, PackageColumn::Size))
                    .max()
                    .cast_as("bigint"),
                "size",
            )
            .from(Entity)
            .join(
                JoinType::InnerJoin,
                Packages,
                Expr::col((Packages, PackageColumn::Id))
                    .equals((Entity, Column::DataTransferPackageId)),
            )
            .and_where(self.status_is(&[Status::Pending, Status::Scheduled]))
            .and_where(Expr::col((Entity, Column::DestinationLocationId)).is_not_null())
            .group_by_col((Entity, Column::DestinationLocationId))
            .to_owned();
        let rows = self.database.connection().query_all(&query).await?;
        let mut largest = HashMap::new();
        for row in rows {
            let size: Option<i64> = row.try_get("", "size")?;
            let size = size.and_then(|size| u64::try_from(size).ok());
            largest.insert(row.try_get("", "location")?, size.unwrap_or(0));
        }
        Ok(largest)
    }
}
