//! Sites and locations at the two ends of transfers.

use std::collections::HashMap;

use entity::{data_location, data_transfer, site};
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoIden, JoinType, SelectStatement};
use sea_orm::{ColumnTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QueryResult};
use serde::Serialize;

use super::Repository;
use crate::transfer::database::DatabaseError;

/// One end of a transfer, as far as a queue's name needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TransferEnd {
    /// Short name of the site.
    pub site: String,
    /// Name of the location.
    pub location: String,
}

/// Why a site's locations could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// There is no site of this short name.
    #[error("there is no site `{name}`; the database has {}", list(.known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// The short names that there are.
        known: Vec<String>,
    },
    /// The database.
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
    /// Every location that has a site, by id.
    ///
    /// # Errors
    /// What the database says.
    pub async fn places(&self) -> Result<HashMap<i64, TransferEnd>, DatabaseError> {
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

    /// Names of a site's locations, in their order of use.
    ///
    /// # Errors
    /// [`SiteError::Unknown`], which lists the sites that there are; else what the database says.
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

/// The two ends: aliases of the location and of its site, and names of the selected columns.
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

/// Adds the id and the names of both ends to a query of transfers. Rows that lead nowhere are not
/// left out: they would wait for ever without anybody knowing.
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

/// Reads what [`with_ends`] selects.
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
