//! Messages that are settled without a run of their task.

use super::execution::Execution;
use super::settlement::Requeue;
use crate::task::Discarded;
use celery_protocol::result::Cause;

impl Execution<'_> {
    /// Runs the task's action for a discarded message before it is acknowledged, without a time limit. A shutdown ends
    /// the wait, and the message is then requeued.
    pub(super) async fn discard(&self, cause: &Cause) -> Result<(), Requeue> {
        let reason = match cause {
            Cause::Expired => Discarded::Expired,
            Cause::Revoked | Cause::Terminated => Discarded::Revoked,
        };
        let discarding = (self.entry.discard)(self.request.message.clone(), reason);
        let warm = &self.runtime.shutdown.warm;
        warm.run_until_cancelled(discarding).await.ok_or(Requeue)
    }
}
