//! Follow-up tasks of a task: its callbacks, its errbacks and the rest of its chain.

use serde_json::Value;

use super::chord::has_failed;
use super::{Stopped, UnsentTask, Workflow, WorkflowError};
use crate::clock;
use crate::offload::is_large;
use celery_protocol::canvas::{self, Call};
use celery_protocol::exception::Exception;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{ResultMeta, State};

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

    /// Handles the failure of a task after its FAILURE is stored: stores the failure for the rest of its chain, and
    /// sends its errbacks.
    ///
    /// # Errors
    /// The worker stops.
    pub(crate) async fn failed(
        &self,
        message: &TaskMessage,
        exception: &Exception,
        traceback: Option<&str>,
    ) -> Result<(), Stopped> {
        if let Some(rest) = &message.embed.chain {
            let state = State::Failure {
                exception: exception.clone(),
                traceback: traceback.map(str::to_owned),
            };
            let mut parts = Vec::new();
            for step in self.failed_steps(rest).await {
                parts.extend(self.fail(UnsentTask::new(step, state.clone())).await?);
            }
            self.count(parts).await?;
        }
        self.send_errbacks(
            &message.id,
            &message.embed.errbacks,
            &self.call(message, "link_error"),
        )
        .await?;
        Ok(())
    }

    /// Sends the errbacks of a task, and returns their results. If that fails, the error is only logged; the task stays
    /// failed.
    pub(super) async fn send_errbacks(
        &self,
        task_id: &str,
        errbacks: &[Value],
        call: &Call<'_>,
    ) -> Result<Vec<Value>, Stopped> {
        let planning = || canvas::after_failure(task_id, errbacks, call);
        let sent = match self.large_work.work(is_large(errbacks), planning).await {
            Ok(plan) => self.carry_out(plan, task_id).await,
            Err(error) => Err(error.into()),
        };
        match sent {
            Ok(sent) => Ok(sent),
            Err(WorkflowError::Stopped) => Err(Stopped),
            Err(error) => {
                tracing::error!(task_id, %error, "errbacks of a failed task were not sent");
                Ok(Vec::new())
            }
        }
    }

    pub(super) async fn failed_steps(&self, chain: &[Value]) -> Vec<TaskMessage> {
        let planning = || canvas::failed_steps(chain);
        self.large_work.work(is_large(chain), planning).await
    }

    /// Stores the failure of a task that was not sent. Returns the task if it must be counted: it is a part of a chord
    /// and had not failed before.
    pub(super) async fn fail(&self, unsent: UnsentTask) -> Result<Option<UnsentTask>, Stopped> {
        let UnsentTask {
            message,
            state,
            children,
        } = &unsent;
        let mut counts = message.embed.chord.is_some();
        if counts {
            let get = || self.results.get(&message.id);
            let stored = self
                .retry_until_reachable(&message.id, "a result is not read", get)
                .await?
                .flatten();
            counts = !stored.is_some_and(|meta| has_failed(&meta));
        }
        if message.ignore_result != Some(true) {
            let mut meta = ResultMeta::new(message, state.clone(), clock::now());
            meta.children.clone_from(children);
            let store = || self.results.store(&meta, message);
            self.retry_until_reachable(&message.id, "a result is not stored", store)
                .await?;
        }
        Ok(counts.then_some(unsent))
    }
}
