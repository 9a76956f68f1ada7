//! What can go wrong with a transfer.
//!
//! The enum holds what an operator reads: every message says what, where, why, and what to do next.
//! What follows from an error stands in the table of [`failures`].

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::failures::{self, Kind, Retry};
pub use super::failures::{Scope, Wait};
use super::link::{ClosedLink, FullLink, PausedLink};
use traces::Explain;

/// One end of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The end that holds the package.
    Origin,
    /// The end that gets it.
    Destination,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Origin => "origin",
            Self::Destination => "destination",
        })
    }
}

/// Why a copy was told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interruption {
    /// The worker shuts down.
    Shutdown,
    /// The caller withdrew the task, or gave no other reason.
    Cancelled,
    /// An operator reset or terminated the transfer.
    Operator,
}

impl fmt::Display for Interruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shutdown => "the worker shuts down",
            Self::Cancelled => "it was cancelled",
            Self::Operator => "an operator stopped it",
        })
    }
}

/// What is known of where a copy stands still.
fn standstill(storage: Option<Role>) -> String {
    match storage {
        None => String::new(),
        Some(role) => format!(", and the storage at the {role} does not answer"),
    }
}

/// A cause of any type.
pub type Cause = Box<dyn Error + Send + Sync>;

/// A transfer did not happen, or not completely.
///
/// `line` fields hold the line of bbcp's, ssh's or a remote shell's output that told.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages name every field; a second wording beside them would only drift"
)]
pub enum TransferError {
    // The request: there is nothing (more) to do for this worker.
    #[error("data transfer {id} does not exist; nothing was done")]
    UnknownTransfer { id: i64 },
    #[error(
        "data transfer {id} has failed for good before; reset it (status pending) to have it tried again"
    )]
    AlreadyFailed { id: i64 },
    #[error(
        "data transfer {id} failed before and waits until {not_before} to be tried again; the manager sends it then, `ccat-transfer transfers run {id}` does it now"
    )]
    NotDue { id: i64, not_before: DateTime<Utc> },
    #[error(
        "the link {link} is paused since {since} by {by}: {reason}; the transfer waits until it is resumed (`ccat-transfer links resume`)"
    )]
    LinkPaused {
        link: String,
        since: DateTime<Utc>,
        by: String,
        reason: String,
    },
    #[error(
        "the link {link} has {copies} copies and may have {limit} at this time; the transfer waits until one ends (`ccat-transfer links list`)"
    )]
    LinkFull {
        link: String,
        limit: u32,
        copies: u64,
    },
    #[error("data transfer {id} is being done by {owner}; left alone")]
    Held { id: i64, owner: String },
    #[error(
        "data transfer {id} is in progress but no worker of this kind holds it; if none runs it any more, reset it"
    )]
    Untracked { id: i64 },
    #[error(
        "data transfer {id} was taken from this worker by another worker or an operator; what was copied is left unpublished"
    )]
    LeaseLost { id: i64 },
    #[error("the copy was stopped because {cause}; nothing was published")]
    Interrupted { cause: Interruption },

    // What the rows ask for cannot be done.
    #[error(
        "the {role} `{location}` is {kind} storage, which bbcp cannot reach; correct the route"
    )]
    UnsupportedLocation {
        role: Role,
        location: String,
        kind: String,
    },
    #[error("there is no route from site `{origin}` to site `{destination}`; add one")]
    NoRoute { origin: String, destination: String },
    #[error(
        "the route from site `{origin}` to site `{destination}` wants method `{method}`; this worker does `bbcp` only"
    )]
    OtherMethod {
        origin: String,
        destination: String,
        method: String,
    },
    #[error("the {role} `{location}` has the unsafe host name {host:?}: {problem}")]
    BadHost {
        role: Role,
        location: String,
        host: String,
        problem: &'static str,
    },
    #[error("the login name {user:?} for the {role} `{location}` is unsafe; correct `ssh.user`")]
    BadUser {
        role: Role,
        location: String,
        user: String,
    },
    #[error("the {role} path {path:?} cannot be used: {problem}")]
    BadPath {
        role: Role,
        path: String,
        problem: &'static str,
    },
    #[error(
        "both the origin ({origin_host}) and the destination ({destination_host}) are remote for this worker; run it at one of them, or name this host in `transfer.local_hosts`"
    )]
    BothRemote {
        origin_host: String,
        destination_host: String,
    },
    #[error(
        "origin and destination are the same file, {path}, perhaps by another host name, a link or an exported directory; correct the locations"
    )]
    SamePlace { path: String },
    #[error("bad settings for the link from `{origin}` to `{destination}`: {problem}")]
    LinkSettings {
        origin: String,
        destination: String,
        problem: String,
    },

    // The origin.
    #[error("{path} does not exist at the origin; put it back or correct the package's path")]
    OriginMissing { path: String },
    #[error(
        "{path}, the directory of the origin location, {problem}; mount it, the transfer waits"
    )]
    OriginRootMissing {
        path: String,
        problem: String,
        /// The directory exists and is empty.
        empty: bool,
    },
    #[error("{path} cannot be read at the origin; check permissions: {line}")]
    OriginUnreadable { path: String, line: String },
    #[error(
        "{path} at the origin is not a file but a directory or a device; a package is one archive, as the stage that assembles transfer packages makes it: correct the package's path there"
    )]
    OriginNotAFile { path: String },
    #[error(
        "{path} at the origin has {found} bytes where the database says {recorded}; find out which is right"
    )]
    OriginSize {
        path: String,
        recorded: u64,
        found: u64,
    },
    #[error("{path} changed at the origin while it was copied; let its writer finish: {line}")]
    OriginChanged { path: String, line: String },
    #[error(
        "{path} at the origin has {algorithm} {found} where the database says {recorded}; the origin's copy is damaged or was replaced"
    )]
    OriginCorrupt {
        path: String,
        algorithm: &'static str,
        recorded: String,
        found: String,
    },

    // The destination.
    #[error(
        "{path} exists at the destination with other content; look at it and remove it, nothing was overwritten"
    )]
    DestinationExists { path: String },
    #[error(
        "bbcp found a file at {path}, a name that only this attempt has; the next attempt has another one"
    )]
    TemporaryExists { path: String },
    #[error("{path} is being written by data transfer {by}; tried again when that is done")]
    DestinationBusy { path: String, by: String },
    #[error("{path} does not exist at the destination; mount or make it, it is not made here")]
    DestinationRootMissing { path: String },
    #[error("the directory of {path} is missing at the destination though it was made: {line}")]
    DestinationDirectory { path: String, line: String },
    #[error("{path} cannot be written at the destination; check permissions: {line}")]
    DestinationDenied { path: String, line: String },
    #[error(
        "{path} has {available} bytes free where {needed} are needed (with the margin); make room"
    )]
    StorageLow {
        path: String,
        available: u64,
        needed: u64,
    },
    #[error("the destination ran full while {path} was copied; make room: {line}")]
    StorageFull { path: String, line: String },
    #[error(
        "the file system of {path} has neither rename without overwriting nor hard links, so that the file cannot be published safely; use another one"
    )]
    RenameUnsupported { path: String },

    // The link.
    #[error(
        "{host} did not let us in; check `ssh.user`, `ssh.identity_file` and its authorized keys: {line}"
    )]
    SshDenied { host: String, line: String },
    #[error(
        "the host key of {host} is unknown or has changed; check `ssh.known_hosts_file`: {line}"
    )]
    HostKey { host: String, line: String },
    #[error("{host} cannot be reached; check network, firewall and port range: {line}")]
    Network { host: String, line: String },
    #[error("no free port for the data connections; widen `bbcp.port_range`: {line}")]
    PortBusy { line: String },
    #[error("the side at {host} ended without saying why ({line}); look for a crash there")]
    RemoteDied { host: String, line: String },
    #[error(
        "no byte moved for {}, at {bytes_done} of {bytes_total} bytes{}; the copy was stopped",
        humantime::format_duration(*.idle),
        standstill(*.storage)
    )]
    Stalled {
        idle: Duration,
        bytes_done: u64,
        bytes_total: u64,
        /// The end whose storage did not answer; none where both do, so that it is the link.
        storage: Option<Role>,
    },
    #[error(
        "{moved} bytes moved in the last {}, which is below {least} bytes/s, at {bytes_done} of {bytes_total} bytes; the copy was stopped (`transfer.min_rate`)",
        humantime::format_duration(*.window)
    )]
    TooSlow {
        moved: u64,
        window: Duration,
        least: u64,
        bytes_done: u64,
        bytes_total: u64,
    },
    #[error(
        "the copy was not done after {}, at {bytes_done} of {bytes_total} bytes, and was stopped (`transfer.deadline_rate`)",
        humantime::format_duration(*.limit)
    )]
    Deadline {
        limit: Duration,
        bytes_done: u64,
        bytes_total: u64,
    },
    #[error(
        "bbcp met its time limit, which this worker never sets; look for one in its build: {line}"
    )]
    TimeLimit { line: String },
    #[error(
        "{operation} at {host} took longer than {}",
        humantime::format_duration(*.limit)
    )]
    OperationTimeout {
        operation: &'static str,
        host: String,
        limit: Duration,
    },

    // The data.
    #[error("bbcp found the data damaged on its way: {line}")]
    DamagedInFlight { line: String },
    #[error(
        "{path} has {found} bytes at the destination where {expected} were sent; the copy was thrown away"
    )]
    TargetSize {
        path: String,
        expected: u64,
        found: u64,
    },
    #[error(
        "{path} has {algorithm} {found} at the destination where the origin has {expected}; the copy was thrown away"
    )]
    ChecksumMismatch {
        path: String,
        algorithm: &'static str,
        expected: String,
        found: String,
    },

    #[error("bbcp does not complete the partial copy: {line}")]
    ResumeRefused { line: String },

    // Programs.
    #[error("`{program}` is not there on this host; install it or set its absolute path")]
    ProgramMissing { program: String },
    #[error("a program is missing at {host}; install it there or set its absolute path: {line}")]
    RemoteProgramMissing {
        role: Role,
        host: String,
        line: String,
    },
    #[error("cannot start `{program}`")]
    Spawn { program: String, source: io::Error },
    #[error("bbcp did not accept its command line; check the section [bbcp]: {line}")]
    BadOption { line: String },
    #[error("bbcp crashed: {line}")]
    Segfault { line: String },
    #[error("bbcp failed ({exit}): {line}")]
    BbcpFailed { exit: String, line: String },
    #[error("{operation} failed at the {role}, {path}")]
    Storage {
        operation: &'static str,
        role: Role,
        path: String,
        source: Cause,
    },
    #[error("cannot write the log file {}; check `transfer.log_dir`", .path.display())]
    LogFile { path: PathBuf, source: io::Error },

    #[error(
        "the operations database refuses a value of this transfer, or a row that it needs is missing; correct the row"
    )]
    Database { source: Cause },

    #[error("the attempt broke down inside this worker, which is a bug of it: {what}")]
    Internal { what: String },
}

