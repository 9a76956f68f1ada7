//! Settings: the sections of this program beside those of `celery_worker_cli::settings`, one file for each.
//!
//! The file of a section has its type and its rules. `defaults.toml` has the defaults and the documentation of the keys;
//! `config.default.toml` is generated from it and from the defaults of the worker's process.

use std::borrow::Cow;
use std::path::Path;

use secrecy::ExposeSecret as _;
use serde::Deserialize;

mod bbcp;
mod health;
mod manager;
mod notifications;
mod ops_db;
mod routes;
mod ssh;
mod task_names;
#[cfg(test)]
mod tests;
mod transfer;

pub use bbcp::Bbcp;
pub use celery_worker_cli::settings::{
    Celery, DelayedDelivery, ExchangeKind, Http, Log, Problem, QueueType, SettingsError, TaskQueue,
    Traces,
};
pub use health::Health;
pub use manager::ManagerSettings;
pub use notifications::Notifications;
pub use ops_db::{DatabaseType, EnumLabels, OpsDb, SslMode};
pub use routes::{LinkSettings, RouteOverride, Slowness};
pub use ssh::Ssh;
pub use transfer::{DigestAlgorithm, QueueLocation, Transfer};

use celery_worker_cli::settings::{
    Problems, Secret, Settings as CheckedSettings, Source, WorkerSettings, exposed_urls,
};

/// Defaults of all sections in TOML, with the documentation of every key.
pub const DEFAULTS: &str = include_str!("../../config.default.toml");

/// Environment variable that names the file of settings.
pub const CONFIG_VARIABLE: &str = "CCAT_DATA_TRANSFER_CONFIG";

const SOURCE: Source = Source {
    defaults: DEFAULTS,
    prefix: Cow::Borrowed("CCAT_DATA_TRANSFER_"),
    // Shared with the Python packages.
    section_prefixes: &[("CCAT_OPS_DB_", "ops_db")],
    whole: &["routes"],
    secrets: &[
        Secret::value(
            "ops_db.database_postgresql_password",
            "ops_db.database_postgresql_password_file",
        ),
        Secret::value(
            "notifications.webhook_url",
            "notifications.webhook_url_file",
        ),
        Secret::value("health.redis_url", "health.redis_url_file"),
    ],
};

/// Loads the settings: the defaults, then `file`, then `environment` (see [`std::env::vars`]).
///
/// # Errors
/// [`SettingsError`] with every unknown key, invalid value and broken rule.
pub fn load(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Settings, SettingsError> {
    let (mut settings, warnings) = SOURCE.load::<Settings>(file, environment)?;
    settings.warnings = warnings;
    Ok(settings)
}

/// All settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Celery: broker, results, concurrency.
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
    pub manager: ManagerSettings,
    /// Notices to the administrators.
    pub notifications: Notifications,
    /// Heartbeats for monitors.
    pub health: Health,
    /// The side port.
    pub http: Http,
    /// Export of spans.
    pub traces: Traces,
    /// Logging.
    pub log: Log,
    /// Risks in the settings: secrets that others can read, here or in transit.
    #[serde(skip)]
    pub warnings: Vec<Problem>,
}

impl Settings {
    /// The sections of the worker's process.
    #[must_use]
    pub fn worker(&self) -> WorkerSettings {
        WorkerSettings {
            celery: self.celery.clone(),
            http: self.http.clone(),
            log: self.log.clone(),
            traces: self.traces.clone(),
            warnings: self.warnings.clone(),
        }
    }
}

impl CheckedSettings for Settings {
    fn check(&self, problems: &mut Problems) {
        self.celery.check(&mut problems.section("celery"));
        task_names::check(&self.celery, &mut problems.section("celery"));
        self.ops_db.check(&mut problems.section("ops_db"));
        self.transfer.check(&mut problems.section("transfer"));
        self.manager.check(&mut problems.section("manager"));
        let mut notifications = problems.section("notifications");
        self.notifications.check(&mut notifications);
        self.health.check(&mut problems.section("health"));
        self.http.check(&mut problems.section("http"));
        self.log.check(&mut problems.section("log"));
        self.traces.check(&mut problems.section("traces"));
        self.bbcp.check(&mut problems.section("bbcp"));
        self.ssh.check(&mut problems.section("ssh"));
        let transfer = &self.transfer;
        let mut section = problems.section("transfer");
        let (stall, window) = (transfer.stall_timeout, transfer.min_rate_window);
        self.bbcp.check_stall("stall_timeout", stall, &mut section);
        self.bbcp
            .check_stall("min_rate_window", window, &mut section);
        self.check_routes(problems);
    }

    fn exposures(&self) -> Vec<Problem> {
        let mut found = self.celery.exposures();
        found.extend(exposed_urls(
            "health.redis_url",
            self.health.redis_url.expose_secret(),
        ));
        found.extend(self.traces.exposure());
        found.extend(self.ops_db.exposure());
        found
    }
}
