//! Checks that everything exists that a worker or a manager needs, and gives advice if something does not.
//!
//! Existing data are not changed: trial objects (a queue, a key, a directory at a destination) have names of our own
//! and are removed at once. Checks run concurrently, with a limit of their number and a time limit for each. A failed
//! check stops only those that depend on it. The order of the findings is always the same.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::settings::Settings;
use crate::transfer::plan::{Hosts, LocalHost};

mod broker;
mod database;
mod host;
mod locations;
mod redis_broker;
mod scheduled;
mod services;
mod tcp_buffers;

/// Maximum number of concurrent checks.
const MAX_CONCURRENT_CHECKS: usize = 8;

/// A check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum Check {
    /// The settings are valid, and secrets are safe.
    Settings,
    /// The attempts' logs can be written.
    LogDir,
    /// Limits of this process.
    Limits,
    /// The ports of `bbcp.port_range` are free.
    Ports,
    /// bbcp on this host.
    Bbcp,
    /// The database can be reached.
    Database,
    /// The database has the necessary tables and columns.
    Schema,
    /// No partial copies of ended transfers are left.
    Partials,
    /// Transfers that are SCHEDULED are taken by workers.
    Scheduled,
    /// Clocks agree: the database's, and those of other hosts.
    Clock,
    /// The login to the broker succeeds.
    Broker,
    /// The broker's user has the necessary permissions.
    Permissions,
    /// Queues have the configured arguments.
    Queues,
    /// The broker's time limit for unacknowledged messages.
    ConsumerTimeout,
    /// Results can be stored.
    Results,
    /// Heartbeats can be written.
    Health,
    /// The collector accepts traces.
    Traces,
    /// Links have an end on this host.
    Links,
    /// The login to other hosts succeeds.
    Ssh,
    /// bbcp on other hosts.
    RemoteBbcp,
    /// The program for digests on other hosts.
    Digest,
    /// The kernels' TCP buffers are large enough for the links to other hosts.
    TcpBuffers,
    /// Origins can be read.
    Origin,
    /// Destinations have enough free space.
    Space,
    /// Destinations can be written.
    Write,
}

/// Result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// No problem.
    Green,
    /// It works, but needs attention.
    Yellow,
    /// It does not work.
    Red,
    /// Not checked, since an earlier check failed or a prerequisite is missing.
    Skipped,
}

/// Result of a check, without its name.
#[derive(Debug)]
struct Outcome {
    verdict: Verdict,
    found: String,
    advice: Option<String>,
}

impl Outcome {
    fn green(found: impl Into<String>) -> Self {
        Self::new(Verdict::Green, found, None)
    }

    fn yellow(found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Verdict::Yellow, found, Some(advice.into()))
    }

    fn red(found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Verdict::Red, found, Some(advice.into()))
    }

    fn new(verdict: Verdict, found: impl Into<String>, advice: Option<String>) -> Self {
        Self {
            verdict,
            found: found.into(),
            advice,
        }
    }
}

/// Result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// The check.
    pub check: Check,
    /// Checked object; empty if only one exists.
    pub subject: String,
    /// Verdict.
    pub verdict: Verdict,
    /// Observation.
    pub found: String,
    /// Command or setting that corrects the problem; `None` if no action is necessary.
    pub advice: Option<String>,
}

/// Selection of the checks.
#[derive(Debug, Clone)]
pub(crate) struct DoctorOptions {
    /// Only the locations of these sites, by short name, and links from or to them; all if empty.
    pub sites: Vec<String>,
    /// Queues to check besides those of the locations.
    pub queues: Vec<String>,
    /// Checks to leave out.
    pub skip: BTreeSet<Check>,
    /// Time limit of one check.
    pub limit: Duration,
}

/// Makes the checks.
pub(crate) struct Doctor {
    settings: Arc<Settings>,
    /// Name of this host.
    host: String,
    hosts: Hosts,
    options: DoctorOptions,
    bound: Semaphore,
}

impl Doctor {
    /// Creates the checks for the host with this name.
    #[must_use]
    pub(crate) fn new(settings: Arc<Settings>, host: String, options: DoctorOptions) -> Self {
        let hosts = Hosts::new(LocalHost::of_settings(&host, &settings.transfer));
        Self {
            settings,
            host,
            hosts,
            options,
            bound: Semaphore::new(MAX_CONCURRENT_CHECKS),
        }
    }

    /// Makes all checks and returns the findings, in a fixed order.
    pub(crate) async fn run_checks(&self) -> Vec<Finding> {
        let (names, known) = oneshot::channel();
        let (here, (database, places), broker, services) = tokio::join!(
            self.check_this_host(),
            self.check_database_and_locations(names),
            self.check_broker(known),
            self.check_services(),
        );
        [here, database, broker, services, places].concat()
    }

    /// Makes one check when a slot is free, with the time limit. Returns `None` if the check is skipped by the
    /// operator.
    async fn check(
        &self,
        check: Check,
        subject: impl Into<String>,
        work: impl Future<Output = Outcome>,
    ) -> Option<Finding> {
        if self.options.skip.contains(&check) {
            return None;
        }
        // The semaphore is never closed.
        let _turn = self.bound.acquire().await;
        let limit = self.options.limit;
        let Outcome {
            verdict,
            found,
            advice,
        } = timeout(limit, work).await.unwrap_or_else(|_| {
            let found = format!("no answer within {}", humantime::format_duration(limit));
            Outcome::red(
                found,
                "find out what hangs, or allow more time with --timeout",
            )
        });
        Some(Finding {
            check,
            subject: subject.into(),
            verdict,
            found,
            advice,
        })
    }

    /// Returns the finding for a check that cannot be made.
    fn skipped(&self, check: Check, subject: impl Into<String>, why: &str) -> Option<Finding> {
        (!self.options.skip.contains(&check)).then(|| Finding {
            check,
            subject: subject.into(),
            verdict: Verdict::Skipped,
            found: why.to_owned(),
            advice: None,
        })
    }
}

/// Returns the findings for settings that cannot be used; no other check is possible then.
#[must_use]
pub(crate) fn invalid_settings(error: &crate::settings::SettingsError) -> Vec<Finding> {
    let finding = |problem: &crate::settings::Problem| Finding {
        check: Check::Settings,
        subject: String::new(),
        verdict: Verdict::Red,
        found: problem.to_string(),
        advice: Some("correct it; `ccat-transfer config default` explains every key".into()),
    };
    error.problems.iter().map(finding).collect()
}
