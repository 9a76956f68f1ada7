//! Leases: the right to work on a transfer, and the processes that hold it.
//!
//! A lease is a row with a secret token and an expiry time. Its holder renews it while the attempt runs. The holder
//! loses it when another worker writes another token, or when an operator changes the transfer. A lease is **dead** in
//! two cases only: it has expired by the database's clock, or its owner is a process of this host that provably no
//! longer exists.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use entity::transfer_worker_lease;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::{Pid, gethostname};
use sea_orm::DbErr;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::database::DatabaseError;
use crate::transfer::id::{AttemptNumber, TransferId};

/// A process that can hold leases.
///
/// A process id alone does not identify a process: the system reuses ids, and another container on the same host can
/// have a process with the same id. The boot id, the PID namespace and the start time make it unique.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Owner {
    /// Celery's name of the worker, `celery@host`.
    pub node: String,
    /// Name of the host.
    pub host: String,
    /// Process id.
    pub pid: u32,
    /// Boot id and PID namespace in which the process id is valid; empty if the system does not provide them.
    pub pid_scope: String,
    /// Start time of the process, in the kernel's units (clock ticks since boot); empty if the system does not provide
    /// it.
    pub started: String,
}

impl Owner {
    /// Describes this process.
    pub fn current(node: impl Into<String>) -> Self {
        Self::of_process(node, std::process::id())
    }

    /// Describes a process of this host.
    pub fn of_process(node: impl Into<String>, pid: u32) -> Self {
        Self {
            node: node.into(),
            host: gethostname()
                .map_or_else(|_| String::new(), |h| h.to_string_lossy().into_owned()),
            pid,
            pid_scope: pid_scope().unwrap_or_default(),
            started: process_start(pid).unwrap_or_default(),
        }
    }

    /// Returns true if `other` was a process that this process could see, and certainly no longer exists.
    ///
    /// False means alive or unknown: another host, another container, or another boot. (After a reboot, the other boot
    /// id proves nothing, because two hosts can have the same name.)
    pub fn is_provably_dead(&self, other: &Self) -> bool {
        let in_sight = !self.pid_scope.is_empty()
            && self.pid_scope == other.pid_scope
            && self.host == other.host
            && !other.started.is_empty();
        in_sight && !process_lives(other.pid, &other.started)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {} on {})", self.node, self.pid, self.host)
    }
}

/// Boot id and PID namespace of this process.
fn pid_scope() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), namespace.to_str()?))
}

/// Start time of a process: field 22 of `/proc/PID/stat`, see proc(5). The second field is a name that may contain
/// blanks and parentheses, so fields are counted from the last parenthesis.
fn process_start(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_process_start(&stat).map(str::to_owned)
}

fn parse_process_start(stat: &str) -> Option<&str> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    behind_name.split_ascii_whitespace().nth(19)
}

/// Returns true if a process with this id and start time runs. Unclear cases count as running: with `hidepid`, a
/// process of another user accepts signal 0 but has no readable `/proc/PID/stat`.
fn process_lives(pid: u32, started: &str) -> bool {
    let Ok(raw) = i32::try_from(pid) else {
        return false;
    };
    // `kill` interprets 0 and negative numbers as process groups.
    if raw <= 0 || kill(Pid::from_raw(raw), None) == Err(Errno::ESRCH) {
        return false;
    }
    process_start(pid).is_none_or(|now| now == started)
}

/// The right to work on one transfer, as its holder has it.
///
/// Every write that depends on the lease is conditional on the token, so a holder that lost the lease without noticing
/// (for example because it was suspended) can no longer change anything.
#[derive(Debug, Clone)]
pub struct Lease {
    pub(super) data_transfer_id: TransferId,
    pub(super) attempt: AttemptNumber,
    pub(super) token: Uuid,
    pub(super) ttl: Duration,
}

impl Lease {
    /// Id of the transfer.
    pub fn data_transfer_id(&self) -> TransferId {
        self.data_transfer_id
    }

    /// Number of the attempt: 1, 2, … Interrupted attempts count. Each lease of a transfer has its own number.
    pub fn attempt(&self) -> AttemptNumber {
        self.attempt
    }

    /// Secret that distinguishes this lease from all others.
    pub(super) fn token(&self) -> Uuid {
        self.token
    }

    /// Duration of the lease after each renewal.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Returns a word that is unique among all leases of all databases, for names of temporary files and logs.
    pub fn tag(&self) -> String {
        let token = self.token.simple().to_string();
        let (head, _) = token.split_at(8);
        format!("{}-{}-{head}", self.data_transfer_id, self.attempt)
    }
}

/// Progress of a copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes copied.
    pub bytes_done: u64,
    /// Bytes to copy, once known.
    pub bytes_total: Option<u64>,
    /// Current rate, in bytes per second.
    pub rate_bytes_per_s: u64,
    /// Bytes on which both ends agree so far. They are counted in blocks of 64 MiB and more, if one end is another host.
    pub bytes_verified: u64,
}

/// Current phase of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The attempt inspects both ends.
    Preparing,
    /// The attempt copies: bbcp runs.
    Copying,
    /// The attempt computes digests.
    Verifying,
    /// The attempt renames the file and commits the row.
    Publishing,
}

impl Phase {
    /// Stable name of the phase, for programs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Copying => "copying",
            Self::Verifying => "verifying",
            Self::Publishing => "publishing",
        }
    }
}

