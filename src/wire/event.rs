//! Events: what a worker tells monitors such as Flower.

use serde_json::{Map, Value, json};

use super::exception::Exception;
use super::message::TaskMessage;
use super::repr;
use super::result::{Cause, State};

/// What the worker says that it is, its version and its system.
const SOFTWARE: (&str, &str, &str) = ("py-celery", "5.7.0", "Linux");

/// Routing key of a list of events.
pub const LIST: &str = "task.multi";

/// Events in one list at most; Python's own number.
pub const LISTED: usize = 24;

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
    /// It still is, as it was asked to say; with fewer words, as Python's.
    WorkerHeartbeatAsked,
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
    /// What is told of a task that reached a state after `runtime` seconds.
    #[must_use]
    pub fn of(id: &'a str, state: &'a State, runtime: f64) -> Option<Self> {
        match state {
            State::Started { .. } => None,
            State::Progress(progress) => Some(Self::Progress { id, progress }),
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
            Self::WorkerHeartbeat(_) | Self::WorkerHeartbeatAsked => "worker-heartbeat",
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
                | Self::WorkerHeartbeatAsked
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
    pub fn to_json(&self, stamp: Stamp<'_>) -> Value {
        let mut event = Map::new();
        event.insert("hostname".into(), json!(stamp.hostname));
        event.insert("utcoffset".into(), json!(stamp.utcoffset));
        event.insert("pid".into(), json!(stamp.pid));
        event.insert("clock".into(), json!(stamp.clock));
        let Value::Object(fields) = self.fields() else {
            return Value::Object(event);
        };
        event.extend(fields);
        event.insert("timestamp".into(), json!(stamp.timestamp));
        event.insert("type".into(), json!(self.name()));
        Value::Object(event)
    }

    fn fields(&self) -> Value {
        match self {
            Self::WorkerOnline(load) | Self::WorkerHeartbeat(load) | Self::WorkerOffline(load) => {
                json!({
                    "freq": load.freq,
                    "active": load.active,
                    "processed": load.processed,
                    "loadavg": load.loadavg,
                    // Monitors decide by these what they may ask of a worker.
                    "sw_ident": SOFTWARE.0,
                    "sw_ver": SOFTWARE.1,
                    "sw_sys": SOFTWARE.2,
                })
            }
            Self::WorkerHeartbeatAsked => json!({
                "freq": 5,
                "sw_ident": SOFTWARE.0,
                "sw_ver": SOFTWARE.1,
                "sw_sys": SOFTWARE.2,
            }),
            Self::TaskReceived(message) => json!({
                "uuid": message.id,
                "name": message.display_name(),
                "args": message.argsrepr,
                "kwargs": message.kwargsrepr,
                "root_id": message.root_id,
                "parent_id": message.parent_id,
                "retries": message.retries,
                "eta": message.eta.map(super::isoformat),
                "expires": message.expires.map(super::isoformat),
            }),
            Self::TaskStarted(id) => json!({ "uuid": id }),
            Self::TaskRejected { id, requeue } => json!({"uuid": id, "requeue": requeue}),
            // In a field of its own: the names in it are the task's.
            Self::Progress { id, progress } => json!({"uuid": id, "progress": progress}),
            Self::WorkerElectAck(id) => json!({ "id": id }),
            Self::TaskSucceeded {
                id,
                result,
                runtime,
            } => json!({
                "uuid": id,
                "result": repr::shorten(&repr::value(result)),
                "runtime": runtime,
            }),
            Self::TaskFailed {
                id,
                exception,
                traceback,
            }
            | Self::TaskRetried {
                id,
                exception,
                traceback,
            } => json!({
                "uuid": id,
                "exception": exception.repr(),
                "traceback": traceback,
            }),
            Self::TaskRevoked { id, cause } => json!({
                "uuid": id,
                "terminated": *cause == Cause::Terminated,
                // Python names the signal that it sends; here it is always SIGTERM first.
                "signum": (*cause == Cause::Terminated).then_some(15),
                "expired": *cause == Cause::Expired,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp<'_> = Stamp {
        hostname: "w@h",
        pid: 7,
        clock: 4,
        timestamp: 1.5,
        utcoffset: -1.0,
    };

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
            event.to_json(STAMP),
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
        let shown = event.to_json(STAMP);
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
        assert_eq!(
            event.to_json(STAMP)["exception"],
            "NotRegistered('no.such.task')"
        );
    }
}
