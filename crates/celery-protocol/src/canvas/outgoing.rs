//! A task to send: its message and its route.

use chrono::{DateTime, TimeDelta, Utc};
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use serde_json::{Map, Value, json};

use super::signature::{names, text};
use super::{Call, Error, Signature};
use crate::message::JSON;
use crate::{Headers, Properties, RawMessage, isoformat, repr, time, weight};

/// Maximum number of JSON levels in a body. serde_json, and therefore a worker like this one, does not read deeper
/// ones.
const MAX_LEVELS: usize = 120;

/// Destination of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// The default queue.
    Default,
    /// A queue.
    Queue(String),
    /// An exchange.
    Exchange {
        /// Name of the exchange.
        name: String,
        /// The routing key.
        routing_key: String,
    },
}

/// A message and its destination.
#[derive(Debug, Clone, PartialEq)]
pub struct Outgoing {
    /// The complete protocol 2 message.
    pub message: RawMessage,
    /// Destination of the message.
    pub route: Route,
}

impl Outgoing {
    /// Creates the message of a single task, as Python's `send_task` does, with every header.
    pub(super) fn new(
        task: &str,
        id: &str,
        args: &[Value],
        kwargs: &Map<String, Value>,
        options: &Map<String, Value>,
        call: &Call<'_>,
    ) -> Result<Self, Error> {
        match options.get("serializer") {
            None | Some(Value::Null) => {}
            Some(Value::String(name)) if name == "json" || name == JSON => {}
            Some(other) => {
                return Err(Error::Serializer {
                    task: task.to_owned(),
                    serializer: other
                        .as_str()
                        .map_or_else(|| other.to_string(), str::to_owned),
                });
            }
        }
        let value = |name: &str| options.get(name).cloned().unwrap_or_default();
        let stamped = options
            .get("stamped_headers")
            .filter(|list| list.is_array());
        // Each stamp is copied once, even if it is named several times.
        let mut stamps = Map::new();
        for stamp in names(options, "stamped_headers") {
            if let (Some(value), false) = (options.get(stamp), stamps.contains_key(stamp)) {
                stamps.insert(stamp.to_owned(), value.clone());
            }
        }
        let (expires, expiration) = expires(options, call.now)?;
        let headers = [
            ("lang", json!("py")),
            ("task", json!(task)),
            ("id", json!(id)),
            ("shadow", value("shadow")),
            ("eta", eta(options, call.now)?),
            ("expires", expires),
            ("group", value("group_id")),
            ("group_index", value("group_index")),
            (
                "retries",
                options.get("retries").cloned().unwrap_or(json!(0)),
            ),
            (
                "timelimit",
                json!([value("time_limit"), value("soft_time_limit")]),
            ),
            (
                "root_id",
                json!(text(options, "root_id").or(call.root_id).unwrap_or(id)),
            ),
            (
                "parent_id",
                json!(text(options, "parent_id").or(call.parent_id)),
            ),
            ("argsrepr", json!(repr::shorten(&repr::tuple(args)))),
            ("kwargsrepr", json!(repr::shorten(&repr::dict(kwargs)))),
            ("origin", json!(call.origin)),
            ("ignore_result", value("ignore_result")),
            (
                "replaced_task_nesting",
                options
                    .get("replaced_task_nesting")
                    .cloned()
                    .unwrap_or(json!(0)),
            ),
            ("stamped_headers", stamped.cloned().unwrap_or_default()),
            ("stamps", stamps.into()),
        ]
        .map(|(name, value)| (name.to_owned(), value));
        let mut headers = Headers::from_iter(headers);
        if let Some(Value::Object(more)) = options.get("headers") {
            headers.extend(more.clone());
        }
        let follows = FollowUps::of(options);
        let arguments = args.iter().chain(kwargs.values());
        // The depth includes the body and the list or mapping in it.
        let mut values = arguments.chain(follows.values());
        let is_flat = values.all(|value| is_within(value, MAX_LEVELS - 2));
        if !is_flat {
            return Err(Error::Depth);
        }
        let transient = matches!(options.get("delivery_mode"), Some(mode) if *mode == 1 || *mode == "transient");
        Ok(Self {
            message: RawMessage {
                headers,
                properties: Properties {
                    content_type: Some(JSON.into()),
                    content_encoding: Some("utf-8".into()),
                    correlation_id: Some(id.to_owned()),
                    reply_to: Some(
                        text(options, "reply_to")
                            .unwrap_or(call.reply_to)
                            .to_owned(),
                    ),
                    priority: Some(priority(options)),
                    expiration,
                    persistent: !transient,
                    app_id: text(options, "app_id").map(str::to_owned),
                    message_id: text(options, "message_id").map(str::to_owned),
                    message_type: text(options, "type").map(str::to_owned),
                },
                // Not compressed, even if `compression` is set: every receiver can read it.
                body: serde_json::to_vec(&(args, kwargs, &follows)).unwrap_or_default(),
            },
            route: route(options)?,
        })
    }

