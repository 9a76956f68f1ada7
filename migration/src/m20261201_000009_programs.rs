//! Table of the signs of life of workers and managers.

use entity::transfer_worker_program;
use sea_orm_migration::prelude::*;

/// Migration that creates the table of signs of life.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(program()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::drop()
            .table(transfer_worker_program::Entity)
            .to_owned();
        manager.drop_table(table).await
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

fn program() -> TableCreateStatement {
    use transfer_worker_program::{Column, Entity};
    let text = |name: Column| ColumnDef::new(name).text().not_null().to_owned();
    let time = |name: Column| ColumnDef::new(name).timestamp_with_time_zone().to_owned();
    Table::create()
        .table(Entity)
        .col(text(Column::Name).primary_key())
        .col(text(Column::Token))
        .col(ColumnDef::new(Column::Kind).string_len(16).not_null())
        .col(text(Column::Host))
        .col(ColumnDef::new(Column::Pid).big_integer().not_null())
        .col(text(Column::Version))
        .col(time(Column::StartedAt).not_null())
        .col(time(Column::SeenAt).not_null())
        .col(time(Column::EndedAt))
        .to_owned()
}
