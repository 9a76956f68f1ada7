//! What can go wrong with a transfer, and what follows from it.
//!
//! Two tables define everything: the enum (what an operator reads) and its method `class`
//! (what the worker does with it). Every message says what, where, why, and what to do next.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Where the reason lies, as in FTS3's error table: tells an operator whom to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// The origin location or its data.
    Source,
    /// The destination location.
    Destination,
    /// What lies between: network, ssh, routes.
    Link,
    /// This worker and its host.
    Agent,
    /// The operations database.
    Database,
    /// The request itself: the transfer is not there to be done.
    Request,
}

impl Scope {
    /// Stable lower-case name, for the attempt history.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Link => "link",
            Self::Agent => "agent",
            Self::Database => "database",
            Self::Request => "request",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One end of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The end that holds the package.
    Origin,
    /// The end that gets it.
    Destination,
}

impl Role {
    fn scope(self) -> Scope {
        match self {
            Self::Origin => Scope::Source,
            Self::Destination => Scope::Destination,
        }
    }
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
    #[error("origin and destination are the same file, {path}; correct the route")]
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
    #[error("{path} cannot be read at the origin; check permissions: {line}")]
    OriginUnreadable { path: String, line: String },
    #[error("{path} at the origin is not a file; correct the package's path")]
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
        "no byte moved for {}, at {bytes_done} of {bytes_total} bytes; the copy was stopped",
        humantime::format_duration(*.idle)
    )]
    Stalled {
        idle: Duration,
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

    #[error("the operations database did not answer as it should")]
    Database { source: Cause },

    #[error("the attempt broke down inside this worker, which is a bug of it: {what}")]
    Internal { what: String },
}

/// Whether and how often an error may be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    /// The same again would fail again.
    Never,
    /// Up to the general limit.
    General,
    /// Up to this many times, whatever the general limit is.
    AtMost(u32),
    /// As often as needed: nothing failed that is the transfer's fault.
    Uncounted,
    /// The row is not this worker's: it must not be touched.
    NotOurs,
}

/// Python exception names (`ccat_data_transfer.exceptions`).
mod exc {
    pub(super) const BBCP: &str = "BBCPError";
    pub(super) const CHECKSUM: &str = "ChecksumVerificationError";
    pub(super) const CONFIGURATION: &str = "ConfigurationError";
    pub(super) const CORRUPTION: &str = "DataCorruptionError";
    pub(super) const DATABASE: &str = "DatabaseError";
    pub(super) const EXISTS: &str = "DestinationFileExistsError";
    pub(super) const EXIT: &str = "ServiceExit";
    pub(super) const NETWORK: &str = "NetworkError";
    pub(super) const SCHEDULE: &str = "ScheduleError";
    pub(super) const SEGFAULT: &str = "SegmentationFaultError";
    pub(super) const STORAGE: &str = "StorageError";
    pub(super) const TRANSFER: &str = "DataTransferError";
}

/// What the worker does with an error; one line of the table.
struct Class(&'static str, Scope, Retry, &'static str);

