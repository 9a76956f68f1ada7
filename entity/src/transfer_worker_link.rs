//! How the link between two sites may be used: limits, and whether it is paused.
//!
//! A link without a row has no limits. The names are those of `site.short_name`, as in the
//! settings' `[[routes]]`; as for the lease there is no foreign key, so that nothing here can keep
//! the ops-db's owner from changing a site.

use sea_orm::entity::prelude::*;

/// A row of `transfer_worker_link`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_link")]
pub struct Model {
    /// Short name of the site that copies come from.
    #[sea_orm(primary_key, auto_increment = false)]
    pub origin: String,
    /// Short name of the site that they go to.
    #[sea_orm(primary_key, auto_increment = false)]
    pub destination: String,
    /// Transfers that are SCHEDULED or IN_PROGRESS at once, at most; none for no limit.
    pub max_active: Option<i64>,
    /// Higher comes first.
    pub priority: i64,
    /// Windows of the day with another `max_active`, one a line.
    pub capacity: String,
    /// bbcp's streams, instead of the settings'.
    pub streams: Option<i64>,
    /// bbcp's TCP window, instead of the settings'.
    pub tcp_window: Option<String>,
    /// bbcp's rate limit, instead of the settings'.
    pub max_rate: Option<String>,
    /// Since when no copy starts; none while the link is open. By the database's clock.
    pub paused_at: Option<DateTimeUtc>,
    /// Who paused it, `login@host`.
    pub paused_by: Option<String>,
    /// Why.
    pub pause_reason: Option<String>,
    /// Whether the pause stops running copies, too.
    pub stops_running: bool,
    /// How many transfers managers have scheduled so far. A manager that has counted what is under
    /// way sees by it what others have scheduled since.
    pub issued: i64,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
