//! Task messages: protocol 2 (headers) and protocol 1 (everything in the body).

use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
use serde_json::{Map, Value, json};

use super::RawMessage;

/// The only serializer that is accepted.
pub const JSON: &str = "application/json";

/// A task to run, as a producer asked for it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TaskMessage {
    /// Id of the task, by which its result is found.
    pub id: String,
    /// Name of the task.
    pub task: String,
    /// Positional arguments; a list, unless the producer is broken.
    pub args: Value,
    /// Keyword arguments; a mapping, unless the producer is broken.
    pub kwargs: Value,
    /// What follows the task.
    pub embed: Embed,
    /// First task of the workflow.
    pub root_id: Option<String>,
    /// Task that sent this one.
    pub parent_id: Option<String>,
    /// Group of the task.
    pub group: Option<String>,
    /// Place in the group, from 0.
    pub group_index: Option<i64>,
    /// How often the task was retried before.
    pub retries: u32,
    /// Not to be run before this time.
    pub eta: Option<DateTime<Utc>>,
    /// Not to be run after this time.
    pub expires: Option<DateTime<Utc>>,
    /// Hard and soft time limit, in seconds.
    pub time_limit: (Option<f64>, Option<f64>),
    /// Name to show instead of `task`.
    pub shadow: Option<String>,
    /// `repr` of the arguments.
    pub argsrepr: Option<String>,
    /// `repr` of the keyword arguments.
    pub kwargsrepr: Option<String>,
    /// Process that sent the message.
    pub origin: Option<String>,
    /// Whether no result is wanted; `None` leaves it to the task.
    pub ignore_result: Option<bool>,
    /// Queue for `rpc://` results.
    pub reply_to: Option<String>,
    /// Correlation id for `rpc://` results: the message's, or the task's id.
    pub correlation_id: String,
    /// Priority of the message.
    pub priority: Option<u8>,
    /// Everything that the producer put beside the arguments, known or not: the headers, or, with
    /// protocol 1, the body's other fields. A retry sends them again.
    pub headers: Map<String, Value>,
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
    /// told apart, as Python hands both on as they are.
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
    /// The message for the next run of a task that is retried: the same one, due at `eta`. What the
    /// broker added to `raw` on its way is left out.
    #[must_use]
    pub fn retry(&self, raw: &RawMessage, eta: DateTime<Utc>) -> RawMessage {
        let mut headers = self.headers.clone();
        headers
            .retain(|name, _| !name.starts_with("x-death") && !name.starts_with("x-first-death"));
        headers.insert("retries".into(), json!(self.retries.saturating_add(1)));
        headers.insert("eta".into(), json!(super::isoformat(eta)));
        // Python's rule.
        let parent = self.parent_id.as_ref().unwrap_or(&self.id);
        headers.insert("parent_id".into(), json!(parent));
        RawMessage {
            headers,
            properties: raw.properties.clone(),
            body: raw.body.clone(),
        }
    }

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

    /// Name to show: `shadow`, or the task's.
    #[must_use]
    pub fn display_name(&self) -> &str {
        self.shadow.as_deref().unwrap_or(&self.task)
    }
}

/// What becomes of a message that is no usable task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Taken off the queue for good.
    Ack,
    /// Rejected without requeue: to the dead-letter exchange where the queue has one.
    Reject,
}

