//! `[http]`: health checks and metrics over HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;

use super::problem::SectionProblems;

/// `[http]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Address of `/livez`, `/readyz` and `/metrics`; empty for none.
    pub listen: String,
    /// Delay after which a loop counts as stopped.
    #[serde(with = "humantime_serde")]
    pub stopped_after: Duration,
}

impl Http {
    /// The address; none for an empty text, and for one that [`check`](Self::check) refuses.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }

    /// Adds the broken rules of the section.
    pub fn check(&self, problems: &mut SectionProblems<'_>) {
        problems.require(
            self.listen.is_empty() || self.address().is_some(),
            "listen",
            "must be an IP address and a port, e.g. \"127.0.0.1:9808\" or \"[::1]:9808\", or empty",
        );
        problems.require(
            self.stopped_after >= Duration::from_secs(1),
            "stopped_after",
            "must be 1s or more",
        );
    }
}
