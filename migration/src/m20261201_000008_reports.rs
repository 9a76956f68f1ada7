//! Index of attempts by the time of their end, for reports.

use entity::transfer_worker_attempt;
use sea_orm_migration::prelude::*;

/// Migration that creates the index for reports.
#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

const INDEX: &str = "transfer_worker_attempt_ended_at";

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let index = Index::create()
            .name(INDEX)
            .table(transfer_worker_attempt::Entity)
            .col(transfer_worker_attempt::Column::EndedAt)
            .to_owned();
        manager.create_index(index).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let index = Index::drop()
            .name(INDEX)
            .table(transfer_worker_attempt::Entity)
            .to_owned();
        manager.drop_index(index).await
    }

    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }
}
