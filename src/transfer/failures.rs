//! The table of failures, with the consequences of each.
//!
//! As in FTS3's table of scopes and codes, there is a row for each kind of failure: whose matter it
//! is, whether, how often and when it is tried again, and the Python exception that a Celery caller
//! sees. The texts of bbcp, ssh and remote shells by which kinds are recognized stand in
//! [`patterns`](super::patterns).
//!
//! `docs/failures.md` is made from both; a test compares.

use super::error::Role;

/// Where the reason lies: tells an operator whom to call.
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
    #[must_use]
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

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
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

/// How long the next attempt is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The manager's next pass may send it.
    None,
    /// `transfer.retry_delay_first`, doubling.
    Backoff,
    /// `transfer.retry_delay_storage`, doubling: somebody has to make room or mount a disk.
    Storage,
}

/// A kind of failure: a row of the table.
#[derive(Debug)]
pub(super) struct Kind {
    /// Stable `snake_case` name. Codes are stored in the attempt history: add, but never rename.
    pub(super) code: &'static str,
    /// None where it depends on which end it happened at.
    pub(super) scope: Option<Scope>,
    pub(super) retry: Retry,
    pub(super) wait: Wait,
    /// Name of the Python exception, of `ccat_data_transfer.exceptions`.
    pub(super) exc_type: &'static str,
    /// What happened, for the documentation.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "the documentation is made by a test")
    )]
    pub(super) what: &'static str,
    /// What an operator can do about it.
    pub(super) remedy: &'static str,
}

/// Python exception names.
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

/// Rooms are not made in minutes: with the default delays this is about a day.
const STORAGE_RETRIES: u32 = 12;

macro_rules! kinds {
    ($($name:ident = $code:literal, $scope:expr, $retry:expr, $wait:ident, $exc:ident, $what:literal, $remedy:literal;)*) => {
        $(pub(in crate::transfer) static $name: Kind = Kind {
            code: $code,
            scope: $scope,
            retry: $retry,
            wait: Wait::$wait,
            exc_type: exc::$exc,
            what: $what,
            remedy: $remedy,
        };)*

        /// Every kind there is.
        pub(in crate::transfer) static ALL: &[&Kind] = &[$(&$name),*];
    };
}

use Retry::{AtMost, General, Never, NotOurs, Uncounted};

const SOURCE: Option<Scope> = Some(Scope::Source);
const DESTINATION: Option<Scope> = Some(Scope::Destination);
const LINK: Option<Scope> = Some(Scope::Link);
const AGENT: Option<Scope> = Some(Scope::Agent);
const DB: Option<Scope> = Some(Scope::Database);
const REQUEST: Option<Scope> = Some(Scope::Request);
const THAT_END: Option<Scope> = None;

