//! Events that a worker sends to monitors such as Flower.

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::exception::Exception;
use super::headers::Headers;
use super::message::TaskMessage;
use super::repr;
use super::result::{Cause, State, StateName};

/// Name, version and operating system that the worker reports.
const SOFTWARE: (&str, &str, &str) = ("py-celery", CELERY_VERSION, "Linux");

/// Version of Celery whose behaviour and formats the worker has.
pub const CELERY_VERSION: &str = "5.7.0";

/// Routing key of a list of events.
pub const LIST: &str = "task.multi";

/// Maximum number of events in one list. Python's lists end at 24; Celery's receiver, and therefore Flower, accepts any
/// length, and a fast worker has too many events for short ones.
pub const LISTED: usize = 500;

/// Fields of `task-sent`, with the headers that they come from.
const SENT: [(&str, &str); 9] = [
    ("uuid", "id"),
    ("root_id", "root_id"),
    ("parent_id", "parent_id"),
    ("name", "task"),
    ("args", "argsrepr"),
    ("kwargs", "kwargsrepr"),
    ("retries", "retries"),
    ("eta", "eta"),
    ("expires", "expires"),
];

/// State and load of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Interval of the heartbeats, in seconds.
    pub freq: f64,
    /// Number of running tasks.
    pub active: usize,
    /// Number of tasks started since the start of the worker.
    pub processed: u64,
    /// Load averages of the host over 1, 5 and 15 minutes.
    pub loadavg: [f64; 3],
}

/// An event of a worker or of a task.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event<'a> {
    /// The worker has started.
    WorkerOnline(Load),
    /// The worker is still running.
    WorkerHeartbeat(Load),
    /// The worker stops.
    WorkerOffline(Load),
    /// A task message was received.
    TaskReceived(&'a TaskMessage),
    /// A task has started; the value is its id.
    TaskStarted(&'a str),
    /// A task has succeeded.
    TaskSucceeded {
        /// Id of the task.
        id: &'a str,
        /// Result of the task.
        result: &'a Value,
        /// Duration of the run, in seconds.
        runtime: f64,
    },
    /// A task has failed.
    TaskFailed {
        /// Id of the task.
        id: &'a str,
        /// Exception that the task raised.
        exception: &'a Exception,
        /// Text in the form of a Python traceback.
        traceback: Option<&'a str>,
    },
    /// A task raised an exception and will run again.
    TaskRetried {
        /// Id of the task.
        id: &'a str,
        /// Exception that the task raised.
        exception: &'a Exception,
        /// Text in the form of a Python traceback.
        traceback: Option<&'a str>,
    },
    /// A task will not run, or was stopped.
    TaskRevoked {
        /// Id of the task.
        id: &'a str,
        /// Reason for the revocation.
        cause: Cause,
    },
    /// A task rejected its message.
    TaskRejected {
        /// Id of the task.
        id: &'a str,
        /// True if the message was requeued.
        requeue: bool,
    },
    /// Progress of a task. Celery has no such event. Its name must not begin with `task-`: monitors interpret the rest
    /// of such a name as the task's state, do not offer to terminate a task that is not STARTED, and show their own
    /// interpretation instead of REVOKED.
    Progress {
        /// Id of the task.
        id: &'a str,
        /// The same mapping that the state PROGRESS has as its result.
        progress: &'a Value,
    },
    /// The answer to a node that requests an election.
    WorkerElectAck(&'a str),
}

/// A task message that was sent, with its route: the event `task-sent`, which is the sender's and not a worker's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SentTask<'a> {
    /// Headers of the message.
    pub headers: &'a Headers,
    /// Queue of the message.
    pub queue: &'a str,
    /// Exchange that it was published to.
    pub exchange: &'a str,
    /// Its routing key.
    pub routing_key: &'a str,
}

impl<'a> SentTask<'a> {
    /// Routing key on the exchange of events.
    pub const EVENT_KEY: &'static str = "task.sent";

    /// The event as monitors read it.
    #[must_use]
    pub fn stamped(self, stamp: Stamp<'a>) -> impl Serialize + use<'a> {
        StampedSentTask { task: self, stamp }
    }
}

struct StampedSentTask<'a> {
    task: SentTask<'a>,
    stamp: Stamp<'a>,
}

impl Serialize for StampedSentTask<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { task, stamp } = self;
        stamp.around(serializer, "task-sent", |map| {
            for (key, header) in SENT {
                map.serialize_entry(key, &task.headers.get(header))?;
            }
            map.serialize_entry("queue", task.queue)?;
            map.serialize_entry("exchange", task.exchange)?;
            map.serialize_entry("routing_key", task.routing_key)
        })
    }
}

/// Fields that every event contains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stamp<'a> {
    /// Node name.
    pub hostname: &'a str,
    /// Process id of the worker.
    pub pid: u32,
    /// The node's Lamport clock.
    pub clock: u64,
    /// Seconds since 1970.
    pub timestamp: f64,
    /// Hours by which the worker's time zone is *west* of UTC: -1.0 in Cologne in winter.
    pub utcoffset: f64,
}

