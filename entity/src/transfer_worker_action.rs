//! Actions of operators on transfers, with the operator's name and reason.
//!
//! The table has no foreign key to `data_transfer`; see [`crate::transfer_worker_lease`] for the reason.

use sea_orm::entity::prelude::*;
use serde::Serialize;

/// An action of an operator on a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumIter, DeriveActiveEnum, Serialize)]
#[sea_orm(rs_type = "String", db_type = "String(StringLen::N(16))")]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Make another attempt now.
    #[sea_orm(string_value = "retry")]
    Retry,
    /// Stop the transfer, whether it waits or runs.
    #[sea_orm(string_value = "cancel")]
    Cancel,
    /// Make no further attempt.
    #[sea_orm(string_value = "fail")]
    Fail,
}

impl Action {
    /// Name of the action, as stored in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Cancel => "cancel",
            Self::Fail => "fail",
        }
    }
}

/// A row of `transfer_worker_action`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_action")]
pub struct Model {
    /// Primary key.
    #[sea_orm(primary_key)]
    pub id: i64,
    /// Id of the transfer.
    pub data_transfer_id: i64,
    /// Time of the action, by the database's clock.
    pub acted_at: DateTimeUtc,
    /// The action.
    pub action: Action,
    /// The operator, as `login@host`.
    pub operator: String,
    /// Reason, if the operator gave one.
    #[sea_orm(column_type = "Text", nullable)]
    pub reason: Option<String>,
    /// Status of the transfer before the action.
    pub previous_status: String,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