#[rustfmt::skip]
mod table {
    use super::*;
    kinds! {
    // The origin.
    ORIGIN_MISSING = "origin_missing", SOURCE, Never, None, TRANSFER,
        "The package is not at the origin.", "Put it back, or correct its path, and reset the transfer.";
    ORIGIN_ROOT_MISSING = "origin_root_missing", SOURCE, Uncounted, Storage, STORAGE,
        "The origin location's own directory is missing, empty or cannot be entered, perhaps because its disk is not mounted.",
        "Mount it; `ccat-transfer doctor` shows which. `ccat-transfer transfers retry` tries the transfers again at once.";
    ORIGIN_UNREADABLE = "origin_unreadable", SOURCE, Never, None, STORAGE,
        "The worker may not read the package.", "Correct the permissions and reset the transfer.";
    ORIGIN_NOT_A_FILE = "origin_not_a_file", SOURCE, Never, None, TRANSFER,
        "The package's path names a directory or a device.",
        "A package is one archive. The stage that assembles transfer packages makes it; see why it recorded this path.";
    ORIGIN_SIZE = "origin_size", SOURCE, Never, None, CORRUPTION,
        "The package has another size than the database says.", "Find out which is right.";
    ORIGIN_CHANGED = "origin_changed", SOURCE, AtMost(1), Backoff, CORRUPTION,
        "The package changed while it was copied.", "Let its writer finish before the transfer is made. It is tried once more, in case the writer was only late.";
    ORIGIN_CORRUPT = "origin_corrupt", SOURCE, Never, None, CORRUPTION,
        "The package's content does not have the checksum that the database recorded.", "The origin's copy is damaged or was replaced. Restore it.";

    // The destination.
    DESTINATION_EXISTS = "destination_exists", DESTINATION, Never, None, EXISTS,
        "Another file has the package's name at the destination. Nothing was overwritten. (A file with the same content is no failure: the transfer is COMPLETED.)",
        "Look at it, remove or rename it, and reset the transfer.";
    TEMPORARY_EXISTS = "temporary_exists", DESTINATION, General, Backoff, EXISTS,
        "bbcp found a file under the attempt's own temporary name, which no other attempt has. It says nothing about the package's own name.",
        "If it comes again, see what else writes names that begin with `.ccat-transfer-`.";
    DESTINATION_BUSY = "destination_busy", DESTINATION, Uncounted, Backoff, SCHEDULE,
        "Another transfer is copying to the same path.", "Nothing. When that one is done, this one finds the file, and either agrees with it or fails clearly.";
    DESTINATION_ROOT_MISSING = "destination_root_missing", DESTINATION, Uncounted, Storage, STORAGE,
        "The location's own directory is missing. It is never made, since it may be a mount point with nothing mounted.", "Mount or make it.";
    DESTINATION_DIRECTORY = "destination_directory", DESTINATION, AtMost(1), Backoff, STORAGE,
        "A directory that was made is missing when bbcp looks for it.", "See who removes directories there.";
    DESTINATION_DENIED = "destination_denied", DESTINATION, Never, None, STORAGE,
        "The worker may not write at the destination.", "Correct the permissions and reset the transfer.";
    STORAGE_LOW = "storage_low", DESTINATION, AtMost(STORAGE_RETRIES), Storage, STORAGE,
        "The package would not fit with `transfer.free_space_margin`. Nothing was copied.", "Make room.";
    STORAGE_FULL = "storage_full", DESTINATION, AtMost(STORAGE_RETRIES), Storage, STORAGE,
        "The destination ran full during the copy, which was removed so that it does not keep others from their work.", "Make room.";
    RENAME_UNSUPPORTED = "rename_unsupported", DESTINATION, Never, None, STORAGE,
        "The file system can neither rename without overwriting nor make hard links, so that no copy can be published safely.", "Use another file system.";

    // The link.
    SSH_DENIED = "ssh_denied", LINK, Never, None, CONFIGURATION,
        "The other host refused the login.", "Check `ssh.user`, `ssh.identity_file` and the authorized keys there.";
    SSH_HOST_KEY = "ssh_host_key", LINK, Never, None, CONFIGURATION,
        "The other host's key is unknown or has changed.", "Check `ssh.known_hosts_file`; make sure that it is the right host.";
    NETWORK = "network", LINK, General, Backoff, NETWORK,
        "The other host cannot be reached, or a connection broke.", "Check network, firewall and `bbcp.port_range`.";
    PORT_BUSY = "port_busy", LINK, General, Backoff, NETWORK,
        "No port was free for the data connections.", "Widen `bbcp.port_range`.";
    REMOTE_DIED = "remote_died", LINK, General, Backoff, BBCP,
        "The other end's program ended without saying why.", "Look for a crash there, and for start-up files that print something.";
    STALLED = "stalled", LINK, General, Backoff, NETWORK,
        "No byte moved for `transfer.stall_timeout`, though the destination's storage answered.", "Look at the link.";
    STALLED_STORAGE = "stalled_storage", THAT_END, General, Backoff, STORAGE,
        "No byte moved for `transfer.stall_timeout`, and the storage at one end did not answer.", "Look at that storage: a hung mount, a dying disk.";
    TOO_SLOW = "too_slow", LINK, General, Backoff, NETWORK,
        "Over `transfer.min_rate_window` less than `transfer.min_rate` was moved.", "Look at the link, or lower the rate.";
    DEADLINE = "deadline", LINK, General, Backoff, NETWORK,
        "The copy took longer than its size allows by `transfer.deadline_rate`.", "Look at the link, or lower the rate.";
    TIME_LIMIT = "time_limit", LINK, General, Backoff, BBCP,
        "bbcp met a time limit of its own, which this worker never sets.", "Look for one in its build.";
    OPERATION_TIMEOUT = "operation_timeout", LINK, General, Backoff, NETWORK,
        "A small operation at one end (a look, a rename) took too long.", "Look at that host and its storage.";

    // The data.
    DAMAGED_IN_FLIGHT = "damaged_in_flight", LINK, General, Backoff, CORRUPTION,
        "bbcp's checksum found damage on the way. The copy was removed.", "If it comes again, look for bad memory or a bad network card.";
    TARGET_SIZE = "target_size", LINK, General, Backoff, CORRUPTION,
        "bbcp called a copy good that has the wrong size. It was removed.", "If it comes again, look at the destination's storage.";
    CHECKSUM_MISMATCH = "checksum_mismatch", LINK, General, Backoff, CHECKSUM,
        "bbcp called a copy good whose content is not the origin's. It was removed. (After a resumed copy, it was copied anew from the start before this was said.)",
        "If it comes again, look for bad memory or a bad disk.";
    RESUME_REFUSED = "resume_refused", LINK, General, Backoff, BBCP,
        "bbcp refused to go on with a partial copy, and to begin anew as well.", "Look at the log file of the attempt.";

    // Programs.
    PROGRAM_MISSING = "program_missing", AGENT, Never, None, CONFIGURATION,
        "A program is missing on the worker's host.", "Install it, or set its absolute path.";
    REMOTE_PROGRAM_MISSING = "remote_program_missing", THAT_END, Never, None, CONFIGURATION,
        "A program is missing at the other end.", "Install it there, or set its absolute path (`bbcp.remote_program`, `ssh.sha256_command` and its like).";
    SPAWN = "spawn", AGENT, General, Backoff, BBCP,
        "A program could not be started.", "Look for limits on processes or memory on the worker's host.";
    BAD_OPTION = "bad_option", AGENT, Never, None, CONFIGURATION,
        "bbcp did not accept its command line.", "Check the section `[bbcp]`; perhaps this bbcp is too old.";
    SEGFAULT = "segfault", AGENT, General, Backoff, SEGFAULT,
        "bbcp crashed.", "If it comes again, take another build of bbcp.";
    BBCP_FAILED = "bbcp_failed", LINK, General, Backoff, BBCP,
        "bbcp failed in a way that is not known.", "Read the log file of the attempt.";
    STORAGE = "storage", THAT_END, General, Backoff, STORAGE,
        "The storage at one end refused something.", "The message tells what; look at that storage.";
    LOG_FILE = "log_file", AGENT, General, Backoff, STORAGE,
        "The attempt's log file could not be opened.", "Check `transfer.log_dir`.";
    INTERNAL = "internal", AGENT, General, Backoff, TRANSFER,
        "The worker has a bug.", "Report it, with the message.";

    // What the rows ask for cannot be done.
    LOCATION_UNSUPPORTED = "location_unsupported", THAT_END, Never, None, CONFIGURATION,
        "A location is an object store or a tape library.", "bbcp reaches disks only. Correct the transfer's locations.";
    ROUTE_MISSING = "route_missing", LINK, Never, None, CONFIGURATION,
        "The database has no route between the two sites.", "Make one, and reset the transfer.";
    ROUTE_METHOD = "route_method", LINK, Never, None, CONFIGURATION,
        "The route's method is not bbcp.", "Send such transfers to another worker, or correct the route.";
    HOST_INVALID = "host_invalid", THAT_END, Never, None, CONFIGURATION,
        "A location's host is not a host name or address.", "Correct the location's row.";
    USER_INVALID = "user_invalid", THAT_END, Never, None, CONFIGURATION,
        "The login is not one that ssh could not mistake for an option.", "Correct `ssh.user`.";
    PATH_INVALID = "path_invalid", THAT_END, Never, None, CONFIGURATION,
        "A path is not safe or too long: control characters, `..`, a name above 255 bytes, a path above 999 bytes at the destination or 1999 at the origin.",
        "Rename the package, or shorten the location's path.";
    BOTH_ENDS_REMOTE = "both_ends_remote", LINK, Never, None, CONFIGURATION,
        "Neither end is on the worker's host.", "Run the worker at the origin or at the destination; see `transfer.local_hosts`.";
    SAME_PLACE = "same_place", LINK, Never, None, CONFIGURATION,
        "Origin and destination are one file.", "Correct the locations: the only copy must not count as two.";
    LINK_SETTINGS = "link_settings", LINK, Never, None, CONFIGURATION,
        "A `[[routes]]` entry has a bad value.", "`ccat-transfer config check` tells which.";

    // Not failures of the transfer.
    INTERRUPTED = "interrupted", AGENT, Uncounted, None, EXIT,
        "The worker was stopped. Where the link resumes, the partial copy is kept for the next attempt.", "Nothing.";
    DATABASE = "database", DB, General, Backoff, DATABASE,
        "The operations database refuses a value of this transfer, or a row that the transfer refers to is missing or incomplete. (While the database cannot be reached, or refuses everything, the worker waits and the copy goes on.)",
        "Read the message; correct the row or the constraint that it names, and reset the transfer.";
    UNKNOWN = "transfer_unknown", REQUEST, NotOurs, None, TRANSFER,
        "There is no such transfer.", "The message is wrong, or the row was deleted.";
    FAILED_BEFORE = "transfer_failed_before", REQUEST, NotOurs, None, TRANSFER,
        "The transfer has FAILED before.", "If it is to be tried again: `ccat-transfer transfers retry ID`.";
    NOT_DUE = "not_due", REQUEST, NotOurs, None, SCHEDULE,
        "A message came for a transfer that waits to be tried again. The row, not the message, says when.",
        "Nothing: the manager sends a message in time. `ccat-transfer transfers run` does it at once, and so does a reset of its `retry_count`.";
    LINK_PAUSED = "link_paused", LINK, Uncounted, None, SCHEDULE,
        "Somebody has paused the link. The row waits, PENDING; a copy that ran was stopped only if the pause was meant for that.",
        "Nothing: when the link is resumed (`ccat-transfer links resume`), the manager sends the transfer again.";
    LINK_FULL = "link_full", LINK, Uncounted, None, SCHEDULE,
        "A message came for a transfer whose link has as many copies as it may: the limit was made smaller after the message was sent, or its window of the day has begun. The row waits, PENDING.",
        "Nothing: when the link has room, the manager sends the transfer again. `ccat-transfer transfers run` does it at once.";
    HELD = "held_by_other", REQUEST, NotOurs, None, SCHEDULE,
        "Another worker is at it.", "Nothing.";
    UNTRACKED = "in_progress_untracked", REQUEST, NotOurs, None, SCHEDULE,
        "The row says IN_PROGRESS, but no worker of this kind is at it.", "If no Python worker is either: `ccat-transfer transfers retry ID --untracked`.";
    LEASE_LOST = "lease_lost", REQUEST, NotOurs, None, SCHEDULE,
        "An operator changed the row, or another worker took the transfer over. The copy was stopped and removed, and the row left as it is.", "Nothing.";
    }
}

