//! States of tasks in the result backend, for all steps that store one.

use crate::clock;
use serde_json::Value;

use super::request::Request;
use super::runtime::Runtime;
use crate::workflow::{STORE_PAUSES, Stopped};
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{Extended, ResultMeta, State};
use service_connection::backoff::RetryLoop;
use service_connection::error_chain::chain;

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

    /// Stores a final state, for as long as it takes: until then the message is not acknowledged.
    /// A shutdown ends the wait, a warm one after [`super::SETTLED_WITHIN`]. The message then returns to its
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
        let stored = self.stopping.run_until_cancelled(storing).await;
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