impl From<PausedLink> for TransferError {
    fn from(paused: PausedLink) -> Self {
        Self::LinkPaused {
            link: paused.name.to_string(),
            since: paused.pause.since,
            by: paused.pause.by,
            reason: paused.pause.reason,
        }
    }
}

impl From<ClosedLink> for TransferError {
    fn from(closed: ClosedLink) -> Self {
        match closed {
            ClosedLink::Paused(paused) => paused.into(),
            ClosedLink::Full(FullLink {
                name,
                limit,
                copies,
            }) => Self::LinkFull {
                link: name.to_string(),
                limit,
                copies,
            },
        }
    }
}

impl TransferError {
    /// The error's row in the table.
    fn kind(&self) -> &'static Kind {
        match self {
            Self::UnknownTransfer { .. } => &failures::UNKNOWN,
            Self::AlreadyFailed { .. } => &failures::FAILED_BEFORE,
            Self::NotDue { .. } => &failures::NOT_DUE,
            Self::LinkPaused { .. } => &failures::LINK_PAUSED,
            Self::LinkFull { .. } => &failures::LINK_FULL,
            Self::Held { .. } => &failures::HELD,
            Self::Untracked { .. } => &failures::UNTRACKED,
            Self::LeaseLost { .. } => &failures::LEASE_LOST,
            Self::Interrupted { .. } => &failures::INTERRUPTED,

            Self::UnsupportedLocation { .. } => &failures::LOCATION_UNSUPPORTED,
            Self::NoRoute { .. } => &failures::ROUTE_MISSING,
            Self::OtherMethod { .. } => &failures::ROUTE_METHOD,
            Self::BadHost { .. } => &failures::HOST_INVALID,
            Self::BadUser { .. } => &failures::USER_INVALID,
            Self::BadPath { .. } => &failures::PATH_INVALID,
            Self::BothRemote { .. } => &failures::BOTH_ENDS_REMOTE,
            Self::SamePlace { .. } => &failures::SAME_PLACE,
            Self::LinkSettings { .. } => &failures::LINK_SETTINGS,

            Self::OriginMissing { .. } => &failures::ORIGIN_MISSING,
            Self::OriginRootMissing { .. } => &failures::ORIGIN_ROOT_MISSING,
            Self::OriginUnreadable { .. } => &failures::ORIGIN_UNREADABLE,
            Self::OriginNotAFile { .. } => &failures::ORIGIN_NOT_A_FILE,
            Self::OriginSize { .. } => &failures::ORIGIN_SIZE,
            Self::OriginChanged { .. } => &failures::ORIGIN_CHANGED,
            Self::OriginCorrupt { .. } => &failures::ORIGIN_CORRUPT,

            Self::DestinationExists { .. } => &failures::DESTINATION_EXISTS,
            Self::TemporaryExists { .. } => &failures::TEMPORARY_EXISTS,
            Self::DestinationBusy { .. } => &failures::DESTINATION_BUSY,
            Self::DestinationRootMissing { .. } => &failures::DESTINATION_ROOT_MISSING,
            Self::DestinationDirectory { .. } => &failures::DESTINATION_DIRECTORY,
            Self::DestinationDenied { .. } => &failures::DESTINATION_DENIED,
            Self::StorageLow { .. } => &failures::STORAGE_LOW,
            Self::StorageFull { .. } => &failures::STORAGE_FULL,
            Self::RenameUnsupported { .. } => &failures::RENAME_UNSUPPORTED,

            Self::SshDenied { .. } => &failures::SSH_DENIED,
            Self::HostKey { .. } => &failures::SSH_HOST_KEY,
            Self::Network { .. } => &failures::NETWORK,
            Self::PortBusy { .. } => &failures::PORT_BUSY,
            Self::RemoteDied { .. } => &failures::REMOTE_DIED,
            Self::Stalled { storage: None, .. } => &failures::STALLED,
            Self::Stalled { .. } => &failures::STALLED_STORAGE,
            Self::TooSlow { .. } => &failures::TOO_SLOW,
            Self::Deadline { .. } => &failures::DEADLINE,
            Self::TimeLimit { .. } => &failures::TIME_LIMIT,
            Self::OperationTimeout { .. } => &failures::OPERATION_TIMEOUT,

            Self::DamagedInFlight { .. } => &failures::DAMAGED_IN_FLIGHT,
            Self::TargetSize { .. } => &failures::TARGET_SIZE,
            Self::ChecksumMismatch { .. } => &failures::CHECKSUM_MISMATCH,
            Self::ResumeRefused { .. } => &failures::RESUME_REFUSED,

            Self::ProgramMissing { .. } => &failures::PROGRAM_MISSING,
            Self::RemoteProgramMissing { .. } => &failures::REMOTE_PROGRAM_MISSING,
            Self::Spawn { .. } => &failures::SPAWN,
            Self::BadOption { .. } => &failures::BAD_OPTION,
            Self::Segfault { .. } => &failures::SEGFAULT,
            Self::BbcpFailed { .. } => &failures::BBCP_FAILED,
            Self::Storage { .. } => &failures::STORAGE,
            Self::LogFile { .. } => &failures::LOG_FILE,
            Self::Database { .. } => &failures::DATABASE,
            Self::Internal { .. } => &failures::INTERNAL,
        }
    }

    /// The end it happened at, where that makes a difference to whose matter it is.
    fn role(&self) -> Option<Role> {
        match self {
            Self::UnsupportedLocation { role, .. }
            | Self::BadHost { role, .. }
            | Self::BadUser { role, .. }
            | Self::BadPath { role, .. }
            | Self::RemoteProgramMissing { role, .. }
            | Self::Storage { role, .. } => Some(*role),
            Self::Stalled { storage, .. } => *storage,
            _ => None,
        }
    }

    /// Stable `snake_case` name for the attempt history, metrics and logs.
    pub fn code(&self) -> &'static str {
        self.kind().code
    }

    /// Where the reason lies.
    pub fn scope(&self) -> Scope {
        let kind = self.kind();
        kind.scope
            .or_else(|| self.role().map(Role::scope))
            .unwrap_or(Scope::Link)
    }

    /// Whether another attempt can help. False too for a transfer that is not this worker's.
    pub fn retryable(&self) -> bool {
        !matches!(self.retry(), Retry::Never | Retry::NotOurs)
    }

    /// How many failures in a row may be followed by another attempt, where the error has its own
    /// limit; it wins over the general one.
    pub fn retry_limit(&self) -> Option<u32> {
        match self.retry() {
            Retry::AtMost(n) => Some(n),
            Retry::Never | Retry::General | Retry::Uncounted | Retry::NotOurs => None,
        }
    }

    /// Name of the Python exception that a Celery caller sees.
    pub fn exc_type(&self) -> &'static str {
        self.kind().exc_type
    }

    pub(super) fn retry(&self) -> Retry {
        self.kind().retry
    }

    /// What an operator can do about it, in whole sentences.
    pub fn remedy(&self) -> &'static str {
        self.kind().remedy
    }

    /// How long the next attempt is waited for, if there is one.
    pub fn wait(&self) -> Wait {
        self.kind().wait
    }

    /// Whether a partial copy that this error left is worth being completed by the next attempt.
    ///
    /// Not where its content is in doubt, and not on a disk that is full: there, nobody else's work
    /// could go on.
    pub(super) fn leaves_a_sound_partial(&self) -> bool {
        self.retryable()
            && !self.condemns_the_partial()
            && !matches!(
                self,
                Self::TemporaryExists { .. }
                    | Self::DamagedInFlight { .. }
                    | Self::OriginChanged { .. }
                    | Self::StorageFull { .. }
            )
    }

    /// Whether this may be due to a partial copy that was completed, so that the copy is to be begun
    /// anew before it counts.
    pub(super) fn condemns_the_partial(&self) -> bool {
        matches!(
            self,
            Self::ResumeRefused { .. } | Self::ChecksumMismatch { .. } | Self::TargetSize { .. }
        )
    }

    /// The whole chain of causes in one line, for a database column or a Celery message.
    pub fn chain(&self) -> String {
        service_connection::error_chain::chain(self).to_string()
    }
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for TransferError {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        Self::Storage {
            operation: "a step",
            role: Role::Destination,
            path: String::new(),
            source: lost.into(),
        }
    }
}

impl Explain for TransferError {
    fn kind(&self) -> String {
        self.code().to_owned()
    }

    fn message(&self) -> String {
        self.chain()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_is_one_line_with_every_cause() {
        let inner = io::Error::other("disk on fire");
        let error = TransferError::Storage {
            operation: "mkdir",
            role: Role::Destination,
            path: "/d".into(),
            source: inner.into(),
        };
        assert_eq!(
            error.chain(),
            "mkdir failed at the destination, /d: disk on fire"
        );
        assert_eq!(error.scope(), Scope::Destination);
        assert!(error.retryable());
    }

    #[test]
    fn own_limit_and_ownership() {
        let changed = TransferError::OriginChanged {
            path: "/a".into(),
            line: String::new(),
        };
        assert_eq!(changed.retry_limit(), Some(1));
        let held = TransferError::Held {
            id: 1,
            owner: "w".into(),
        };
        assert!(!held.retryable());
        assert_eq!(held.exc_type(), "ScheduleError");
    }
}
