//! Filling an ops-db from here, for tests and development.
//!
//! Sites, locations, routes and transfers are made by other components in production. Both
//! functions refuse a database that Alembic owns.

use std::fmt;
use std::path::{Component, Path};
use std::str::FromStr;

use entity::{
    DatabaseEnum, LocationType, PackageState, RouteType, Status, StorageType, Timestamp,
    data_location, data_transfer, data_transfer_package, data_transfer_route, disk_data_location,
    site,
};
use figment::Figment;
use figment::providers::{Format as _, Toml};
use sea_orm::sea_query::{DynIden, Expr, ExprTrait as _, IntoIden as _, Query};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QueryOrder,
};
use serde::{Deserialize, Deserializer, de};

use super::database::{self, DatabaseError};
use super::repository::{LocationRecord, Repository, insert_into};

/// Sites, their locations and the routes between them, as a TOML file has them.
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
    /// Name for people.
    pub name: String,
    /// Name in queue names.
    pub short_name: String,
    /// Where it is.
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
    /// What it is for.
    #[serde(rename = "type", deserialize_with = "member")]
    pub location_type: LocationType,
    /// What it is made of.
    #[serde(rename = "storage", deserialize_with = "member")]
    pub storage_type: StorageType,
    /// Host of a disk; empty for the one that looks.
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
    /// Short name of the site where it begins.
    pub origin: String,
    /// Short name of the site where it ends.
    pub destination: String,
    /// The program.
    pub method: String,
    /// How it leads.
    #[serde(rename = "type", deserialize_with = "member")]
    pub route_type: RouteType,
}

