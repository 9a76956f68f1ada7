//! `[http]`: health checks and metrics over HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use super::problem::SectionProblems;

/// Minimum length of a token for pages, in bytes.
pub const MIN_TOKEN_LENGTH: usize = 16;

/// `[http]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Address of `/livez`, `/readyz` and `/metrics`; empty for none.
    pub listen: String,
    /// True if the server also has the pages of the program.
    pub page: bool,
    /// Token that requests of the pages must contain; empty for none.
    pub page_token: SecretString,
    /// File that holds the token instead; empty for none.
    pub page_token_file: String,
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
            !self.page || self.address().is_some(),
            "page",
            "needs an address in http.listen",
        );
        let token = self.page_token.expose_secret();
        problems.require(
            token.is_empty() || token.len() >= MIN_TOKEN_LENGTH,
            "page_token",
            "must have 16 characters or more",
        );
        let is_public = self
            .address()
            .is_some_and(|address| !address.ip().is_loopback());
        problems.require(
            !(self.page && is_public && token.is_empty()),
            "page_token_file",
            "is needed for the page on an address of the network: the path of a file with 16 characters or more",
        );
        problems.require(
            self.stopped_after >= Duration::from_secs(1),
            "stopped_after",
            "must be 1s or more",
        );
    }
}
