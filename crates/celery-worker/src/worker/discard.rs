//! Messages that end without a run of their task.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::Worker;
use super::accepted::Received;
use super::settlement::Requeue;
use super::task::Entry;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::Cause;

/// Reason why a message ends without a run of its task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discarded {
    /// The time until which it may begin (`expires`) has passed.
    Expired,
    /// The task was revoked through remote control, by its id or by a stamp. Such a request does not
    /// contain its sender.
    Revoked,
    /// Its arguments do not fit the task; Python's text for that.
    WrongArguments(String),
}

/// Action of a task when its message ends without a run.
pub(super) type Discard =
    Arc<dyn Fn(Arc<TaskMessage>, Discarded) -> BoxFuture<'static, ()> + Send + Sync>;

impl Worker {
    /// Runs the task's action before the message is acknowledged, without a time limit. A shutdown ends the
    /// wait, and the message then returns to its queue.
    pub(super) async fn discard(
        &self,
        received: &Received,
        entry: &Entry,
        cause: &Cause,
    ) -> Result<(), Requeue> {
        let Some(discard) = &entry.discard else {
            return Ok(());
        };
        let reason = match cause {
            Cause::Expired => Discarded::Expired,
            Cause::Revoked | Cause::Terminated => Discarded::Revoked,
        };
        let discarding = discard(received.message.clone(), reason);
        let done = self.shutdown.warm.run_until_cancelled(discarding).await;
        done.ok_or(Requeue)
    }
}
