//! The columns of the table of failures, and the macro that reads its rows.

use std::error::Error;
use std::fmt;

/// One end of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The end that holds the package.
    Origin,
    /// The end that receives it.
    Destination,
}

impl Role {
    /// Scope of a failure at this end.
    pub(super) fn scope(self) -> Scope {
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

/// Reason for stopping a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interruption {
    /// The worker shuts down.
    Shutdown,
    /// The task was terminated or exceeded its time limit, or the command was stopped.
    Cancelled,
}

impl fmt::Display for Interruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shutdown => "the worker shuts down",
            Self::Cancelled => "it was cancelled",
        })
    }
}

/// Underlying error of any type.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Location of the cause; decides who has to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// The origin location or its data.
    Source,
    /// The destination location.
    Destination,
    /// The connection between the ends: network, ssh, routes.
    Link,
    /// This worker and its host.
    Agent,
    /// The operations database.
    Database,
    /// The request itself: this worker has nothing to do.
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

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Rule for further attempts after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RetryRule {
    /// No further attempt: it would fail for the same reason.
    Never,
    /// Up to the general limit.
    General,
    /// Up to this number of failures, independent of the general limit.
    AtMost(u32),
    /// As often as needed: the transfer is not the cause.
    Uncounted,
    /// The row belongs to another worker or needs none: it is not touched.
    NotOurs,
}

/// Delay before the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// No delay: the manager's next pass may send it.
    None,
    /// `transfer.retry_delay_first`, doubled after each failure.
    Backoff,
    /// `transfer.retry_delay_storage`, doubled after each failure: an operator has to make room or mount a disk.
    Storage,
}

/// Treatment of the partial copy that a failed attempt leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PartialCopy {
    /// The next attempt completes it.
    Keep,
    /// It is removed: its content is in doubt, the disk is full, or no further attempt follows.
    Discard,
    /// An earlier partial copy that was completed may be the cause. The same attempt copies once more from
    /// the start; without an earlier partial copy, or if that fails as well, it is removed.
    Restart,
}

/// The row of a failure, without its patterns.
#[derive(Debug)]
pub(crate) struct FailureRow {
    /// Stable `snake_case` name. Codes are stored in the attempt history: add, but never rename.
    pub(crate) code: &'static str,
    /// `None` if it depends on the end at which the failure happened.
    pub(crate) scope: Option<Scope>,
    pub(crate) retry: RetryRule,
    pub(crate) wait: Wait,
    pub(crate) partial: PartialCopy,
    /// Description, in whole sentences: the row's doc comment.
    pub(crate) description: &'static str,
    /// Advice for an operator, in whole sentences.
    pub(crate) remedy: &'static str,
}

/// Defines [`TransferError`](super::TransferError) and [`FailureKind`](super::FailureKind) from the rows of the table.
///
/// A row is the doc comment, the variant with its fields, the code, and in this order:
/// * `scope`: a [`Scope`], or `EndOf(role)` if the field `role` names the end;
/// * `retry`, `wait`, `partial`: a [`RetryRule`], a [`Wait`] and a [`PartialCopy`];
/// * `message`: the text with its cause, as `thiserror` takes it; in parentheses if it has arguments;
/// * `remedy`: [`FailureRow::remedy`];
/// * any number of `known_by`, `suspected_by` and `assumed_by`
///   ([`Confidence`](super::pattern::Confidence)): the rank among all patterns, the fields as they follow from
///   an [`Observation`](super::pattern::Observation), and the matchers of lines.
macro_rules! failures {
    ($(
        $(#[doc = $description:literal])+
        $variant:ident {
            $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)?
        } = $code:literal {
            scope: $scope:ident $(($end:ident))?,
            retry: $retry:ident $(($times:expr))?, wait: $wait:ident, partial: $partial:ident,
            $(message: $message:literal,)? $(message: ($($format:tt)+),)?
            remedy: $remedy:literal,
            $($confidence:ident($rank:literal): |$seen:ident| { $($values:tt)* } in [$($matcher:expr),+ $(,)?],)*
        }
    )+) => {
        /// Failure of a transfer: nothing was transferred, or not everything.
        ///
        /// `line` fields contain the line of bbcp's, ssh's or a remote shell's output that states the failure.
        #[derive(Debug, thiserror::Error)]
        #[expect(missing_docs, reason = "the messages explain every field")]
        pub enum TransferError {
            $(
                $(#[doc = $description])+
                #[error($($message)? $($($format)+)?)]
                $variant { $($(#[$field_doc])* $field: $type),* },
            )+
        }

        /// Kind of a [`TransferError`], without the values.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum FailureKind {
            $($(#[doc = $description])+ $variant,)+
        }

        impl TransferError {
            /// Kind of the failure.
            pub fn kind(&self) -> FailureKind {
                match self {
                    $(Self::$variant { .. } => FailureKind::$variant,)+
                }
            }

            /// Location of the reason.
            pub fn scope(&self) -> Scope {
                match self {
                    $(Self::$variant { $($end,)? .. } => failures!(@scope $scope $($end)?),)+
                }
            }
        }

        impl FailureKind {
            /// All kinds, in the order of the table.
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),+];

            /// Row of the table.
            pub(crate) fn row(self) -> &'static FailureRow {
                match self {
                    $(Self::$variant => {
                        static ROW: FailureRow = FailureRow {
                            code: $code,
                            scope: failures!(@row_scope $scope),
                            retry: RetryRule::$retry $(($times))?,
                            wait: Wait::$wait,
                            partial: PartialCopy::$partial,
                            description: concat!($($description),+).trim_ascii_start(),
                            remedy: $remedy,
                        };
                        &ROW
                    })+
                }
            }

            /// Patterns of the output by which the failure is recognized.
            pub(crate) fn patterns(self) -> &'static [Pattern<TransferError>] {
                match self {
                    $(Self::$variant => {
                        static PATTERNS: &[Pattern<TransferError>] = &[$(Pattern {
                            rank: $rank,
                            confidence: failures!(@$confidence),
                            failure: |$seen| TransferError::$variant { $($values)* },
                            matchers: &[$($matcher),+],
                        }),*];
                        PATTERNS
                    })+
                }
            }
        }
    };
    (@scope EndOf $role:ident) => { $role.scope() };
    (@scope $scope:ident) => { Scope::$scope };
    (@row_scope EndOf) => { None };
    (@row_scope $scope:ident) => { Some(Scope::$scope) };
    (@known_by) => { Confidence::Known };
    (@suspected_by) => { Confidence::Suspected };
    (@assumed_by) => { Confidence::Assumed };
}
pub(super) use failures;
