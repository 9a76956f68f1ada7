//! The result of a task, in the form that backends store and clients read.

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::compression::{self, Method};
use super::content::Serializer;
use super::exception::Exception;
use super::message::{Reason, TaskMessage};
use super::{RawMessage, isoformat};

/// Reason why a task does not start, or was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The task expired before it started.
    Expired,
    /// The task was revoked before it started.
    Revoked,
    /// The task was stopped while it was running.
    Terminated,
}

impl Cause {
    /// The name of the reason in the result's exception.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::Terminated => "terminated",
        }
    }
}

/// Name of a state that a task sets itself, as with Celery's `update_state`.
///
/// Celery's own names are allowed, as in Celery: after a name of a final state, readers treat the task as finished.
///
/// ```
/// use celery_protocol::result::StateName;
///
/// assert_eq!(StateName::new("MOVING")?.as_str(), "MOVING");
/// assert!(StateName::new("").is_err());
/// # Ok::<(), celery_protocol::result::InvalidStateName>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateName(Cow<'static, str>);

/// The name of a state is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the name of a state has 1 to {} characters and no control characters",
    StateName::MAX_CHARS
)]
pub struct InvalidStateName;

impl StateName {
    /// Progress of a task: a state of this project, which Celery's readers treat as a custom one.
    pub const PROGRESS: Self = Self(Cow::Borrowed("PROGRESS"));

    /// Maximum length, in characters: the column `status` of Celery's result table has this size.
    pub const MAX_CHARS: usize = 50;

    /// Checks a name.
    ///
    /// # Errors
    /// [`InvalidStateName`]
    pub fn new(name: impl Into<Cow<'static, str>>) -> Result<Self, InvalidStateName> {
        let name = name.into();
        let is_valid = !name.is_empty()
            && name.chars().count() <= Self::MAX_CHARS
            && !name.contains(char::is_control);
        is_valid.then_some(Self(name)).ok_or(InvalidStateName)
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns true for Celery's names of final states.
    fn is_final(&self) -> bool {
        FinalState::from_name(self.as_str()).is_some()
    }
}

/// State that no other state follows.
///
/// ```
/// use celery_protocol::result::FinalState;
///
/// let stored = serde_json::json!({"status": "REVOKED", "result": null});
/// assert!(FinalState::of(&stored).is_some_and(FinalState::has_failed));
/// assert_eq!(FinalState::from_name("STARTED"), None);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinalState {
    /// The task returned a value.
    Success,
    /// The task raised an exception.
    Failure,
    /// The task will not run, or was stopped.
    Revoked,
}

impl FinalState {
    const ALL: [Self; 3] = [Self::Success, Self::Failure, Self::Revoked];

    const NAMES: &[&str] = &[
        Self::Success.name(),
        Self::Failure.name(),
        Self::Revoked.name(),
    ];

    /// Celery's name of the state.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Success => "SUCCESS",
            Self::Failure => "FAILURE",
            Self::Revoked => "REVOKED",
        }
    }

    /// The state with a name; `None` for the name of a state that is not final.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    /// The state of a stored mapping; `None` if it is not final.
    #[must_use]
    pub fn of(meta: &Value) -> Option<Self> {
        Self::from_name(meta["status"].as_str()?)
    }

    /// Returns true if the task did not return a value.
    #[must_use]
    pub fn has_failed(self) -> bool {
        self != Self::Success
    }
}

/// State of a task, with its data.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// The task is running.
    Started {
        /// Id of the process that runs the task.
        pid: u32,
        /// Node name of the worker.
        hostname: String,
    },
    /// A state that the task sets itself while it runs.
    Custom {
        /// Name of the state.
        name: StateName,
        /// Value that is stored as the result.
        meta: Value,
    },
    /// The task raised an exception and will run again.
    Retry {
        /// Exception that the task raised.
        exception: Exception,
        /// Text in the form of a Python traceback.
        traceback: Option<String>,
    },
    /// The task returned a value.
    Success(Value),
    /// The task raised an exception.
    Failure {
        /// Exception that the task raised.
        exception: Exception,
        /// Text in the form of a Python traceback.
        traceback: Option<String>,
    },
    /// The task will not run, or was stopped.
    Revoked(Cause),
}

