//! `[[routes]]`: overrides for single links, and the settings that result for a link.

use std::time::Duration;

use figment::value::{Dict, Value};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use celery_worker_cli::settings::Problems;

use super::{Bbcp, DigestAlgorithm, Settings, Ssh};

/// One of `[[routes]]`: overrides for a link.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteOverride {
    /// Short name of the origin's site.
    pub origin: String,
    /// Short name of the destination's site.
    pub destination: String,
    /// Override of `transfer.stall_timeout`.
    #[serde(default, with = "humantime_serde")]
    pub stall_timeout: Option<Duration>,
    /// Override of `transfer.min_rate`.
    #[serde(default)]
    pub min_rate: Option<u64>,
    /// Override of `transfer.min_rate_window`.
    #[serde(default, with = "humantime_serde")]
    pub min_rate_window: Option<Duration>,
    /// Override of `transfer.deadline_rate`.
    #[serde(default)]
    pub deadline_rate: Option<u64>,
    /// Override of `transfer.deadline_grace`.
    #[serde(default, with = "humantime_serde")]
    pub deadline_grace: Option<Duration>,
    /// Override of `transfer.resume`.
    #[serde(default)]
    pub resume: Option<bool>,
    /// Override of `transfer.resume_above`.
    #[serde(default)]
    pub resume_above: Option<u64>,
    /// Keys of `[bbcp]`.
    #[serde(default)]
    pub bbcp: Dict,
    /// Keys of `[ssh]`.
    #[serde(default)]
    pub ssh: Dict,
}

/// Settings of one link: the general ones with the overrides of its route.
#[derive(Debug, Clone)]
pub struct LinkSettings {
    /// bbcp's command line.
    pub bbcp: Bbcp,
    /// Access to the remote end.
    pub ssh: Ssh,
    /// Time without progress until a copy is stopped.
    pub stall_timeout: Duration,
    /// Algorithm by which the ends are compared.
    pub digest: DigestAlgorithm,
    /// Limits for slow copies.
    pub slowness: Slowness,
    /// Partial copies are kept for the next attempt.
    pub resume: bool,
    /// Smallest package in bytes whose partial copies are kept.
    pub resume_above: u64,
}

/// Limits for copies that move, but slowly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slowness {
    /// Minimum rate over `window`, in bytes per second; 0 for no limit.
    pub min_rate: u64,
    /// Time over which `min_rate` is measured.
    pub window: Duration,
    /// Rate from which the time limit is computed, in bytes per second; 0 for no limit.
    pub deadline_rate: u64,
    /// Time added to that limit.
    pub deadline_grace: Duration,
}

impl Slowness {
    /// Time limit for a copy of `bytes`; none without a `deadline_rate`.
    #[must_use]
    pub fn deadline(&self, bytes: u64) -> Option<Duration> {
        let seconds = bytes.checked_div(self.deadline_rate)?;
        Some(
            self.deadline_grace
                .saturating_add(Duration::from_secs(seconds)),
        )
    }
}

impl Settings {
    /// The settings of the link between two sites, by short name.
    ///
    /// # Errors
    /// The problem with a route's own keys. Settings from [`load`](super::load) have none, since it checks every route.
    pub fn link(&self, origin: &str, destination: &str) -> Result<LinkSettings, String> {
        let mut link = LinkSettings {
            bbcp: self.bbcp.clone(),
            ssh: self.ssh.clone(),
            stall_timeout: self.transfer.stall_timeout,
            digest: self.transfer.digest,
            slowness: Slowness {
                min_rate: self.transfer.min_rate,
                window: self.transfer.min_rate_window,
                deadline_rate: self.transfer.deadline_rate,
                deadline_grace: self.transfer.deadline_grace,
            },
            resume: self.transfer.resume,
            resume_above: self.transfer.resume_above,
        };
        for route in &self.routes {
            if route.origin != origin || route.destination != destination {
                continue;
            }
            link.bbcp = overlay(&link.bbcp, &route.bbcp)?;
            link.ssh = overlay(&link.ssh, &route.ssh)?;
            link.stall_timeout = route.stall_timeout.unwrap_or(link.stall_timeout);
            let slowness = link.slowness;
            link.slowness = Slowness {
                min_rate: route.min_rate.unwrap_or(slowness.min_rate),
                window: route.min_rate_window.unwrap_or(slowness.window),
                deadline_rate: route.deadline_rate.unwrap_or(slowness.deadline_rate),
                deadline_grace: route.deadline_grace.unwrap_or(slowness.deadline_grace),
            };
            link.resume = route.resume.unwrap_or(link.resume);
            link.resume_above = route.resume_above.unwrap_or(link.resume_above);
        }
        Ok(link)
    }

    /// Adds the broken rules of each route, after its overrides are applied.
    pub(super) fn check_routes(&self, problems: &mut Problems) {
        for (n, route) in self.routes.iter().enumerate() {
            let key = format!("routes[{n}]");
            let same = |other: &&RouteOverride| {
                other.origin == route.origin && other.destination == route.destination
            };
            if self.routes.iter().filter(same).count() > 1 {
                let message = "another entry has the same link; merge the two";
                problems.add(&key, message);
            }
            match self.link(&route.origin, &route.destination) {
                Ok(link) => {
                    let LinkSettings { bbcp, ssh, .. } = &link;
                    bbcp.check(&mut problems.section(&format!("{key}.bbcp")));
                    ssh.check(&mut problems.section(&format!("{key}.ssh")));
                    let mut route = problems.section(&key);
                    bbcp.check_stall("stall_timeout", link.stall_timeout, &mut route);
                    bbcp.check_stall("min_rate_window", link.slowness.window, &mut route);
                }
                Err(message) => problems.add(&key, message),
            }
        }
    }
}

/// Keys of `base`, replaced by those of `over`.
fn overlay<T: Serialize + DeserializeOwned>(base: &T, over: &Dict) -> Result<T, String> {
    let Value::Dict(_, mut dict) = Value::serialize(base).map_err(|e| e.to_string())? else {
        return Err("not a table".into());
    };
    dict.extend(over.clone());
    Value::from(dict)
        .deserialize()
        .map_err(|e| e.kind.to_string())
}
