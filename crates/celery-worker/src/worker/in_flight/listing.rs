//! Lists of the tasks in flight, for `celery inspect`.

use serde_json::{Value, json};

use super::{InFlight, InFlightTask, Phase};
use crate::publication::unix_seconds;
use crate::worker::request::Request;
use celery_protocol::message::TaskMessage;
use celery_protocol::repr;

/// Maximum size in bytes of a list of tasks in a reply.
const SHOWN_BYTES: usize = 4 << 20;

/// Size of a body, in bytes, above which its message is shown with shortened arguments.
const LONG_BODY: usize = 16 << 10;

/// Approximate size of the description of a task without its arguments, in bytes.
const DESCRIPTION_BYTES: usize = 512;

/// A task in flight, for the log.
pub(crate) struct Activity {
    pub(crate) phase: Phase,
    pub(crate) name: String,
    pub(crate) id: String,
    /// The progress that the task reported last, as JSON.
    pub(crate) progress: Option<String>,
}

impl InFlight {
    /// All tasks: the running ones first, those that wait longest for their eta last.
    pub(crate) fn activities(&self) -> Vec<Activity> {
        let tasks = self.lock();
        let activity = |task: &InFlightTask| Activity {
            phase: task.phase,
            name: task.request.message.task.clone(),
            id: task.request.message.id.clone(),
            progress: task.progress.as_ref().map(Value::to_string),
        };
        let mut activities: Vec<_> = tasks.tasks.values().map(activity).collect();
        drop(tasks);
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
        for task in self.lock().tasks.values() {
            if !wanted(task.phase, &task.request.message) {
                continue;
            }
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
}

impl InFlightTask {
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
        if let Some(progress) = &self.progress {
            shown["progress"] = progress.clone();
        }
        shown
    }
}