impl State {
    /// Celery's name of the state.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Started { .. } => "STARTED",
            Self::Custom { name, .. } => name.as_str(),
            Self::Retry { .. } => "RETRY",
            Self::Success(_) => FinalState::Success.name(),
            Self::Failure { .. } => FinalState::Failure.name(),
            Self::Revoked(_) => FinalState::Revoked.name(),
        }
    }

    /// The value that is stored as the result: a value, or an exception as a mapping.
    #[must_use]
    pub fn result(&self) -> Value {
        match self {
            Self::Started { pid, hostname } => json!({"pid": pid, "hostname": hostname}),
            Self::Success(value) | Self::Custom { meta: value, .. } => value.clone(),
            Self::Retry { exception, .. } | Self::Failure { exception, .. } => json!(exception),
            Self::Revoked(cause) => json!(Exception::revoked(cause.as_str())),
        }
    }

    /// True for a state that no other state follows.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Success(_) | Self::Failure { .. } | Self::Revoked(_) => true,
            Self::Custom { name, .. } => name.is_final(),
            Self::Started { .. } | Self::Retry { .. } => false,
        }
    }

    /// True if a stored state with this name must be kept when this state arrives: a SUCCESS always, and every final
    /// state if this one is a custom state. A task that failed may run again.
    #[must_use]
    pub fn yields_to(&self, stored: &str) -> bool {
        self.unyielding().contains(&stored)
    }

    /// The names of stored states that must be kept when this state arrives.
    #[must_use]
    pub fn unyielding(&self) -> &'static [&'static str] {
        match self {
            Self::Custom { name, .. } if !name.is_final() => FinalState::NAMES,
            _ => const { &[FinalState::Success.name()] },
        }
    }
}

/// A task's result as a mapping with exactly the keys that Python writes.
#[derive(Debug, Clone, PartialEq)]
pub struct ResultMeta {
    /// Id of the task.
    pub task_id: String,
    /// State of the task.
    pub state: State,
    /// Time at which a final state was reached.
    pub date_done: Option<DateTime<Utc>>,
    /// The message's group.
    pub group_id: Option<String>,
    /// Id of the task that sent this one.
    pub parent_id: Option<String>,
    /// The results of the tasks that this one sent, each in the form of `AsyncResult.as_tuple()`:
    /// `[[id, parent], null]`, or `[[group, parent], [child, …]]`.
    pub children: Vec<Value>,
    /// Additional keys with the setting `result_extended`.
    pub extended: Option<Extended>,
}

/// The keys that `result_extended` adds to a result.
#[derive(Debug, Clone, PartialEq)]
pub struct Extended {
    /// Name of the task.
    pub name: String,
    /// Positional arguments of the task.
    pub args: Value,
    /// Keyword arguments of the task.
    pub kwargs: Value,
    /// Node name of the worker.
    pub worker: String,
    /// Number of previous retries of the task.
    pub retries: u32,
    /// The *routing key* of the task's message, which Celery calls `queue`.
    pub queue: Option<String>,
    /// `stamped_headers`, and the stamps under their own names; empty for a task without stamps.
    pub stamps: Map<String, Value>,
}

impl ResultMeta {
    /// Creates the result of `message`, reached at `now`.
    #[must_use]
    pub fn new(message: &TaskMessage, state: State, now: DateTime<Utc>) -> Self {
        Self {
            task_id: message.id.clone(),
            date_done: state.is_final().then_some(now),
            state,
            group_id: message.group.clone(),
            parent_id: message.parent_id.clone(),
            children: Vec::new(),
            extended: None,
        }
    }

    /// The values whose size is not limited.
    pub fn values(&self) -> impl Iterator<Item = &Value> {
        let own = match &self.state {
            State::Success(value) | State::Custom { meta: value, .. } => Some(value),
            _ => None,
        };
        let extended = self.extended.iter();
        let arguments = extended.flat_map(|extended| [&extended.args, &extended.kwargs]);
        own.into_iter().chain(&self.children).chain(arguments)
    }

    /// The mapping with Python's keys.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let traceback = match &self.state {
            State::Retry { traceback, .. } | State::Failure { traceback, .. } => traceback.as_ref(),
            _ => None,
        };
        let mut meta = Map::new();
        meta.insert("status".into(), json!(self.state.name()));
        meta.insert("result".into(), self.state.result());
        meta.insert("traceback".into(), json!(traceback));
        meta.insert("children".into(), json!(self.children));
        meta.insert("date_done".into(), json!(self.date_done.map(isoformat)));
        if let Some(group) = &self.group_id {
            meta.insert("group_id".into(), json!(group));
        }
        if let Some(parent) = &self.parent_id {
            meta.insert("parent_id".into(), json!(parent));
        }
        if let Some(extended) = &self.extended {
            meta.insert("name".into(), json!(extended.name));
            meta.insert("args".into(), extended.args.clone());
            meta.insert("kwargs".into(), extended.kwargs.clone());
            meta.insert("worker".into(), json!(extended.worker));
            meta.insert("retries".into(), json!(extended.retries));
            meta.insert("queue".into(), json!(extended.queue));
            meta.extend(extended.stamps.clone());
        }
        meta.insert("task_id".into(), json!(self.task_id));
        Value::Object(meta)
    }
}

