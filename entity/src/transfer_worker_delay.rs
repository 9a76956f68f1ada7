//! Delays before the next attempt of failed transfers.
//!
//! A row is written when a transfer goes back to PENDING after a failure, and removed when a worker takes the transfer
//! again. It is valid only while the transfer has the `retry_count` with which the row was written: an operator who
//! resets that count wants an attempt now.
//!
//! The table has no foreign key to `data_transfer`; see [`crate::transfer_worker_lease`] for the reason.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_delay`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_delay")]
pub struct Model {
    /// Id of the transfer.
    #[sea_orm(primary_key, auto_increment = false)]
    pub data_transfer_id: i64,
    /// Earliest time of the next attempt, by the database's clock.
    pub not_before: DateTimeUtc,
    /// `retry_count` of the transfer when the row was written.
    pub retry_count: i64,
    /// Error code of the failure that causes the delay.
    pub error_code: String,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
