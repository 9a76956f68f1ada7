//! States of tasks in the result backend, for all steps that store one.

use std::time::Duration;

use serde_json::Value;

use super::request::Request;
use super::runtime::Runtime;
use crate::clock;
use crate::workflow::{STORE_PAUSES, Stopped};
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{Extended, ResultMeta, State};
use service_connection::backoff::RetryLoop;
use service_connection::error_chain::chain;

/// Time limit for storing a state that is only informative: STARTED, PROGRESS or one of the task's own.
const STATE_TIMEOUT: Duration = Duration::from_secs(5);

impl Runtime {
    /// The result mapping of a state.
    pub(super) fn meta(&self, request: &Request, state: State, children: Vec<Value>) -> ResultMeta {
        let mut meta = ResultMeta::new(&request.message, state, clock::now());
        meta.children = children;
        meta.extended = self.config.result_extended.then(|| self.extended(request));
        meta
    }

    fn extended(&self, request: &Request) -> Extended {
        let message = &request.message;
        Extended {
            name: message.task.clone(),
            args: message.args.clone(),
            kwargs: message.kwargs.clone(),
            worker: self.hostname.to_string(),
            retries: message.retries,
            queue: Some(request.routing_key.clone()),
            stamps: message.stamps(),
        }
    }

    /// Stores an informative state: the task continues even if it cannot be stored.
    pub(super) async fn store_state(&self, request: &Request, state: State, sent: Vec<Value>) {
        let message = &request.message;
        let meta = self.meta(request, state, sent);
        let error =
            match tokio::time::timeout(STATE_TIMEOUT, self.results.store(&meta, message)).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => chain(&error).to_string(),
                Err(_) => "no answer in time".into(),
            };
        tracing::warn!(
            task_id = message.id,
            state = meta.state.name(),
            error,
            "state was not stored"
        );
    }

    /// Stores a final state, for as long as it takes: until then the message is not acknowledged.
    /// A shutdown ends the wait [`super::SETTLED_WITHIN`] after the last running task. The message then returns to its
    /// queue, and the next run of the task finds its work done.
    pub(super) async fn store(
        &self,
        message: &TaskMessage,
        meta: &ResultMeta,
    ) -> Result<(), Stopped> {
        let storing = RetryLoop::new(STORE_PAUSES).run(
            || async { fault_point!(ResultStored, self.results.store(meta, message).await) },
            |error| !error.is_hopeless(),
            |error, retry_in_s| {
                tracing::warn!(
                    task_id = message.id,
                    error = %chain(error),
                    retry_in_s,
                    "result was not stored; retrying, the message stays unacknowledged"
                );
            },
        );
        let stored = self.settling_over.run_until_cancelled(storing).await;
        if let Err(error) = stored.ok_or(Stopped)? {
            tracing::error!(
                task_id = message.id,
                error = %chain(&error),
                "result cannot be stored and is lost; a retry would not help"
            );
        }
        Ok(())
    }
}