    /// Memory of the message, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.message.body.len() + weight::of_map(&self.message.headers)
    }

    /// The message of the task that polls a chord if the backend does not count its parts, as a client sends it: to the
    /// queue of the body, due in one second.
    pub(super) fn chord_unlock(
        id: &str,
        group_id: &str,
        header: Vec<Value>,
        body: &Signature,
        call: &Call<'_>,
    ) -> Result<Self, Error> {
        const FIRST_POLL_SECONDS: u32 = 1;
        let mut options = Map::new();
        for name in ["queue", "exchange", "routing_key", "priority", "headers"] {
            if let Some(value) = body.options.get(name) {
                options.insert(name.to_owned(), value.clone());
            }
        }
        options.insert("countdown".into(), FIRST_POLL_SECONDS.into());
        options.insert("ignore_result".into(), true.into());
        let kwargs = [
            ("interval", Value::Null),
            ("max_retries", Value::Null),
            ("result", header.into()),
            // Python's own retries of this message need this option.
            (
                "_chord_unlock_exchange_type",
                text(&body.options, "exchange_type")
                    .unwrap_or("direct")
                    .into(),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value));
        let args = [json!(group_id), body.to_json()];
        let kwargs = Map::from_iter(kwargs);
        Self::new("celery.chord_unlock", id, &args, &kwargs, &options, call)
    }
}

/// Callbacks, errbacks, chain and chord of a task, the third element of a body; serialized without a copy.
struct FollowUps<'a>([(&'static str, Option<&'a Value>); 4]);

impl<'a> FollowUps<'a> {
    fn of(options: &'a Map<String, Value>) -> Self {
        let fields = [
            ("callbacks", "link"),
            ("errbacks", "link_error"),
            ("chain", "chain"),
            ("chord", "chord"),
        ];
        Self(fields.map(|(field, option)| (field, options.get(option))))
    }

    fn values(&self) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter_map(|(_, value)| *value)
    }
}

impl Serialize for FollowUps<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (field, value) in &self.0 {
            match value {
                // A list, or a single signature that counts as a list with one element.
                Some(value @ Value::Array(_)) => map.serialize_entry(field, value)?,
                Some(one) if field.ends_with("backs") && !one.is_null() => {
                    map.serialize_entry(field, &[one])?;
                }
                other => map.serialize_entry(field, other)?,
            }
        }
        map.end()
    }
}

fn priority(options: &Map<String, Value>) -> u8 {
    let priority = options.get("priority").and_then(Value::as_u64).unwrap_or(0);
    u8::try_from(priority).unwrap_or(u8::MAX)
}

fn route(options: &Map<String, Value>) -> Result<Route, Error> {
    for what in ["queue", "exchange", "routing_key"] {
        if !matches!(
            options.get(what),
            None | Some(Value::Null | Value::String(_))
        ) {
            let expected = "a name";
            return Err(Error::Form { what, expected });
        }
    }
    // Python goes through the exchange only if it has both.
    Ok(
        match (
            text(options, "exchange"),
            text(options, "routing_key"),
            text(options, "queue"),
        ) {
            (Some(name), Some(routing_key), _) => Route::Exchange {
                name: name.to_owned(),
                routing_key: routing_key.to_owned(),
            },
            (_, _, Some(queue)) => Route::Queue(queue.to_owned()),
            (_, _, None) => Route::Default,
        },
    )
}

fn seconds(value: &Value) -> Option<TimeDelta> {
    let milliseconds = value.as_f64()? * 1000.0;
    #[expect(clippy::cast_possible_truncation, reason = "casts saturate")]
    TimeDelta::try_milliseconds(milliseconds as i64)
}

fn number(what: &'static str) -> Error {
    Error::Form {
        what,
        expected: "a number of seconds or an ISO 8601 time",
    }
}

/// Value of `eta` from `countdown`, which takes precedence as in Python, or from the option `eta`.
fn eta(options: &Map<String, Value>, now: DateTime<Utc>) -> Result<Value, Error> {
    match options.get("countdown") {
        None | Some(Value::Null) => {}
        Some(countdown) => {
            let delay = seconds(countdown).ok_or(number("countdown"))?;
            if !delay.is_zero() {
                let eta = later(now, delay).ok_or(number("countdown"))?;
                return Ok(json!(isoformat(eta)));
            }
        }
    }
    match options.get("eta") {
        None | Some(Value::Null) => Ok(Value::Null),
        Some(Value::String(eta)) if time::parse(eta).is_some() => Ok(json!(eta)),
        Some(_) => Err(number("eta")),
    }
}

/// The time after a delay; none if it is outside of the calendar that readers know.
fn later(now: DateTime<Utc>, delay: TimeDelta) -> Option<DateTime<Utc>> {
    now.checked_add_signed(delay).filter(time::is_in_calendar)
}

/// `expires` as a time, and as milliseconds from now, after which the broker drops the message.
fn expires(
    options: &Map<String, Value>,
    now: DateTime<Utc>,
) -> Result<(Value, Option<String>), Error> {
    let (header, left) = match options.get("expires") {
        None | Some(Value::Null) => return Ok((Value::Null, None)),
        Some(Value::String(text)) => {
            let at = time::parse(text).ok_or(number("expires"))?;
            (json!(text), at - now)
        }
        Some(value) => {
            let left = seconds(value).ok_or(number("expires"))?;
            let at = later(now, left).ok_or(number("expires"))?;
            (json!(isoformat(at)), left)
        }
    };
    // A longer time than AMQP can express counts as unlimited.
    let left = left.num_milliseconds().clamp(0, u32::MAX.into());
    Ok((header, Some(left.to_string())))
}

/// True if a value is nested no deeper than `levels`.
fn is_within(value: &Value, levels: usize) -> bool {
    let Some(levels) = levels.checked_sub(1) else {
        return false;
    };
    match value {
        Value::Array(values) => values.iter().all(|value| is_within(value, levels)),
        Value::Object(map) => map.values().all(|value| is_within(value, levels)),
        _ => true,
    }
}
