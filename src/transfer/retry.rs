//! Decision about further attempts after a failure.
//!
//! The manager makes a retry possible: the row becomes PENDING with `retry_count + 1`, and the manager sends no message
//! before the delay has passed. A stopped attempt is not a failure: the row becomes PENDING without being counted. An
//! attempt waits for a database that cannot be reached or refuses everything; such a database ends no attempt.
//!
//! Pure functions: the random number is an argument.

use std::time::Duration;

use super::failures::{RetryRule, TransferError, Wait};
use crate::settings::Transfer;

/// Consequence of a failure for the row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// PENDING again; `retry_count` grows only if `counted`.
    Retry {
        /// True if this attempt was a failure of the transfer.
        counted: bool,
        /// Delay before the next attempt.
        delay: Duration,
    },
    /// FAILED: no further attempt.
    Permanent {
        /// Reason, for `failure_error_message`.
        reason: String,
    },
    /// Another worker or an operator owns the row, or it has ended: do not write it.
    Leave,
}

/// Settings for retries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryPolicy {
    /// Maximum number of further attempts after the first failure; the limit of an error type takes precedence.
    pub max_retries: u32,
    /// Delay after the first failure; each further failure doubles it.
    pub first: Duration,
    /// Delay after the first failure for lack of storage; each further failure doubles it.
    pub storage: Duration,
    /// Upper limit of delays, unless the first one is longer.
    pub longest: Duration,
    /// Share by which a delay may be shortened, 0 to 1, so that transfers that failed together are not all retried at
    /// the same time.
    pub jitter: f64,
}

impl From<&Transfer> for RetryPolicy {
    fn from(settings: &Transfer) -> Self {
        Self {
            max_retries: settings.max_retries,
            first: settings.retry_delay_first,
            storage: settings.retry_delay_storage,
            longest: settings.retry_delay_max,
            jitter: settings.retry_delay_jitter,
        }
    }
}

impl RetryPolicy {
    /// Returns the delay after a failure with `failures` failures before it; `luck` is a random number from 0 to 1.
    #[must_use]
    pub fn delay(&self, wait: Wait, failures: u32, luck: f64) -> Duration {
        let first = match wait {
            Wait::None => return Duration::ZERO,
            Wait::Backoff => self.first,
            Wait::Storage => self.storage,
        };
        let doubled = first.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX));
        let whole = doubled.min(self.longest.max(first));
        let share = 1.0 - self.jitter.clamp(0.0, 1.0) * luck.clamp(0.0, 1.0);
        whole.mul_f64(share)
    }
}

/// Decides about `error` after `retry_count` earlier failures; for `luck` see [`RetryPolicy::delay`].
#[must_use]
pub fn decide(
    error: &TransferError,
    retry_count: u32,
    policy: &RetryPolicy,
    luck: f64,
) -> Decision {
    let retry = |counted| Decision::Retry {
        counted,
        delay: policy.delay(error.wait(), retry_count, luck),
    };
    let limit = match error.retry() {
        RetryRule::NotOurs => return Decision::Leave,
        RetryRule::Uncounted => return retry(false),
        RetryRule::Never => {
            return Decision::Permanent {
                reason: error.chain(),
            };
        }
        RetryRule::General => policy.max_retries,
        RetryRule::AtMost(own) => own,
    };
    if retry_count < limit {
        retry(true)
    } else {
        Decision::Permanent {
            reason: format!("{} (given up after {limit} retries)", error.chain()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::panic, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;
    use crate::transfer::failures::Interruption;

    fn policy(max_retries: u32) -> RetryPolicy {
        RetryPolicy {
            max_retries,
            first: Duration::from_secs(60),
            storage: Duration::from_secs(1800),
            longest: Duration::from_secs(7200),
            jitter: 0.2,
        }
    }

    fn full() -> TransferError {
        TransferError::StorageFull {
            path: "/d".into(),
            line: String::new(),
        }
    }

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
        let decision = decide(&error, before, &policy(max), 0.5);
        let counted = matches!(decision, Decision::Retry { counted: true, .. });
        assert_eq!(counted, again, "{decision:?}");
    }

    #[test]
    fn permanent_errors_are_never_retried() {
        let error = TransferError::OriginMissing { path: "/a".into() };
        assert_eq!(
            decide(&error, 0, &policy(3), 0.0),
            Decision::Permanent {
                reason:
                    "/a does not exist at the origin; put it back or correct the package's path"
                        .into()
            }
        );
    }

    #[test]
    fn full_disk_is_retried_after_a_long_delay() {
        let Decision::Retry {
            counted: true,
            delay,
        } = decide(&full(), 0, &policy(0), 1.0)
        else {
            panic!("a full disk has its own limit");
        };
        assert_eq!(delay, Duration::from_secs(1440));
        assert_eq!(
            policy(3).delay(Wait::Storage, 5, 0.0),
            Duration::from_secs(7200)
        );
        assert!(matches!(
            decide(&full(), 12, &policy(20), 0.0),
            Decision::Permanent { .. }
        ));
    }

    proptest! {
        #[test]
        fn stopping_never_counts(before: u32, max: u32) {
            let stopped = TransferError::Interrupted { cause: Interruption::Shutdown };
            let decision = decide(&stopped, before, &policy(max), 0.5);
            prop_assert_eq!(decision, Decision::Retry { counted: false, delay: Duration::ZERO });
        }

        /// A transfer with a value that the database refuses becomes FAILED with a reason, instead of being sent again
        /// forever.
        #[test]
        fn a_value_that_the_database_refuses_counts(before in 0..10_u32) {
            let refused = TransferError::Database { source: "no package".into() };
            let decision = decide(&refused, before, &policy(3), 0.5);
            let ends = matches!(decision, Decision::Permanent { .. });
            prop_assert_eq!(ends, before >= 3);
        }

        #[test]
        fn a_row_of_another_worker_is_left(before: u32, max: u32) {
            let lost = TransferError::LeaseLost { id: 1.into() };
            prop_assert_eq!(decide(&lost, before, &policy(max), 0.5), Decision::Leave);
        }

        /// For all settings: no delay exceeds its limit, more failures never shorten it, and `luck` shortens it by at
        /// most its share.
        #[test]
        fn delays_grow_to_a_limit(
            first in 0..100_000_u64,
            longest in 0..1_000_000_u64,
            jitter in 0.0..=1.0_f64,
            failures in 0..200_u32,
            luck in 0.0..1.0_f64,
        ) {
            let policy = RetryPolicy {
                first: Duration::from_secs(first),
                longest: Duration::from_secs(longest),
                jitter,
                ..policy(3)
            };
            let whole = policy.delay(Wait::Backoff, failures, 0.0);
            let some = policy.delay(Wait::Backoff, failures, luck);
            prop_assert!(whole <= policy.longest.max(policy.first));
            prop_assert!(whole <= policy.delay(Wait::Backoff, failures + 1, 0.0));
            prop_assert!(some <= whole);
            prop_assert!(some.as_secs_f64() + 0.001 >= whole.as_secs_f64() * (1.0 - jitter));
        }
    }
}
