//! Which transfers are not to be tried before a certain time.
//!
//! Written when a transfer goes back to PENDING after a failure, gone when it is taken up again. It
//! stands only as long as the transfer's `retry_count` is the one it was written with: an operator
//! who resets that count wants the transfer tried now.
//!
//! As for the lease there is no foreign key to `data_transfer`.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_delay`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_delay")]
pub struct Model {
    /// The transfer.
    #[sea_orm(primary_key, auto_increment = false)]
    pub data_transfer_id: i64,
    /// Not before this time, by the database's clock.
    pub not_before: DateTimeUtc,
    /// The transfer's `retry_count` when this was written.
    pub retry_count: i64,
    /// Class of the error that is waited out.
    pub error_code: String,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
