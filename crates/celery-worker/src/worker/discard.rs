//! The end of a task that is expired or revoked before its run: it is concluded without an execution.

use super::execution::Execution;
use super::runtime::Runtime;
use crate::broker::Disposition;
use crate::clock;
use crate::task::Discarded;
use crate::workflow::Stopped;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{Cause, State};

impl Runtime {
    /// Reason why a task must not start, if any.
    pub(super) fn unwanted(&self, message: &TaskMessage) -> Option<Cause> {
        let expired = message
            .expires
            .is_some_and(|expires| expires <= clock::now());
        let cause = match expired {
            true => Cause::Expired,
            false if self.revoked.revokes(message) => Cause::Revoked,
            false => return None,
        };
        tracing::info!(
            task_id = message.id,
            ?cause,
            "task was revoked or has expired; it does not run"
        );
        Some(cause)
    }
}

impl Execution<'_> {
    /// Ends a message whose task must not start.
    pub(super) async fn end_without_run(&self, cause: Cause) -> Disposition {
        match self.discard(&cause).await {
            Ok(()) => self.record(State::Revoked(cause)).await,
            Err(Stopped) => Disposition::Requeue,
        }
    }

    /// Runs the task's action for a discarded message before it is acknowledged, without a time limit. A shutdown ends
    /// the wait, and the message is then requeued.
    async fn discard(&self, cause: &Cause) -> Result<(), Stopped> {
        let reason = match cause {
            Cause::Expired => Discarded::Expired,
            Cause::Revoked | Cause::Terminated => Discarded::Revoked,
        };
        let discarding = (self.entry.discard)(self.request.message.clone(), reason);
        let warm = &self.runtime.shutdown.warm;
        warm.run_until_cancelled(discarding).await.ok_or(Stopped)
    }
}
