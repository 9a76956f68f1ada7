//! The message for the next run of a task that is retried.
//!
//! It is a complete protocol 2 message with the id of the run before it. Whatever its producer put
//! into the first one is in it again: the body as it was, byte for byte, the application headers
//! with their types, the stamps.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::content::JSON;
use super::message::{Protocol, TaskMessage};
use super::{Properties, RawMessage, isoformat, repr};

/// Headers that RabbitMQ adds to dead letters. It would take a message that has them for one that
/// goes round in circles.
const DEAD_LETTER_HEADERS: [&str; 7] = [
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
];

/// What is different in the next run, as `Task.retry` takes it. Nothing by default.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Changes {
    /// Another queue; without one it goes the way that the task came.
    pub queue: Option<String>,
    /// Other positional arguments.
    pub args: Option<Vec<Value>>,
    /// Other keyword arguments.
    pub kwargs: Option<Map<String, Value>>,
    /// Another end of its usefulness.
    pub expires: Option<DateTime<Utc>>,
    /// Another priority.
    pub priority: Option<u8>,
    /// Another hard time limit, in seconds.
    pub time_limit: Option<f64>,
    /// Another soft time limit, in seconds.
    pub soft_time_limit: Option<f64>,
    /// Whether no result is wanted.
    pub ignore_result: Option<bool>,
    /// Another name to show.
    pub shadow: Option<String>,
    /// Further headers, or other values for those that the producer set.
    pub headers: Map<String, Value>,
}

impl TaskMessage {
    /// The message of the task's next run: the same as `raw`, which this one was decoded from, due
    /// at `eta` (at once where there is none) and with the `changes`. What the broker added on its
    /// way is left out.
    #[must_use]
    pub fn retry(
        &self,
        raw: &RawMessage,
        eta: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
        changes: &Changes,
    ) -> RawMessage {
        let expires = changes.expires.or(self.expires);
        let properties = Properties {
            correlation_id: Some(self.id.clone()),
            priority: changes.priority.or(self.priority),
            // What is left of its time, as a new message gets it; never less than nothing.
            expiration: expires
                .map(|expires| (expires - now).num_milliseconds().max(0).to_string()),
            persistent: true,
            ..raw.properties.clone()
        };
        let mut message = RawMessage {
            headers: self.next_headers(raw, eta, changes),
            properties,
            body: raw.body.clone(),
        };
        if self.protocol == Protocol::One || changes.args.is_some() || changes.kwargs.is_some() {
            self.write_body(&mut message, changes);
        }
        message
    }

    fn next_headers(
        &self,
        raw: &RawMessage,
        eta: Option<DateTime<Utc>>,
        changes: &Changes,
    ) -> Map<String, Value> {
        let kept = |name: &str| self.headers.get(name).cloned().unwrap_or_default();
        // As the producer wrote it, where it still holds.
        let expires = match (changes.expires, kept("expires")) {
            (None, text @ (Value::String(_) | Value::Null)) => text,
            (changed, _) => json!(changed.or(self.expires).map(isoformat)),
        };
        let limits = [
            (changes.time_limit, self.time_limit.0, 0),
            (changes.soft_time_limit, self.time_limit.1, 1),
        ]
        .map(|(changed, known, place)| match (changed, known) {
            (Some(changed), _) => json!(changed),
            // With a fraction only where there was one.
            (None, Some(_)) => kept("timelimit").get(place).cloned().unwrap_or_default(),
            (None, None) => Value::Null,
        });
        let repr_of = |changed: Option<String>, known: &Option<String>, current: &Value| {
            changed
                .or_else(|| known.clone().filter(|text| !text.is_empty()))
                .unwrap_or_else(|| repr::shorten(&repr::value(current)))
        };
        let args = changes.args.as_deref().map(repr::tuple);
        let kwargs = changes.kwargs.as_ref().map(repr::dict);

        let mut headers = raw.headers.clone();
        headers.retain(|name, _| !DEAD_LETTER_HEADERS.contains(&name.as_str()));
        let own = [
            ("lang", json!("py")),
            ("task", json!(self.task)),
            ("id", json!(self.id)),
            (
                "shadow",
                json!(changes.shadow.as_ref().or(self.shadow.as_ref())),
            ),
            ("eta", json!(eta.map(isoformat))),
            ("expires", expires),
            ("group", kept("group")),
            ("group_index", kept("group_index")),
            ("retries", json!(self.retries.saturating_add(1))),
            ("timelimit", json!(limits)),
            ("root_id", json!(self.root_id.as_ref().unwrap_or(&self.id))),
            // Its own id where it has no parent: Python takes the run that retries for one.
            (
                "parent_id",
                json!(self.parent_id.as_ref().unwrap_or(&self.id)),
            ),
            ("argsrepr", json!(repr_of(args, &self.argsrepr, &self.args))),
            (
                "kwargsrepr",
                json!(repr_of(kwargs, &self.kwargsrepr, &self.kwargs)),
            ),
            ("origin", kept("origin")),
            (
                "ignore_result",
                changes
                    .ignore_result
                    .map_or_else(|| kept("ignore_result"), Value::from),
            ),
            (
                "replaced_task_nesting",
                self.headers
                    .get("replaced_task_nesting")
                    .cloned()
                    .unwrap_or_else(|| json!(0)),
            ),
            ("stamped_headers", kept("stamped_headers")),
            (
                "stamps",
                self.headers
                    .get("stamps")
                    .cloned()
                    .unwrap_or_else(|| json!({})),
            ),
        ];
        headers.extend(own.map(|(name, value)| (name.to_owned(), value)));
        headers.extend(changes.headers.clone());
        headers
    }

    /// Writes the body anew: JSON, not compressed.
    fn write_body(&self, message: &mut RawMessage, changes: &Changes) {
        let (args, kwargs) = match &self.typed {
            Some((args, kwargs)) => (args, kwargs),
            None => (&self.args, &self.kwargs),
        };
        let args = changes
            .args
            .as_ref()
            .map_or_else(|| args.clone(), |args| json!(args));
        let kwargs = changes
            .kwargs
            .as_ref()
            .map_or_else(|| kwargs.clone(), |kwargs| json!(kwargs));
        message.body = json!([args, kwargs, self.embed.to_json()])
            .to_string()
            .into_bytes();
        message.properties.content_type = Some(JSON.into());
        message.properties.content_encoding = Some("utf-8".into());
        message.headers.remove("compression");
    }
}
