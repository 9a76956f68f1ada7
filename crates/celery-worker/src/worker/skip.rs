//! The end of a task that does not run: it is revoked, it has expired, or it has succeeded before.

use tokio_util::sync::CancellationToken;

use super::conclusion::Conclusion;
use super::processing::TaskProcessing;
use super::schedule::StoredSuccess;
use crate::broker::Disposition;
use crate::task::Discarded;
use crate::workflow::{Stopped, WorkflowError};
use celery_protocol::result::{Cause, State};

impl TaskProcessing<'_> {
    /// Ends a task that must not run; returns the disposition of its message.
    pub(super) async fn skip(&self, cause: Cause) -> Disposition {
        tracing::info!(
            task_id = self.request.message.id,
            ?cause,
            "task was revoked or has expired; it does not run"
        );
        if cause == Cause::Expired {
            // As in Python: it is listed as revoked, and new workers get it.
            let id = self.request.message.id.clone();
            self.runtime.revoked.add([id]);
        }
        let ended = async {
            let reason = match cause {
                Cause::Expired => Discarded::Expired,
                Cause::Revoked | Cause::Terminated => Discarded::Revoked,
            };
            // A warm shutdown ends the wait: no task has begun.
            self.discard(reason, &self.runtime.shutdown.warm).await?;
            let conclusion = Conclusion::without_run(self);
            conclusion.record(State::Revoked(cause)).await
        };
        match ended.await {
            Ok(()) => Disposition::Ack,
            Err(Stopped) => Disposition::Requeue,
        }
    }

    /// Runs the task's action for a message that ends without a run, without a time limit. `stop` ends the wait.
    pub(super) async fn discard(
        &self,
        reason: Discarded,
        stop: &CancellationToken,
    ) -> Result<(), Stopped> {
        let discarding = (self.registered.discard)(self.request.message.clone(), reason);
        stop.run_until_cancelled(discarding).await.ok_or(Stopped)
    }

    /// Ends a redelivered task that had succeeded before; returns the disposition of its message.
    pub(super) async fn skip_succeeded(&self, before: StoredSuccess) -> Disposition {
        let message = &self.request.message;
        tracing::info!(
            task_id = message.id,
            "redelivered task had succeeded before; it does not run"
        );
        match self.follow_up(before).await {
            Ok(()) => Disposition::Ack,
            Err(Stopped) => Disposition::Requeue,
        }
    }

    /// Sends the follow-up tasks of an earlier success. This worker sends them before it stores the result, with their
    /// results as its children. A result without children was stored in another way, for example by the task itself.
    async fn follow_up(&self, before: StoredSuccess) -> Result<(), Stopped> {
        let message = &self.request.message;
        let workflow = &self.runtime.workflow;
        if !before.has_children {
            match workflow.succeeded(message, &before.returned).await {
                Ok(_) => {}
                Err(WorkflowError::Stopped) => return Err(Stopped),
                Err(error) => tracing::error!(
                    task = message.task,
                    task_id = message.id,
                    %error,
                    "follow-up messages of a task that had succeeded before cannot be sent"
                ),
            }
        }
        // The earlier run may not have been counted for its chord.
        let state = State::Success(before.returned);
        workflow.ended(message, &state).await
    }
}
