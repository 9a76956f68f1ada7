//! `[notifications]`: notices to the administrators.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use celery_worker_cli::settings::SectionProblems;

/// `[notifications]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notifications {
    /// Program and arguments; empty for none.
    pub command: Vec<String>,
    /// URL for posts; empty for none. A secret, since it permits posting.
    pub webhook_url: SecretString,
    /// File that holds the address instead; empty for none.
    pub webhook_url_file: String,
    /// Shortest time between two notifications.
    #[serde(with = "humantime_serde")]
    pub min_interval: Duration,
    /// Time limit of one notification by one of the two ways.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

impl Notifications {
    /// Adds the broken rules of the section.
    pub(super) fn check(&self, problems: &mut SectionProblems<'_>) {
        let webhook = self.webhook_url.expose_secret();
        if !webhook.is_empty() {
            problems.require_url("webhook_url", webhook, &["https", "http"]);
        }
        problems.require(
            !self.command.first().is_some_and(String::is_empty),
            "command",
            "must be a program and its arguments, or empty",
        );
        problems.require(!self.timeout.is_zero(), "timeout", "must be above 0");
    }
}
