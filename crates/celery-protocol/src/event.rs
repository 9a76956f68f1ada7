//! Events: what a worker tells monitors such as Flower.

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::exception::Exception;
use super::message::TaskMessage;
use super::repr;
use super::result::{Cause, State, StateName};

/// What the worker says that it is, its version and its system.
const SOFTWARE: (&str, &str, &str) = ("py-celery", "5.7.0", "Linux");

/// Routing key of a list of events.
pub const LIST: &str = "task.multi";

/// Events in one list at most. Python's lists end at 24; Celery's receiver, and so Flower, takes any length, and
/// what a fast worker has to tell fits no short ones.
pub const LISTED: usize = 500;

/// What the worker itself looks like at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Seconds between two heartbeats.
    pub freq: f64,
    /// Tasks that run.
    pub active: usize,
    /// Tasks that were begun since the start.
    pub processed: u64,
    /// Load averages of the host over 1, 5 and 15 minutes.
    pub loadavg: [f64; 3],
}

/// Something that happened.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event<'a> {
    /// The worker is there.
    WorkerOnline(Load),
    /// It still is.
    WorkerHeartbeat(Load),
    /// It goes.
    WorkerOffline(Load),
    /// A task came.
    TaskReceived(&'a TaskMessage),
    /// It runs.
    TaskStarted(&'a str),
    /// It returned.
    TaskSucceeded {
        /// Its id.
        id: &'a str,
        /// What it returned.
        result: &'a Value,
        /// How long it ran, in seconds.
        runtime: f64,
    },
    /// It raised.
    TaskFailed {
        /// Its id.
        id: &'a str,
        /// What it raised.
        exception: &'a Exception,
        /// Text in the form of a Python traceback.
        traceback: Option<&'a str>,
    },
    /// It raised and will be run again.
    TaskRetried {
        /// Its id.
        id: &'a str,
        /// What it raised.
        exception: &'a Exception,
        /// Text in the form of a Python traceback.
        traceback: Option<&'a str>,
    },
    /// It will not run, or was stopped.
    TaskRevoked {
        /// Its id.
        id: &'a str,
        /// Why.
        cause: Cause,
    },
    /// It refused its message.
    TaskRejected {
        /// Its id.
        id: &'a str,
        /// Whether the message went back to its queue.
        requeue: bool,
    },
    /// How far it is. Celery has no such event. Its name must not begin with `task-`: monitors take what
    /// follows for the task's state, do not offer to terminate what is not STARTED, and keep a state of
    /// their own making over REVOKED.
    Progress {
        /// Its id.
        id: &'a str,
        /// The same mapping that the state PROGRESS has as its result.
        progress: &'a Value,
    },
    /// The answer to a node that wants an election.
    WorkerElectAck(&'a str),
}

/// What every event carries.
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
    /// Hours that the worker's local zone lies *west* of UTC: -1.0 in Cologne in winter.
    pub utcoffset: f64,
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

    /// The event's type.
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

    /// Whether it tells of the worker; such events are always sent.
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

    /// Whether it goes in a list with its like, as Python sends those that tell of a task's state.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        self.name().starts_with("task-")
    }

    /// Routing key on the exchange of events, for one that goes by itself.
    #[must_use]
    pub fn routing_key(&self) -> String {
        self.name().replace('-', ".")
    }

    /// The event as monitors read it.
    #[must_use]
    pub fn stamped(&'a self, stamp: Stamp<'a>) -> impl Serialize + use<'a> {
        Stamped { event: self, stamp }
    }

    /// Adds what only this kind of event carries.
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
                // In a field of its own: the names in it are the task's.
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
                map.serialize_entry("traceback", traceback)
            }
            Self::TaskRevoked { id, cause } => {
                let terminated = *cause == Cause::Terminated;
                map.serialize_entry("uuid", id)?;
                map.serialize_entry("terminated", &terminated)?;
                // Python names the signal that it sends; here it is always SIGTERM first.
                map.serialize_entry("signum", &terminated.then_some(15))?;
                map.serialize_entry("expired", &(*cause == Cause::Expired))
            }
        }
    }
}

/// Monitors decide by these what they may ask of a worker.
fn software<M: SerializeMap>(map: &mut M) -> Result<(), M::Error> {
    map.serialize_entry("sw_ident", SOFTWARE.0)?;
    map.serialize_entry("sw_ver", SOFTWARE.1)?;
    map.serialize_entry("sw_sys", SOFTWARE.2)
}

/// An event with its stamp. It is written as it is read off: there are three of them for each task, and
/// a mapping of values on the way to their text cost more than the text.
struct Stamped<'a> {
    event: &'a Event<'a>,
    stamp: Stamp<'a>,
}

impl Serialize for Stamped<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { event, stamp } = self;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("hostname", stamp.hostname)?;
        map.serialize_entry("utcoffset", &stamp.utcoffset)?;
        map.serialize_entry("pid", &stamp.pid)?;
        map.serialize_entry("clock", &stamp.clock)?;
        event.fields(&mut map)?;
        map.serialize_entry("timestamp", &stamp.timestamp)?;
        map.serialize_entry("type", event.name())?;
        map.end()
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
    fn progress_is_no_state_of_a_task_and_hides_no_field() {
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
