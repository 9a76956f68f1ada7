//! The handover of a task whose lease was lost: the same task may have started an attempt on another worker, which then
//! stores the result of the task.

use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::database_retry::retry_until_reachable;
use super::lease::Lease;
use super::repository::Successor;
use super::service::TransferService;

/// Time within which a process that was paused finds out that its task was given to another worker.
const DETECTION_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum wait for another worker that was given the task to start.
const MAX_HANDOVER_TIMEOUT: Duration = Duration::from_secs(15);

/// Interval of the checks.
const HANDOVER_POLL: Duration = Duration::from_millis(200);

impl TransferService {
    /// Returns true if the task `task_id` follows the lost lease on another worker, which then stores the result.
    /// `is_gone` returns true once it is known that the task was taken from this worker.
    ///
    /// A process that was paused may detect the lost lease before it knows that, and the other worker may not have
    /// started yet. The function waits a limited time for both.
    pub async fn is_left_to_another_worker(
        &self,
        task_id: &str,
        lost: &Lease,
        cancelled: &CancellationToken,
        is_gone: impl Fn() -> bool,
    ) -> bool {
        let began = Instant::now();
        let handover_timeout = handover_timeout(self.settings().transfer.lease_ttl);
        loop {
            let reading = || self.repository().successor(lost, task_id);
            let is_gone = is_gone();
            let Ok(successor) = retry_until_reachable(cancelled, reading).await else {
                return is_gone;
            };
            match is_left(successor, is_gone, began.elapsed(), handover_timeout) {
                Some(is_left) => return is_left,
                None => sleep(HANDOVER_POLL).await,
            }
        }
    }
}

/// Time limit for another worker that was given the task to start. That worker checks the lease more often than this, see
/// [`acquire`](super::acquire).
fn handover_timeout(lease_ttl: Duration) -> Duration {
    (lease_ttl / 4).clamp(DETECTION_TIMEOUT, MAX_HANDOVER_TIMEOUT)
}

/// Decides after one observation if the result is left to another worker; `None` if it is too early to tell.
fn is_left(
    successor: Successor,
    is_gone: bool,
    waited: Duration,
    handover_timeout: Duration,
) -> Option<bool> {
    match successor {
        Successor::SameTask => return Some(true),
        // The other worker finds the transfer completed, and stores this result.
        Successor::Completed if is_gone => return Some(true),
        Successor::Completed | Successor::None => {}
    }
    let limit = match is_gone {
        true => handover_timeout,
        false => DETECTION_TIMEOUT,
    };
    (waited >= limit).then_some(false)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::same_task_has_the_lease(Successor::SameTask, false, 0, Some(true))]
    #[case::same_task_after_the_limits(Successor::SameTask, true, 60, Some(true))]
    #[case::completed_and_gone(Successor::Completed, true, 0, Some(true))]
    #[case::completed_but_here(Successor::Completed, false, 0, None)]
    #[case::completed_and_not_taken_back(Successor::Completed, false, 2, Some(false))]
    #[case::nobody_yet(Successor::None, false, 1, None)]
    #[case::nobody_and_not_taken_back(Successor::None, false, 2, Some(false))]
    #[case::gone_and_nobody_yet(Successor::None, true, 9, None)]
    #[case::gone_and_nobody(Successor::None, true, 10, Some(false))]
    fn observation_decides(
        #[case] successor: Successor,
        #[case] is_gone: bool,
        #[case] waited: u64,
        #[case] expected: Option<bool>,
    ) {
        let seconds = Duration::from_secs;
        let found = is_left(successor, is_gone, seconds(waited), seconds(10));
        assert_eq!(found, expected);
    }

    #[rstest]
    #[case::short(4, 2)]
    #[case::quarter(40, 10)]
    #[case::long(600, 15)]
    fn timeout_follows_the_lease(#[case] ttl: u64, #[case] timeout: u64) {
        assert_eq!(
            handover_timeout(Duration::from_secs(ttl)),
            Duration::from_secs(timeout)
        );
    }
}
