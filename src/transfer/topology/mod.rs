//! Sites, locations, routes and transfers of an ops-db that no other component fills.
//!
//! In production ccat_data_transfer writes these rows, and both functions refuse a database that Alembic owns. They are
//! part of the program because two documented commands use them: `db seed` and `transfers create` set up a trial on a
//! host that has only this package.

use std::fmt;
use std::str::FromStr;

use entity::{DatabaseEnum, LocationType, RouteType, StorageType, data_location, site};
use figment::Figment;
use figment::providers::{Format as _, Toml};
use sea_orm::sea_query::{DynIden, Expr, ExprTrait as _, Query};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryOrder};
use serde::{Deserialize, Deserializer, de};

use super::database::DatabaseError;
use super::repository::{LocationRecord, Repository, insert_into};

mod create;
mod seed;

pub use create::{NewTransfer, create_transfer};
pub use seed::{Seeded, seed};

/// Sites, their locations and the routes between them, read from a TOML file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// `[[sites]]`
    #[serde(default)]
    pub sites: Vec<SiteSpec>,
    /// `[[routes]]`
    #[serde(default)]
    pub routes: Vec<RouteSpec>,
}

/// One of `[[sites]]`; known by its short name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteSpec {
    /// Display name.
    pub name: String,
    /// Name in queue names.
    pub short_name: String,
    /// Geographic location.
    #[serde(default)]
    pub location: Option<String>,
    /// `[[sites.locations]]`
    #[serde(default)]
    pub locations: Vec<LocationSpec>,
}

/// One of `[[sites.locations]]`; known by its name within the site.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocationSpec {
    /// Name in queue names.
    pub name: String,
    /// Purpose.
    #[serde(rename = "type", deserialize_with = "member")]
    pub location_type: LocationType,
    /// Kind of storage.
    #[serde(rename = "storage", deserialize_with = "member")]
    pub storage_type: StorageType,
    /// Host of a disk; empty for the worker's own host.
    #[serde(default)]
    pub host: String,
    /// Root directory of a disk.
    #[serde(default)]
    pub path: String,
    /// Order of use among the site's locations.
    #[serde(default)]
    pub priority: i64,
}

/// One of `[[routes]]`; known by its two sites.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSpec {
    /// Short name of the origin's site.
    pub origin: String,
    /// Short name of the destination's site.
    pub destination: String,
    /// Copy program.
    pub method: String,
    /// Kind of route.
    #[serde(rename = "type", deserialize_with = "member")]
    pub route_type: RouteType,
}

fn member<'de, D: Deserializer<'de>, E: DatabaseEnum>(deserializer: D) -> Result<E, D::Error> {
    let label = String::deserialize(deserializer)?;
    E::from_label(&label).ok_or_else(|| {
        let members: Vec<_> = E::ALL.iter().map(|member| member.value()).collect();
        de::Error::custom(format!("`{label}` is not one of {}", members.join(", ")))
    })
}

impl FromStr for Topology {
    type Err = TopologyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Figment::from(Toml::string(text))
            .extract()
            .map_err(|error| TopologyError::Syntax(Box::new(error)))
    }
}

/// A location by its names, written `SITE/LOCATION`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocationName {
    /// Short name of the site.
    pub site: String,
    /// Name of the location.
    pub location: String,
}

impl FromStr for LocationName {
    type Err = TopologyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((site, location)) if !site.is_empty() && !location.is_empty() => Ok(Self {
                site: site.to_owned(),
                location: location.to_owned(),
            }),
            _ => Err(TopologyError::LocationName(text.to_owned())),
        }
    }
}

impl fmt::Display for LocationName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.site, self.location)
    }
}

