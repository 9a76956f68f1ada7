//! The end of a task that does not run: it is revoked, it has expired, or it has succeeded before.

use serde_json::Value;

use super::conclusion::Conclusion;
use super::processing::TaskProcessing;
use super::runtime::Runtime;
use crate::broker::Disposition;
use crate::clock;
use crate::task::Discarded;
use crate::workflow::Stopped;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{Cause, State};

impl Runtime {
    /// Reason why a task must not run, if any.
    pub(super) fn skip_reason(&self, message: &TaskMessage) -> Option<Cause> {
        let is_expired = message
            .expires
            .is_some_and(|expires| expires <= clock::now());
        match is_expired {
            true => Some(Cause::Expired),
            false => self.revoked.revokes(message).then_some(Cause::Revoked),
        }
    }
}

impl TaskProcessing<'_> {
    /// Ends a task that must not run; returns the disposition of its message.
    pub(super) async fn skip(&self, cause: Cause) -> Disposition {
        tracing::info!(
            task_id = self.request.message.id,
            ?cause,
            "task was revoked or has expired; it does not run"
        );
        let ended = async {
            self.discard(&cause).await?;
            let conclusion = Conclusion::without_run(self);
            conclusion.record(State::Revoked(cause)).await
        };
        match ended.await {
            Ok(()) => Disposition::Ack,
            Err(stopped) => stopped.into(),
        }
    }

    /// Runs the task's action for a discarded message before it is acknowledged, without a time limit. A shutdown ends
    /// the wait.
    async fn discard(&self, cause: &Cause) -> Result<(), Stopped> {
        let reason = match cause {
            Cause::Expired => Discarded::Expired,
            Cause::Revoked | Cause::Terminated => Discarded::Revoked,
        };
        let discarding = (self.entry.discard)(self.request.message.clone(), reason);
        let warm = &self.runtime.shutdown.warm;
        warm.run_until_cancelled(discarding).await.ok_or(Stopped)
    }

    /// Ends a redelivered task that had succeeded before with the result `returned`; returns the disposition of its
    /// message.
    pub(super) async fn skip_succeeded(&self, returned: Value) -> Disposition {
        let message = &self.request.message;
        tracing::info!(
            task_id = message.id,
            "redelivered task had succeeded before; it does not run"
        );
        // The follow-up tasks were sent before this result was stored, but the task may not have been counted for its
        // chord.
        let state = State::Success(returned);
        match self.runtime.workflow.returned(message, &state).await {
            Ok(()) => Disposition::Ack,
            Err(stopped) => stopped.into(),
        }
    }
}
