//! Cancellation of a running task, and its reason.

use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

/// Reason why a task is cancelled. Only the first reason is kept.
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
    reason: Arc<OnceLock<CancelReason>>,
}

impl Cancellation {
    /// Creates the cancellation of a task, which `shutdown` also cancels.
    pub(crate) fn new(shutdown: &CancellationToken) -> Self {
        Self {
            now: shutdown.child_token(),
            for_good: CancellationToken::new(),
            reason: Arc::default(),
        }
    }

    /// Cancels the task; its message is not requeued.
    pub(crate) fn stop(&self, reason: CancelReason) {
        // A task that was cancelled before keeps the first reason.
        if !self.now.is_cancelled() {
            let _ = self.reason.set(reason);
            self.for_good.cancel();
            self.now.cancel();
        }
    }

    /// Reason of the cancellation; `None` without one, or after a shutdown.
    pub(crate) fn reason(&self) -> Option<CancelReason> {
        self.reason.get().copied()
    }
}
