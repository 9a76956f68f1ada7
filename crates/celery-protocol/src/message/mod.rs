//! Task messages: protocol 2 (headers) and protocol 1 (everything in the body).

mod decode;
#[cfg(test)]
mod tests;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::{Headers, repr};

pub use super::content::JSON;
pub use decode::{decode, eta, head, is_falsy, refused};

/// Maximum number of characters of a text in an outline.
const OUTLINED_CHARS: usize = 1000;

/// Layout of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// Everything in the body, a mapping; headers may stand beside it and then win.
    One,
    /// Everything but the arguments and what follows in the headers.
    #[default]
    Two,
}

/// A task to run, as a producer asked for it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TaskMessage {
    /// Id of the task, by which its result is found.
    pub id: String,
    /// Name of the task.
    pub task: String,
    /// Layout of the message.
    pub protocol: Protocol,
    /// Positional arguments; a list, unless the producer is broken. Values that JSON has no form
    /// for (times, UUIDs, bytes …) are text.
    pub args: Value,
    /// Keyword arguments; a mapping, unless the producer is broken. With text likewise.
    pub kwargs: Value,
    /// Both as they came, in kombu's envelopes, where that is something else.
    pub typed: Option<(Value, Value)>,
    /// Follow-up tasks.
    pub embed: Embed,
    /// First task of the workflow.
    pub root_id: Option<String>,
    /// Task that sent this one.
    pub parent_id: Option<String>,
    /// Group of the task.
    pub group: Option<String>,
    /// Place in the group, from 0.
    pub group_index: Option<i64>,
    /// Number of earlier retries.
    pub retries: u32,
    /// Not to be run before this time.
    pub eta: Option<DateTime<Utc>>,
    /// Not to be run after this time.
    pub expires: Option<DateTime<Utc>>,
    /// Hard and soft time limit, in seconds.
    pub time_limit: (Option<f64>, Option<f64>),
    /// Name to show instead of `task`.
    pub shadow: Option<String>,
    /// `repr` of the arguments, as the producer wrote it; none with protocol 1.
    pub argsrepr: Option<String>,
    /// `repr` of the keyword arguments.
    pub kwargsrepr: Option<String>,
    /// Process that sent the message.
    pub origin: Option<String>,
    /// True if no result is stored; `None` for the option of the task.
    pub ignore_result: Option<bool>,
    /// Queue for `rpc://` results.
    pub reply_to: Option<String>,
    /// Correlation id for `rpc://` results: the message's, or the task's id.
    pub correlation_id: String,
    /// Priority of the message.
    pub priority: Option<u8>,
    /// Everything that the producer put beside the arguments, known or not: the headers, or, with
    /// protocol 1, the body's other fields. A retry sends them again.
    pub headers: Headers,
}

/// Signatures that a message carries. They are checked when they are applied, not before: a
/// broken callback is a failure of the task, as in Python, and no reason to refuse it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Embed {
    /// Applied when the task succeeds (`link`).
    pub callbacks: Vec<Value>,
    /// Applied when it fails (`link_error`).
    pub errbacks: Vec<Value>,
    /// The rest of the chain, *reversed*: the next step is the last element. `None` and empty are
    /// distinguished, as Python hands both on as they are.
    pub chain: Option<Vec<Value>>,
    /// Body of the chord whose header the task is a part of.
    pub chord: Option<Value>,
}

impl Embed {
    /// Reads the mapping of a message; unknown keys are of no concern.
    fn take(fields: &mut Map<String, Value>) -> Self {
        let mut list = |key: &str| match fields.remove(key) {
            Some(Value::Array(signatures)) => Some(signatures),
            Some(one @ Value::Object(_)) => Some(vec![one]),
            _ => None,
        };
        Self {
            callbacks: list("callbacks").unwrap_or_default(),
            errbacks: list("errbacks").unwrap_or_default(),
            chain: list("chain"),
            chord: fields.remove("chord").filter(Value::is_object),
        }
    }

    /// As the third element of a protocol 2 body.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let list = |signatures: &Vec<Value>| match signatures.as_slice() {
            [] => Value::Null,
            some => some.into(),
        };
        json!({
            "callbacks": list(&self.callbacks),
            "errbacks": list(&self.errbacks),
            "chain": self.chain,
            "chord": self.chord,
        })
    }
}

