//! The tasks that every Celery worker has: those that a result backend needs.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::SETTLED_WITHIN;
use super::canvas::{Canvas, Stopped, Unlock};
use super::task::{Attributes, Control, Failure, Registry, Retry, When};
use crate::results::ResultBackend;
use celery_protocol::arguments::{Parameter, Signature};
use celery_protocol::canvas::ResultNode;
use celery_protocol::exception::{BUILTINS, Exception};
use service_connection::error_chain::chain;

/// Watches the header of a chord, for backends that do not count.
const CHORD_UNLOCK: &str = "celery.chord_unlock";

/// Deletes results that are too old. Sent by `celery beat`, daily.
const BACKEND_CLEANUP: &str = "celery.backend_cleanup";

/// After the run: a chord must not be forgotten because a worker dies.
const LATE: Attributes = Attributes {
    acks_late: Some(true),
    ignore_result: Some(true),
    ..Attributes::NONE
};

/// Registers them. Whoever has registered a task of such a name keeps it.
pub(super) fn register(
    registry: &mut Registry,
    canvas: &Arc<Canvas>,
    results: &Arc<dyn ResultBackend>,
    retry_interval: Duration,
) {
    const UNLOCK: Signature = Signature {
        function: "unlock_chord",
        parameters: &[
            Parameter::required("group_id"),
            Parameter::required("callback"),
            Parameter::optional("interval"),
            Parameter::optional("max_retries"),
            Parameter::optional("result"),
            Parameter::optional("_chord_unlock_exchange_type"),
        ],
        bound: true,
    };
    const CLEANUP: Signature = Signature {
        function: "backend_cleanup",
        parameters: &[],
        bound: false,
    };
    let canvas = canvas.clone();
    let unlock = move |arguments, control: Control| {
        let shutting_down = control.shutting_down.clone();
        let unlocking = unlock_chord(canvas.clone(), arguments, control, retry_interval);
        until_shutdown(unlocking, shutting_down)
    };
    let results = results.clone();
    let cleanup = move |(): (), _: Control| cleanup(results.clone());
    // The only error is that the name is taken.
    let _ = registry.function(CHORD_UNLOCK, UNLOCK, LATE, unlock);
    let _ = registry.function(BACKEND_CLEANUP, CLEANUP, Attributes::NONE, cleanup);
}

/// Runs a task that only waits for servers. A shutdown ends it in the same way as the follow-up tasks of a task.
async fn until_shutdown(
    work: impl Future<Output = Result<(), Failure>>,
    shutting_down: CancellationToken,
) -> Result<(), Failure> {
    let over = async {
        shutting_down.cancelled().await;
        sleep(SETTLED_WITHIN).await;
    };
    tokio::select! {
        done = work => done,
        () = over => Err(Failure::Interrupted),
    }
}

type UnlockArguments = (
    String,
    Value,
    Option<f64>,
    Option<u32>,
    Option<Vec<Value>>,
    Value,
);

async fn unlock_chord(
    canvas: Arc<Canvas>,
    (group_id, body, interval, max_retries, result, _): UnlockArguments,
    control: Control,
    retry_interval: Duration,
) -> Result<(), Failure> {
    let members = result.unwrap_or_default();
    let members = members.iter().map(ResultNode::parse);
    let header =
        ResultNode {
            members: Some(members.collect::<Option<_>>().ok_or_else(|| {
                Exception::new(BUILTINS, "ValueError", "result: no list of results")
            })?),
            id: group_id,
            parent: None,
        };
    let request = &control.request;
    match canvas.unlock(request, &header, &body).await {
        Ok(Unlock::Done) => return Ok(()),
        Ok(Unlock::NotReady) => {}
        Err(Stopped) => return Err(Failure::Interrupted),
    }
    let max_retries = max_retries.unwrap_or(u32::MAX);
    if request.retries >= max_retries {
        // Nobody will look any more, and the body would be awaited for ever.
        let error = Exception::max_retries_exceeded(request);
        return match canvas.give_up(request, &body, &error).await {
            Ok(()) => Err(error.into()),
            Err(Stopped) => Err(Failure::Interrupted),
        };
    }
    let interval = interval
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .unwrap_or(retry_interval);
    Err(Failure::Retry(Box::new(Retry {
        when: Some(When::In(interval)),
        max_retries: Some(max_retries),
        ..Retry::default()
    })))
}

async fn cleanup(results: Arc<dyn ResultBackend>) -> Result<(), Failure> {
    match results.cleanup().await {
        Ok(deleted) => {
            tracing::info!(deleted, "results that were too old are deleted");
            Ok(())
        }
        Err(error) => {
            Err(Exception::new(BUILTINS, "RuntimeError", chain(&error).to_string()).into())
        }
    }
}