/// Why a message is no usable task.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Reason {
    /// The body is above the limit; both in bytes.
    #[error("body of {size} bytes is above celery.max_body_bytes ({limit})")]
    TooLarge {
        /// The body's size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// The body is compressed, which this worker cannot undo.
    #[error("body is compressed with `{0}`, which is not supported")]
    Compressed(String),
    /// The content type is not accepted.
    #[error("content type `{0}` is not accepted, only `{JSON}`")]
    ContentType(String),
    /// The body is no JSON.
    #[error("body does not decode: {0}")]
    Body(String),
    /// Neither a `task` header nor a body that names a task.
    #[error("message names no task")]
    NotATask,
    /// No id, so nobody could ask for a result.
    #[error("task message has no id")]
    NoId,
    /// `eta` or `expires` is no ISO 8601 time.
    #[error("`{header}` is no ISO 8601 time: {value}")]
    Time {
        /// Which of the two.
        header: &'static str,
        /// What it holds.
        value: String,
    },
    /// It has an id, but not the form of a task.
    #[error("{0}")]
    Malformed(&'static str),
}

impl Reason {
    /// What Python does with such a message. Where a Python worker would die (no id, wrong form),
    /// the message is rejected.
    #[must_use]
    pub fn fate(&self) -> Fate {
        match self {
            Self::Body(_) => Fate::Ack,
            _ => Fate::Reject,
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
    /// Where a result could be sent.
    pub reply_to: Option<String>,
}

/// Reads a task message of either protocol.
///
/// # Errors
/// [`Refused`], for everything that is no task; see [`Reason::fate`].
pub fn decode(raw: &RawMessage, max_body_bytes: usize) -> Result<TaskMessage, Refused> {
    let named = text(&raw.headers, "task");
    let id = text(&raw.headers, "id");
    let read = || {
        let body = body(raw, max_body_bytes)?;
        match (&named, body) {
            (Some(task), Value::Array(parts)) => protocol_2(raw, task, id.clone(), parts),
            // A protocol 1 body under protocol 2 headers: the headers win.
            (_, Value::Object(fields)) if named.is_some() || fields.contains_key("task") => {
                protocol_1(raw, fields)
            }
            (Some(_), _) if id.is_none() => Err(Reason::NoId),
            (Some(_), _) => Err(Reason::Malformed("body is neither a list nor a mapping")),
            (None, _) => Err(Reason::NotATask),
        }
    };
    read().map_err(|reason| Refused {
        reason,
        task: named.clone(),
        id: id.clone(),
        reply_to: raw.properties.reply_to.clone(),
    })
}

fn body(raw: &RawMessage, max_body_bytes: usize) -> Result<Value, Reason> {
    if raw.body.len() > max_body_bytes {
        return Err(Reason::TooLarge {
            size: raw.body.len(),
            limit: max_body_bytes,
        });
    }
    if let Some(method) = text(&raw.headers, "compression") {
        return Err(Reason::Compressed(method));
    }
    match raw.properties.content_type.as_deref() {
        Some(JSON) => {}
        other => return Err(Reason::ContentType(other.unwrap_or_default().to_owned())),
    }
    serde_json::from_slice(&raw.body).map_err(|e| Reason::Body(e.to_string()))
}

fn protocol_2(
    raw: &RawMessage,
    task: &str,
    id: Option<String>,
    parts: Vec<Value>,
) -> Result<TaskMessage, Reason> {
    let id = id.ok_or(Reason::NoId)?;
    let [args, kwargs, embed] = <[Value; 3]>::try_from(parts)
        .map_err(|_| Reason::Malformed("body is no list of args, kwargs and embed"))?;
    let mut embed = match embed {
        Value::Object(embed) => embed,
        Value::Null => Map::new(),
        _ => return Err(Reason::Malformed("the body's third element is no mapping")),
    };
    let mut message = common(raw, raw.headers.clone(), id, task.to_owned())?;
    message.args = args;
    message.kwargs = kwargs;
    message.embed = Embed::take(&mut embed);
    Ok(message)
}

fn protocol_1(raw: &RawMessage, mut fields: Map<String, Value>) -> Result<TaskMessage, Reason> {
    let args = fields
        .remove("args")
        .unwrap_or_else(|| Value::Array(Vec::new()));
    let kwargs = fields
        .remove("kwargs")
        .unwrap_or_else(|| Value::Object(Map::new()));
    let embed = Embed {
        // Protocol 1 has none.
        chain: None,
        ..Embed::take(&mut fields)
    };
    if let Some(group) = fields.remove("taskset") {
        fields.entry("group").or_insert(group);
    }
    fields.extend(raw.headers.clone());
    let task = text(&fields, "task").ok_or(Reason::NotATask)?;
    let id = text(&fields, "id").ok_or(Reason::NoId)?;
    if !kwargs.is_object() {
        return Err(Reason::Malformed("keyword arguments are no mapping"));
    }
    let mut message = common(raw, fields, id, task)?;
    message.args = args;
    message.kwargs = kwargs;
    message.embed = embed;
    Ok(message)
}

fn common(
    raw: &RawMessage,
    all: Map<String, Value>,
    id: String,
    task: String,
) -> Result<TaskMessage, Reason> {
    let headers = &all;
    Ok(TaskMessage {
        root_id: text(headers, "root_id"),
        parent_id: text(headers, "parent_id"),
        group: text(headers, "group"),
        group_index: headers.get("group_index").and_then(Value::as_i64),
        retries: headers
            .get("retries")
            .and_then(Value::as_u64)
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(0),
        eta: time(headers, "eta")?,
        expires: time(headers, "expires")?,
        time_limit: time_limit(headers)?,
        shadow: text(headers, "shadow"),
        argsrepr: text(headers, "argsrepr"),
        kwargsrepr: text(headers, "kwargsrepr"),
        origin: text(headers, "origin"),
        ignore_result: headers.get("ignore_result").and_then(Value::as_bool),
        reply_to: raw
            .properties
            .reply_to
            .clone()
            .filter(|queue| !queue.is_empty()),
        correlation_id: raw
            .properties
            .correlation_id
            .clone()
            .filter(|correlation| !correlation.is_empty())
            .unwrap_or_else(|| id.clone()),
        priority: raw.properties.priority,
        id,
        task,
        args: Value::Null,
        kwargs: Value::Null,
        embed: Embed::default(),
        headers: all,
    })
}

fn text(headers: &Map<String, Value>, key: &str) -> Option<String> {
    headers
        .get(key)
        .and_then(Value::as_str)
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
}

fn time_limit(headers: &Map<String, Value>) -> Result<(Option<f64>, Option<f64>), Reason> {
    match headers.get("timelimit") {
        None | Some(Value::Null) => Ok((None, None)),
        Some(Value::Array(pair)) if pair.len() == 2 => Ok((pair[0].as_f64(), pair[1].as_f64())),
        Some(_) => Err(Reason::Malformed("`timelimit` is no pair")),
    }
}

fn time(
    headers: &Map<String, Value>,
    header: &'static str,
) -> Result<Option<DateTime<Utc>>, Reason> {
    match headers.get(header) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => match parse_time(text) {
            Some(time) => Ok(Some(time)),
            None => Err(Reason::Time {
                header,
                value: text.clone(),
            }),
        },
        Some(other) => Err(Reason::Time {
            header,
            value: other.to_string(),
        }),
    }
}

/// ISO 8601 with an offset, with `Z`, or without either, which means UTC.
pub(super) fn parse_time(text: &str) -> Option<DateTime<Utc>> {
    let text = text.replacen(' ', "T", 1);
    DateTime::parse_from_str(&text, "%Y-%m-%dT%H:%M:%S%.f%#z")
        .or_else(|_| DateTime::parse_from_rfc3339(&text))
        .map(|time| time.to_utc())
        .ok()
        .or_else(|| {
            ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M"]
                .iter()
                .find_map(|format| NaiveDateTime::parse_from_str(&text, format).ok())
                .or_else(|| {
                    NaiveDate::parse_from_str(&text, "%Y-%m-%d")
                        .ok()?
                        .and_hms_opt(0, 0, 0)
                })
                .map(|naive| naive.and_utc())
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Properties;
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    fn raw(headers: Value, body: &Value) -> RawMessage {
        RawMessage {
            headers: serde_json::from_value(headers).unwrap_or_default(),
            properties: Properties {
                content_type: Some(JSON.into()),
                content_encoding: Some("utf-8".into()),
                correlation_id: Some("8f8de068".into()),
                reply_to: Some("5dba047d".into()),
                ..Properties::default()
            },
            body: body.to_string().into_bytes(),
        }
    }

    /// As captured from a Celery 5.7 producer.
    fn captured() -> RawMessage {
        raw(
            json!({
                "lang": "py", "task": "t.f", "id": "8f8de068", "shadow": null, "eta": null,
                "expires": null, "group": null, "group_index": null, "retries": 0,
                "timelimit": [null, null], "root_id": "8f8de068", "parent_id": null,
                "argsrepr": "[549362609]", "kwargsrepr": "{}", "origin": "gen30460@vm",
                "ignore_result": null, "replaced_task_nesting": 0, "stamped_headers": null,
                "stamps": {},
            }),
            &json!([[549362609], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]),
        )
    }

    fn refused(raw: &RawMessage) -> Refused {
        decode(raw, 1000).err().unwrap_or(Refused {
            reason: Reason::Malformed("was accepted"),
            task: None,
            id: None,
            reply_to: None,
        })
    }

    #[test]
    fn protocol_2_as_captured() {
        let message = decode(&captured(), 1000);
        assert_eq!(
            message,
            Ok(TaskMessage {
                id: "8f8de068".into(),
                task: "t.f".into(),
                args: json!([549362609]),
                kwargs: json!({}),
                headers: captured().headers,
                root_id: Some("8f8de068".into()),
                argsrepr: Some("[549362609]".into()),
                kwargsrepr: Some("{}".into()),
                origin: Some("gen30460@vm".into()),
                reply_to: Some("5dba047d".into()),
                correlation_id: "8f8de068".into(),
                ..TaskMessage::default()
            })
        );
    }

    #[test]
    fn what_follows_is_read_and_written_alike() {
        let embed = json!({"callbacks": [{"task": "a"}], "errbacks": null, "chain": [], "chord": {"task": "b"}});
        let message = raw(captured().headers.into(), &json!([[], {}, embed]));
        let read = decode(&message, 1000).unwrap_or_default().embed;
        assert_eq!(read.callbacks, [json!({"task": "a"})]);
        assert_eq!(read.chain, Some(Vec::new()));
        assert_eq!(read.to_json(), embed);
        assert_eq!(
            Embed::default().to_json(),
            json!({"callbacks": null, "errbacks": null, "chain": null, "chord": null})
        );
    }

    #[test]
    fn only_task_and_id_are_required() {
        let mut message = raw(json!({"task": "t.f", "id": "a"}), &json!([[], {}, null]));
        message.properties = Properties {
            content_type: Some(JSON.into()),
            ..Default::default()
        };
        let message = decode(&message, 1000).unwrap_or_default();
        assert_eq!(
            (message.correlation_id.as_str(), message.reply_to),
            ("a", None)
        );
    }

    #[test]
    fn protocol_1() {
        let body = json!({"task": "t.f", "id": "a", "args": [1], "retries": 2, "taskset": "g",
                          "eta": "2026-11-24T04:13:55.482591"});
        let message = decode(&raw(json!({}), &body), 1000).unwrap_or_default();
        assert_eq!(
            (message.task.as_str(), message.args, message.kwargs),
            ("t.f", json!([1]), json!({}))
        );
        assert_eq!((message.retries, message.group), (2, Some("g".into())));
        assert!(message.eta.is_some());
    }

    #[rstest]
    #[case::not_json(b"{", Fate::Ack)]
    #[case::not_utf8(b"[\"\xff\"]", Fate::Ack)]
    #[case::empty(b"", Fate::Ack)]
    #[case::null(b"null", Fate::Reject)]
    #[case::two_elements(b"[[], {}]", Fate::Reject)]
    #[case::embed_a_list(b"[[], {}, []]", Fate::Reject)]
    fn bad_bodies(#[case] body: &[u8], #[case] fate: Fate) {
        let mut message = captured();
        message.body = body.into();
        let refused = refused(&message);
        assert_eq!(refused.reason.fate(), fate, "{refused}");
        assert_eq!(refused.id.as_deref(), Some("8f8de068"));
    }

    #[rstest]
    #[case::no_task(json!({"id": "a"}), Reason::NotATask)]
    #[case::no_id(json!({"task": "t"}), Reason::NoId)]
    #[case::id_a_number(json!({"task": "t", "id": 7}), Reason::NoId)]
    #[case::eta(json!({"task": "t", "id": "a", "eta": 17.5}), Reason::Time { header: "eta", value: "17.5".into() })]
    #[case::expires(json!({"task": "t", "id": "a", "expires": "soon"}), Reason::Time { header: "expires", value: "soon".into() })]
    #[case::timelimit(json!({"task": "t", "id": "a", "timelimit": 5}), Reason::Malformed("`timelimit` is no pair"))]
    #[case::compression(json!({"task": "t", "id": "a", "compression": "gzip"}), Reason::Compressed("gzip".into()))]
    fn bad_headers(#[case] headers: Value, #[case] reason: Reason) {
        let refused = refused(&raw(headers, &json!([[], {}, {}])));
        assert_eq!(refused.reason, reason);
        assert_eq!(refused.reason.fate(), Fate::Reject);
    }

    #[rstest]
    #[case(None)]
    #[case(Some("application/x-python-serialize"))]
    #[case(Some("text/plain"))]
    fn content_types(#[case] content_type: Option<&str>) {
        let mut message = captured();
        message.properties.content_type = content_type.map(str::to_owned);
        assert!(matches!(refused(&message).reason, Reason::ContentType(_)));
    }

    #[test]
    fn large_bodies_are_not_read() {
        let refused = decode(&captured(), 10).err().map(|r| r.reason);
        assert!(matches!(refused, Some(Reason::TooLarge { limit: 10, .. })));
    }

    #[rstest]
    #[case("2026-11-24T04:13:55.482591+00:00", 1_795_493_635)]
    #[case("2026-11-24T06:13:55+02:00", 1_795_493_635)]
    #[case("2026-11-24T04:13:55Z", 1_795_493_635)]
    #[case("2026-11-24T04:13:55", 1_795_493_635)]
    #[case("2026-11-24 04:13:55", 1_795_493_635)]
    #[case("2026-11-24", 1_795_478_400)]
    fn times(#[case] text: &str, #[case] timestamp: i64) {
        assert_eq!(parse_time(text).map(|t| t.timestamp()), Some(timestamp));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut message = captured();
            message.body = body;
            let _ = decode(&message, 1000);
            message.headers.clear();
            let _ = decode(&message, 1000);
        }

        #[test]
        fn no_time_makes_it_panic(text in ".{0,40}") {
            let _ = parse_time(&text);
        }
    }
}
