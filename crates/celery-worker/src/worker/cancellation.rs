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
    /// Cancelled, and with it `now`, when the task must stop even if it has caught its soft time limit.
    pub(crate) last: CancellationToken,
    reason: Arc<Mutex<Option<CancelReason>>>,
}

impl Cancellation {
    /// Creates the cancellation of a task, which `shutdown` also cancels.
    pub(crate) fn new(shutdown: &CancellationToken) -> Self {
        let last = shutdown.child_token();
        Self {
            now: last.child_token(),
            for_good: CancellationToken::new(),
            soft_time_limit: CancellationToken::new(),
            last,
            reason: Arc::default(),
        }
    }

    /// Cancels the task; its message is not requeued. A task that was cancelled before keeps the first reason; but after
    /// the soft time limit, which it may catch, another one can follow.
    pub(crate) fn stop(&self, reason: CancelReason) {
        let mut current = self.reason.lock();
        let is_first = current.is_none() || *current == Some(CancelReason::SoftTimeLimit);
        if !is_first || *current == Some(reason) || self.last.is_cancelled() {
            return;
        }
        *current = Some(reason);
        // With the lock, so that the tokens are never those of one reason, and the reason another one.
        self.for_good.cancel();
        if reason == CancelReason::SoftTimeLimit {
            self.soft_time_limit.cancel();
            self.now.cancel();
        } else {
            self.last.cancel();
        }
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
            assert!(stop.now.is_cancelled() && stop.for_good.is_cancelled());
            (
                stop.reason(),
                stop.soft_time_limit.is_cancelled(),
                stop.last.is_cancelled(),
            )
        };
        let hard = TimeLimit(1.0);
        for (reasons, reason, is_soft, is_last) in [
            ([SoftTimeLimit, hard], hard, true, true),
            ([SoftTimeLimit, Terminated], Terminated, true, true),
            ([SoftTimeLimit, SoftTimeLimit], SoftTimeLimit, true, false),
            ([hard, SoftTimeLimit], hard, false, true),
            ([Terminated, hard], Terminated, false, true),
        ] {
            assert_eq!(stopped_by(reasons), (Some(reason), is_soft, is_last));
        }
    }

    #[test]
    fn a_shutdown_is_no_reason() {
        let shutdown = CancellationToken::new();
        let stop = Cancellation::new(&shutdown);
        shutdown.cancel();
        stop.stop(Terminated);
        assert_eq!(stop.reason(), None);
        assert!(stop.now.is_cancelled() && stop.last.is_cancelled());
    }

    /// A task that has caught its soft time limit learns of a shutdown, too, and its message is not requeued.
    #[test]
    fn a_shutdown_can_follow_the_soft_time_limit() {
        let shutdown = CancellationToken::new();
        let stop = Cancellation::new(&shutdown);
        stop.stop(SoftTimeLimit);
        assert!(!stop.last.is_cancelled());
        shutdown.cancel();
        assert!(stop.last.is_cancelled());
        assert_eq!(stop.reason(), Some(SoftTimeLimit));
    }
}
