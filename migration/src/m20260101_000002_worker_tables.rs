//! Tables of leases and attempts.

use entity::{transfer_worker_attempt, transfer_worker_lease};
use sea_orm_migration::prelude::*;

/// Migration that creates the tables of leases and attempts.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(lease()).await?;
        manager.create_table(attempt()).await?;
        // Unique: two attempts with the same number would share a temporary name.
        let index = Index::create()
            .name("transfer_worker_attempt_number")
            .table(transfer_worker_attempt::Entity)
            .col(transfer_worker_attempt::Column::DataTransferId)
            .col(transfer_worker_attempt::Column::Attempt)
            .unique()
            .to_owned();
        manager.create_index(index).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(
                Table::drop()
                    .table(transfer_worker_attempt::Entity)
                    .to_owned(),
            )
            .await?;
        manager
            .drop_table(
                Table::drop()
                    .table(transfer_worker_lease::Entity)
                    .to_owned(),
            )
            .await
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

fn text(name: impl IntoIden) -> ColumnDef {
    ColumnDef::new(name).text().not_null().to_owned()
}

fn time(name: impl IntoIden) -> ColumnDef {
    ColumnDef::new(name)
        .timestamp_with_time_zone()
        .not_null()
        .to_owned()
}

fn lease() -> TableCreateStatement {
    use transfer_worker_lease::Column;
    Table::create()
        .table(transfer_worker_lease::Entity)
        .col(
            ColumnDef::new(Column::DataTransferId)
                .big_integer()
                .not_null()
                .primary_key(),
        )
        .col(text(Column::Token))
        .col(ColumnDef::new(Column::Attempt).integer().not_null())
        .col(text(Column::TaskId))
        .col(text(Column::OwnerNode))
        .col(text(Column::OwnerHost))
        .col(ColumnDef::new(Column::OwnerPid).big_integer().not_null())
        .col(text(Column::OwnerPidScope))
        .col(text(Column::OwnerStarted))
        .col(time(Column::AcquiredAt))
        .col(time(Column::RenewedAt))
        .col(time(Column::ExpiresAt))
        .col(ColumnDef::new(Column::BytesDone).big_integer().not_null())
        .col(ColumnDef::new(Column::BytesTotal).big_integer())
        .col(
            ColumnDef::new(Column::RateBytesPerS)
                .big_integer()
                .not_null(),
        )
        .to_owned()
}

fn attempt() -> TableCreateStatement {
    use transfer_worker_attempt::Column;
    let optional_text = |name: Column| ColumnDef::new(name).text().to_owned();
    let optional_number = |name: Column| ColumnDef::new(name).big_integer().to_owned();
    Table::create()
        .table(transfer_worker_attempt::Entity)
        .col(
            ColumnDef::new(Column::Id)
                .big_integer()
                .not_null()
                .auto_increment()
                .primary_key(),
        )
        .col(
            ColumnDef::new(Column::DataTransferId)
                .big_integer()
                .not_null(),
        )
        .col(ColumnDef::new(Column::Attempt).integer().not_null())
        .col(text(Column::TaskId))
        .col(text(Column::Worker))
        .col(time(Column::StartedAt))
        .col(ColumnDef::new(Column::EndedAt).timestamp_with_time_zone())
        .col(ColumnDef::new(Column::Outcome).string_len(16))
        .col(optional_text(Column::ErrorCode))
        .col(optional_text(Column::Message))
        .col(optional_number(Column::Bytes))
        .col(optional_number(Column::RateBytesPerS))
        .col(optional_text(Column::Digest))
        .col(optional_text(Column::LogPath))
        .col(optional_text(Column::TemporaryName))
        .to_owned()
}
