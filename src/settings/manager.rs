//! `[manager]`: the manager's loop.

use std::time::Duration;

use serde::Deserialize;

use celery_worker_cli::settings::SectionProblems;

/// `[manager]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManagerSettings {
    /// Pause between two passes.
    #[serde(with = "humantime_serde")]
    pub sleep_time: Duration,
    /// Interval between full scans, which also find COMPLETED transfers that were reset.
    #[serde(with = "humantime_serde")]
    pub full_look_interval: Duration,
    /// Time that a transfer may be SCHEDULED until its message is searched for; zero for never.
    #[serde(with = "humantime_serde")]
    pub reconcile_after: Duration,
    /// Short names of the sites whose transfers are scheduled; empty for all.
    pub sites: Vec<String>,
}

impl ManagerSettings {
    /// Adds the broken rules of the section.
    pub(super) fn check(&self, problems: &mut SectionProblems<'_>) {
        problems.require(!self.sleep_time.is_zero(), "sleep_time", "must be above 0");
    }
}
