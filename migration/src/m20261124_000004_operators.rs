//! For operators: phase and streams of a running copy, the table of operators' actions, and an index to find transfers
//! by the error code of an attempt.

use entity::{transfer_worker_action, transfer_worker_attempt, transfer_worker_lease};
use sea_orm_migration::prelude::*;

/// Migration that adds what the commands for operators need.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

const ACTION_INDEX: &str = "transfer_worker_action_transfer";
const ERROR_INDEX: &str = "transfer_worker_attempt_error_code";

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use transfer_worker_lease::Column::{Phase, Streams};
        // One statement for each column: SQLite adds one column at a time.
        for mut column in [
            ColumnDef::new(Phase).text().to_owned(),
            ColumnDef::new(Streams).integer().to_owned(),
        ] {
            let adding = Table::alter()
                .table(transfer_worker_lease::Entity)
                .add_column(&mut column)
                .to_owned();
            manager.alter_table(adding).await?;
        }
        manager.create_table(action()).await?;
        let of_a_transfer = Index::create()
            .name(ACTION_INDEX)
            .table(transfer_worker_action::Entity)
            .col(transfer_worker_action::Column::DataTransferId)
            .to_owned();
        manager.create_index(of_a_transfer).await?;
        let by_error = Index::create()
            .name(ERROR_INDEX)
            .table(transfer_worker_attempt::Entity)
            .col(transfer_worker_attempt::Column::ErrorCode)
            .col(transfer_worker_attempt::Column::DataTransferId)
            .col(transfer_worker_attempt::Column::Attempt)
            .to_owned();
        manager.create_index(by_error).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use transfer_worker_lease::Column::{Phase, Streams};
        let by_error = Index::drop()
            .name(ERROR_INDEX)
            .table(transfer_worker_attempt::Entity)
            .to_owned();
        manager.drop_index(by_error).await?;
        let table = Table::drop()
            .table(transfer_worker_action::Entity)
            .to_owned();
        manager.drop_table(table).await?;
        for column in [Streams, Phase] {
            let dropping = Table::alter()
                .table(transfer_worker_lease::Entity)
                .drop_column(column)
                .to_owned();
            manager.alter_table(dropping).await?;
        }
        Ok(())
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}

fn action() -> TableCreateStatement {
    use transfer_worker_action::Column;
    let text = |name: Column| ColumnDef::new(name).text().not_null().to_owned();
    Table::create()
        .table(transfer_worker_action::Entity)
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
        .col(
            ColumnDef::new(Column::ActedAt)
                .timestamp_with_time_zone()
                .not_null(),
        )
        .col(ColumnDef::new(Column::Action).string_len(16).not_null())
        .col(text(Column::Operator))
        .col(ColumnDef::new(Column::Reason).text())
        .col(text(Column::PreviousStatus))
        .to_owned()
}