impl Stamp<'_> {
    /// Writes an event: the fields of the stamp around those of its kind.
    fn around<S: Serializer>(
        &self,
        serializer: S,
        name: &str,
        fields: impl FnOnce(&mut S::SerializeMap) -> Result<(), S::Error>,
    ) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("hostname", self.hostname)?;
        map.serialize_entry("utcoffset", &self.utcoffset)?;
        map.serialize_entry("pid", &self.pid)?;
        map.serialize_entry("clock", &self.clock)?;
        fields(&mut map)?;
        map.serialize_entry("timestamp", &self.timestamp)?;
        map.serialize_entry("type", name)?;
        map.end()
    }
}

impl<'a> Event<'a> {
    /// Event of a task that reached a state after `runtime` seconds. Celery has none for custom states.
    #[must_use]
    pub fn of(id: &'a str, state: &'a State, runtime: f64) -> Option<Self> {
        match state {
            State::Started { .. } => None,
            State::Custom { name, meta } => {
                (*name == StateName::PROGRESS).then_some(Self::Progress { id, progress: meta })
            }
            State::Retry {
                exception,
                traceback,
            } => Some(Self::TaskRetried {
                id,
                exception,
                traceback: traceback.as_deref(),
            }),
            State::Success(result) => Some(Self::TaskSucceeded {
                id,
                result,
                runtime,
            }),
            State::Failure {
                exception,
                traceback,
            } => Some(Self::TaskFailed {
                id,
                exception,
                traceback: traceback.as_deref(),
            }),
            State::Revoked(cause) => Some(Self::TaskRevoked { id, cause: *cause }),
        }
    }

    /// Type of the event.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::WorkerOnline(_) => "worker-online",
            Self::WorkerHeartbeat(_) => "worker-heartbeat",
            Self::WorkerOffline(_) => "worker-offline",
            Self::TaskReceived(_) => "task-received",
            Self::TaskStarted(_) => "task-started",
            Self::TaskSucceeded { .. } => "task-succeeded",
            Self::TaskFailed { .. } => "task-failed",
            Self::TaskRetried { .. } => "task-retried",
            Self::TaskRevoked { .. } => "task-revoked",
            Self::TaskRejected { .. } => "task-rejected",
            Self::Progress { .. } => "progress-reported",
            Self::WorkerElectAck(_) => "worker-elect-ack",
        }
    }

    /// Returns true for an event about the worker; such events are always sent.
    #[must_use]
    pub fn is_worker(&self) -> bool {
        matches!(
            self,
            Self::WorkerOnline(_)
                | Self::WorkerHeartbeat(_)
                | Self::WorkerOffline(_)
                | Self::WorkerElectAck(_)
        )
    }

    /// Returns true if the event is sent in a list with others, as in Python for the events about a task's state.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        self.name().starts_with("task-")
    }

    /// Routing key on the exchange of events, for an event that is sent alone.
    #[must_use]
    pub fn routing_key(&self) -> String {
        self.name().replace('-', ".")
    }

    /// The event in the format for monitors.
    #[must_use]
    pub fn stamped(&'a self, stamp: Stamp<'a>) -> impl Serialize + use<'a> {
        Stamped { event: self, stamp }
    }

    /// Adds the fields of this kind of event.
    fn fields<M: SerializeMap>(&self, map: &mut M) -> Result<(), M::Error> {
        match self {
            Self::WorkerOnline(load) | Self::WorkerHeartbeat(load) | Self::WorkerOffline(load) => {
                map.serialize_entry("freq", &load.freq)?;
                map.serialize_entry("active", &load.active)?;
                map.serialize_entry("processed", &load.processed)?;
                map.serialize_entry("loadavg", &load.loadavg)?;
                software(map)
            }
            Self::TaskReceived(message) => {
                map.serialize_entry("uuid", &message.id)?;
                map.serialize_entry("name", message.display_name())?;
                map.serialize_entry("args", &message.argsrepr)?;
                map.serialize_entry("kwargs", &message.kwargsrepr)?;
                map.serialize_entry("root_id", &message.root_id)?;
                map.serialize_entry("parent_id", &message.parent_id)?;
                map.serialize_entry("retries", &message.retries)?;
                map.serialize_entry("eta", &message.eta.map(super::isoformat))?;
                map.serialize_entry("expires", &message.expires.map(super::isoformat))
            }
            Self::TaskStarted(id) => map.serialize_entry("uuid", id),
            Self::TaskRejected { id, requeue } => {
                map.serialize_entry("uuid", id)?;
                map.serialize_entry("requeue", requeue)
            }
            Self::Progress { id, progress } => {
                map.serialize_entry("uuid", id)?;
                // In a separate field, because the task chooses the names in it.
                map.serialize_entry("progress", progress)
            }
            Self::WorkerElectAck(id) => map.serialize_entry("id", id),
            Self::TaskSucceeded {
                id,
                result,
                runtime,
            } => {
                map.serialize_entry("uuid", id)?;
                map.serialize_entry("result", &repr::shortened(result))?;
                map.serialize_entry("runtime", runtime)
            }
            Self::TaskFailed {
                id,
                exception,
                traceback,
            }
            | Self::TaskRetried {
                id,
                exception,
                traceback,
            } => {
                map.serialize_entry("uuid", id)?;
                map.serialize_entry("exception", &exception.repr())?;
                match traceback {
                    Some(traceback) => map.serialize_entry("traceback", traceback),
                    None => Ok(()),
                }
            }
            Self::TaskRevoked { id, cause } => {
                let terminated = *cause == Cause::Terminated;
                map.serialize_entry("uuid", id)?;
                map.serialize_entry("terminated", &terminated)?;
                // Python reports the signal that it sends; the first one here is always SIGTERM.
                map.serialize_entry("signum", &terminated.then_some(15))?;
                map.serialize_entry("expired", &(*cause == Cause::Expired))
            }
        }
    }
}

