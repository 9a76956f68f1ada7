//! What operators did about transfers, by whom and why.
//!
//! As for the lease there is no foreign key to `data_transfer`.

use sea_orm::entity::prelude::*;
use serde::Serialize;

/// What an operator can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumIter, DeriveActiveEnum, Serialize)]
#[sea_orm(rs_type = "String", db_type = "String(StringLen::N(16))")]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Have it tried again, now.
    #[sea_orm(string_value = "retry")]
    Retry,
    /// Stop it, whether it waits or runs.
    #[sea_orm(string_value = "cancel")]
    Cancel,
    /// Give it up before it is tried (again).
    #[sea_orm(string_value = "fail")]
    Fail,
}

impl Action {
    /// The word for it, as it is stored.
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
    /// Key.
    #[sea_orm(primary_key)]
    pub id: i64,
    /// The transfer.
    pub data_transfer_id: i64,
    /// When, by the database's clock.
    pub acted_at: DateTimeUtc,
    /// What was done.
    pub action: Action,
    /// By whom, `login@host`.
    pub operator: String,
    /// Why, if that was said.
    #[sea_orm(column_type = "Text", nullable)]
    pub reason: Option<String>,
    /// The transfer's status before.
    pub previous_status: String,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
