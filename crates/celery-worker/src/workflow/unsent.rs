//! Tasks that fail without being sent, because a task before them in a chain or chord has failed; and the errbacks of a
//! task that failed, sent or not.

use serde_json::Value;

use super::{Stopped, Workflow, WorkflowError};
use crate::clock;
use crate::offload::is_large;
use celery_protocol::canvas::{self, Call};
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{FinalState, ResultMeta, State};

/// A task that was not sent, and fails.
pub(super) struct UnsentTask {
    pub(super) message: TaskMessage,
    pub(super) state: State,
    /// Results of the tasks that were sent because of the failure.
    pub(super) children: Vec<Value>,
}

impl UnsentTask {
    pub(super) fn new(message: TaskMessage, state: State) -> Self {
        let children = Vec::new();
        Self {
            message,
            state,
            children,
        }
    }
}

impl Workflow {
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
            let ended = stored.and_then(|meta| FinalState::of(&meta));
            counts = !ended.is_some_and(FinalState::has_failed);
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

    /// Returns the steps of a chain after a failed one.
    pub(super) async fn failed_steps(&self, chain: &[Value]) -> Vec<TaskMessage> {
        let planning = || canvas::failed_steps(chain);
        self.large_work.work(is_large(chain), planning).await
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
}
