//! Cancellation of a running task, and its reason.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// Reason why a task is cancelled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum CancelReason {
    /// The task was terminated on request: it does not run again.
    Terminated,
    /// The task exceeded its soft time limit.
    SoftTimeLimit,
    /// The task exceeded its time limit, in seconds.
    TimeLimit(f64),
}

/// Cancels one task. Clones cancel the same task.
#[derive(Debug, Clone)]
pub(crate) struct Cancellation {
    /// Cancelled when the task must stop, for one of the reasons or by a cold shutdown.
    pub(crate) now: CancellationToken,
    /// Cancelled before `now` if the message of the task is not requeued.
    pub(crate) for_good: CancellationToken,
    /// Cancelled before `now` at the soft time limit.
    pub(crate) soft_time_limit: CancellationToken,
    reason: Arc<Mutex<Option<CancelReason>>>,
}

impl Cancellation {
    /// Creates the cancellation of a task, which `shutdown` also cancels.
    pub(crate) fn new(shutdown: &CancellationToken) -> Self {
        Self {
            now: shutdown.child_token(),
            for_good: CancellationToken::new(),
            soft_time_limit: CancellationToken::new(),
            reason: Arc::default(),
        }
    }

    /// Cancels the task; its message is not requeued.
    pub(crate) fn stop(&self, reason: CancelReason) {
        let mut first = self.reason.lock();
        // A task that was cancelled before keeps the first reason; but it may catch the soft time limit and go on.
        if self.now.is_cancelled() && *first != Some(CancelReason::SoftTimeLimit) {
            return;
        }
        *first = Some(reason);
        drop(first);
        if reason == CancelReason::SoftTimeLimit {
            self.soft_time_limit.cancel();
        }
        self.for_good.cancel();
        self.now.cancel();
    }

    /// Reason of the cancellation; `None` without one, or after a shutdown.
    pub(crate) fn reason(&self) -> Option<CancelReason> {
        *self.reason.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use CancelReason::{SoftTimeLimit, Terminated, TimeLimit};

    /// A task that has caught its soft time limit can still be terminated, or exceed its time limit.
    #[test]
    fn only_the_soft_time_limit_can_be_followed_by_another_reason() {
        let stopped_by = |reasons: [CancelReason; 2]| {
            let stop = Cancellation::new(&CancellationToken::new());
            for reason in reasons {
                stop.stop(reason);
            }
            (stop.reason(), stop.soft_time_limit.is_cancelled())
        };
        let hard = TimeLimit(1.0);
        assert_eq!(stopped_by([SoftTimeLimit, hard]), (Some(hard), true));
        assert_eq!(
            stopped_by([SoftTimeLimit, Terminated]),
            (Some(Terminated), true)
        );
        assert_eq!(stopped_by([hard, SoftTimeLimit]), (Some(hard), false));
        assert_eq!(stopped_by([Terminated, hard]), (Some(Terminated), false));
    }

    #[test]
    fn a_shutdown_is_no_reason() {
        let shutdown = CancellationToken::new();
        let stop = Cancellation::new(&shutdown);
        shutdown.cancel();
        stop.stop(CancelReason::Terminated);
        assert_eq!(stop.reason(), None);
    }
}