impl TransferError {
    /// The table. Codes are stored in the attempt history: add, but never rename.
    #[rustfmt::skip]
    fn class(&self) -> Class {
        use Retry::{AtMost, General, Never, NotOurs, Uncounted};
        use Scope::{Agent, Database, Destination, Link, Request, Source};
        match self {
            Self::UnknownTransfer { .. }        => Class("transfer_unknown", Request, NotOurs, exc::TRANSFER),
            Self::AlreadyFailed { .. }          => Class("transfer_failed_before", Request, NotOurs, exc::TRANSFER),
            Self::Held { .. }                   => Class("held_by_other", Request, NotOurs, exc::SCHEDULE),
            Self::Untracked { .. }              => Class("in_progress_untracked", Request, NotOurs, exc::SCHEDULE),
            Self::LeaseLost { .. }              => Class("lease_lost", Request, NotOurs, exc::SCHEDULE),
            Self::Interrupted { .. }            => Class("interrupted", Agent, Uncounted, exc::EXIT),

            Self::UnsupportedLocation { role, .. } => Class("location_unsupported", role.scope(), Never, exc::CONFIGURATION),
            Self::NoRoute { .. }                => Class("route_missing", Link, Never, exc::CONFIGURATION),
            Self::OtherMethod { .. }            => Class("route_method", Link, Never, exc::CONFIGURATION),
            Self::BadHost { role, .. }          => Class("host_invalid", role.scope(), Never, exc::CONFIGURATION),
            Self::BadUser { role, .. }          => Class("user_invalid", role.scope(), Never, exc::CONFIGURATION),
            Self::BadPath { role, .. }          => Class("path_invalid", role.scope(), Never, exc::CONFIGURATION),
            Self::BothRemote { .. }             => Class("both_ends_remote", Link, Never, exc::CONFIGURATION),
            Self::SamePlace { .. }              => Class("same_place", Link, Never, exc::CONFIGURATION),
            Self::LinkSettings { .. }           => Class("link_settings", Link, Never, exc::CONFIGURATION),

            Self::OriginMissing { .. }          => Class("origin_missing", Source, Never, exc::TRANSFER),
            Self::OriginUnreadable { .. }       => Class("origin_unreadable", Source, Never, exc::STORAGE),
            Self::OriginNotAFile { .. }         => Class("origin_not_a_file", Source, Never, exc::TRANSFER),
            Self::OriginSize { .. }             => Class("origin_size", Source, Never, exc::CORRUPTION),
            // Once more, in case its writer was only late; a file that goes on changing is no package.
            Self::OriginChanged { .. }          => Class("origin_changed", Source, AtMost(1), exc::CORRUPTION),
            Self::OriginCorrupt { .. }          => Class("origin_corrupt", Source, Never, exc::CORRUPTION),

            Self::DestinationExists { .. }      => Class("destination_exists", Destination, Never, exc::EXISTS),
            Self::DestinationRootMissing { .. } => Class("destination_root_missing", Destination, General, exc::STORAGE),
            Self::DestinationDirectory { .. }   => Class("destination_directory", Destination, AtMost(1), exc::STORAGE),
            Self::DestinationDenied { .. }      => Class("destination_denied", Destination, Never, exc::STORAGE),
            Self::StorageLow { .. }             => Class("storage_low", Destination, General, exc::STORAGE),
            Self::StorageFull { .. }            => Class("storage_full", Destination, General, exc::STORAGE),
            Self::RenameUnsupported { .. }      => Class("rename_unsupported", Destination, Never, exc::STORAGE),

            Self::SshDenied { .. }              => Class("ssh_denied", Link, Never, exc::CONFIGURATION),
            Self::HostKey { .. }                => Class("ssh_host_key", Link, Never, exc::CONFIGURATION),
            Self::Network { .. }                => Class("network", Link, General, exc::NETWORK),
            Self::PortBusy { .. }               => Class("port_busy", Link, General, exc::NETWORK),
            Self::RemoteDied { .. }             => Class("remote_died", Link, General, exc::BBCP),
            Self::Stalled { .. }                => Class("stalled", Link, General, exc::NETWORK),
            Self::TimeLimit { .. }              => Class("time_limit", Link, General, exc::BBCP),
            Self::OperationTimeout { .. }       => Class("operation_timeout", Link, General, exc::NETWORK),

            Self::DamagedInFlight { .. }        => Class("damaged_in_flight", Link, General, exc::CORRUPTION),
            Self::TargetSize { .. }             => Class("target_size", Link, General, exc::CORRUPTION),
            Self::ChecksumMismatch { .. }       => Class("checksum_mismatch", Link, General, exc::CHECKSUM),

            Self::ProgramMissing { .. }         => Class("program_missing", Agent, Never, exc::CONFIGURATION),
            Self::RemoteProgramMissing { role, .. } => Class("remote_program_missing", role.scope(), Never, exc::CONFIGURATION),
            Self::Spawn { .. }                  => Class("spawn", Agent, General, exc::BBCP),
            Self::BadOption { .. }              => Class("bad_option", Agent, Never, exc::CONFIGURATION),
            Self::Segfault { .. }               => Class("segfault", Agent, General, exc::SEGFAULT),
            Self::BbcpFailed { .. }             => Class("bbcp_failed", Link, General, exc::BBCP),
            Self::Storage { role, .. }          => Class("storage", role.scope(), General, exc::STORAGE),
            Self::LogFile { .. }                => Class("log_file", Agent, General, exc::STORAGE),
            Self::Database { .. }               => Class("database", Database, Uncounted, exc::DATABASE),
            Self::Internal { .. }               => Class("internal", Agent, General, exc::TRANSFER),
        }
    }

    /// Stable `snake_case` name for the attempt history, metrics and logs.
    pub fn code(&self) -> &'static str {
        self.class().0
    }

    /// Where the reason lies.
    pub fn scope(&self) -> Scope {
        self.class().1
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
        self.class().3
    }

    pub(super) fn retry(&self) -> Retry {
        self.class().2
    }

    /// The whole chain of causes in one line, for a database column or a Celery message.
    pub fn chain(&self) -> String {
        crate::telemetry::chain(self).to_string()
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
