//! The data of the status page and of its API.
//!
//! Every time is in UTC, every size in bytes, every rate in bytes per second.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use crate::explanation::Explanation;
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::link::{LinkName, Pause};
use crate::transfer::repository::{TransferDetail, TransferSummary};

/// State of the whole system.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Overview {
    /// Time of the data, by the database's clock; null if the database has not been read yet, so that nothing is known.
    pub at: Option<DateTime<Utc>>,
    /// Present if the database cannot be reached; the data are then those of `at`.
    pub unreachable: Option<Unreachable>,
    /// Summary in one sentence.
    pub verdict: Verdict,
    /// Numbers of transfers by status; null until they are counted for the first time.
    pub counts: Option<Counts>,
    /// Running transfers, the oldest first, at most 1000.
    pub running: Vec<RunningTransfer>,
    /// Links that have a route, a limit or transfers, by name.
    pub links: Vec<LinkState>,
    /// Problems by cause: those that require an action first.
    pub problems: Vec<ProblemGroup>,
    /// Workers and managers; null if the database has no table for them, which `ccat-transfer db migrate` creates.
    pub programs: Option<Vec<ProgramState>>,
    /// Ended attempts of the last 24 hours by link; only links with attempts.
    pub last_24h: Vec<LinkTotal>,
}

/// The links.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Links {
    /// Time of the data; null if the database has not been read yet.
    pub at: Option<DateTime<Utc>>,
    /// Present if the database cannot be reached; the data are then those of `at`.
    pub unreachable: Option<Unreachable>,
    /// The links, by name.
    pub links: Vec<LinkState>,
}

/// The problems.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Problems {
    /// Time of the data; null if the database has not been read yet.
    pub at: Option<DateTime<Utc>>,
    /// Present if the database cannot be reached; the data are then those of `at`.
    pub unreachable: Option<Unreachable>,
    /// Problems by cause: those that require an action first.
    pub problems: Vec<ProblemGroup>,
}

/// The workers and managers.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Programs {
    /// Time of the data; null if the database has not been read yet.
    pub at: Option<DateTime<Utc>>,
    /// Present if the database cannot be reached; the data are then those of `at`.
    pub unreachable: Option<Unreachable>,
    /// Workers and managers of the last days; null if the database has no table for them.
    pub programs: Option<Vec<ProgramState>>,
}

/// Failure to read the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Unreachable {
    /// Time of the first failure.
    pub since: DateTime<Utc>,
    /// Cause.
    pub error: String,
}

/// Summary of the state in one sentence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Verdict {
    /// Severity.
    pub level: Level,
    /// The sentence.
    pub text: String,
}

/// Severity of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Nothing requires an action.
    Ok,
    /// Transfers wait, and will be tried again without an action.
    Waiting,
    /// Something requires an action.
    Action,
    /// The state is not known.
    Unknown,
}

/// Numbers of transfers by status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Counts {
    /// Time of the count.
    pub at: DateTime<Utc>,
    /// PENDING: waits for the manager.
    pub pending: u64,
    /// SCHEDULED: waits for a worker.
    pub scheduled: u64,
    /// IN_PROGRESS: a worker runs an attempt.
    pub in_progress: u64,
    /// COMPLETED: the file is at its destination.
    pub completed: u64,
    /// FAILED: no further attempt is made.
    pub failed: u64,
}

/// A transfer that a worker runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct RunningTransfer {
    /// Id of the transfer.
    pub id: TransferId,
    /// Name of the file.
    pub file_name: Option<String>,
    /// Location to copy from, `site/location`; null if it no longer exists.
    pub origin: Option<String>,
    /// Location to copy to, `site/location`.
    pub destination: Option<String>,
    /// The link; null if a site no longer exists.
    pub link: Option<LinkName>,
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Step of the attempt: preparing, copying, verifying or publishing.
    pub phase: Option<String>,
    /// Bytes copied.
    pub bytes_done: u64,
    /// Bytes to copy, once known.
    pub bytes_total: Option<u64>,
    /// Copied share, 0 to 100.
    pub percent: Option<u8>,
    /// Current rate, in bytes per second.
    pub bytes_per_second: u64,
    /// Remaining time of the copy at this rate, in seconds.
    pub remaining_s: Option<u64>,
    /// Expected end of the copy at this rate.
    pub ends_at: Option<DateTime<Utc>>,
    /// Name of the worker.
    pub worker: String,
    /// Start of the attempt.
    pub started_at: DateTime<Utc>,
    /// Last sign of life of the attempt.
    pub renewed_at: DateTime<Utc>,
    /// True if the worker has not renewed its lease in time.
    pub is_overdue: bool,
}

