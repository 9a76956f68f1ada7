//! Follow-up tasks of a task that succeeds: its callbacks and the next step of its chain.

use serde_json::Value;

use super::{Workflow, WorkflowError};
use crate::offload::is_large;
use celery_protocol::canvas;
use celery_protocol::message::TaskMessage;

impl Workflow {
    /// Sends the follow-up tasks of a task that succeeded, before its SUCCESS is stored: the callbacks and the next
    /// step of its chain. Returns their results, which are the task's children.
    ///
    /// # Errors
    /// [`WorkflowError`]: the task fails, or its message is requeued if the worker stops.
    pub(crate) async fn succeeded(
        &self,
        message: &TaskMessage,
        returned: &Value,
    ) -> Result<Vec<Value>, WorkflowError> {
        let embed = &message.embed;
        if embed.callbacks.is_empty() && embed.chain.as_ref().is_none_or(Vec::is_empty) {
            return Ok(Vec::new());
        }
        let call = self.call(message, "link");
        let rest = embed.chain.iter().flatten();
        let values = embed.callbacks.iter().chain(rest).chain([returned]);
        let planning = || canvas::after_success(message, returned, &call);
        let plan = self.large_work.work(is_large(values), planning).await?;
        // Boxed, here and below: most tasks have no follow-up tasks, and their futures need no memory for it.
        Box::pin(self.carry_out(plan, &message.id)).await
    }
}
