//! The ops-db subset as SQLAlchemy would create it. Enums are native types with the names of the members on PostgreSQL,
//! and text on SQLite.

use entity::{
    DatabaseEnum, LocationType, PackageState, RouteType, Status, StorageType, data_location,
    data_transfer, data_transfer_log, data_transfer_package, data_transfer_route,
    disk_data_location, site,
};
use sea_orm_migration::prelude::extension::postgres::Type;
use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

/// Migration that creates the ops-db subset.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let enums = Enums {
            native: manager.get_database_backend() == DbBackend::Postgres,
        };
        if enums.native {
            create_type::<Status>(manager).await?;
            create_type::<LocationType>(manager).await?;
            create_type::<StorageType>(manager).await?;
            create_type::<RouteType>(manager).await?;
            create_type::<PackageState>(manager).await?;
        }
        for table in [
            site(),
            data_location(enums),
            disk_data_location(),
            data_transfer_route(enums),
            data_transfer_package(enums),
            data_transfer(enums),
            data_transfer_log(enums),
        ] {
            manager.create_table(table).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in entity::OPS_DB_TABLES.into_iter().rev() {
            manager
                .drop_table(Table::drop().table(table).to_owned())
                .await?;
        }
        if manager.get_database_backend() == DbBackend::Postgres {
            for name in [
                Status::TYPE_NAME,
                LocationType::TYPE_NAME,
                StorageType::TYPE_NAME,
                RouteType::TYPE_NAME,
                PackageState::TYPE_NAME,
            ] {
                manager
                    .drop_type(Type::drop().name(name).to_owned())
                    .await?;
            }
        }
        Ok(())
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

async fn create_type<E: DatabaseEnum>(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    let labels = E::ALL.iter().map(|member| member.name());
    manager
        .create_type(
            Type::create()
                .as_enum(E::TYPE_NAME)
                .values(labels)
                .to_owned(),
        )
        .await
}

/// Type of enum columns: native or text.
#[derive(Clone, Copy)]
struct Enums {
    native: bool,
}

impl Enums {
    fn column<E: DatabaseEnum>(self, name: impl IntoIden) -> ColumnDef {
        let mut column = ColumnDef::new(name);
        if self.native {
            column.custom(E::TYPE_NAME);
        } else {
            column.string_len(32);
        }
        column.not_null();
        column
    }
}

fn key(name: impl IntoIden) -> ColumnDef {
    ColumnDef::new(name)
        .integer()
        .not_null()
        .auto_increment()
        .primary_key()
        .to_owned()
}

fn created_at(name: impl IntoIden) -> ColumnDef {
    ColumnDef::new(name)
        .date_time()
        .not_null()
        .default(Expr::current_timestamp())
        .to_owned()
}

/// Foreign key constraint of a column.
fn refers<C: IntoIden, T: IntoTableRef, K: IntoIden>(
    column: C,
    table: T,
    key: K,
) -> ForeignKeyCreateStatement {
    ForeignKey::create()
        .from_col(column)
        .to(table, key)
        .to_owned()
}

fn site() -> TableCreateStatement {
    use site::Column;
    Table::create()
        .table(site::Entity)
        .col(key(Column::Id))
        .col(ColumnDef::new(Column::Name).string().not_null())
        .col(
            ColumnDef::new(Column::ShortName)
                .string()
                .not_null()
                .unique_key(),
        )
        .col(ColumnDef::new(Column::Location).string())
        .to_owned()
}

fn data_location(enums: Enums) -> TableCreateStatement {
    use data_location::{Column, Optional};
    Table::create()
        .table(data_location::Entity)
        .col(key(Column::Id))
        .col(ColumnDef::new(Column::Name).string().not_null())
        .col(enums.column::<LocationType>(Column::LocationType))
        .col(enums.column::<StorageType>(Column::StorageType))
        .col(
            ColumnDef::new(Column::Priority)
                .integer()
                .not_null()
                .default(0),
        )
        .col(
            ColumnDef::new(Optional::Active)
                .boolean()
                .not_null()
                .default(true),
        )
        .col(ColumnDef::new(Column::SiteId).integer().not_null())
        .foreign_key(&mut refers(Column::SiteId, site::Entity, site::Column::Id))
        .index(
            Index::create()
                .unique()
                .col(Column::SiteId)
                .col(Column::Name),
        )
        .to_owned()
}

fn disk_data_location() -> TableCreateStatement {
    use disk_data_location::Column;
    Table::create()
        .table(disk_data_location::Entity)
        .col(
            ColumnDef::new(Column::DataLocationId)
                .integer()
                .not_null()
                .primary_key(),
        )
        .col(ColumnDef::new(Column::Host).string())
        .col(ColumnDef::new(Column::Path).string().not_null())
        .foreign_key(&mut refers(
            Column::DataLocationId,
            data_location::Entity,
            data_location::Column::Id,
        ))
        .to_owned()
}

fn data_transfer_route(enums: Enums) -> TableCreateStatement {
    use data_transfer_route::Column;
    Table::create()
        .table(data_transfer_route::Entity)
        .col(key(Column::Id))
        .col(ColumnDef::new(Column::OriginSiteId).integer().not_null())
        .col(
            ColumnDef::new(Column::DestinationSiteId)
                .integer()
                .not_null(),
        )
        .col(ColumnDef::new(Column::Method).string().not_null())
        .col(enums.column::<RouteType>(Column::RouteType))
        .col(ColumnDef::new(Column::OriginLocationId).integer())
        .col(ColumnDef::new(Column::DestinationLocationId).integer())
        .foreign_key(&mut refers(
            Column::OriginSiteId,
            site::Entity,
            site::Column::Id,
        ))
        .foreign_key(&mut refers(
            Column::DestinationSiteId,
            site::Entity,
            site::Column::Id,
        ))
        .foreign_key(&mut refers(
            Column::OriginLocationId,
            data_location::Entity,
            data_location::Column::Id,
        ))
        .foreign_key(&mut refers(
            Column::DestinationLocationId,
            data_location::Entity,
            data_location::Column::Id,
        ))
        .to_owned()
}

fn data_transfer_package(enums: Enums) -> TableCreateStatement {
    use data_transfer_package::{Column, Optional};
    Table::create()
        .table(data_transfer_package::Entity)
        .col(key(Column::Id))
        .col(ColumnDef::new(Column::FileName).string().not_null())
        .col(ColumnDef::new(Column::RelativePath).string().not_null())
        .col(ColumnDef::new(Column::Size).big_integer())
        .col(ColumnDef::new(Column::Checksum).string())
        .col(enums.column::<PackageState>(Optional::Status))
        .col(created_at(Optional::CreatedAt))
        .to_owned()
}

fn data_transfer(enums: Enums) -> TableCreateStatement {
    use data_transfer::{Column, Optional};
    Table::create()
        .table(data_transfer::Entity)
        .col(key(Column::Id))
        .col(
            ColumnDef::new(Column::DataTransferPackageId)
                .integer()
                .not_null(),
        )
        .col(
            ColumnDef::new(Column::OriginLocationId)
                .integer()
                .not_null(),
        )
        .col(
            ColumnDef::new(Column::DestinationLocationId)
                .integer()
                .not_null(),
        )
        .col(enums.column::<Status>(Column::Status))
        .col(
            ColumnDef::new(Column::RetryCount)
                .integer()
                .not_null()
                .default(0),
        )
        .col(enums.column::<Status>(Optional::UnpackStatus))
        .col(ColumnDef::new(Column::StartTime).date_time())
        .col(ColumnDef::new(Column::EndTime).date_time())
        .col(ColumnDef::new(Column::FailureErrorMessage).text())
        .col(created_at(Optional::CreatedAt))
        .foreign_key(&mut refers(
            Column::DataTransferPackageId,
            data_transfer_package::Entity,
            data_transfer_package::Column::Id,
        ))
        .foreign_key(&mut refers(
            Column::OriginLocationId,
            data_location::Entity,
            data_location::Column::Id,
        ))
        .foreign_key(&mut refers(
            Column::DestinationLocationId,
            data_location::Entity,
            data_location::Column::Id,
        ))
        .to_owned()
}

fn data_transfer_log(enums: Enums) -> TableCreateStatement {
    use data_transfer_log::{Column, Optional};
    Table::create()
        .table(data_transfer_log::Entity)
        .col(key(Column::Id))
        .col(ColumnDef::new(Column::DataTransferId).integer().not_null())
        .col(ColumnDef::new(Column::Timestamp).date_time().not_null())
        .col(enums.column::<Status>(Optional::Status))
        .col(ColumnDef::new(Column::LogPath).string().not_null())
        .foreign_key(&mut refers(
            Column::DataTransferId,
            data_transfer::Entity,
            data_transfer::Column::Id,
        ))
        .to_owned()
}
