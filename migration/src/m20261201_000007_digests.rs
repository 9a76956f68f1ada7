//! Table of the digests of blocks.

use entity::transfer_worker_digest;
use sea_orm_migration::prelude::*;

/// Migration that creates the table of the digests of blocks.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(digest()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::drop()
            .table(transfer_worker_digest::Entity)
            .to_owned();
        manager.drop_table(table).await
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

fn digest() -> TableCreateStatement {
    use transfer_worker_digest::{Column, Entity};
    Table::create()
        .table(Entity)
        .col(
            ColumnDef::new(Column::DataTransferId)
                .big_integer()
                .not_null(),
        )
        .col(ColumnDef::new(Column::FileEnd).string_len(16).not_null())
        .col(ColumnDef::new(Column::Block).big_integer().not_null())
        .col(ColumnDef::new(Column::FileVersion).text().not_null())
        .col(ColumnDef::new(Column::Digest).text().not_null())
        .col(ColumnDef::new(Column::State).text())
        .primary_key(
            Index::create()
                .col(Column::DataTransferId)
                .col(Column::FileEnd)
                .col(Column::Block),
        )
        .to_owned()
}
