//! Links between two sites: their limits and pauses.
//!
//! A link without a row has no limits. The names are those of `site.short_name`, as in `[[routes]]` of the settings.
//! The table has no foreign key, so that it never prevents the owner of the ops-db from changing a site.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_link`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_link")]
pub struct Model {
    /// Short name of the site to copy from.
    #[sea_orm(primary_key, auto_increment = false)]
    pub origin: String,
    /// Short name of the site to copy to.
    #[sea_orm(primary_key, auto_increment = false)]
    pub destination: String,
    /// Maximum number of transfers that are SCHEDULED or IN_PROGRESS at once; null for no limit.
    pub max_active: Option<i64>,
    /// Priority; the highest is scheduled first.
    pub priority: i64,
    /// Times of the day with another `max_active`, one window per line.
    pub capacity: String,
    /// Number of bbcp's streams; overrides the settings.
    pub streams: Option<i64>,
    /// TCP window of bbcp; overrides the settings.
    pub tcp_window: Option<String>,
    /// Rate limit of bbcp; overrides the settings.
    pub max_rate: Option<String>,
    /// Time since which no copy starts, by the database's clock; null while the link is open.
    pub paused_at: Option<DateTimeUtc>,
    /// Operator who paused the link, as `login@host`.
    pub paused_by: Option<String>,
    /// Reason for the pause.
    pub pause_reason: Option<String>,
    /// True if the pause also stops running copies.
    pub stops_running: bool,
    /// Number of transfers that managers have scheduled so far. A manager that counted the transfers in progress uses
    /// it to detect what other managers have scheduled since.
    pub issued: i64,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
