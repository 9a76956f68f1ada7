//! Requests that revoke and terminate tasks.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{RemoteControl, ids, is_true, shortened};
use crate::clock;
use crate::worker::bounded_queue::{BoundedQueue, Queued};
use crate::worker::revocation;
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::message::TaskMessage;
use celery_protocol::pidbox::ControlRequest;
use celery_protocol::repr;
use celery_protocol::result::{Cause, ResultMeta, State};
use service_connection::error_chain::chain;

/// Maximum number of requests whose REVOKED waits to be stored, and the bytes of their ids.
const QUEUE: usize = 1000;
const QUEUE_BYTES: usize = 4 << 20;

/// Time limit for storing the state of one task in the result backend.
const WITHIN: Duration = Duration::from_secs(5);

/// Number of tasks whose REVOKED is stored at the same time.
const AT_ONCE: usize = 8;

/// Maximum number of ids in a reply or a log line.
const SHOWN: usize = 100;
const LOGGED: usize = 10;

/// Ids for which REVOKED must be stored.
pub(super) type Revocations = BoundedQueue<Vec<String>>;

/// A line for revocations, and its other end for [`store`].
pub(super) fn line() -> (Revocations, mpsc::Receiver<Queued<Vec<String>>>) {
    BoundedQueue::new(QUEUE, QUEUE_BYTES)
}

/// Stores REVOKED at once for tasks that have not begun anywhere, so that their callers need not wait until
/// the messages come. Beside the remote control, which does not wait for the result backend.
pub(super) async fn store(
    control: Arc<RemoteControl>,
    mut line: mpsc::Receiver<Queued<Vec<String>>>,
) {
    while let Some(Queued { item: ids, .. }) = line.recv().await {
        let asked = ids.len();
        let mut storing = stream::iter(ids)
            .map(|id| control.store_revoked(id))
            .buffer_unordered(AT_ONCE);
        let mut stored = 0;
        while let Some(outcome) = storing.next().await {
            match outcome {
                Ok(()) => stored += 1,
                // The others would fail in the same way, after the same time.
                Err(error) => {
                    tracing::warn!(
                        tasks = asked - stored,
                        error,
                        "REVOKED was not stored; it will be stored when the messages of the tasks arrive"
                    );
                    break;
                }
            }
        }
    }
}

impl RemoteControl {
    /// `revoke`, and `terminate`, which is the same with `terminate=True`.
    pub(super) fn revoke(&self, request: &ControlRequest) -> Result<Value, Exception> {
        let ids = ids(request.argument("task_id"));
        check_signal(request)?;
        let terminate = request.method == "terminate" || is_true(request.argument("terminate"));
        tracing::warn!(
            tasks = ids.len(),
            ids = listed(&ids, LOGGED),
            terminate,
            "tasks revoked by remote control"
        );
        self.worker.revoked.add(ids.iter().cloned());
        self.announce_revoked(&ids);
        if terminate {
            let wanted: HashSet<&str> = ids.iter().map(String::as_str).collect();
            let is_wanted = |message: &TaskMessage| wanted.contains(message.id.as_str());
            self.worker.in_flight.terminate(is_wanted);
            // The waiting tasks, too, which will not run.
            return Ok(match self.worker.in_flight.ids(is_wanted).as_slice() {
                [] => json!({"ok": "terminate: tasks unknown"}),
                ids => json!({"ok": format!("terminate: {}", listed(ids, SHOWN))}),
            });
        }
        let quoted: Vec<String> = ids.iter().map(|id| format!("'{id}'")).collect();
        let shown = match quoted.as_slice() {
            [] => "set()".to_owned(),
            quoted => format!("{{{}}}", listed(quoted, SHOWN)),
        };
        Ok(json!({"ok": format!("tasks {shown} flagged as revoked")}))
    }