/// State of a link between two sites.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct LinkState {
    /// Short name of the site to copy from.
    pub origin: String,
    /// Short name of the site to copy to.
    pub destination: String,
    /// Number of running transfers.
    pub active: u64,
    /// Maximum number of transfers that may be SCHEDULED or IN_PROGRESS now; null for no limit.
    pub limit: Option<u32>,
    /// Number of SCHEDULED transfers, which wait for a worker.
    pub scheduled: u64,
    /// Number of PENDING transfers, which wait for the manager.
    pub waiting: u64,
    /// Lowest id of the PENDING transfers.
    pub oldest_waiting: Option<TransferId>,
    /// Creation time of the oldest PENDING transfer, if the database records it.
    pub waiting_since: Option<DateTime<Utc>>,
    /// Total rate of the running copies, in bytes per second.
    pub bytes_per_second: u64,
    /// Mean rate of the last 24 hours, in bytes per second.
    pub bytes_per_second_24h: u64,
    /// Packages that arrived in the last 24 hours.
    pub packages_24h: u64,
    /// Their size in bytes.
    pub bytes_24h: u64,
    /// Failed attempts of the last 24 hours.
    pub failures_24h: u64,
    /// The pause; null while the link is open.
    pub pause: Option<Pause>,
    /// End of the time window in which the link takes no transfers; null outside of such a window.
    pub closed_until: Option<DateTime<Utc>>,
}

impl LinkState {
    /// Name of the link.
    #[must_use]
    pub fn name(&self) -> LinkName {
        LinkName {
            origin: self.origin.clone(),
            destination: self.destination.clone(),
        }
    }
}

/// Transfers, or a program, with the same problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ProblemGroup {
    /// Kind of the problem.
    pub kind: ProblemKind,
    /// True if the problem lasts until an operator acts.
    pub requires_action: bool,
    /// Error code of the attempts, see docs/failures.md.
    pub error_code: Option<String>,
    /// Description of the problem.
    pub title: String,
    /// Advice for an operator, in whole sentences.
    pub remedy: String,
    /// Command that ends the problem once its cause is corrected.
    pub command: Option<String>,
    /// Number of transfers.
    pub count: u64,
    /// The newest of these transfers, at most 20.
    pub transfers: Vec<Problem>,
}

/// Kind of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// FAILED: no further attempt is made.
    Failed,
    /// A worker or manager has given no sign of life for too long, and has not ended.
    Program,
    /// IN_PROGRESS without a lease: a worker that does not use leases runs it, or none.
    Untracked,
    /// IN_PROGRESS, and the worker has not renewed its lease in time.
    Overdue,
    /// SCHEDULED for too long: no worker has taken it.
    Untaken,
    /// PENDING until the time of the next attempt.
    Delayed,
}

/// A transfer with a problem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Problem {
    /// Id of the transfer.
    pub id: TransferId,
    /// Name of the file.
    pub file_name: Option<String>,
    /// The link; null if a site no longer exists.
    pub link: Option<LinkName>,
    /// Error message of the latest failed attempt.
    pub message: Option<String>,
    /// Time since which the transfer is in this state.
    pub since: Option<DateTime<Utc>>,
    /// Number of failed attempts so far.
    pub retry_count: u32,
    /// Earliest time of the next attempt.
    pub next_attempt_at: Option<DateTime<Utc>>,
}

/// A worker or a manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ProgramState {
    /// Celery's name of the node.
    pub name: String,
    /// `worker` or `manager`.
    pub kind: String,
    /// Host of the process.
    pub host: String,
    /// Version of the program.
    pub version: String,
    /// Start of the process.
    pub started_at: DateTime<Utc>,
    /// Last sign of life.
    pub seen_at: DateTime<Utc>,
    /// End of the process, if it has ended in order.
    pub ended_at: Option<DateTime<Utc>>,
    /// State of the process.
    pub state: ProgramCondition,
    /// Number of transfers that it runs.
    pub running_transfers: u64,
}