/// Phase and progress of an attempt, to show to people.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot {
    /// Current phase.
    pub phase: Phase,
    /// Progress of the copy.
    pub progress: Progress,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            phase: Phase::Preparing,
            progress: Progress::default(),
        }
    }
}

/// Public part of a lease, without its token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct LeaseInfo {
    /// Id of the transfer.
    pub data_transfer_id: TransferId,
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Celery's id of the task.
    pub task_id: String,
    /// The holder.
    pub owner: Owner,
    /// Start of the lease, by the database's clock.
    pub acquired_at: DateTime<Utc>,
    /// Time of the last renewal.
    pub renewed_at: DateTime<Utc>,
    /// Expiry time, unless the lease is renewed before.
    pub expires_at: DateTime<Utc>,
    /// Bytes copied so far.
    pub bytes_done: i64,
    /// Bytes to copy; `None` until known.
    pub bytes_total: Option<i64>,
    /// Current rate, in bytes per second.
    pub rate_bytes_per_s: i64,
    /// Phase of the attempt, see [`Phase::as_str`]; `None` in rows of older workers.
    pub phase: Option<String>,
    /// Number of data streams of the copy; `None` until the copy is planned.
    pub streams: Option<i32>,
}

impl From<&transfer_worker_lease::Model> for LeaseInfo {
    fn from(row: &transfer_worker_lease::Model) -> Self {
        Self {
            data_transfer_id: row.data_transfer_id.into(),
            attempt: AttemptNumber::new(row.attempt),
            task_id: row.task_id.clone(),
            owner: Owner {
                node: row.owner_node.clone(),
                host: row.owner_host.clone(),
                // A number out of range is not a process: the owner counts as dead if this process could see it.
                pid: u32::try_from(row.owner_pid).unwrap_or_default(),
                pid_scope: row.owner_pid_scope.clone(),
                started: row.owner_started.clone(),
            },
            acquired_at: row.acquired_at,
            renewed_at: row.renewed_at,
            expires_at: row.expires_at,
            bytes_done: row.bytes_done,
            bytes_total: row.bytes_total,
            rate_bytes_per_s: row.rate_bytes_per_s,
            phase: row.phase.clone(),
            streams: row.streams,
        }
    }
}

/// Reason why a lease is no longer valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpiryReason {
    /// The holder did not renew it in time.
    Expired,
    /// The process of the holder no longer exists.
    OwnerDead,
    /// An operator or another program changed the status of the transfer while the lease existed.
    StatusChanged,
}

impl fmt::Display for ExpiryReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Expired => "its lease was not renewed in time",
            Self::OwnerDead => "its worker's process has ended",
            Self::StatusChanged => {
                "the transfer's status was changed by an operator or another program"
            }
        })
    }
}

impl LeaseInfo {
    /// Returns the reason if the lease is dead, as seen by `observer`; `now` is by the database's clock.
    pub fn expiry_reason(&self, now: DateTime<Utc>, observer: &Owner) -> Option<ExpiryReason> {
        if self.expires_at <= now {
            Some(ExpiryReason::Expired)
        } else if observer.is_provably_dead(&self.owner) {
            Some(ExpiryReason::OwnerDead)
        } else {
            None
        }
    }
}

/// Error of an operation that needs a lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The caller no longer holds the lease: another worker took it over, or an operator changed the transfer. The
    /// caller must stop the copy, remove its temporary file and write nothing.
    #[error("the lease was lost: the transfer was taken over, reset or cancelled")]
    Lost,
    /// The state of the lease is unknown; the same call may be made again.
    #[error("the lease could not be checked")]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for LeaseError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for LeaseError {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        Self::Database(lost.into())
    }
}

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn start_time_is_found_behind_any_name() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 8315 0 0";
        assert_eq!(parse_process_start(stat), Some("8315"));
        assert_eq!(parse_process_start(""), None);
        assert_eq!(parse_process_start("7 (x) S 1"), None);
    }

    #[test]
    fn this_process_is_alive() {
        let me = Owner::current("celery@here");
        assert!(!me.pid_scope.is_empty() && !me.started.is_empty());
        assert!(!me.is_provably_dead(&me));
    }

    #[test]
    fn a_child_is_dead_once_it_was_reaped() {
        let me = Owner::current("celery@here");
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let other = Owner::of_process("celery@there", child.id());
        assert!(!me.is_provably_dead(&other));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(me.is_provably_dead(&other));
    }

    #[test]
    fn a_reused_process_id_is_another_process() {
        let me = Owner::current("celery@here");
        assert!(me.is_provably_dead(&Owner {
            started: "1".to_owned(),
            ..me.clone()
        }));
    }

    #[test]
    fn process_on_another_host_is_never_dead() {
        let me = Owner::current("celery@here");
        let gone = Owner {
            started: "1".to_owned(),
            ..me.clone()
        };
        for other in [
            Owner {
                host: "elsewhere".to_owned(),
                ..gone.clone()
            },
            Owner {
                pid_scope: "another boot or container".to_owned(),
                ..gone.clone()
            },
            Owner {
                started: String::new(),
                ..gone.clone()
            },
        ] {
            assert!(!me.is_provably_dead(&other), "{other:?}");
        }
        let blind = Owner {
            pid_scope: String::new(),
            ..me
        };
        assert!(!blind.is_provably_dead(&Owner {
            pid_scope: String::new(),
            ..gone
        }));
    }

    proptest! {
        #[test]
        fn any_stat_line_is_read_without_panic(stat in ".*") {
            let _ = parse_process_start(&stat);
        }
    }
}
