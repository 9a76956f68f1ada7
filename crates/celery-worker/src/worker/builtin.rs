//! The tasks that every Celery worker has, because the result backends need them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{SETTLED_WITHIN, canvas_tasks};
use crate::results::ResultBackend;
use crate::task::{Registry, Task, TaskArgs, TaskContext, TaskError, TaskOptions, TaskResult};
use crate::workflow::chord::Unlock;
use crate::workflow::{Stopped, Workflow};
use celery_protocol::canvas::ResultNode;
use celery_protocol::exception::Exception;

/// Registers the tasks. A task of the program with such a name takes precedence.
pub(super) fn register(
    registry: &mut Registry,
    workflow: &Arc<Workflow>,
    results: &Arc<dyn ResultBackend>,
    retry_interval: Duration,
) {
    // The only possible error is that the name is registered already.
    let _ = registry.register(UnlockChord {
        workflow: workflow.clone(),
        retry_interval,
    });
    let _ = registry.register(accumulate);
    canvas_tasks::register(registry);
    let _ = registry.register(BackendCleanup {
        results: results.clone(),
    });
}

/// Polls the header of a chord, for backends that do not count its parts.
struct UnlockChord {
    workflow: Arc<Workflow>,
    retry_interval: Duration,
}

#[derive(TaskArgs)]
struct UnlockArguments {
    group_id: String,
    callback: Value,
    interval: Option<f64>,
    max_retries: Option<u32>,
    result: Option<Vec<Value>>,
    _chord_unlock_exchange_type: Option<Value>,
}

impl Task for UnlockChord {
    const NAME: &'static str = "celery.chord_unlock";
    const FUNCTION: &'static str = "unlock_chord";
    const BIND: bool = true;
    // Acknowledged after the run: a chord must not be lost when a worker dies.
    const OPTIONS: TaskOptions = TaskOptions::DEFAULT.acks_late(true).ignore_result(true);
    type Args = UnlockArguments;
    type Output = ();

    async fn run(&self, arguments: UnlockArguments, cx: TaskContext) -> TaskResult<()> {
        let shutting_down = cx.shutting_down().clone();
        let unlocking = unlock_chord(&self.workflow, arguments, &cx, self.retry_interval);
        until_shutdown(unlocking, shutting_down).await
    }
}

/// Returns its arguments, or one of them. It is the body of the chord that a group becomes when the group replaces a
/// task.
#[celery_worker_macros::task(name = "celery.accumulate", bind)]
async fn accumulate(#[args] args: Vec<Value>, index: Option<usize>) -> TaskResult<Value> {
    match index {
        None => Ok(args.into()),
        Some(index) => {
            let found = args.into_iter().nth(index);
            let error = || Exception::builtin("IndexError", "tuple index out of range");
            Ok(found.ok_or_else(error)?)
        }
    }
}

/// Deletes expired results. `celery beat` sends this task daily.
struct BackendCleanup {
    results: Arc<dyn ResultBackend>,
}

impl Task for BackendCleanup {
    const NAME: &'static str = "celery.backend_cleanup";
    type Args = ();
    type Output = ();

    async fn run(&self, (): (), _cx: TaskContext) -> TaskResult<()> {
        let deleted = self.results.cleanup().await?;
        tracing::info!(deleted, "expired results deleted");
        Ok(())
    }
}

/// Runs a task that only waits for servers. A shutdown ends it after the same time as the follow-up tasks of a task.
async fn until_shutdown(
    work: impl Future<Output = TaskResult<()>>,
    shutting_down: CancellationToken,
) -> TaskResult<()> {
    let over = async {
        shutting_down.cancelled().await;
        sleep(SETTLED_WITHIN).await;
    };
    tokio::select! {
        done = work => done,
        () = over => Err(TaskError::Stopped),
    }
}

async fn unlock_chord(
    workflow: &Workflow,
    arguments: UnlockArguments,
    cx: &TaskContext,
    retry_interval: Duration,
) -> TaskResult<()> {
    let UnlockArguments {
        group_id,
        callback: body,
        interval,
        max_retries,
        result,
        ..
    } = arguments;
    let members = result.unwrap_or_default();
    let members = members.iter().map(ResultNode::parse);
    let header = ResultNode {
        members: Some(
            members
                .collect::<Option<_>>()
                .ok_or_else(|| Exception::value_error("result: not a list of results"))?,
        ),
        id: group_id,
        parent: None,
    };
    let request = cx.request();
    match workflow.unlock(request, &header, &body).await {
        Ok(Unlock::Done) => return Ok(()),
        Ok(Unlock::NotReady) => {}
        Err(Stopped) => return Err(TaskError::Stopped),
    }
    let max_retries = max_retries.unwrap_or(u32::MAX);
    if request.retries >= max_retries {
        // No further poll follows, and clients would wait for the body forever.
        let error = Exception::max_retries_exceeded(request);
        return match workflow.fail_unpolled_chord(request, &body, &error).await {
            Ok(()) => Err(error.into()),
            Err(Stopped) => Err(TaskError::Stopped),
        };
    }
    let interval = interval
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .unwrap_or(retry_interval);
    Err(cx
        .retry()
        .countdown(interval)
        .max_retries(max_retries)
        .into())
}
