//! Table of links between sites.

use entity::transfer_worker_link;
use sea_orm_migration::prelude::*;

/// Migration that creates the table of links.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(link()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table(transfer_worker_link::Entity).to_owned())
            .await
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

fn link() -> TableCreateStatement {
    use transfer_worker_link::{Column, Entity};
    Table::create()
        .table(Entity)
        .col(ColumnDef::new(Column::Origin).text().not_null())
        .col(ColumnDef::new(Column::Destination).text().not_null())
        .col(ColumnDef::new(Column::MaxActive).big_integer())
        .col(
            ColumnDef::new(Column::Priority)
                .big_integer()
                .not_null()
                .default(0),
        )
        .col(
            ColumnDef::new(Column::Capacity)
                .text()
                .not_null()
                .default(""),
        )
        .col(ColumnDef::new(Column::Streams).big_integer())
        .col(ColumnDef::new(Column::TcpWindow).text())
        .col(ColumnDef::new(Column::MaxRate).text())
        .col(ColumnDef::new(Column::PausedAt).timestamp_with_time_zone())
        .col(ColumnDef::new(Column::PausedBy).text())
        .col(ColumnDef::new(Column::PauseReason).text())
        .col(
            ColumnDef::new(Column::StopsRunning)
                .boolean()
                .not_null()
                .default(false),
        )
        .col(
            ColumnDef::new(Column::Issued)
                .big_integer()
                .not_null()
                .default(0),
        )
        .primary_key(Index::create().col(Column::Origin).col(Column::Destination))
        .to_owned()
}