/// Refusal or failure to fill the ops-db. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// The file is not valid TOML, or has unknown or wrong keys.
    #[error("the topology is not valid")]
    Syntax(#[source] Box<figment::Error>),
    /// A route names a site that is neither in the file nor in the database.
    #[error("a route names the unknown site `{name}`; known sites: {}", listed(.known))]
    UnknownSite {
        /// The short name.
        name: String,
        /// Known names.
        known: Vec<String>,
    },
    /// Not of the form `SITE/LOCATION`.
    #[error("`{0}` is not of the form SITE/LOCATION")]
    LocationName(String),
    /// The location does not exist.
    #[error("there is no location {name}; known locations: {}", listed(.known))]
    UnknownLocation {
        /// Requested location.
        name: LocationName,
        /// Known names.
        known: Vec<String>,
    },
    /// The path does not stay below its root.
    #[error("`{0}` is not a relative path to a file")]
    RelativePath(String),
    /// The database is in production: ccat_data_transfer fills it.
    #[error(
        "the table `{}` exists: this ops-db is in production, and ccat_data_transfer fills it",
        entity::ALEMBIC_TABLE
    )]
    OwnedByAlembic,
    /// Error of the database.
    #[error("the ops-db could not be filled")]
    Database(#[from] DatabaseError),
}

/// Joins names for the end of a sentence that begins with "there are".
fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "none yet".to_owned()
    } else {
        names.join(", ")
    }
}

impl From<DbErr> for TopologyError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

/// Looks up a location by its names.
///
/// # Errors
/// [`TopologyError::UnknownLocation`], or an error of the database.
pub async fn locate(
    repository: &Repository,
    name: &LocationName,
) -> Result<LocationRecord, TopologyError> {
    let locating = async {
        let id = location_id(repository.database().connection(), name).await?;
        let location = repository.location(Some(id)).await?;
        // The location was deleted between the two queries.
        location.ok_or_else(|| TopologyError::UnknownLocation {
            name: name.clone(),
            known: Vec::new(),
        })
    };
    repository.database().bounded(locating).await
}

/// A column and its new value.
type Cell = (DynIden, Expr);

async fn refuse_alembic(tx: &DatabaseTransaction) -> Result<(), TopologyError> {
    if migration::table_exists(tx, entity::ALEMBIC_TABLE).await? {
        return Err(TopologyError::OwnedByAlembic);
    }
    Ok(())
}

/// Inserts a row and returns its key. An active model cannot be used: enum columns need a cast, and the key may be of
/// any integer width.
async fn insert<T: EntityTrait>(
    tx: &DatabaseTransaction,
    table: T,
    key: T::Column,
    cells: Vec<Cell>,
) -> Result<i64, DbErr> {
    let mut statement = insert_into(table, cells);
    statement.returning(Query::returning().expr(Expr::col(key).cast_as("bigint")));
    let row = tx
        .query_one(&statement)
        .await?
        .ok_or(DbErr::RecordNotInserted)?;
    row.try_get_by_index(0)
}

async fn location_id(db: &impl ConnectionTrait, name: &LocationName) -> Result<i64, TopologyError> {
    let locations = data_location::Entity::find()
        .find_also_related(site::Entity)
        .order_by_asc(data_location::Column::Id)
        .all(db)
        .await?;
    let mut known = Vec::new();
    for (location, site) in locations {
        let Some(site) = site else { continue };
        if site.short_name == name.site && location.name == name.location {
            return Ok(location.id);
        }
        known.push(format!("{}/{}", site.short_name, location.name));
    }
    Err(TopologyError::UnknownLocation {
        name: name.clone(),
        known,
    })
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_topology_name_the_key() {
        let text = "[[sites]]\nname = 'A'\nshort_name = 'a'\n\
                    [[sites.locations]]\nname = 'x'\ntype = 'bufer'\nstorage = 'disk'\n";
        let TopologyError::Syntax(error) = text.parse::<Topology>().unwrap_err() else {
            panic!("not a syntax error");
        };
        let text = error.to_string();
        assert!(
            text.contains("`bufer` is not one of source, buffer"),
            "{text}"
        );
        assert!("[[sits]]\nname = 'A'".parse::<Topology>().is_err());
    }

    #[test]
    fn a_location_has_two_names() {
        let name: LocationName = "cologne/buffer".parse().unwrap();
        assert_eq!(
            (name.site.as_str(), name.location.as_str()),
            ("cologne", "buffer")
        );
        for text in ["cologne", "/buffer", "cologne/", ""] {
            assert!(text.parse::<LocationName>().is_err(), "{text}");
        }
    }
}