fn member<'de, D: Deserializer<'de>, E: DatabaseEnum>(deserializer: D) -> Result<E, D::Error> {
    let label = String::deserialize(deserializer)?;
    E::from_label(&label).ok_or_else(|| {
        let members: Vec<_> = E::ALL.iter().map(|member| member.value()).collect();
        de::Error::custom(format!("`{label}` is none of {}", members.join(", ")))
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

/// What a seed has changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seeded {
    /// Rows that were made.
    pub created: usize,
    /// Rows that were changed.
    pub updated: usize,
    /// Rows that were as they should be.
    pub unchanged: usize,
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

/// A transfer to be made, with its package.
#[derive(Debug, Clone)]
pub struct NewTransfer {
    /// Path of the file below the origin's root.
    pub relative_path: String,
    /// Its size.
    pub size_bytes: Option<u64>,
    /// Its checksum.
    pub checksum: Option<String>,
    /// Where it is.
    pub origin: LocationName,
    /// Where it is to be.
    pub destination: LocationName,
}

/// Why the ops-db was not filled. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// The file cannot be read.
    #[error("the topology is not valid")]
    Syntax(#[source] Box<figment::Error>),
    /// A route names a site that is neither in the file nor in the database.
    #[error("a route names the site `{name}`; there are {}", listed(.known))]
    UnknownSite {
        /// The short name.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// Not of the form `SITE/LOCATION`.
    #[error("`{0}` is not of the form SITE/LOCATION")]
    LocationName(String),
    /// No such location.
    #[error("there is no location {name}; there are {}", listed(.known))]
    UnknownLocation {
        /// What was asked for.
        name: LocationName,
        /// Those that there are.
        known: Vec<String>,
    },
    /// Not a path below a root.
    #[error("`{0}` is not a relative path to a file")]
    RelativePath(String),
    /// The database is filled by others.
    #[error(
        "the table `{}` exists: this ops-db is in production, and is filled by ccat_data_transfer",
        entity::ALEMBIC_TABLE
    )]
    OwnedByAlembic,
    /// The database.
    #[error("the ops-db could not be filled")]
    Database(#[from] DatabaseError),
}

/// Names for the end of a sentence that says "there are".
fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "none yet; `ccat-transfer db seed` makes them".to_owned()
    } else {
        names.join(", ")
    }
}

impl From<DbErr> for TopologyError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

/// Makes the sites, locations and routes of a topology, and changes those that exist and differ.
/// Nothing is removed.
///
/// # Errors
/// See [`TopologyError`].
pub async fn seed(repository: &Repository, topology: &Topology) -> Result<Seeded, TopologyError> {
    let seeding = async |tx: &DatabaseTransaction| {
        refuse_alembic(tx).await?;
        let mut seeder = Seeder {
            repository,
            tx,
            seeded: Seeded::default(),
        };
        for site in &topology.sites {
            seeder.site(site).await?;
        }
        for route in &topology.routes {
            seeder.route(route).await?;
        }
        Ok(seeder.seeded)
    };
    let database = repository.database();
    database.bounded(database.write(seeding)).await
}

/// The location of that name.
///
/// # Errors
/// [`TopologyError::UnknownLocation`], or what the database says.
pub async fn locate(
    repository: &Repository,
    name: &LocationName,
) -> Result<LocationRecord, TopologyError> {
    let locating = async {
        let id = location_id(repository.database().connection(), name).await?;
        let location = repository.location(Some(id)).await?;
        // Gone since.
        location.ok_or_else(|| TopologyError::UnknownLocation {
            name: name.clone(),
            known: Vec::new(),
        })
    };
    repository.database().bounded(locating).await
}

/// Makes a package and its PENDING transfer, and returns the transfer's id.
///
/// # Errors
/// See [`TopologyError`].
pub async fn create_transfer(
    repository: &Repository,
    new: &NewTransfer,
) -> Result<i64, TopologyError> {
    let file_name = file_name(&new.relative_path)?;
    let creating = async |tx: &DatabaseTransaction| {
        refuse_alembic(tx).await?;
        let origin = location_id(tx, &new.origin).await?;
        let destination = location_id(tx, &new.destination).await?;
        let now = Timestamp(database::now(tx).await?);
        let package = insert(
            tx,
            data_transfer_package::Entity,
            data_transfer_package::Column::Id,
            package_cells(repository, new, file_name, now),
        )
        .await?;
        let transfer = insert(
            tx,
            data_transfer::Entity,
            data_transfer::Column::Id,
            transfer_cells(repository, package, origin, destination, now),
        )
        .await?;
        Ok(transfer)
    };
    let database = repository.database();
    database.bounded(database.write(creating)).await
}

/// A column and what is written to it.
type Cell = (DynIden, Expr);

fn package_cells(
    repository: &Repository,
    new: &NewTransfer,
    file_name: &str,
    now: Timestamp,
) -> Vec<Cell> {
    use data_transfer_package::{Column, Optional};
    let schema = repository.schema();
    let size = new
        .size_bytes
        .map(|size| i64::try_from(size).unwrap_or(i64::MAX));
    let mut cells: Vec<Cell> = vec![
        (Column::FileName.into_iden(), Expr::val(file_name)),
        (
            Column::RelativePath.into_iden(),
            Expr::val(new.relative_path.as_str()),
        ),
        (Column::Size.into_iden(), Expr::val(size)),
        (
            Column::Checksum.into_iden(),
            Expr::val(new.checksum.clone()),
        ),
    ];
    if let Some(column) = &schema.package_state {
        cells.push((
            Optional::Status.into_iden(),
            column.write(PackageState::Waiting),
        ));
    }
    if schema.has_package_created_at {
        cells.push((Optional::CreatedAt.into_iden(), Expr::val(now)));
    }
    cells
}

fn transfer_cells(
    repository: &Repository,
    package: i64,
    origin: i64,
    destination: i64,
    now: Timestamp,
) -> Vec<Cell> {
    use data_transfer::{Column, Optional};
    let schema = repository.schema();
    let mut cells: Vec<Cell> = vec![
        (
            Column::DataTransferPackageId.into_iden(),
            Expr::val(package),
        ),
        (Column::OriginLocationId.into_iden(), Expr::val(origin)),
        (
            Column::DestinationLocationId.into_iden(),
            Expr::val(destination),
        ),
        (
            Column::Status.into_iden(),
            schema.transfer_status.write(Status::Pending),
        ),
        (Column::RetryCount.into_iden(), Expr::val(0)),
    ];
    if let Some(column) = &schema.unpack_status {
        cells.push((
            Optional::UnpackStatus.into_iden(),
            column.write(Status::Pending),
        ));
    }
    if schema.has_transfer_created_at {
        cells.push((Optional::CreatedAt.into_iden(), Expr::val(now)));
    }
    cells
}

/// The last part of a path that stays below its root.
fn file_name(relative_path: &str) -> Result<&str, TopologyError> {
    let path = Path::new(relative_path);
    let stays_below = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    path.file_name()
        .and_then(|name| name.to_str())
        .filter(|_| stays_below && !relative_path.ends_with('/'))
        .ok_or_else(|| TopologyError::RelativePath(relative_path.to_owned()))
}

async fn refuse_alembic(tx: &DatabaseTransaction) -> Result<(), TopologyError> {
    if migration::table_exists(tx, entity::ALEMBIC_TABLE).await? {
        return Err(TopologyError::OwnedByAlembic);
    }
    Ok(())
}

/// Inserts a row and returns its key. Not by an active model: enum columns need a cast, and the
/// key may be of any width.
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

/// A seed in progress.
struct Seeder<'a> {
    repository: &'a Repository,
    tx: &'a DatabaseTransaction,
    seeded: Seeded,
}