    /// Queues the storage of REVOKED for those of the tasks that do not run here.
    fn announce_revoked(&self, ids: &[String]) {
        let running = self.worker.in_flight.running();
        let others: Vec<String> = ids
            .iter()
            .filter(|id| !running.contains(*id))
            .cloned()
            .collect();
        let (tasks, bytes) = (others.len(), others.iter().map(String::len).sum());
        if tasks > 0 && !self.revocations.put(others, bytes) {
            tracing::warn!(
                tasks,
                error = "too many are revoked at once",
                "REVOKED was not stored; it will be stored when the messages of the tasks arrive"
            );
        }
    }

    async fn store_revoked(&self, id: String) -> Result<(), String> {
        let storing = async {
            let stored = self.worker.results.get(&id).await?;
            let begun = stored.is_some_and(|stored| {
                let status = stored["status"].as_str().unwrap_or_default();
                !matches!(status, "PENDING" | "RECEIVED" | "RETRY" | "REJECTED")
            });
            if begun {
                return Ok(());
            }
            let message = TaskMessage {
                id: id.clone(),
                ..TaskMessage::default()
            };
            let meta = ResultMeta::new(&message, State::Revoked(Cause::Revoked), clock::now());
            self.worker.results.store(&meta, &message).await
        };
        match timeout(WITHIN, storing).await {
            Ok(stored) => stored.map_err(|error| chain(&error).to_string()),
            Err(_) => Err("no answer in time".into()),
        }
    }

    pub(super) fn revoke_by_stamped_headers(
        &self,
        request: &ControlRequest,
    ) -> Result<Value, Exception> {
        let headers: Map<String, Value> = match request.argument("headers") {
            Value::Object(headers) => headers.clone(),
            // `celery control` sends the text of its arguments: `name=value`, …
            Value::Array(pairs) => pairs
                .iter()
                .filter_map(|pair| pair.as_str()?.split_once('='))
                .map(|(name, value)| (name.to_owned(), json!(value)))
                .collect(),
            _ => return Err(Exception::value_error("headers is not a mapping")),
        };
        check_signal(request)?;
        let shown = shortened(&repr::value(&Value::Object(headers.clone())));
        tracing::warn!(headers = shown, "tasks revoked by stamped headers");
        self.worker.revoked.add_stamps(&headers);
        if !is_true(request.argument("terminate")) {
            let text = format!("headers {shown} flagged as revoked, but not terminated");
            return Ok(json!({ "ok": text }));
        }
        let stamps = revocation::Stamps::of(&headers);
        let stopped = self
            .worker
            .in_flight
            .terminate(|message| stamps.are_on(message));
        Ok(json!({"ok": match stopped.len() {
            0 => format!("headers {shown} were not terminated"),
            _ => format!("headers {shown} revoked"),
        }}))
    }
}

/// Checks the signal of a request; it has no further effect.
///
/// # Errors
/// Those of Python, where they come after the tasks were flagged as revoked.
fn check_signal(request: &ControlRequest) -> Result<(), Exception> {
    match request.argument("signal") {
        signal if !is_true(signal) => Ok(()),
        Value::Number(_) | Value::Bool(_) => Ok(()),
        // As `str.isupper`.
        Value::String(name)
            if name.chars().any(char::is_uppercase) && !name.chars().any(char::is_lowercase) =>
        {
            let name = match name.starts_with("SIG") {
                true => name.clone(),
                false => format!("SIG{name}"),
            };
            match name.parse::<Signal>() {
                Ok(_) => Ok(()),
                Err(_) => {
                    let text = format!("module 'signal' has no attribute '{}'", shortened(&name));
                    Err(Exception::new(BUILTINS, "AttributeError", text))
                }
            }
        }
        _ => Err(Exception::type_error(
            "signal name must be uppercase string.",
        )),
    }
}

/// Joins texts by commas, up to a maximum number.
fn listed(texts: &[String], most: usize) -> String {
    let mut shown = texts
        .iter()
        .take(most)
        .map(|text| shortened(text))
        .collect::<Vec<_>>()
        .join(", ");
    if texts.len() > most {
        shown.push_str(&format!(", … and {} more", texts.len() - most));
    }
    shown
}
