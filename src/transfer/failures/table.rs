//! The table of failures. One row has all facts that the domain knows about a failure.
//!
//! The columns are explained at [`failures!`] and [`FailureRow`]. The order of the rows is that of
//! `docs/failures.md`; the order in which patterns are tried is their rank.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::connection::DataConnection;
use super::pattern::{Confidence, Pattern, bbcp, exit, shell, ssh};
use super::row::{
    BoxError, FailureRow, Interruption, PartialCopy, RetryRule, Role, Scope, Wait, failures,
};
use crate::transfer::id::TransferId;

/// Limit for failures that need room on a disk, which takes longer than minutes: with the default delays it is
/// reached after about a day.
const STORAGE_RETRIES: u32 = 12;

/// Part of bbcp's line about a data connection that was refused or not answered.
const CONNECT: &str = " unable to connect to port ";

failures! {
    // The origin.
    /// The package is not at the origin.
    OriginMissing { path: String } = "origin_missing" {
        scope: Source, retry: Never, wait: None, partial: Discard,
        message: "{path} does not exist at the origin; put it back or correct the package's path",
        remedy: "Put it back, or correct its path, and reset the transfer.",
        known_by(130): |seen| { path: seen.origin } in [bbcp("No such file or directory processing ")],
    }
    /// The origin location's own directory is missing, empty or cannot be entered, perhaps because its
    /// disk is not mounted.
    OriginRootMissing {
        path: String,
        problem: String,
        /// The directory exists and is empty.
        empty: bool,
    } = "origin_root_missing" {
        scope: Source, retry: Uncounted, wait: Storage, partial: Keep,
        message: "{path}, the directory of the origin location, {problem}; mount it, the transfer waits",
        remedy: "Mount it.",
    }
    /// The worker may not read the package.
    OriginUnreadable { path: String, line: String } = "origin_unreadable" {
        scope: Source, retry: Never, wait: None, partial: Discard,
        message: "{path} cannot be read at the origin; check permissions: {line}",
        remedy: "Correct the permissions and reset the transfer.",
        known_by(70): |seen| { path: seen.origin, line: seen.line } in [
            bbcp("Permission denied processing "),
            bbcp("Permission denied ").names_origin().without(" executing "),
        ],
    }
    /// The package's path names a directory or a device.
    OriginNotAFile { path: String } = "origin_not_a_file" {
        scope: Source, retry: Never, wait: None, partial: Discard,
        message: "{path} at the origin is not a file but a directory or a device; a package is one archive, \
            as the stage that assembles transfer packages makes it: correct the package's path there",
        remedy: "A package is one archive. The stage that assembles transfer packages makes it; see why it \
            recorded this path.",
        known_by(140): |seen| { path: seen.origin } in [bbcp("").ends_with("is a directory.")],
    }
    /// The package has another size than recorded in the database.
    OriginSize { path: String, recorded: u64, found: u64 } = "origin_size" {
        scope: Source, retry: Never, wait: None, partial: Discard,
        message: "{path} at the origin has {found} bytes where the database says {recorded}; find out which \
            is right",
        remedy: "Find out which is right.",
    }
    /// The package changed while it was copied.
    OriginChanged { path: String, line: String } = "origin_changed" {
        scope: Source, retry: AtMost(1), wait: Backoff, partial: Discard,
        message: "{path} changed at the origin while it was copied; let its writer finish: {line}",
        remedy: "Let its writer finish before the transfer is made. It is tried once more, in case the \
            writer was only late.",
        known_by(180): |seen| { path: seen.origin, line: seen.line } in [bbcp("Error -").contains(" writing ")],
    }
    /// The package's content does not have the checksum that the database recorded.
    OriginCorrupt {
        path: String,
        algorithm: &'static str,
        recorded: String,
        found: String,
    } = "origin_corrupt" {
        scope: Source, retry: Never, wait: None, partial: Discard,
        message: "{path} at the origin has {algorithm} {found} where the database says {recorded}; the \
            origin's copy is damaged or was replaced",
        remedy: "The origin's copy is damaged or was replaced. Restore it.",
    }

    // The destination.
    /// Another file has the package's name at the destination. Nothing was overwritten. (With the same content
    /// it is not a failure: the transfer is COMPLETED.)
    DestinationExists { path: String } = "destination_exists" {
        scope: Destination, retry: Never, wait: None, partial: Discard,
        message: "{path} exists at the destination with other content; check it and remove it, nothing was \
            overwritten",
        remedy: "Check it, remove or rename it, and reset the transfer.",
    }
    /// bbcp found a file under the temporary name of the attempt, which no other attempt uses. The package's
    /// own name is not concerned.
    TemporaryExists { path: String } = "temporary_exists" {
        scope: Destination, retry: General, wait: Backoff, partial: Discard,
        message: "bbcp found a file at {path}, a name that only this attempt has; the next attempt has \
            another one",
        remedy: "If it is repeated, find out which other program writes names that begin with `.ccat-transfer-`.",
        known_by(10): |seen| { path: seen.copy } in [bbcp("").ends_with("already exists.")],
    }
    /// Another transfer is copying to the same path.
    DestinationBusy { path: String, by: String } = "destination_busy" {
        scope: Destination, retry: Uncounted, wait: Backoff, partial: Keep,
        message: "{path} is being written by data transfer {by}; tried again when that has ended",
        remedy: "Nothing. After that transfer this one finds the file. It completes if the content is the \
            same, and fails otherwise.",
    }
    /// The location's own directory is missing. The worker never creates it, because it may be a mount point
    /// with nothing mounted.
    DestinationRootMissing { path: String } = "destination_root_missing" {
        scope: Destination, retry: Uncounted, wait: Storage, partial: Keep,
        message: "{path} does not exist at the destination; mount or create it, the worker does not",
        remedy: "Mount or create it.",
    }
    /// A directory that the worker has created is missing when bbcp needs it.
    DestinationDirectory { path: String, line: String } = "destination_directory" {
        scope: Destination, retry: AtMost(1), wait: Backoff, partial: Keep,
        message: "the directory of {path} is missing at the destination, although it was created: {line}",
        remedy: "Find out what removes directories there.",
        known_by(160): |seen| { path: seen.copy, line: seen.line } in [
            bbcp("Target directory ").contains(" not found"), bbcp("No such file or directory opening "),
        ],
    }
    /// The worker may not write at the destination.
    DestinationDenied { path: String, line: String } = "destination_denied" {
        scope: Destination, retry: Never, wait: None, partial: Discard,
        message: "{path} cannot be written at the destination; check permissions: {line}",
        remedy: "Correct the permissions and reset the transfer.",
        known_by(80): |seen| { path: seen.copy, line: seen.line } in [
            bbcp("Permission denied ").without(" executing "), bbcp("").contains(" failed to create "),
        ],
    }
    /// The package would not fit with `transfer.free_space_margin`. Nothing was copied.
    StorageLow { path: String, available: u64, needed: u64 } = "storage_low" {
        scope: Destination, retry: AtMost(STORAGE_RETRIES), wait: Storage, partial: Keep,
        message: "{path} has {available} bytes free where {needed} are needed (with the margin); make room",
        remedy: "Make room.",
    }
    /// The destination ran full during the copy. The copy was removed, so that others can use its space.
    StorageFull { path: String, line: String } = "storage_full" {
        scope: Destination, retry: AtMost(STORAGE_RETRIES), wait: Storage, partial: Discard,
        message: "the destination ran full while {path} was copied; make room: {line}",
        remedy: "Make room.",
        known_by(30): |seen| { path: seen.copy, line: seen.line } in [
            bbcp("No space left on device"), bbcp("Insufficient space"),
        ],
    }
    /// The file system can neither rename without overwriting nor make hard links, so that no copy can
    /// be published safely.
    RenameUnsupported { path: String } = "rename_unsupported" {
        scope: Destination, retry: Never, wait: None, partial: Discard,
        message: "the file system of {path} has neither rename without overwriting nor hard links, so that \
            the file cannot be published safely; use another one",
        remedy: "Use another file system.",
    }

    // The link.
    /// The other host refused the login.
    SshDenied { host: String, line: String } = "ssh_denied" {
        scope: Link, retry: Never, wait: None, partial: Discard,
        message: "{host} refused the login; check `ssh.user`, `ssh.identity_file` and its authorized keys: \
            {line}",
        remedy: "Check `ssh.user`, `ssh.identity_file` and the authorized keys there.",
        known_by(60): |seen| { host: seen.host, line: seen.line } in [
            ssh("Permission denied ("), ssh("").contains(": Permission denied ("),
            ssh("Received disconnect from ").contains("Too many authentication failures"),
        ],
    }
    /// The other host's key is unknown or has changed.
    HostKey { host: String, line: String } = "ssh_host_key" {
        scope: Link, retry: Never, wait: None, partial: Discard,
        message: "the host key of {host} is unknown or has changed; check `ssh.known_hosts_file`: {line}",
        remedy: "Check `ssh.known_hosts_file`; make sure that it is the right host.",
        known_by(50): |seen| { host: seen.host, line: seen.line } in [
            ssh("Host key verification failed"), ssh("@ ").contains("REMOTE HOST IDENTIFICATION HAS CHANGED"),
            ssh("No ").contains(" host key is known for "),
        ],
    }
    /// The other host cannot be reached, or a connection broke.
    Network { host: String, line: String } = "network" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: "{host} cannot be reached; check network, firewall and port range: {line}",
        remedy: "Check network, firewall and `bbcp.port_range`.",
        suspected_by(90): |seen| { host: seen.host, line: seen.line } in [
            bbcp("Connection refused").without(CONNECT), bbcp("Connection timed out").without(CONNECT),
            bbcp("Connection reset").without(" writing to stream."), bbcp("No route to host").without(CONNECT),
            bbcp("Network is unreachable").without(CONNECT), ssh("ssh: connect to host "),
            ssh("ssh: Could not resolve hostname "), ssh("ssh_exchange_identification: "),
            ssh("kex_exchange_identification: "), ssh("banner exchange: "),
            ssh("Connection timed out during banner exchange"), ssh("Connection closed by "),
            ssh("Connection reset by "), ssh("Connection to ").contains(" closed by remote host"),
            ssh("Connection to ").contains(" timed out"), ssh("Timeout, server ").ends_with(" not responding."),
            ssh("Received disconnect from "), ssh("Disconnected from "), ssh("Read from remote host "),
            ssh("Write failed: "), ssh("client_loop: "), ssh("packet_write_"),
            ssh("ssh_dispatch_run_fatal: "),
        ],
        // Some of the data connections were made.
        suspected_by(203): |seen| { host: seen.host, line: seen.line } in [
            bbcp("Unable to allocate more than ").without(" more than 0 of "),
            bbcp("Unable to connect to ").contains("System error"),
        ],
        // A side that sees the other one go: a consequence, never the cause.
        suspected_by(230): |seen| { host: seen.host, line: seen.line } in [
            bbcp("").ends_with("Broken pipe writing to stream."),
            bbcp("").ends_with("Connection reset by peer writing to stream."),
        ],
    }
    /// bbcp ran at both ends, but none of its data connections was made.
    DataPort { connection: Box<DataConnection>, line: String } = "data_port" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: "{connection}; `bbcp.reverse_connection`, `bbcp.no_dns` or `bbcp.port_range` may help: {line}",
        remedy: "Open `bbcp.port_range` of the host that listens in all firewalls. If only the other direction is open, \
            set `bbcp.reverse_connection`. If a wrong address was announced, correct the address of that host's own name, \
            or change `bbcp.no_dns`, so that the name is announced instead of the address, or the reverse.",
        suspected_by(205): |seen| { connection: seen.connection, line: seen.line } in [
            bbcp("").contains(CONNECT), bbcp("Unable to connect to "),
        ],
        // If the origin is remote, bbcp also prints these half a minute after any failure of ssh, which is then the cause.
        suspected_by(210): |seen| { connection: seen.connection, line: seen.line } in [
            bbcp("Accept timed out"), bbcp("Unable to allocate more than 0 of "),
        ],
    }
    /// No port was free for the data connections.
    PortBusy { line: String } = "port_busy" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: "no free port for the data connections; widen `bbcp.port_range`: {line}",
        remedy: "Widen `bbcp.port_range`.",
        known_by(190): |seen| { line: seen.line } in [bbcp("Address already in use")],
    }
    /// The program at the other end ended without a reason.
    RemoteDied { host: String, line: String } = "remote_died" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: "bbcp or ssh at {host} ended without a reason ({line}); look for a crash there",
        remedy: "Look for a crash there, and for start-up files that print something.",
        suspected_by(220): |seen| { host: seen.host, line: seen.line } in [
            bbcp("Unexpected end of control stream"), bbcp("").contains("unexpectedly terminated"),
        ],
        assumed_by(240): |seen| { host: seen.host, line: seen.line } in [
            exit("exit code 255"), exit("exit code 32"),
        ],
    }
    /// No byte moved for `transfer.stall_timeout`, though the destination's storage answered.
    Stalled { idle: Duration, bytes_done: u64, bytes_total: u64 } = "stalled" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: ("no byte moved for {}, at {bytes_done} of {bytes_total} bytes; the copy was stopped",
            humantime::format_duration(*.idle)),
        remedy: "Look at the link.",
    }
    /// No byte moved for `transfer.stall_timeout`, and the storage at one end did not answer.
    StalledStorage { idle: Duration, bytes_done: u64, bytes_total: u64, role: Role } = "stalled_storage" {
        scope: EndOf(role), retry: General, wait: Backoff, partial: Keep,
        message: ("no byte moved for {}, at {bytes_done} of {bytes_total} bytes, and the storage at the \
            {role} does not answer; the copy was stopped",
            humantime::format_duration(*.idle)),
        remedy: "Look at that storage: a hung mount, a dying disk.",
    }
    /// Over `transfer.min_rate_window` the rate was below `transfer.min_rate`.
    TooSlow { moved: u64, window: Duration, least: u64, bytes_done: u64, bytes_total: u64 } = "too_slow" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: ("{moved} bytes moved in the last {}, which is below {least} bytes/s, at {bytes_done} of \
            {bytes_total} bytes; the copy was stopped (`transfer.min_rate`)",
            humantime::format_duration(*.window)),
        remedy: "Look at the link, or lower the rate.",
    }
    /// The copy took longer than its size allows by `transfer.deadline_rate`.
    Deadline { limit: Duration, bytes_done: u64, bytes_total: u64 } = "deadline" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: ("the copy was not complete after {}, at {bytes_done} of {bytes_total} bytes, and was stopped \
            (`transfer.deadline_rate`)",
            humantime::format_duration(*.limit)),
        remedy: "Look at the link, or lower the rate.",
    }
    /// bbcp reached a time limit of its own, which this worker never sets.
    TimeLimit { line: String } = "time_limit" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: "bbcp reached a time limit, which this worker never sets; check its build for one: {line}",
        remedy: "Check its build for a time limit.",
        known_by(200): |seen| { line: seen.line } in [bbcp("Time limit exceeded")],
    }
    /// A small operation at one end (an inspection, a rename) took too long.
    OperationTimeout { operation: &'static str, host: String, limit: Duration } = "operation_timeout" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: ("{operation} at {host} took longer than {}",
            humantime::format_duration(*.limit)),
        remedy: "Look at that host and its storage.",
    }

    // The data.
    /// bbcp's checksum detected damaged data. The copy was removed.
    DamagedInFlight { line: String } = "damaged_in_flight" {
        scope: Link, retry: General, wait: Backoff, partial: Discard,
        message: "bbcp found the data damaged on its way: {line}",
        remedy: "If it is repeated, look for bad memory or a bad network card.",
        known_by(40): |seen| { line: seen.line } in [
            bbcp("").contains(" checksum ").contains(" does not match "), bbcp("").contains("checksum error"),
            bbcp("Invalid checksum from"),
        ],
    }
    /// bbcp reported success, but the copy has the wrong size. It was removed.
    TargetSize { path: String, expected: u64, found: u64 } = "target_size" {
        scope: Link, retry: General, wait: Backoff, partial: Restart,
        message: "{path} has {found} bytes at the destination where {expected} were sent; the copy was discarded",
        remedy: "If it is repeated, look at the destination's storage.",
    }
    /// bbcp reported success, but the content of the copy differs from the origin's. It was removed. (If the
    /// copy had been resumed, the attempt first copied the file again from the start; this failure is reported
    /// only if that copy differs too.)
    ChecksumMismatch {
        path: String,
        algorithm: &'static str,
        expected: String,
        found: String,
        part: String,
    } = "checksum_mismatch" {
        scope: Link, retry: General, wait: Backoff, partial: Restart,
        message: "{path} has {algorithm} {found} at the destination where the origin has {expected}{part}; the \
            copy was discarded",
        remedy: "If it is repeated, look for bad memory or a bad disk.",
    }
    /// The copy changed after it was verified, and again after it was read once more. It was removed.
    CopyChanged { path: String } = "copy_changed" {
        scope: Destination, retry: General, wait: Backoff, partial: Discard,
        message: "the copy of {path} changed at the destination after it was verified; it was discarded",
        remedy: "Find the program that writes to the destination's directory.",
    }
    /// bbcp refused to resume a partial copy, and then also to copy from the beginning.
    ResumeRefused { line: String } = "resume_refused" {
        scope: Link, retry: General, wait: Backoff, partial: Restart,
        message: "bbcp does not resume the partial copy: {line}",
        remedy: "Look at the log file of the attempt.",
        known_by(170): |seen| { line: seen.line } in [
            bbcp("").contains("changed since the copy completed"), bbcp("").contains("appears to have changed"),
            bbcp("Cannot append to "),
        ],
    }

    // Programs.
    /// A program is missing on the worker's host.
    ProgramMissing { program: String } = "program_missing" {
        scope: Agent, retry: Never, wait: None, partial: Discard,
        message: "`{program}` was not found on this host; install it or set its absolute path",
        remedy: "Install it, or set its absolute path.",
        known_by(110): |seen| { program: seen.line } in [bbcp("").contains(" executing ")],
    }
    /// A program is missing at the other end.
    RemoteProgramMissing { role: Role, host: String, line: String } = "remote_program_missing" {
        scope: EndOf(role), retry: Never, wait: None, partial: Discard,
        message: "a program is missing at {host}; install it there or set its absolute path: {line}",
        remedy: "Install it there, or set its absolute path (`bbcp.remote_program`, `ssh.sha256_command` \
            and its like).",
        known_by(100): |seen| { role: seen.role, host: seen.host, line: seen.line } in [
            shell("").ends_with("not found"), shell("").ends_with("No such file or directory"),
            shell("").ends_with("Permission denied"), shell("command not found"),
            shell("no such file or directory"), shell("permission denied"), shell("Unknown command"),
            // csh prints the program's name at the place of bbcp's mark, and not its own.
            bbcp("Command not found."),
        ],
    }
    /// A program could not be started.
    Spawn { program: String, source: io::Error } = "spawn" {
        scope: Agent, retry: General, wait: Backoff, partial: Keep,
        message: "cannot start `{program}`",
        remedy: "Look for limits on processes or memory on the worker's host.",
    }
    /// bbcp did not accept its command line.
    BadOption { line: String } = "bad_option" {
        scope: Agent, retry: Never, wait: None, partial: Discard,
        message: "bbcp did not accept its command line; check the section [bbcp]: {line}",
        remedy: "Check the section `[bbcp]`; perhaps this bbcp is too old.",
        known_by(120): |seen| { line: seen.line } in [
            bbcp("Invalid option"), bbcp("Invalid ").contains(" - ").without("return code"),
            bbcp("").contains("not specified"), bbcp("").contains("opening config file"),
        ],
    }
    /// bbcp crashed.
    Segfault { line: String } = "segfault" {
        scope: Agent, retry: General, wait: Backoff, partial: Keep,
        message: "bbcp crashed: {line}",
        remedy: "If it is repeated, use another build of bbcp.",
        known_by(20): |seen| { line: seen.line } in [
            exit("signal 11"), exit("exit code 139"),
            bbcp("").ends_with("killed via signal 11"), shell("").contains("egmentation fault"),
            // dash prints no name.
            ssh("Segmentation fault").ends_with("Segmentation fault"),
            ssh("Segmentation fault (core dumped)").ends_with("Segmentation fault (core dumped)"),
        ],
    }
    /// bbcp failed for a reason that this worker does not know.
    BbcpFailed { exit: String, line: String } = "bbcp_failed" {
        scope: Link, retry: General, wait: Backoff, partial: Keep,
        message: "bbcp failed ({exit}): {line}",
        remedy: "Read the log file of the attempt.",
    }
    /// The storage at one end refused an operation.
    Storage { operation: &'static str, role: Role, path: String, source: BoxError } = "storage" {
        scope: EndOf(role), retry: General, wait: Backoff, partial: Keep,
        message: "{operation} failed at the {role}, {path}",
        remedy: "Check that storage; the message names the error.",
    }
    /// The attempt's log file could not be opened.
    LogFile { path: PathBuf, source: io::Error } = "log_file" {
        scope: Agent, retry: General, wait: Backoff, partial: Keep,
        message: ("cannot write the log file {}; check `transfer.log_dir`",
            .path.display()),
        remedy: "Check `transfer.log_dir`.",
    }
    /// The worker has a bug.
    Internal { what: String } = "internal" {
        scope: Agent, retry: General, wait: Backoff, partial: Keep,
        message: "the attempt failed inside this worker, which is a bug: {what}",
        remedy: "Report it, with the message.",
    }

    // Requests of the rows that cannot be fulfilled.
    /// A location is an object store or a tape library.
    UnsupportedLocation { role: Role, location: String, kind: String } = "location_unsupported" {
        scope: EndOf(role), retry: Never, wait: None, partial: Discard,
        message: "the {role} `{location}` is {kind} storage, which bbcp cannot reach; correct the route",
        remedy: "bbcp reaches only disks. Correct the transfer's locations.",
    }
    /// The database has no route between the two sites.
    NoRoute { origin: String, destination: String } = "route_missing" {
        scope: Link, retry: Never, wait: None, partial: Discard,
        message: "there is no route from site `{origin}` to site `{destination}`; add one",
        remedy: "Add one, and reset the transfer.",
    }
    /// The route's method is not bbcp.
    OtherMethod { origin: String, destination: String, method: String } = "route_method" {
        scope: Link, retry: Never, wait: None, partial: Discard,
        message: "the route from site `{origin}` to site `{destination}` has the method `{method}`; this \
            worker supports only `bbcp`",
        remedy: "Send such transfers to another worker, or correct the route.",
    }
    /// A location's host is not a host name or address.
    BadHost { role: Role, location: String, host: String, problem: &'static str } = "host_invalid" {
        scope: EndOf(role), retry: Never, wait: None, partial: Discard,
        message: "the {role} `{location}` has the unsafe host name {host:?}: {problem}",
        remedy: "Correct the location's row.",
    }
    /// The login name has a form that ssh could interpret as an option.
    BadUser { role: Role, location: String, user: String } = "user_invalid" {
        scope: EndOf(role), retry: Never, wait: None, partial: Discard,
        message: "the login name {user:?} for the {role} `{location}` is unsafe; correct `ssh.user`",
        remedy: "Correct `ssh.user`.",
    }
    /// A path is unsafe or too long: control characters, `..`, a name above 255 bytes, a path above 999 bytes
    /// at the destination or 1999 at the origin.
    BadPath { role: Role, path: String, problem: &'static str } = "path_invalid" {
        scope: EndOf(role), retry: Never, wait: None, partial: Discard,
        message: "the {role} path {path:?} cannot be used: {problem}",
        remedy: "Rename the package, or shorten the location's path.",
        known_by(150): |seen| { role: Role::Origin, path: seen.origin, problem: "it is too long for bbcp" } in [
            bbcp("Message too long"),
        ],
    }
    /// Neither end is on the worker's host.
    BothRemote { origin_host: String, destination_host: String } = "both_ends_remote" {
        scope: Link, retry: Never, wait: None, partial: Discard,
        message: "both the origin ({origin_host}) and the destination ({destination_host}) are remote for \
            this worker; run it at one of them, or name this host in `transfer.local_hosts`",
        remedy: "Run the worker at the origin or at the destination; see `transfer.local_hosts`.",
    }
    /// Origin and destination are one file.
    SamePlace { path: String } = "same_place" {
        scope: Link, retry: Never, wait: None, partial: Discard,
        message: "origin and destination are the same file, {path}, perhaps by another host name, a link or \
            an exported directory; correct the locations",
        remedy: "Correct the locations: the only copy must not count as two.",
    }
    /// An entry of `[[routes]]` has an invalid value.
    LinkSettings { origin: String, destination: String, problem: String } = "link_settings" {
        scope: Link, retry: Never, wait: None, partial: Discard,
        message: "bad settings for the link from `{origin}` to `{destination}`: {problem}",
        remedy: "Correct the value.",
    }

    // Not failures of the transfer.
    /// The worker was stopped. Where the link resumes, the partial copy is kept for the next attempt.
    Interrupted { cause: Interruption } = "interrupted" {
        scope: Agent, retry: Uncounted, wait: None, partial: Keep,
        message: "the copy was stopped because {cause}; nothing was published",
        remedy: "Nothing.",
    }
    /// The operations database refuses a value of this transfer, or a row that the transfer refers to
    /// is missing or incomplete. (While the database cannot be reached, or refuses everything, the
    /// worker waits and the copy continues.)
    Database { source: BoxError } = "database" {
        scope: Database, retry: General, wait: Backoff, partial: Keep,
        message: "the operations database refuses a value of this transfer, or a row that it needs is \
            missing; correct the row",
        remedy: "Read the message; correct the row or the constraint that it names, and reset the transfer.",
    }
    /// The transfer does not exist.
    UnknownTransfer { id: TransferId } = "transfer_unknown" {
        scope: Request, retry: NotOurs, wait: None, partial: Discard,
        message: "data transfer {id} does not exist; nothing was done",
        remedy: "The message is wrong, or the row was deleted.",
    }
    /// The transfer is FAILED already.
    AlreadyFailed { id: TransferId } = "transfer_failed_before" {
        scope: Request, retry: NotOurs, wait: None, partial: Discard,
        message: "data transfer {id} has failed for good before; reset it (status pending) to try it again",
        remedy: "To try it again, reset it.",
    }
    /// A message arrived for a transfer that waits for its next attempt. The row, not the message, has the time.
    NotDue { id: TransferId, not_before: DateTime<Utc> } = "not_due" {
        scope: Request, retry: NotOurs, wait: None, partial: Discard,
        message: "data transfer {id} failed before and waits until {not_before} to be tried again; the \
            manager sends it then",
        remedy: "Nothing: the manager sends a message in time. A reset of its `retry_count` does it at once.",
    }
    /// An operator has paused the link. The row waits, PENDING; a running copy was stopped only if the pause includes
    /// running copies.
    LinkPaused { link: String, since: DateTime<Utc>, by: String, reason: String } = "link_paused" {
        scope: Link, retry: Uncounted, wait: None, partial: Keep,
        message: "the link {link} is paused since {since} by {by}: {reason}; the transfer waits until it is \
            resumed",
        remedy: "Nothing: when the link is resumed, the manager sends the transfer again.",
    }
    /// A message arrived for a transfer whose link has reached its limit of copies: the limit was made smaller after
    /// the message was sent, or a limit for this time of day has begun. The row waits, PENDING.
    LinkFull { link: String, limit: u32, copies: u64 } = "link_full" {
        scope: Link, retry: Uncounted, wait: None, partial: Keep,
        message: "the link {link} has {copies} copies and may have {limit} at this time; the transfer waits \
            until one ends",
        remedy: "Nothing: when the link has room, the manager sends the transfer again.",
    }
    /// Another worker has the lease of the transfer.
    Held { id: TransferId, owner: String } = "held_by_other" {
        scope: Request, retry: NotOurs, wait: None, partial: Discard,
        message: "data transfer {id} is run by {owner}; nothing was done",
        remedy: "Nothing.",
    }
    /// The row is IN_PROGRESS, but no worker of this program has its lease.
    Untracked { id: TransferId } = "in_progress_untracked" {
        scope: Request, retry: NotOurs, wait: None, partial: Discard,
        message: "data transfer {id} is in progress but no worker of this kind holds it; if none runs it \
            any more, reset it",
        remedy: "If no Python worker runs it either, reset it.",
    }
    /// An operator changed the row, or another worker took the transfer over. The copy was stopped and removed; the row
    /// was not changed.
    LeaseLost { id: TransferId } = "lease_lost" {
        scope: Request, retry: NotOurs, wait: None, partial: Discard,
        message: "data transfer {id} was taken from this worker by another worker or an operator; the copy \
            was not published",
        remedy: "Nothing.",
    }
}