/// Adds the fields by which monitors decide which requests they may send to a worker.
fn software<M: SerializeMap>(map: &mut M) -> Result<(), M::Error> {
    map.serialize_entry("sw_ident", SOFTWARE.0)?;
    map.serialize_entry("sw_ver", SOFTWARE.1)?;
    map.serialize_entry("sw_sys", SOFTWARE.2)
}

/// An event with its stamp. It is serialized directly: three events are sent for each task, and an intermediate mapping
/// of values costs more than the serialization itself.
struct Stamped<'a> {
    event: &'a Event<'a>,
    stamp: Stamp<'a>,
}

impl Serialize for Stamped<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { event, stamp } = self;
        stamp.around(serializer, event.name(), |map| event.fields(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const STAMP: Stamp<'_> = Stamp {
        hostname: "w@h",
        pid: 7,
        clock: 4,
        timestamp: 1.5,
        utcoffset: -1.0,
    };

    fn shown(event: &Event<'_>) -> Value {
        serde_json::to_value(event.stamped(STAMP)).unwrap_or_default()
    }

    #[test]
    fn received_has_the_keys_of_a_capture() {
        let message = TaskMessage {
            id: "a".into(),
            task: "t.f".into(),
            argsrepr: Some("(1,)".into()),
            kwargsrepr: Some("{}".into()),
            ..TaskMessage::default()
        };
        let event = Event::TaskReceived(&message);
        assert_eq!(event.routing_key(), "task.received");
        assert_eq!(
            shown(&event),
            json!({
                "hostname": "w@h", "utcoffset": -1.0, "pid": 7, "clock": 4, "uuid": "a",
                "name": "t.f", "args": "(1,)", "kwargs": "{}", "root_id": null,
                "parent_id": null, "retries": 0, "eta": null, "expires": null,
                "timestamp": 1.5, "type": "task-received",
            })
        );
    }

    #[test]
    fn sent_has_the_keys_of_a_capture() {
        let headers = json!({
            "lang": "py", "task": "t.add", "id": "a", "shadow": null, "eta": null, "expires": null,
            "retries": 0, "root_id": "a", "parent_id": null, "argsrepr": "(2, 3)", "kwargsrepr": "{}",
        });
        let sent = SentTask {
            headers: &headers.as_object().cloned().unwrap_or_default().into(),
            queue: "q",
            exchange: "",
            routing_key: "q",
        };
        assert_eq!(
            serde_json::to_string(&sent.stamped(STAMP)).unwrap_or_default(),
            concat!(
                r#"{"hostname":"w@h","utcoffset":-1.0,"pid":7,"clock":4,"uuid":"a","root_id":"a","#,
                r#""parent_id":null,"name":"t.add","args":"(2, 3)","kwargs":"{}","retries":0,"#,
                r#""eta":null,"expires":null,"queue":"q","exchange":"","routing_key":"q","#,
                r#""timestamp":1.5,"type":"task-sent"}"#
            )
        );
    }

    #[test]
    fn progress_event_is_not_a_task_state_and_keeps_its_fields() {
        let progress = json!({"clock": "mine", "eta": 12.5});
        let event = Event::Progress {
            id: "a",
            progress: &progress,
        };
        assert!(!event.name().starts_with("task-") && !event.is_worker());
        let shown = shown(&event);
        assert_eq!(shown["clock"], 4);
        assert_eq!(shown["progress"], progress);
        assert_eq!(shown["eta"], Value::Null);
    }

    #[test]
    fn exceptions_are_shown_as_python_shows_them() {
        let exception = Exception::not_registered("no.such.task");
        let event = Event::TaskFailed {
            id: "a",
            exception: &exception,
            traceback: None,
        };
        assert_eq!(shown(&event)["exception"], "NotRegistered('no.such.task')");
    }
}
