//! Lists of the tasks in flight, for `celery inspect`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{InFlight, Phase};
use crate::publication::unix_seconds;
use crate::worker::request::Request;
use celery_protocol::message::TaskMessage;
use celery_protocol::{repr, weight};

/// Maximum size in bytes of a list of tasks in a reply.
const SHOWN_BYTES: usize = 4 << 20;

/// Size of a body, in bytes, above which its message is shown with shortened arguments.
const LONG_BODY: usize = 16 << 10;

/// Memory of a progress, in bytes, above which it is shortened.
const LONG_PROGRESS: usize = 4 << 10;

/// Approximate size of the description of a task without its arguments, in bytes.
const DESCRIPTION_BYTES: usize = 1 << 10;

/// A task in flight at a moment.
pub(crate) struct Snapshot {
    pub(crate) phase: Phase,
    pub(crate) request: Arc<Request>,
    acknowledged: bool,
    /// The progress that the task reported last.
    progress: Option<Arc<Value>>,
}

impl InFlight {
    /// All tasks: the running ones first, those that wait longest for their eta last.
    pub(crate) fn activities(&self) -> Vec<Snapshot> {
        let mut activities = self.snapshot(|_, _| true);
        activities.sort_by_key(|activity| match activity.phase {
            Phase::Active(since) => (0, since),
            Phase::Reserved => (1, chrono::DateTime::UNIX_EPOCH),
            Phase::Scheduled(eta) => (2, eta),
        });
        activities
    }

    /// The tasks that `wanted` selects, in the format of `celery inspect`, with their stage. Arguments are shown as
    /// Python prints them if `safe`, or if they are long. The list is limited by [`SHOWN_BYTES`].
    pub(crate) fn requests(
        &self,
        hostname: &str,
        safe: bool,
        wanted: impl Fn(Phase, &TaskMessage) -> bool,
    ) -> Vec<(Phase, Value)> {
        let mut room = SHOWN_BYTES;
        let mut shown = Vec::new();
        for task in self.snapshot(wanted) {
            let message = &task.request.message;
            let body = task.request.raw.body.len();
            let long = body > LONG_BODY;
            let names = message.id.len() + message.task.len() + message.display_name().len();
            let Some(left) = room.checked_sub(body.min(LONG_BODY) + names + DESCRIPTION_BYTES)
            else {
                tracing::warn!(
                    "remote control reply would be too long and does not list all tasks"
                );
                break;
            };
            room = left;
            shown.push((task.phase, task.request(hostname, safe || long)));
        }
        shown
    }

    /// The tasks that `wanted` selects. What is shown of them is made without the lock, which every message needs.
    fn snapshot(&self, wanted: impl Fn(Phase, &TaskMessage) -> bool) -> Vec<Snapshot> {
        let all = self.lock();
        let tasks = all.each();
        let wanted = tasks.filter(|task| wanted(task.phase, &task.request.message));
        let snapshots = wanted.map(|task| Snapshot {
            phase: task.phase,
            request: task.request.clone(),
            acknowledged: task.acknowledged,
            progress: task.progress.clone(),
        });
        snapshots.collect()
    }
}

impl Snapshot {
    /// The progress that the task reported last, as JSON. A long one is a text, and ends with `...`.
    pub(crate) fn progress(&self) -> Option<Value> {
        let progress = self.progress.as_deref()?;
        Some(match weight::exceeds([progress], LONG_PROGRESS) {
            true => repr::shortened(progress).into(),
            false => progress.clone(),
        })
    }

    fn request(&self, hostname: &str, safe: bool) -> Value {
        let started = match self.phase {
            Phase::Active(since) => Some(unix_seconds(since)),
            Phase::Scheduled(_) | Phase::Reserved => None,
        };
        let Request {
            message,
            raw,
            exchange,
            routing_key,
            redelivered,
            ..
        } = &*self.request;
        let value_or_repr = |value: &Value, repr: &Option<String>| match safe {
            true => {
                let shown = repr.as_deref().map(repr::shorten);
                json!(shown.unwrap_or_else(|| repr::shortened(value)))
            }
            false => value.clone(),
        };
        let mut shown = json!({
            "id": message.id,
            "name": message.display_name(),
            "args": value_or_repr(&message.args, &message.argsrepr),
            "kwargs": value_or_repr(&message.kwargs, &message.kwargsrepr),
            "type": message.task,
            "hostname": hostname,
            "time_start": started,
            "acknowledged": self.acknowledged,
            "delivery_info": {
                "exchange": exchange,
                "routing_key": routing_key,
                "priority": raw.properties.priority,
                "redelivered": redelivered,
            },
            "worker_pid": started.map(|_| std::process::id()),
        });
        // Python has no such field.
        if let Some(progress) = self.progress() {
            shown["progress"] = progress;
        }
        shown
    }
}