pub(super) use table::*;

/// What an operator can do about a failure of this code; none for a code that is not known (any
/// more).
#[must_use]
pub fn remedy(code: &str) -> Option<&'static str> {
    ALL.iter()
        .find(|kind| kind.code == code)
        .map(|kind| kind.remedy)
}

impl Role {
    /// Whose matter something is that happened at this end.
    pub(super) fn scope(self) -> Scope {
        match self {
            Self::Origin => Scope::Source,
            Self::Destination => Scope::Destination,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use std::collections::HashSet;
    use std::fmt::Write as _;
    use std::path::Path;

    use super::*;
    use crate::transfer::bbcp::outcome::{Ends, Evidence};
    use crate::transfer::patterns::{MATCHERS, Matcher, OutputSource, Pattern};

    /// The page that is made from the tables.
    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/failures.md");

    /// Set to write the page anew.
    const REWRITE: &str = "REWRITE_DOCS";

    const INTRODUCTION: &str = "\
# What can go wrong, and what happens then

Every failure has a code. It stands in the log (`error_code`), in the history of attempts
(`ccat-transfer transfers show ID`), and here. What is said about retries is what the worker does by
itself; with the default settings, the waits are the ones that are written here.

This page is made from the worker's own table, `src/transfer/failures.rs`, and a test compares the
two. To write it anew: `REWRITE_DOCS=1 cargo test --lib failures`.

## What holds for all of them

* Nothing is ever deleted or overwritten at the origin, and nothing of others at the destination. A
  package has its final name at the destination only when its content is proven to be the origin's.
* *Tried again* means: the row is PENDING with one more in `retry_count`, and the manager sends it
  when its time has come; `transfers show` tells when. The first wait is `transfer.retry_delay_first`
  (1 minute), each further one is twice as long, up to `transfer.retry_delay_max` (2 hours); where
  somebody has to make room first, it begins with `transfer.retry_delay_storage` (30 minutes). Each
  is shorter by up to a fifth, by chance.
* *Up to the limit* is `transfer.max_retries` (3). Some failures have a limit of their own.
* *Not counted* means that `retry_count` stays: nothing failed that is the transfer's fault.
* *Given up* means: the row is FAILED with the reason, and an administrator is told.
  `ccat-transfer transfers retry ID` has it tried again; so does a row that is set to PENDING.
* To have a waiting transfer tried at once: `ccat-transfer transfers retry ID`, or its `retry_count`
  set to 0; or do it yourself with `ccat-transfer transfers run ID`.
* A Celery caller gets the Python exception, of `ccat_data_transfer.exceptions`.
* A text is taken for bbcp's, ssh's or a remote shell's by its form. Where bbcp itself says what is
  wrong, nothing that a start-up file at the other end prints can say otherwise.
* *Whose matter* is the place to look: `source` and `destination` are the two locations, `link` is
  what lies between, `agent` is the worker and its host, `request` is the message.

";

    fn follows(kind: &Kind) -> String {
        let wait = match kind.wait {
            Wait::None => "",
            Wait::Backoff => ", after a wait",
            Wait::Storage => ", after a long wait",
        };
        match kind.retry {
            Never => "Given up at once.".into(),
            General => format!("Tried again{wait}, up to the limit."),
            AtMost(1) => format!("Tried again{wait}, once."),
            AtMost(n) => format!("Tried again{wait}, {n} times at most."),
            Uncounted => format!("Tried again{wait}; not counted."),
            NotOurs => "The row is left as it is.".into(),
        }
    }

    /// Code of the error that bbcp's or ssh's line leads to.
    fn code_of(pattern: Pattern) -> &'static str {
        let ends = Ends {
            source: "/o".into(),
            target: "/d".into(),
            program: "bbcp".into(),
            remote: None,
        };
        Evidence::new(ends).error(pattern, String::new()).code()
    }

    fn shown(text: &Matcher) -> String {
        let mut parts = vec![text.begins];
        parts.extend(text.holds.iter().map(|part| part.trim()));
        if text.ends != text.begins {
            parts.push(text.ends);
        }
        parts.retain(|part| !part.is_empty());
        let mut shown = parts
            .iter()
            .map(|part| part.trim_end())
            .collect::<Vec<_>>()
            .join(" … ");
        if text.names_origin {
            shown.push_str(" … (the package)");
        }
        let before = match (text.source, text.begins.is_empty()) {
            (OutputSource::Bbcp, true) => "bbcp: … ",
            (OutputSource::Bbcp, false) => "bbcp: ",
            (OutputSource::Ssh, true) => "user@host … ",
            (OutputSource::Ssh, false) => "",
            (OutputSource::Shell, true) => "(the shell's name): (bbcp) … ",
            (OutputSource::Shell, false) => "(the shell's name): … (bbcp) … ",
        };
        format!("`{before}{shown}`")
    }

    fn page() -> String {
        let mut page = INTRODUCTION.to_owned();
        page.push_str("## The failures\n");
        for kind in ALL {
            let scope = kind.scope.map_or("the end in question", Scope::as_str);
            let (code, exc, what, remedy) = (kind.code, kind.exc_type, kind.what, kind.remedy);
            write!(
                page,
                "\n### `{code}`\n\n{what}\n\n* Then: {}\n* Whose matter: {scope}\n\
                 * Python exception: `{exc}`\n* What to do: {remedy}\n",
                follows(kind)
            )
            .unwrap();
            let texts: Vec<String> = MATCHERS
                .iter()
                .filter(|(pattern, _)| code_of(*pattern) == code)
                .flat_map(|(_, texts)| texts.iter().map(shown))
                .collect();
            if !texts.is_empty() {
                writeln!(page, "* Known by: {}", texts.join(", ")).unwrap();
            }
        }
        page
    }

    #[test]
    fn the_page_agrees_with_the_table() {
        let page = page();
        if std::env::var_os(REWRITE).is_some() {
            std::fs::create_dir_all(Path::new(PAGE).parent().unwrap()).unwrap();
            std::fs::write(PAGE, &page).unwrap();
        }
        let committed = std::fs::read_to_string(PAGE).unwrap_or_default();
        assert!(
            committed == page,
            "docs/failures.md does not agree with the table; look at the change and write it anew \
             with {REWRITE}=1 cargo test --lib failures"
        );
    }

    #[test]
    fn codes_are_names_and_unique() {
        let codes: HashSet<&str> = ALL.iter().map(|kind| kind.code).collect();
        assert_eq!(codes.len(), ALL.len());
        for kind in ALL {
            assert!(
                kind.code
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{}",
                kind.code
            );
            assert!(
                kind.what.ends_with(['.', ')']) && kind.remedy.ends_with(['.', ')']),
                "{}",
                kind.code
            );
            // Nobody waits for what does not come.
            assert!(
                kind.retry != Never && kind.retry != NotOurs || kind.wait == Wait::None,
                "{}",
                kind.code
            );
        }
    }

    #[test]
    fn matchers_are_in_the_order_of_their_patterns_and_lead_somewhere() {
        let patterns: Vec<Pattern> = MATCHERS.iter().map(|(pattern, _)| *pattern).collect();
        assert!(patterns.is_sorted() && patterns.len() == Pattern::Follower as usize + 1);
        for (pattern, matchers) in MATCHERS {
            assert!(!matchers.is_empty(), "{pattern:?}");
            let code = code_of(*pattern);
            assert!(
                ALL.iter().any(|kind| kind.code == code),
                "{pattern:?}: {code}"
            );
        }
    }
}