/// Prefix of compressed values. The MIME type of the compression, a NUL and the compressed bytes follow.
const COMPRESSED: &[u8] = b"\0celery-compressed\0";

/// Maximum size of a value after decompression, in bytes: everyone with write access to Redis can store a small value
/// that decompresses to a huge one.
const MAX_STORED: usize = 64 << 20;

/// Reason why stored bytes are not a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotReadable {
    /// The bytes cannot be decompressed.
    #[error("it cannot be decompressed")]
    Compressed(#[from] Reason),
    /// The bytes come from another serializer, or are invalid.
    #[error("it is not {serializer}, the serializer of results: {reason}")]
    Serialized {
        /// Name of the serializer.
        serializer: &'static str,
        /// Description of the error.
        reason: String,
    },
    /// The value has no status, so it is not a result.
    #[error("it is not a mapping with a status")]
    NoStatus,
}

/// Converts a value for a key-value store.
#[must_use]
pub fn encode(value: &Value, serializer: Serializer, compression: Option<Method>) -> Vec<u8> {
    let plain = serializer.write(value);
    let packed = compression.and_then(|method| {
        let packed = method.compress(&plain)?;
        let name = method.content_type().as_bytes();
        Some([COMPRESSED, name, b"\0", &packed].concat())
    });
    packed.unwrap_or(plain)
}

/// Reads a value from a key-value store, compressed or not.
///
/// # Errors
/// [`NotReadable`].
pub fn decode(stored: &[u8], serializer: Serializer) -> Result<Value, NotReadable> {
    let plain = match stored.strip_prefix(COMPRESSED) {
        None => stored.into(),
        Some(rest) => {
            let mut parts = rest.splitn(2, |byte| *byte == 0);
            let name = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
            let packed = parts.next().unwrap_or_default();
            compression::undo(packed, Some(&name.into()), MAX_STORED)?
        }
    };
    let read = serializer.read(&plain, MAX_STORED);
    read.map_err(|reason| NotReadable::Serialized {
        serializer: serializer.name(),
        reason,
    })
}

/// Reads the mapping of a result from a key-value store.
///
/// # Errors
/// [`NotReadable`].
pub fn read(stored: &[u8], serializer: Serializer) -> Result<Value, NotReadable> {
    with_status(decode(stored, serializer)?)
}

/// Reads the mapping of a result from the message of a worker with `rpc://`, which names its serializer.
///
/// # Errors
/// [`NotReadable`].
pub fn read_message(message: &RawMessage) -> Result<Value, NotReadable> {
    let content_type = message.properties.content_type.as_deref();
    let serializer = content_type.and_then(Serializer::of).unwrap_or_default();
    with_status(decode(&message.body, serializer)?)
}

