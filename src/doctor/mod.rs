//! Looks whether everything that a worker or a manager needs is there, and says what to do where it
//! is not.
//!
//! Nothing is changed that was there before: what has to be written to find out whether it can be
//! (a queue, a key, a directory at a destination) has a name of our own and is removed at once.
//! Checks run at the same time, a few at a time and each for a limited time; what stands in the way
//! of one stops only those that depend on it. The order of the findings is always the same.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::settings::Settings;
use crate::transfer::plan::LocalHost;

mod broker;
mod database;
mod here;
mod places;
mod scheduled;
mod services;

/// Checks that run at the same time; below what an sshd lets knock at once.
const AT_ONCE: usize = 8;

/// What is looked at.
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
    /// The ports of `bbcp.port_range` can be listened at.
    Ports,
    /// bbcp on this host.
    Bbcp,
    /// The database can be reached.
    Database,
    /// Its tables are what is needed.
    Schema,
    /// No partial copies of ended transfers are left.
    Partials,
    /// Transfers that are SCHEDULED are taken by workers.
    Scheduled,
    /// Clocks agree: the database's, and those of other hosts.
    Clock,
    /// The broker lets us in.
    Broker,
    /// What the broker's user may do.
    Permissions,
    /// Queues are what would be declared.
    Queues,
    /// How long the broker lets a message be held.
    ConsumerTimeout,
    /// Results can be stored.
    Results,
    /// Signs of life can be written.
    Health,
    /// The collector takes traces.
    Traces,
    /// Links have an end on this host.
    Links,
    /// Other hosts let us in.
    Ssh,
    /// bbcp on other hosts.
    RemoteBbcp,
    /// The program for digests on other hosts.
    Digest,
    /// Origins can be read.
    Origin,
    /// There is room at destinations.
    Space,
    /// Destinations can be written.
    Write,
}

/// How it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Green,
    /// It works, and may be a matter of time.
    Yellow,
    /// It does not work.
    Red,
    /// It could not be looked at, since something before it is red or missing.
    Skipped,
}

/// What a check found, without its name.
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

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// Which one.
    pub check: Check,
    /// What was looked at; empty where there is only one.
    pub subject: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do: a command or a setting. None where nothing is to be done.
    pub advice: Option<String>,
}

/// What is to be looked at.
#[derive(Debug, Clone)]
pub(crate) struct Wishes {
    /// Only the locations of these sites, by short name, and links from or to them; all if empty.
    pub sites: Vec<String>,
    /// Queues beside those of the locations.
    pub queues: Vec<String>,
    /// Checks to leave out.
    pub skip: BTreeSet<Check>,
    /// Longest time for one check.
    pub limit: Duration,
}

/// Looks at everything.
pub(crate) struct Doctor {
    settings: Arc<Settings>,
    /// This host's name.
    host: String,
    local: LocalHost,
    wishes: Wishes,
    bound: Semaphore,
}

impl Doctor {
    /// A doctor on the host of this name.
    #[must_use]
    pub(crate) fn new(settings: Arc<Settings>, host: String, wishes: Wishes) -> Self {
        let further = settings.transfer.local_hosts.iter().map(String::as_str);
        let local = LocalHost::new(&host, further);
        Self {
            settings,
            host,
            local,
            wishes,
            bound: Semaphore::new(AT_ONCE),
        }
    }

    /// Everything that was found, in a fixed order.
    pub(crate) async fn examine(&self) -> Vec<Finding> {
        let (names, known) = oneshot::channel();
        let (here, (database, places), broker, services) = tokio::join!(
            self.look_here(),
            self.look_at_database_and_places(names),
            self.look_at_broker(known),
            self.look_at_services(),
        );
        [here, database, broker, services, places].concat()
    }

    /// Does one check, when it is its turn and not for longer than it may take. None if it is left
    /// out.
    async fn check(
        &self,
        check: Check,
        subject: impl Into<String>,
        work: impl Future<Output = Outcome>,
    ) -> Option<Finding> {
        if self.wishes.skip.contains(&check) {
            return None;
        }
        // It is never closed.
        let _turn = self.bound.acquire().await;
        let limit = self.wishes.limit;
        let Outcome {
            verdict,
            found,
            advice,
        } = timeout(limit, work).await.unwrap_or_else(|_| {
            let found = format!("no answer within {}", humantime::format_duration(limit));
            Outcome::red(
                found,
                "find out what hangs, or give it more time by --timeout",
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

    /// A check that cannot be done.
    fn skipped(&self, check: Check, subject: impl Into<String>, why: &str) -> Option<Finding> {
        (!self.wishes.skip.contains(&check)).then(|| Finding {
            check,
            subject: subject.into(),
            verdict: Verdict::Skipped,
            found: why.to_owned(),
            advice: None,
        })
    }
}

/// What is to be said of settings that cannot be used; nothing else can be looked at then.
#[must_use]
pub(crate) fn unusable(error: &crate::settings::SettingsError) -> Vec<Finding> {
    let finding = |problem: &crate::settings::Problem| Finding {
        check: Check::Settings,
        subject: String::new(),
        verdict: Verdict::Red,
        found: problem.to_string(),
        advice: Some("correct it; `ccat-transfer config default` explains every key".into()),
    };
    error.problems.iter().map(finding).collect()
}
