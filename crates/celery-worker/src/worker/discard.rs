//! Messages that end without a run of their task.

use super::Worker;
use super::accepted::Received;
use super::settlement::Requeue;
use crate::task::{Discarded, Entry};
use celery_protocol::result::Cause;

impl Worker {
    /// Runs the task's action before the message is acknowledged, without a time limit. A shutdown ends the
    /// wait, and the message then returns to its queue.
    pub(super) async fn discard(
        &self,
        received: &Received,
        entry: &Entry,
        cause: &Cause,
    ) -> Result<(), Requeue> {
        let reason = match cause {
            Cause::Expired => Discarded::Expired,
            Cause::Revoked | Cause::Terminated => Discarded::Revoked,
        };
        let discarding = (entry.discard)(received.message.clone(), reason);
        let done = self.shutdown.warm.run_until_cancelled(discarding).await;
        done.ok_or(Requeue)
    }
}
