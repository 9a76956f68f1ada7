//! Failures of transfers: one table, from the line of bbcp's output to the consequences for the row.
//!
//! A failure is a value that travels in one direction. A line of output matches a [pattern](pattern), which
//! makes a [`TransferError`]; its [row](FailureKind::row) states what follows. The tasks write the
//! transfer's row accordingly and name the Python exception for the Celery caller.
//!
//! To add a failure, add a row to the [table](table). The compiler then asks for the Python exception in
//! `src/tasks/exceptions.rs`, and a test asks for a new `docs/failures.md`. Only a text that names a
//! command of this program needs a second place, `src/advice.rs`.

use std::sync::LazyLock;

use crate::transfer::trace::Explain;

use super::link::{ClosedLink, FullLink, PausedLink};

mod connection;
mod pattern;
mod row;
mod table;

pub(super) use connection::ListenerAddresses;
pub use connection::{DataConnection, Unreached};
pub(super) use pattern::{Confidence, Names, Observation};
#[cfg(test)]
pub(crate) use pattern::{Matcher, OutputSource};
pub(super) use row::PartialCopy;
pub(crate) use row::RetryRule;
pub use row::{BoxError, Interruption, Role, Scope, Wait};
pub use table::{FailureKind, TransferError};

use pattern::{OutputLine, OutputSource as Source, Pattern, mask_paths};

impl TransferError {
    /// Error of a stopped step. A cancellation token has no reason; [`Request`](super::request::Request) knows it.
    pub(super) const STOPPED: Self = Self::Interrupted {
        cause: Interruption::Cancelled,
    };

    /// Stable `snake_case` name for the attempt history, metrics and logs.
    pub fn code(&self) -> &'static str {
        self.kind().code()
    }

    /// Delay before the next attempt, if there is one.
    pub fn wait(&self) -> Wait {
        self.kind().row().wait
    }

    pub(super) fn retry(&self) -> RetryRule {
        self.kind().row().retry
    }

    pub(super) fn partial(&self) -> PartialCopy {
        self.kind().row().partial
    }

    /// Returns true if the attempt was stopped and did not fail: its message is needed again.
    pub(crate) fn is_interruption(&self) -> bool {
        matches!(self, Self::Interrupted { .. })
    }

    /// The whole chain of causes in one line, for a database column or a Celery message.
    pub fn chain(&self) -> String {
        service_connection::error_chain::chain(self).to_string()
    }
}

impl FailureKind {
    /// Stable `snake_case` name for the attempt history, metrics and logs.
    pub fn code(self) -> &'static str {
        self.row().code
    }

    /// The kind with this code; `None` if the code is unknown (for example from an older version).
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.code() == code)
    }
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

/// The patterns of all kinds by rank.
static PATTERNS: LazyLock<Vec<(FailureKind, &Pattern<TransferError>)>> = LazyLock::new(|| {
    let of_kind = |kind: FailureKind| kind.patterns().iter().map(move |pattern| (kind, pattern));
    let kinds = FailureKind::ALL.iter().copied();
    let mut patterns: Vec<_> = kinds.flat_map(of_kind).collect();
    patterns.sort_by_key(|(_, pattern)| pattern.rank);
    patterns
});

/// A pattern that a line of output or an exit status matches.
#[derive(Debug, Clone, Copy)]
pub(super) struct PatternMatch {
    kind: FailureKind,
    pattern: &'static Pattern<TransferError>,
    source: Source,
}

impl PatternMatch {
    /// The failure that a line states, if any.
    pub(super) fn of_line(line: &str, names: Names<'_>) -> Option<Self> {
        let masked = mask_paths(line, names);
        let line = OutputLine::parse(&masked, names.program);
        PATTERNS.iter().find_map(|(kind, pattern)| {
            Some(Self {
                kind: *kind,
                pattern,
                source: pattern.source_of(&line)?,
            })
        })
    }

    /// The failure that an exit status states, if any.
    pub(super) fn of_exit(status: &str) -> Option<Self> {
        let (kind, pattern) = PATTERNS.iter().find(|(_, p)| p.is_exit(status))?;
        Some(Self {
            kind: *kind,
            pattern,
            source: Source::ExitStatus,
        })
    }

    /// Order among all patterns, the most specific first.
    pub(super) fn rank(&self) -> u16 {
        self.pattern.rank
    }

    pub(super) fn confidence(&self) -> Confidence {
        self.pattern.confidence
    }

    /// Returns true if bbcp itself printed the line.
    pub(super) fn is_from_bbcp(&self) -> bool {
        self.source == Source::Bbcp
    }

    /// The failure with its values.
    pub(super) fn failure(&self, observation: Observation) -> TransferError {
        (self.pattern.failure)(observation)
    }

    /// Returns true if ssh states that no connection exists, or that it ended.
    fn is_lost_connection(&self) -> bool {
        self.source == Source::Ssh && self.kind.row().scope == Some(Scope::Link)
    }
}

/// Name of the worker's own host in messages.
pub(crate) const THIS_HOST: &str = "this host";

/// The failure to connect to a host that ssh's own output states, if any.
pub(super) fn connection_failure(output: &str, host: &str, role: Role) -> Option<TransferError> {
    const NAMES: Names<'_> = Names {
        origin: "",
        copy: "",
        program: "",
    };
    let (found, line) = output
        .lines()
        .filter_map(|line| Some((PatternMatch::of_line(line, NAMES)?, line)))
        .filter(|(found, _)| found.is_lost_connection())
        .min_by_key(|(found, _)| found.rank())?;
    Some(found.failure(Observation {
        line: line.trim().to_owned(),
        origin: String::new(),
        copy: String::new(),
        host: host.to_owned(),
        role,
        connection: Box::new(DataConnection::new(host, THIS_HOST)),
    }))
}

#[cfg(test)]
mod tests;
