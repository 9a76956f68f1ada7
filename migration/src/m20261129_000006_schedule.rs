//! Table of schedule records: times since which transfers are SCHEDULED.

use entity::transfer_worker_schedule;
use sea_orm_migration::prelude::*;

/// Migration that creates the table of schedule records.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(schedule()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::drop()
            .table(transfer_worker_schedule::Entity)
            .to_owned();
        manager.drop_table(table).await
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

fn schedule() -> TableCreateStatement {
    use transfer_worker_schedule::{Column, Entity};
    Table::create()
        .table(Entity)
        .col(
            ColumnDef::new(Column::DataTransferId)
                .big_integer()
                .not_null()
                .primary_key(),
        )
        .col(
            ColumnDef::new(Column::ScheduledAt)
                .timestamp_with_time_zone()
                .not_null(),
        )
        .col(ColumnDef::new(Column::Queue).text())
        .col(ColumnDef::new(Column::TaskId).text())
        .col(
            ColumnDef::new(Column::Resent)
                .big_integer()
                .not_null()
                .default(0),
        )
        .to_owned()
}
