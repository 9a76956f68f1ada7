//! Settings: one file for each section of `config.default.toml`, which is their reference and holds
//! their defaults.
//!
//! A section's file has its type and its rules. [`load`] layers the embedded defaults, a file and
//! the environment, and reports *every* problem at once, each with its key and the source of the
//! value. The types only hold values; nothing in them reads a file or the clock.

use serde::Deserialize;

mod bbcp;
mod celery;
mod exposure;
mod health;
mod http;
mod load;
mod log;
mod manager;
mod notifications;
mod ops_db;
mod problem;
mod routes;
mod secrets;
mod ssh;
mod trace_rules;
mod transfer;
mod worker_options;

pub use bbcp::Bbcp;
pub use celery::{Celery, RedisTls, ResultSerializer, ResultTables, ResultTransport};
pub use celery_worker::broker::{DelayedDelivery, ExchangeKind, QueueType, TaskQueue};
pub use health::Health;
pub use http::Http;
pub use load::{DEFAULTS, load};
pub use log::{Log, LogFormat};
pub use manager::Manager;
pub use notifications::Notifications;
pub use ops_db::{DatabaseType, EnumLabels, OpsDb, SslMode};
pub use problem::{Problem, SettingsError};
pub use routes::{LinkSettings, RouteOverride, Slowness};
pub use ssh::Ssh;
pub use traces::Traces;
pub use transfer::{DigestAlgorithm, QueueLocation, Transfer};

use problem::Problems;

/// All settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The Celery side: broker, results, concurrency.
    pub celery: Celery,
    /// The operations database.
    pub ops_db: OpsDb,
    /// Rules for all transfers.
    pub transfer: Transfer,
    /// bbcp's command line.
    pub bbcp: Bbcp,
    /// Access to remote locations.
    pub ssh: Ssh,
    /// Overrides for single links.
    #[serde(default)]
    pub routes: Vec<RouteOverride>,
    /// The manager's loop.
    pub manager: Manager,
    /// Notices to the administrators.
    pub notifications: Notifications,
    /// Signs of life.
    pub health: Health,
    /// The side port.
    pub http: Http,
    /// Export of spans.
    pub traces: Traces,
    /// Logging.
    pub log: Log,
    /// Risks: secrets that others can read, here or in transit.
    #[serde(skip)]
    pub warnings: Vec<Problem>,
}

impl Settings {
    /// Checks the rules again, after a change by other means than a file.
    ///
    /// # Errors
    /// [`SettingsError`] with every broken rule.
    pub fn validate(&self) -> Result<(), SettingsError> {
        let problems = self.problems();
        match problems.is_empty() {
            true => Ok(()),
            false => Err(SettingsError { problems }),
        }
    }

    /// Broken rules of all sections, for values of the right types.
    fn problems(&self) -> Vec<Problem> {
        let mut problems = Problems::default();
        self.celery.check(&mut problems.section("celery"));
        self.ops_db.check(&mut problems.section("ops_db"));
        self.transfer.check(&mut problems.section("transfer"));
        self.manager.check(&mut problems.section("manager"));
        let mut notifications = problems.section("notifications");
        self.notifications.check(&mut notifications);
        self.health.check(&mut problems.section("health"));
        self.http.check(&mut problems.section("http"));
        self.log.check(&mut problems.section("log"));
        trace_rules::check(&self.traces, &mut problems.section("traces"));
        self.bbcp.check(&mut problems.section("bbcp"));
        self.ssh.check(&mut problems.section("ssh"));
        let transfer = &self.transfer;
        let mut section = problems.section("transfer");
        let (stall, window) = (transfer.stall_timeout, transfer.min_rate_window);
        self.bbcp.check_stall("stall_timeout", stall, &mut section);
        self.bbcp
            .check_stall("min_rate_window", window, &mut section);
        self.check_routes(&mut problems);
        problems.into_vec()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::path::Path;

    use super::*;

    /// A file that breaks every rule, and the problems in their order.
    #[test]
    fn every_broken_rule_is_reported_in_order() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let error = load(Some(&golden.join("broken_settings.toml")), []).unwrap_err();
        let expected = std::fs::read_to_string(golden.join("broken_settings.txt")).unwrap();
        assert_eq!(error.to_string(), expected.trim_end());
    }
}