impl Seeder<'_> {
    async fn site(&mut self, spec: &SiteSpec) -> Result<(), DbErr> {
        use site::{Column, Entity};
        let existing = Entity::find()
            .filter(Column::ShortName.eq(spec.short_name.as_str()))
            .one(self.tx)
            .await?;
        let wanted = |id| site::Model {
            id,
            name: spec.name.clone(),
            short_name: spec.short_name.clone(),
            location: spec.location.clone(),
        };
        let cells: Vec<Cell> = vec![
            (Column::Name.into_iden(), Expr::val(spec.name.as_str())),
            (
                Column::ShortName.into_iden(),
                Expr::val(spec.short_name.as_str()),
            ),
            (
                Column::Location.into_iden(),
                Expr::val(spec.location.clone()),
            ),
        ];
        let existing = existing.map(|row| (row.id, row == wanted(row.id)));
        let id = self.put(Entity, Column::Id, existing, cells).await?;
        for location in &spec.locations {
            self.location(id, location).await?;
        }
        Ok(())
    }

    async fn location(&mut self, site_id: i64, spec: &LocationSpec) -> Result<(), DbErr> {
        use data_location::{Column, Entity, Optional};
        let existing = Entity::find()
            .filter(Column::SiteId.eq(site_id))
            .filter(Column::Name.eq(spec.name.as_str()))
            .one(self.tx)
            .await?;
        let schema = self.repository.schema();
        let mut cells: Vec<Cell> = vec![
            (Column::Name.into_iden(), Expr::val(spec.name.as_str())),
            (
                Column::LocationType.into_iden(),
                schema.location_type.write(spec.location_type),
            ),
            (
                Column::StorageType.into_iden(),
                schema.storage_type.write(spec.storage_type),
            ),
            (Column::Priority.into_iden(), Expr::val(spec.priority)),
            (Column::SiteId.into_iden(), Expr::val(site_id)),
        ];
        if schema.has_active && existing.is_none() {
            cells.push((Optional::Active.into_iden(), Expr::val(true)));
        }
        let existing = existing.map(|row| {
            let is_wanted = row.location_type.means(spec.location_type)
                && row.storage_type.means(spec.storage_type)
                && row.priority == Some(spec.priority);
            (row.id, is_wanted)
        });
        let id = self.put(Entity, Column::Id, existing, cells).await?;
        if spec.storage_type == StorageType::Disk {
            self.disk(id, spec).await
        } else {
            Ok(())
        }
    }

    async fn disk(&mut self, location_id: i64, spec: &LocationSpec) -> Result<(), DbErr> {
        use disk_data_location::{Column, Entity, Model};
        let wanted = Model {
            data_location_id: location_id,
            host: Some(spec.host.clone()).filter(|host| !host.is_empty()),
            path: spec.path.clone(),
        };
        let cells: Vec<Cell> = vec![
            (Column::DataLocationId.into_iden(), Expr::val(location_id)),
            (Column::Host.into_iden(), Expr::val(wanted.host.clone())),
            (Column::Path.into_iden(), Expr::val(wanted.path.as_str())),
        ];
        let existing = Entity::find_by_id(location_id).one(self.tx).await?;
        let existing = existing.map(|row| (location_id, row == wanted));
        self.put(Entity, Column::DataLocationId, existing, cells)
            .await
            .map(drop)
    }

    async fn route(&mut self, spec: &RouteSpec) -> Result<(), TopologyError> {
        use data_transfer_route::{Column, Entity};
        let origin = self.site_id(&spec.origin).await?;
        let destination = self.site_id(&spec.destination).await?;
        let existing = Entity::find()
            .filter(Column::OriginSiteId.eq(origin))
            .filter(Column::DestinationSiteId.eq(destination))
            .filter(Column::OriginLocationId.is_null())
            .filter(Column::DestinationLocationId.is_null())
            .one(self.tx)
            .await?;
        let route_type = &self.repository.schema().route_type;
        let cells: Vec<Cell> = vec![
            (Column::OriginSiteId.into_iden(), Expr::val(origin)),
            (
                Column::DestinationSiteId.into_iden(),
                Expr::val(destination),
            ),
            (Column::Method.into_iden(), Expr::val(spec.method.as_str())),
            (
                Column::RouteType.into_iden(),
                route_type.write(spec.route_type),
            ),
        ];
        let existing = existing.map(|row| {
            let is_wanted =
                row.method.as_ref() == Some(&spec.method) && row.route_type.means(spec.route_type);
            (row.id, is_wanted)
        });
        self.put(Entity, Column::Id, existing, cells).await?;
        Ok(())
    }

    async fn site_id(&self, short_name: &str) -> Result<i64, TopologyError> {
        let sites = site::Entity::find()
            .order_by_asc(site::Column::ShortName)
            .all(self.tx)
            .await?;
        sites
            .iter()
            .find(|site| site.short_name == short_name)
            .map(|site| site.id)
            .ok_or_else(|| TopologyError::UnknownSite {
                name: short_name.to_owned(),
                known: sites.iter().map(|site| site.short_name.clone()).collect(),
            })
    }

    /// Makes a row, or changes the existing one (its key, and whether it is as wanted).
    async fn put<T: EntityTrait>(
        &mut self,
        table: T,
        key: T::Column,
        existing: Option<(i64, bool)>,
        cells: Vec<Cell>,
    ) -> Result<i64, DbErr> {
        match existing {
            Some((id, true)) => {
                self.seeded.unchanged += 1;
                Ok(id)
            }
            Some((id, false)) => {
                self.seeded.updated += 1;
                let mut update = Query::update();
                update
                    .table(table)
                    .values(cells)
                    .and_where(Expr::col(key).eq(id));
                self.tx.execute(&update).await?;
                Ok(id)
            }
            None => {
                self.seeded.created += 1;
                insert(self.tx, table, key, cells).await
            }
        }
    }
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
    fn a_file_stays_below_its_root() {
        assert_eq!(file_name("2026/a.tar").unwrap(), "a.tar");
        for path in [
            "",
            "/a.tar",
            "../a.tar",
            "x/../a.tar",
            "./a.tar",
            "x/",
            "x/..",
        ] {
            assert!(file_name(path).is_err(), "{path}");
        }
    }

    #[test]
    fn errors_of_a_topology_name_the_key() {
        let text = "[[sites]]\nname = 'A'\nshort_name = 'a'\n\
                    [[sites.locations]]\nname = 'x'\ntype = 'bufer'\nstorage = 'disk'\n";
        let TopologyError::Syntax(error) = text.parse::<Topology>().unwrap_err() else {
            panic!("not a syntax error");
        };
        let text = error.to_string();
        assert!(text.contains("`bufer` is none of source, buffer"), "{text}");
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
