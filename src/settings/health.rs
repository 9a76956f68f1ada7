//! `[health]`: heartbeats for monitors.

use std::time::Duration;

use celery_worker::results;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use celery_worker_cli::settings::SectionProblems;

/// `[health]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Redis that receives heartbeats; empty for none. A secret, since it may contain a password.
    pub redis_url: SecretString,
    /// File that holds the URL instead; empty for none.
    pub redis_url_file: String,
    /// Part of the key between `health:` and the name.
    pub service_type: String,
    /// Name of the manager.
    pub manager_name: String,
    /// Name of a worker.
    pub worker_name: String,
    /// Key for a running task, which contains `{task_id}`; empty for none.
    pub task_key: String,
    /// Interval between two heartbeats.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// Lifetime of a heartbeat.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
}

impl Health {
    /// Adds the broken rules of the section.
    pub(super) fn check(&self, problems: &mut SectionProblems<'_>) {
        let redis = self.redis_url.expose_secret();
        if !redis.is_empty()
            && let Err(error) = results::redis_client(redis)
        {
            problems.add("redis_url", error.to_string());
        }
        problems.require(
            !self.interval.is_zero() && self.ttl >= self.interval * 2,
            "ttl",
            "must be twice health.interval or more, and that above 0",
        );
        problems.require(
            self.task_key.is_empty() || self.task_key.contains("{task_id}"),
            "task_key",
            "must contain {task_id}, or be empty",
        );
    }
}