/// State of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProgramCondition {
    /// Gives signs of life.
    Running,
    /// Has given no sign of life for three intervals, and has not ended in order.
    Lost,
    /// Has ended in order.
    Ended,
}

/// Ended attempts of one link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct LinkTotal {
    /// Short name of the site to copy from; `?` if its row no longer exists.
    pub origin: String,
    /// Short name of the site to copy to.
    pub destination: String,
    /// Number of transfers that were completed.
    pub packages: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Number of transfers that have FAILED.
    pub failed: u64,
    /// Number of failed attempts that are followed by another one.
    pub retried: u64,
}

/// Period of a plot, which ends now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, ToSchema)]
pub enum Period {
    /// 24 hours, in steps of 30 minutes.
    #[serde(rename = "24h")]
    Day,
    /// 7 days, in steps of 6 hours.
    #[serde(rename = "7d")]
    Week,
    /// 30 days, in steps of one day.
    #[serde(rename = "30d")]
    Month,
}

impl Period {
    /// All periods, the shortest first.
    pub const ALL: [Self; 3] = [Self::Day, Self::Week, Self::Month];

    /// The name in URLs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Day => "24h",
            Self::Week => "7d",
            Self::Month => "30d",
        }
    }

    /// Length of the period.
    #[must_use]
    pub const fn length(self) -> Duration {
        const DAY: u64 = 86_400;
        Duration::from_secs(match self {
            Self::Day => DAY,
            Self::Week => 7 * DAY,
            Self::Month => 30 * DAY,
        })
    }

    /// Length of a step.
    #[must_use]
    pub const fn bucket(self) -> Duration {
        Duration::from_secs(match self {
            Self::Day => 1_800,
            Self::Week => 21_600,
            Self::Month => 86_400,
        })
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Period {
    type Err = InvalidPeriod;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|period| period.name() == text);
        found.ok_or_else(|| InvalidPeriod(text.chars().take(40).collect()))
    }
}

/// Error for a text that is not a [`Period`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a period; it must be 24h, 7d or 30d")]
pub struct InvalidPeriod(String);

/// Packages that arrived, and failures, over a period.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Throughput {
    /// The period.
    pub period: Period,
    /// Start of the period.
    pub since: DateTime<Utc>,
    /// End of the period.
    pub until: DateTime<Utc>,
    /// Length of a step in seconds.
    pub bucket_s: u64,
    /// Links with attempts in the period, by name.
    pub links: Vec<LinkThroughput>,
}

/// Throughput of one link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct LinkThroughput {
    /// Short name of the site to copy from; `?` if its row no longer exists.
    pub origin: String,
    /// Short name of the site to copy to.
    pub destination: String,
    /// All steps of the period, the oldest first; the first and the last one are incomplete.
    pub buckets: Vec<Bucket>,
}

/// One step of a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Bucket {
    /// Start of the step.
    pub start: DateTime<Utc>,
    /// Number of transfers that were completed.
    pub packages: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Number of failed attempts.
    pub failures: u64,
}

/// Result of a search.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Transfers {
    /// Found transfers, the newest first.
    pub transfers: Vec<TransferSummary>,
    /// `cursor` of the next part; null if there is none. A part may have fewer transfers than `limit`, or none, although
    /// older ones follow: the search ends after a limited time.
    pub next_cursor: Option<String>,
    /// Lowest id up to which the search has looked; null if it has looked at all.
    pub searched_to: Option<TransferId>,
}

/// A transfer with its whole history.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Transfer {
    /// Time of the data, by the database's clock.
    pub at: DateTime<Utc>,
    /// Rows of the database.
    #[serde(flatten)]
    pub detail: TransferDetail,
    /// Explanation of the state, and the next steps.
    #[serde(rename = "outlook")]
    pub explanation: Explanation,
    /// End of the log of the last attempt that has one, if the file is on this host.
    pub log: Option<LogTail>,
}

/// End of a log file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct LogTail {
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Path of the file.
    pub path: String,
    /// Last lines of the file, at most 200.
    pub lines: Vec<String>,
    /// True if these are all lines.
    pub is_complete: bool,
}

/// The answer to a request that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ErrorMessage {
    /// Failed operation and cause.
    pub error: String,
}
