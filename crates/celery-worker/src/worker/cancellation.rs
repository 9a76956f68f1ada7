//! How a task is told to stop, and why.

use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

/// Why a task was told to stop. The first reason counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum CancelReason {
    /// Somebody terminated it: it is not run again.
    Terminated,
    /// It ran longer than its soft time limit.
    SoftTimeLimit,
    /// It ran longer than its time limit, in seconds.
    TimeLimit(f64),
}

/// Tells one task to stop. Clones tell the same one.
#[derive(Debug, Clone)]
pub(crate) struct Cancellation {
    /// Cancelled when it has to stop, by one of the reasons or a cold shutdown.
    pub(crate) now: CancellationToken,
    /// Cancelled before `now` when its message does not go back to the queue.
    pub(crate) for_good: CancellationToken,
    reason: Arc<OnceLock<CancelReason>>,
}

impl Cancellation {
    /// A task that also stops with `shutdown`.
    pub(crate) fn new(shutdown: &CancellationToken) -> Self {
        Self {
            now: shutdown.child_token(),
            for_good: CancellationToken::new(),
            reason: Arc::default(),
        }
    }

    /// Stops it, for good.
    pub(crate) fn stop(&self, reason: CancelReason) {
        // Once it stops, it stops for the first reason.
        if !self.now.is_cancelled() {
            let _ = self.reason.set(reason);
            self.for_good.cancel();
            self.now.cancel();
        }
    }

    /// Why it was stopped; `None` if it was not, or by a shutdown.
    pub(crate) fn reason(&self) -> Option<CancelReason> {
        self.reason.get().copied()
    }
}
