//! Seeding of sites, locations and routes.

use entity::{StorageType, data_location, data_transfer_route, disk_data_location, site};
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoIden as _, Query};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QueryOrder,
};

use super::{
    Cell, LocationSpec, RouteSpec, SiteSpec, Topology, TopologyError, insert, refuse_alembic,
};
use crate::transfer::repository::Repository;

/// Numbers of rows of a seed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seeded {
    /// Created rows.
    pub created: usize,
    /// Changed rows.
    pub updated: usize,
    /// Rows that need no change.
    pub unchanged: usize,
}

/// Creates the sites, locations and routes of a topology, and changes those that exist and differ.
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

    /// Creates a row, or changes the existing one. The existing row is given by its key, with true if it needs no
    /// change.
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