fn with_status(meta: Value) -> Result<Value, NotReadable> {
    match meta["status"].is_string() {
        true => Ok(meta),
        false => Err(NotReadable::NoStatus),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(state: State) -> Value {
        let now = DateTime::from_timestamp(1_795_493_153, 751_852_000).unwrap_or_default();
        let message = TaskMessage {
            id: "91ee9000".into(),
            ..TaskMessage::default()
        };
        ResultMeta::new(&message, state, now).to_json()
    }

    #[test]
    fn success_has_the_six_keys() {
        assert_eq!(
            meta(State::Success(json!(true))),
            json!({
                "status": "SUCCESS", "result": true, "traceback": null, "children": [],
                "date_done": "2026-11-24T04:05:53.751852+00:00", "task_id": "91ee9000",
            })
        );
    }

    #[test]
    fn compressed_result_names_its_method() {
        let value = json!({"status": "SUCCESS", "result": "é".repeat(1000)});
        for method in [
            None,
            Some(Method::Gzip),
            Some(Method::Bzip2),
            Some(Method::Zstd),
        ] {
            for serializer in Serializer::ALL {
                let stored = encode(&value, serializer, method);
                assert_eq!(stored.starts_with(COMPRESSED), method.is_some());
                assert_eq!(read(&stored, serializer).ok(), Some(value.clone()));
            }
        }
        // Output of Celery 5.7's `compress_payload('{"status": "SUCCESS"}', "gzip")`.
        let hex = "789cab562a2e492c292d56b252500a0e7576760d0e56aa05004cda0698";
        let packed: Vec<u8> = (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap_or_default())
            .collect();
        let stored = [COMPRESSED, b"application/x-gzip\0", &packed].concat();
        assert_eq!(
            read(&stored, Serializer::Json).ok(),
            Some(json!({"status": "SUCCESS"}))
        );
    }

    #[test]
    fn invalid_results_are_refused() {
        for stored in [
            &b""[..],
            b"7",
            b"[]",
            b"{}",
            b"{\"status\": 7}",
            b"\x80\x04pickle",
            b"\0celery-compressed\0",
            b"\0celery-compressed\0no/such\0abc",
            b"\0celery-compressed\0application/zstd\0abc",
        ] {
            for serializer in Serializer::ALL {
                assert!(read(stored, serializer).is_err(), "{stored:?}");
            }
        }
    }

    #[test]
    fn only_custom_states_are_replaced_by_failures() {
        let progress = custom("PROGRESS");
        let started = State::Started {
            pid: 7,
            hostname: "celery@h".into(),
        };
        for (stored, by_progress, by_started) in [
            ("SUCCESS", true, true),
            ("FAILURE", true, false),
            ("REVOKED", true, false),
            ("STARTED", false, false),
            ("RETRY", false, false),
        ] {
            assert_eq!(progress.yields_to(stored), by_progress, "{stored}");
            assert_eq!(started.yields_to(stored), by_started, "{stored}");
        }
        assert!(!custom("FAILURE").yields_to("FAILURE"));
    }

    fn custom(name: &'static str) -> State {
        State::Custom {
            name: StateName(Cow::Borrowed(name)),
            meta: json!({"bytes": 1}),
        }
    }

    #[test]
    fn a_custom_state_is_written_as_python_writes_it() {
        let message = TaskMessage {
            id: "a".into(),
            ..TaskMessage::default()
        };
        let written = |name| {
            let meta = ResultMeta::new(&message, custom(name), DateTime::default());
            meta.to_json().to_string()
        };
        assert_eq!(
            written("MOVING"),
            r#"{"status":"MOVING","result":{"bytes":1},"traceback":null,"children":[],"date_done":null,"task_id":"a"}"#
        );
        assert!(written("FAILURE").contains(r#""date_done":"1970-01-01T00:00:00.000000+00:00""#));
    }

    #[test]
    fn names_of_states_are_bounded() {
        for name in ["M".repeat(50), "\u{e4}".repeat(50), "FAILURE".to_owned()] {
            assert!(StateName::new(name.clone()).is_ok(), "{name}");
        }
        for name in ["M".repeat(51), String::new(), "A\nB".to_owned()] {
            assert_eq!(StateName::new(name), Err(InvalidStateName));
        }
    }

    #[test]
    fn started_is_not_done() {
        let started = meta(State::Started {
            pid: 7,
            hostname: "celery@h".into(),
        });
        assert_eq!(started["date_done"], Value::Null);
        assert_eq!(started["result"], json!({"pid": 7, "hostname": "celery@h"}));
    }

    #[test]
    fn failure_carries_the_exception() {
        let exception = Exception::type_error("no");
        let traceback = Some(exception.traceback("in f"));
        let failed = meta(State::Failure {
            exception,
            traceback,
        });
        assert_eq!(
            failed["result"],
            json!({"exc_type": "TypeError", "exc_message": ["no"], "exc_module": "builtins"})
        );
        assert_eq!(
            failed["traceback"],
            "Traceback (most recent call last):\n  in f\nTypeError: no\n"
        );
    }

    #[test]
    fn group_and_parent_only_if_the_message_has_them() {
        let message = TaskMessage {
            id: "a".into(),
            group: Some("g".into()),
            parent_id: Some("p".into()),
            ..TaskMessage::default()
        };
        let meta =
            ResultMeta::new(&message, State::Success(Value::Null), DateTime::default()).to_json();
        assert_eq!(meta["group_id"], "g");
        assert_eq!(meta["parent_id"], "p");
    }
}
