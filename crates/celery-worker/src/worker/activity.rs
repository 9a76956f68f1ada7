//! The log of what a worker does at a moment, on request (`USR1`).

use std::sync::Arc;

use tokio::sync::Notify;

use super::in_flight::Phase;
use super::runtime::Runtime;
use crate::clock;
use celery_protocol::repr;

/// Maximum number of tasks that are logged one by one.
const MOST: usize = 200;

/// Asks a worker to log its tasks: those that run with the time and the progress that they reported last, and those that
/// wait with what they wait for. Made by [`Worker::activity_log`](super::Worker::activity_log).
#[derive(Debug, Clone, Default)]
pub struct ActivityLog(Arc<Notify>);

impl ActivityLog {
    /// Requests the log lines; the worker writes them at once.
    pub fn request(&self) {
        self.0.notify_one();
    }

    /// Waits for the next request.
    pub(super) async fn requested(&self) {
        self.0.notified().await;
    }
}

/// Logs the tasks of a worker.
pub(super) fn log(runtime: &Runtime) {
    let tasks = runtime.in_flight.activities();
    let count = |wanted: fn(Phase) -> bool| tasks.iter().filter(|task| wanted(task.phase)).count();
    tracing::warn!(
        running = count(|phase| matches!(phase, Phase::Active(_))),
        reserved = count(|phase| phase == Phase::Reserved),
        scheduled = count(|phase| matches!(phase, Phase::Scheduled(_))),
        slots = runtime.slots.size(),
        stopping = runtime.shutdown.warm.is_cancelled(),
        "activity of the worker, as requested by a signal"
    );
    let now = clock::now();
    for activity in tasks.iter().take(MOST) {
        let seconds = |span: chrono::TimeDelta| span.as_seconds_f64();
        let message = &activity.request.message;
        let (task, task_id) = (repr::shorten(&message.task), repr::shorten(&message.id));
        match activity.phase {
            Phase::Active(since) => tracing::warn!(
                task,
                task_id,
                runtime_s = seconds(now - since),
                progress = activity.progress().map(|progress| progress.to_string()),
                "task runs"
            ),
            Phase::Reserved => {
                tracing::warn!(task, task_id, "task waits for a slot or for its rate limit")
            }
            Phase::Scheduled(eta) => tracing::warn!(
                task,
                task_id,
                remaining_s = seconds(eta - now),
                "task waits for its eta"
            ),
        }
    }
    if let Some(unlisted) = tasks.len().checked_sub(MOST).filter(|count| *count > 0) {
        tracing::warn!(unlisted, "further tasks wait and are not listed");
    }
}
