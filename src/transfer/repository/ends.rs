//! Sites and locations at the two ends of transfers.

use std::collections::HashMap;

use entity::{data_location, data_transfer, site};
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoIden, JoinType, SelectStatement};
use sea_orm::{ColumnTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QueryResult};
use serde::Serialize;
use utoipa::ToSchema;

use super::Repository;
use crate::transfer::database::DatabaseError;

/// One end of a transfer, with the names that a queue name needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct TransferEnd {
    /// Short name of the site.
    pub site: String,
    /// Name of the location.
    pub location: String,
}

/// Error of listing the locations of a site.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// No site has this short name.
    #[error("there is no site `{name}`; the database has {}", list(.known))]
    Unknown {
        /// Short name in the request.
        name: String,
        /// Short names of all sites.
        known: Vec<String>,
    },
    /// The database returned an error.
    #[error("the site's locations could not be read")]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for SiteError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

impl Repository {
    /// Returns all locations that have a site, by location id.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn transfer_ends(&self) -> Result<HashMap<i64, TransferEnd>, DatabaseError> {
        let reading = async {
            let db = self.database.connection();
            let sites = self.short_names().await?;
            let locations = data_location::Entity::find().all(db).await?;
            let place = |location: data_location::Model| {
                let endpoint = TransferEnd {
                    site: sites.get(&location.site_id)?.clone(),
                    location: location.name,
                };
                Some((location.id, endpoint))
            };
            Ok(locations.into_iter().filter_map(place).collect())
        };
        self.database.bounded(reading).await
    }

    /// Returns the names of a site's locations, in their order of use.
    ///
    /// # Errors
    /// [`SiteError::Unknown`] with the short names of all sites; [`SiteError::Database`].
    pub async fn locations_of_site(&self, short_name: &str) -> Result<Vec<String>, SiteError> {
        let reading = async {
            let db = self.database.connection();
            let sites = site::Entity::find()
                .order_by_asc(site::Column::ShortName)
                .all(db)
                .await?;
            let Some(site) = sites.iter().find(|site| site.short_name == short_name) else {
                let known = sites.into_iter().map(|site| site.short_name).collect();
                return Err(SiteError::Unknown {
                    name: short_name.to_owned(),
                    known,
                });
            };
            let locations = data_location::Entity::find()
                .filter(data_location::Column::SiteId.eq(site.id))
                .order_by_asc(data_location::Column::Priority)
                .order_by_asc(data_location::Column::Id)
                .all(db)
                .await?;
            Ok(locations
                .into_iter()
                .map(|location| location.name)
                .collect())
        };
        self.database.bounded(reading).await
    }
}

/// Name under which [`with_ends`] selects the transfer's id.
pub(super) const ID: &str = "id";

/// Names for each end: alias of the location, alias of its site, and the names of the two selected columns.
const ORIGIN: [&str; 4] = [
    "origin",
    "origin_site",
    "origin_location",
    "origin_site_name",
];
const DESTINATION: [&str; 4] = [
    "destination",
    "destination_site",
    "destination_location",
    "destination_site_name",
];

/// Adds the id and the names of both ends to a query of transfers. Transfers without a location or a site are included:
/// otherwise they would wait forever without being noticed.
pub(super) fn with_ends(query: &mut SelectStatement) -> &mut SelectStatement {
    use data_transfer::{Column, Entity};
    query.expr_as(Expr::col((Entity, Column::Id)).cast_as("bigint"), ID);
    for ([location, site, location_name, site_name], key) in [
        (ORIGIN, Column::OriginLocationId),
        (DESTINATION, Column::DestinationLocationId),
    ] {
        query
            .join_as(
                JoinType::LeftJoin,
                data_location::Entity,
                location,
                Expr::col((location, data_location::Column::Id)).equals((Entity, key)),
            )
            .join_as(
                JoinType::LeftJoin,
                site::Entity,
                site,
                Expr::col((site, site::Column::Id))
                    .equals((location, data_location::Column::SiteId)),
            )
            .expr_as(
                Expr::col((location, data_location::Column::Name)),
                location_name.into_iden(),
            )
            .expr_as(
                Expr::col((site, site::Column::ShortName)),
                site_name.into_iden(),
            );
    }
    query
}

/// Reads the columns that [`with_ends`] selects.
pub(super) fn ends(row: &QueryResult) -> Result<(Option<TransferEnd>, Option<TransferEnd>), DbErr> {
    let read = |[_, _, location, site]: [&str; 4]| {
        let location: Option<String> = row.try_get("", location)?;
        let site: Option<String> = row.try_get("", site)?;
        Ok::<_, DbErr>(
            site.zip(location)
                .map(|(site, location)| TransferEnd { site, location }),
        )
    };
    Ok((read(ORIGIN)?, read(DESTINATION)?))
}
