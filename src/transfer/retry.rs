//! Whether a failed transfer is tried again.
//!
//! A retry goes back through the manager (status pending, `retry_count + 1`), so that the pause
//! between two attempts is the manager's. Stopping is not failing, and neither is a database that
//! was away: such attempts are given back without being counted.

use super::error::{Retry, TransferError};

/// What becomes of the row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Back to pending; `retry_count` grows only if `counted`.
    Retry {
        /// Whether this attempt was a failure of the transfer.
        counted: bool,
    },
    /// Failed for good.
    Permanent {
        /// Why, for `failure_error_message`.
        reason: String,
    },
    /// The row belongs to someone else or is settled: do not write it.
    Leave,
}

/// Decides about `error` after `retry_count` failures before this one.
///
/// `max_retries` is the number of further attempts after the first failed one; an error's own
/// limit takes its place.
pub fn decide(error: &TransferError, retry_count: u32, max_retries: u32) -> Decision {
    let limit = match error.retry() {
        Retry::NotOurs => return Decision::Leave,
        Retry::Uncounted => return Decision::Retry { counted: false },
        Retry::Never => {
            return Decision::Permanent {
                reason: error.chain(),
            };
        }
        Retry::General => max_retries,
        Retry::AtMost(own) => own,
    };
    if retry_count < limit {
        Decision::Retry { counted: true }
    } else {
        Decision::Permanent {
            reason: format!("{} (given up after {limit} retries)", error.chain()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;
    use crate::transfer::error::Interruption;

    fn network() -> TransferError {
        TransferError::Network {
            host: "h".into(),
            line: "reset".into(),
        }
    }

    fn changed() -> TransferError {
        TransferError::OriginChanged {
            path: "/a".into(),
            line: String::new(),
        }
    }

    #[rstest]
    #[case::first(network(), 0, 3, true)]
    #[case::last(network(), 2, 3, true)]
    #[case::used_up(network(), 3, 3, false)]
    #[case::none_allowed(network(), 0, 0, false)]
    #[case::own_limit(changed(), 0, 3, true)]
    #[case::own_limit_used_up(changed(), 1, 3, false)]
    #[case::own_limit_above_general(changed(), 0, 0, true)]
    fn counted(
        #[case] error: TransferError,
        #[case] before: u32,
        #[case] max: u32,
        #[case] again: bool,
    ) {
        let decision = decide(&error, before, max);
        assert_eq!(
            decision == (Decision::Retry { counted: true }),
            again,
            "{decision:?}"
        );
    }

    #[test]
    fn permanent_errors_are_never_retried() {
        let error = TransferError::OriginMissing { path: "/a".into() };
        assert_eq!(
            decide(&error, 0, 3),
            Decision::Permanent {
                reason:
                    "/a does not exist at the origin; put it back or correct the package's path"
                        .into()
            }
        );
    }

    proptest! {
        #[test]
        fn stopping_and_infrastructure_never_count(before: u32, max: u32) {
            let stopped = TransferError::Interrupted { cause: Interruption::Shutdown };
            let database = TransferError::Database { source: "gone".into() };
            for error in [stopped, database] {
                prop_assert_eq!(decide(&error, before, max), Decision::Retry { counted: false });
            }
        }

        #[test]
        fn a_row_of_another_worker_is_left(before: u32, max: u32) {
            prop_assert_eq!(decide(&TransferError::LeaseLost { id: 1 }, before, max), Decision::Leave);
        }
    }
}
