//! Delays before the next attempt, and unique destinations of leases.

use entity::{transfer_worker_delay, transfer_worker_lease};
use sea_orm_migration::prelude::*;

/// Migration that adds the table of delays and the column `destination` of leases.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

const DESTINATION_INDEX: &str = "transfer_worker_lease_destination";

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(delay()).await?;
        let mut destination = ColumnDef::new(transfer_worker_lease::Column::Destination);
        let column = Table::alter()
            .table(transfer_worker_lease::Entity)
            .add_column(destination.text())
            .to_owned();
        manager.alter_table(column).await?;
        // Leases without a destination (of older workers, and of attempts without a plan so far) do not conflict: NULLs
        // are distinct on both databases.
        let index = Index::create()
            .name(DESTINATION_INDEX)
            .table(transfer_worker_lease::Entity)
            .col(transfer_worker_lease::Column::Destination)
            .unique()
            .to_owned();
        manager.create_index(index).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let index = Index::drop()
            .name(DESTINATION_INDEX)
            .table(transfer_worker_lease::Entity)
            .to_owned();
        manager.drop_index(index).await?;
        let column = Table::alter()
            .table(transfer_worker_lease::Entity)
            .drop_column(transfer_worker_lease::Column::Destination)
            .to_owned();
        manager.alter_table(column).await?;
        manager
            .drop_table(
                Table::drop()
                    .table(transfer_worker_delay::Entity)
                    .to_owned(),
            )
            .await
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

fn delay() -> TableCreateStatement {
    use transfer_worker_delay::Column;
    Table::create()
        .table(transfer_worker_delay::Entity)
        .col(
            ColumnDef::new(Column::DataTransferId)
                .big_integer()
                .not_null()
                .primary_key(),
        )
        .col(
            ColumnDef::new(Column::NotBefore)
                .timestamp_with_time_zone()
                .not_null(),
        )
        .col(ColumnDef::new(Column::RetryCount).big_integer().not_null())
        .col(ColumnDef::new(Column::ErrorCode).text().not_null())
        .to_owned()
}