impl TaskMessage {
    /// `stamped_headers`, and the stamps under their own names; empty for a task without.
    #[must_use]
    pub fn stamps(&self) -> Map<String, Value> {
        let mut stamps = Map::new();
        let (Some(names @ Value::Array(_)), Some(Value::Object(values))) = (
            self.headers.get("stamped_headers"),
            self.headers.get("stamps"),
        ) else {
            return stamps;
        };
        stamps.insert("stamped_headers".into(), names.clone());
        stamps.extend(values.clone());
        stamps
    }

    /// Summary of a task whose message is left to the broker for now: without arguments, headers and
    /// follow-up tasks, and with texts of bounded size.
    #[must_use]
    pub fn outline(&self) -> Self {
        let cut = |text: &str| -> String { text.chars().take(OUTLINED_CHARS).collect() };
        let cut_one = |text: &Option<String>| text.as_deref().map(cut);
        Self {
            id: cut(&self.id),
            task: cut(&self.task),
            protocol: self.protocol,
            root_id: cut_one(&self.root_id),
            parent_id: cut_one(&self.parent_id),
            group: cut_one(&self.group),
            group_index: self.group_index,
            retries: self.retries,
            eta: self.eta,
            expires: self.expires,
            time_limit: self.time_limit,
            shadow: cut_one(&self.shadow),
            argsrepr: self.argsrepr.as_deref().map(repr::shorten),
            kwargsrepr: self.kwargsrepr.as_deref().map(repr::shorten),
            origin: cut_one(&self.origin),
            ignore_result: self.ignore_result,
            reply_to: cut_one(&self.reply_to),
            correlation_id: cut(&self.correlation_id),
            priority: self.priority,
            ..Self::default()
        }
    }

    /// Name to show: `shadow`, or the task's.
    #[must_use]
    pub fn display_name(&self) -> &str {
        self.shadow.as_deref().unwrap_or(&self.task)
    }
}

/// Disposition of a message that is not a usable task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Taken off the queue for good.
    Ack,
    /// Rejected without requeue: to the dead-letter exchange where the queue has one.
    Reject,
}

/// Reason why a message is not a usable task.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The body is above the limit; both in bytes.
    #[error("body of {size} bytes is above celery.max_body_bytes ({limit})")]
    TooLarge {
        /// The body's size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// The transport could not read the properties, and left them out together with the body.
    #[error("properties of the message cannot be read: {0}")]
    Properties(&'static str),
    /// The body grows above the limit when it is decompressed; in bytes.
    #[error("decompressed body is above celery.max_body_bytes ({limit})")]
    Inflated {
        /// The limit.
        limit: usize,
    },
    /// The body's compression cannot be undone.
    #[error("body does not decompress: {0}")]
    Compression(String),
    /// The content type is not accepted.
    #[error("content type `{0}` is not accepted by celery.accept_content")]
    ContentType(String),
    /// The body is not what its content type says.
    #[error("body does not decode: {0}")]
    Body(String),
    /// Neither a `task` header nor a body that names a task.
    #[error("message names no task")]
    NotATask,
    /// The id is missing, so its result could not be read.
    #[error("task message has no id")]
    NoId,
    /// Protocol 1 with keyword arguments that are none.
    #[error("keyword arguments are not a mapping")]
    KeywordArguments,
    /// `eta` or `expires` is not an ISO 8601 time.
    #[error("`{header}` is not an ISO 8601 time: {value}")]
    Time {
        /// Which of the two.
        header: &'static str,
        /// Its content.
        value: String,
    },
    /// It has an id, but not the form of a task.
    #[error("{0}")]
    Malformed(&'static str),
}

impl Reason {
    /// Disposition of such a message in Python. Where a Python worker would die (no id, wrong form),
    /// the message is rejected.
    #[must_use]
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Body(_) | Self::Compression(_) => Disposition::Ack,
            _ => Disposition::Reject,
        }
    }
}

/// A refused message: why, and what of it could be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    /// Why.
    pub reason: Reason,
    /// The task's name, where the headers have one. An unknown task is reported as such,
    /// whatever else is wrong with the message.
    pub task: Option<String>,
    /// The task's id, likewise.
    pub id: Option<String>,
    /// Queue for the result.
    pub reply_to: Option<String>,
}
