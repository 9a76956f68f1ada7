//! Task messages: protocol 2 (headers) and protocol 1 (everything in the body).

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::content::{self, Accept};
use super::{Headers, RawMessage, envelope, repr, time};

pub use super::content::JSON;

/// Maximum number of characters of a text in an outline.
const OUTLINED_CHARS: usize = 1000;

/// How a message is laid out.
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
    /// How the message was laid out.
    pub protocol: Protocol,
    /// Positional arguments; a list, unless the producer is broken. Values that JSON has no form
    /// for (times, UUIDs, bytes …) are text.
    pub args: Value,
    /// Keyword arguments; a mapping, unless the producer is broken. With text likewise.
    pub kwargs: Value,
    /// Both as they came, in kombu's envelopes, where that is something else.
    pub typed: Option<(Value, Value)>,
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
    /// `repr` of the arguments, as the producer wrote it; none with protocol 1.
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

/// What becomes of a message that is no usable task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
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
    /// No id, so nobody could ask for a result.
    #[error("task message has no id")]
    NoId,
    /// Protocol 1 with keyword arguments that are none.
    #[error("keyword arguments are no mapping")]
    KeywordArguments,
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
    /// Where a result could be sent.
    pub reply_to: Option<String>,
}

/// Reads a task message of either protocol.
///
/// # Errors
/// [`Refused`], for everything that is no task; see [`Reason::disposition`].
pub fn decode(raw: &RawMessage, accept: &Accept) -> Result<TaskMessage, Refused> {
    let mut named = Named::of(&raw.headers);
    read(raw, accept, &mut named).map_err(|reason| {
        // Python decompresses a body before it looks at anything else.
        if matches!(reason, Reason::Compression(_)) {
            named = Named::default();
        }
        named.refused(raw, reason)
    })
}

/// Reads a task message from its headers, without its body.
///
/// # Errors
/// [`Refused`] for a message whose headers do not describe a task, for example with protocol 1.
pub fn head(raw: &RawMessage) -> Result<TaskMessage, Refused> {
    let named = Named::of(&raw.headers);
    let mut message = match common(raw, &named, raw.headers.clone()) {
        Ok(message) => message,
        Err(reason) => return Err(named.refused(raw, reason)),
    };
    message.argsrepr = text(&raw.headers, "argsrepr");
    message.kwargsrepr = text(&raw.headers, "kwargsrepr");
    Ok(message)
}

/// The time of an `eta`, if it is valid.
pub fn eta(text: &str) -> Option<DateTime<Utc>> {
    time::parse(text)
}

/// A message that is refused before it is read.
#[must_use]
pub fn refused(raw: &RawMessage, reason: Reason) -> Refused {
    Named::of(&raw.headers).refused(raw, reason)
}

/// What a message says that it is.
#[derive(Default)]
struct Named {
    task: Option<String>,
    id: Option<String>,
}

impl Named {
    fn refused(self, raw: &RawMessage, reason: Reason) -> Refused {
        Refused {
            reason,
            task: self.task,
            id: self.id,
            reply_to: raw.properties.reply_to.clone(),
        }
    }

    fn of(fields: &Map<String, Value>) -> Self {
        // Some producers count their tasks.
        let number = |id: &Value| (id.is_number() && !id.is_f64()).then(|| id.to_string());
        Self {
            task: text(fields, "task"),
            id: text(fields, "id").or_else(|| fields.get("id").and_then(number)),
        }
    }
}

fn read(raw: &RawMessage, accept: &Accept, named: &mut Named) -> Result<TaskMessage, Reason> {
    let body = content::inflated(raw, accept)?;
    // The header decides which protocol it is, even if its value is no name.
    let by_header = raw.headers.contains_key("task");
    if by_header && named.task.is_none() {
        return Err(Reason::NotATask);
    }
    let value = content::value(raw, &body, accept).map_err(|reason| match reason {
        // Python has to decode a message without the header to know what it is, and treats all that
        // goes wrong then alike.
        Reason::ContentType(_) if !by_header => Reason::Body(reason.to_string()),
        reason => reason,
    })?;
    match envelope::mapping(value) {
        Err(Value::Array(parts)) if by_header => protocol_2(raw, named, parts),
        Ok(fields) if by_header || fields.contains_key("task") => protocol_1(raw, named, fields),
        _ if !by_header => Err(Reason::NotATask),
        _ if named.id.is_none() => Err(Reason::NoId),
        _ => Err(Reason::Malformed("body is neither a list nor a mapping")),
    }
}

fn protocol_2(raw: &RawMessage, named: &Named, parts: Vec<Value>) -> Result<TaskMessage, Reason> {
    let mut message = common(raw, named, raw.headers.clone())?;
    let [args, kwargs, embed] = <[Value; 3]>::try_from(parts)
        .map_err(|_| Reason::Malformed("body is no list of args, kwargs and embed"))?;
    message.embed = match envelope::mapping(embed) {
        Ok(mut embed) => Embed::take(&mut embed),
        Err(other) if is_falsy(&other) => Embed::default(),
        _ => return Err(Reason::Malformed("the body's third element is no mapping")),
    };
    let repr = |name: &str| message.headers.get(name).and_then(Value::as_str);
    message.argsrepr = Some(repr("argsrepr").unwrap_or_default().to_owned());
    message.kwargsrepr = Some(repr("kwargsrepr").unwrap_or_default().to_owned());
    Ok(with_arguments(message, args, kwargs))
}

fn protocol_1(
    raw: &RawMessage,
    named: &mut Named,
    mut fields: Map<String, Value>,
) -> Result<TaskMessage, Reason> {
    // Protocol 2 headers over a protocol 1 body: the headers win. They are nothing to a body that has
    // neither a header `task` above it nor arguments in it.
    let is_hybrid = raw.headers.contains_key("task") || fields.contains_key("args");
    let args = fields.remove("args").unwrap_or_else(|| json!([]));
    let kwargs = fields.remove("kwargs").unwrap_or_else(|| json!({}));
    let embed = Embed {
        // Protocol 1 has none.
        chain: None,
        ..Embed::take(&mut fields)
    };
    if let Some(group) = fields.remove("taskset") {
        fields.entry("group").or_insert(group);
    }
    if is_hybrid {
        fields.extend(Map::clone(&raw.headers));
    }
    *named = Named::of(&fields);
    if named.task.is_none() {
        return Err(Reason::NotATask);
    }
    if envelope::mapping(kwargs.clone()).is_err() {
        return Err(Reason::KeywordArguments);
    }
    let mut message = common(raw, named, fields.into())?;
    message.protocol = Protocol::One;
    message.argsrepr = text(&message.headers, "argsrepr");
    message.kwargsrepr = text(&message.headers, "kwargsrepr");
    message.embed = embed;
    Ok(with_arguments(message, args, kwargs))
}

/// Puts the arguments into a message as a task gets them.
fn with_arguments(mut message: TaskMessage, args: Value, kwargs: Value) -> TaskMessage {
    if envelope::is_in(&args) || envelope::is_in(&kwargs) {
        message.typed = Some((args.clone(), kwargs.clone()));
    }
    message.args = match args {
        // Whatever Python can iterate over.
        Value::String(text) => text.chars().map(|c| Value::from(c.to_string())).collect(),
        other => match envelope::mapping(other) {
            Ok(map) => map.into_iter().map(|(key, _)| Value::from(key)).collect(),
            Err(other) => envelope::plain(other),
        },
    };
    message.kwargs = envelope::plain(kwargs);
    message
}

fn common(raw: &RawMessage, named: &Named, all: Headers) -> Result<TaskMessage, Reason> {
    let id = named.id.clone().ok_or(Reason::NoId)?;
    let task = named.task.clone().ok_or(Reason::NotATask)?;
    let headers = &*all;
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
        headers: all,
        ..TaskMessage::default()
    })
}

fn text(headers: &Map<String, Value>, key: &str) -> Option<String> {
    headers
        .get(key)
        .and_then(Value::as_str)
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
}

/// What Python takes for false: nothing, none or empty.
pub fn is_falsy(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn time_limit(headers: &Map<String, Value>) -> Result<(Option<f64>, Option<f64>), Reason> {
    match headers.get("timelimit") {
        None => Ok((None, None)),
        Some(other) if is_falsy(other) => Ok((None, None)),
        Some(Value::Array(pair)) if pair.len() == 2 => Ok((pair[0].as_f64(), pair[1].as_f64())),
        Some(_) => Err(Reason::Malformed("`timelimit` is no pair")),
    }
}

fn time(
    headers: &Map<String, Value>,
    header: &'static str,
) -> Result<Option<DateTime<Utc>>, Reason> {
    let Some(value) = headers.get(header).filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let written = match value {
        Value::Object(map) => match envelope::open(map) {
            // As headers of AMQP's own type, and protocol 1 fields, can be.
            Some((kind, time)) if kind == "datetime" => time.as_str(),
            _ => None,
        },
        other => other.as_str(),
    };
    match written.and_then(time::parse) {
        Some(time) => Ok(Some(time)),
        None => Err(Reason::Time {
            header,
            value: value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Properties;
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    fn with_body(body: &Value) -> RawMessage {
        RawMessage {
            headers: captured().headers,
            ..raw(json!({}), body)
        }
    }

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
        decode(raw, &Accept::json(1000)).err().unwrap_or(Refused {
            reason: Reason::Malformed("was accepted"),
            task: None,
            id: None,
            reply_to: None,
        })
    }

    #[test]
    fn protocol_2_as_captured() {
        let message = decode(&captured(), &Accept::json(1000));
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
        let message = with_body(&json!([[], {}, embed]));
        let read = decode(&message, &Accept::json(1000))
            .unwrap_or_default()
            .embed;
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
        let message = decode(&message, &Accept::json(1000)).unwrap_or_default();
        assert_eq!(
            (message.correlation_id.as_str(), message.reply_to),
            ("a", None)
        );
    }

    #[test]
    fn protocol_1() {
        let body = json!({"task": "t.f", "id": "a", "args": [1], "retries": 2, "taskset": "g",
                          "eta": "2026-11-24T04:13:55.482591"});
        let message = decode(&raw(json!({}), &body), &Accept::json(1000)).unwrap_or_default();
        assert_eq!(
            (message.task.as_str(), message.args, message.kwargs),
            ("t.f", json!([1]), json!({}))
        );
        assert_eq!((message.retries, message.group), (2, Some("g".into())));
        assert!(message.eta.is_some());
    }

    #[rstest]
    #[case::not_json(b"{", Disposition::Ack)]
    #[case::not_utf8(b"[\"\xff\"]", Disposition::Ack)]
    #[case::empty(b"", Disposition::Reject)]
    #[case::null(b"null", Disposition::Reject)]
    #[case::two_elements(b"[[], {}]", Disposition::Reject)]
    #[case::embed_a_list(b"[[], {}, [1]]", Disposition::Reject)]
    #[case::embed_an_envelope(
        br#"[[], {}, {"__type__": "bytes", "__value__": ""}]"#,
        Disposition::Reject
    )]
    #[case::an_envelope(br#"{"__type__": "bytes", "__value__": ""}"#, Disposition::Reject)]
    fn bad_bodies(#[case] body: &[u8], #[case] disposition: Disposition) {
        let mut message = captured();
        message.body = body.into();
        let refused = refused(&message);
        assert_eq!(refused.reason.disposition(), disposition, "{refused}");
        assert_eq!(refused.id.as_deref(), Some("8f8de068"));
    }

    #[rstest]
    #[case::no_task(json!({"id": "a"}), Reason::NotATask)]
    #[case::no_id(json!({"task": "t"}), Reason::NoId)]
    #[case::id_null(json!({"task": "t", "id": null}), Reason::NoId)]
    #[case::task_a_number(json!({"task": 7, "id": "a"}), Reason::NotATask)]
    #[case::eta(json!({"task": "t", "id": "a", "eta": 17.5}), Reason::Time { header: "eta", value: "17.5".into() })]
    #[case::expires(json!({"task": "t", "id": "a", "expires": "soon"}), Reason::Time { header: "expires", value: "soon".into() })]
    #[case::timelimit(json!({"task": "t", "id": "a", "timelimit": 5}), Reason::Malformed("`timelimit` is no pair"))]
    fn bad_headers(#[case] headers: Value, #[case] reason: Reason) {
        let refused = refused(&raw(headers, &json!([[], {}, {}])));
        assert_eq!(refused.reason, reason);
        assert_eq!(refused.reason.disposition(), Disposition::Reject);
    }

    #[rstest]
    #[case(None, "a text body")]
    #[case(Some("application/data"), "bytes")]
    #[case(Some("application/json"), "")]
    fn bodies_that_would_kill_python(#[case] content_type: Option<&str>, #[case] body: &str) {
        let mut message = captured();
        message.properties.content_type = content_type.map(str::to_owned);
        message.body = body.into();
        assert!(matches!(refused(&message).reason, Reason::Malformed(_)));
    }

    #[rstest]
    #[case("application/x-python-serialize")]
    #[case("application/x-msgpack")]
    #[case("text/plain")]
    fn content_types_that_are_not_accepted(#[case] content_type: &str) {
        let mut message = captured();
        message.properties.content_type = Some(content_type.into());
        assert_eq!(
            refused(&message).reason,
            Reason::ContentType(content_type.into())
        );
    }

    #[rstest]
    #[case("application/x-msgpack", b"\x93\x91\xc4\x02\xff\x00\x80\xc0", json!(["/wA="]))]
    #[case("application/x-yaml", b"[[2026-11-24], {}, null]", json!(["2026-11-24"]))]
    #[case("application/json", br#"[[{"__type__": "bytes", "__value__": "b"}], {}, {}]"#, json!(["b"]))]
    fn every_serializer(#[case] content_type: &str, #[case] body: &[u8], #[case] args: Value) {
        let mut message = captured();
        message.properties.content_type = Some(content_type.into());
        message.properties.content_encoding = Some("BINARY".into());
        message.body = body.into();
        let names = ["json", "application/x-msgpack", "yaml", "pickle"].map(str::to_owned);
        let message = decode(&message, &Accept::new(&names, 1000)).unwrap_or_default();
        assert_eq!(message.args, args);
        let typed = message.typed.unwrap_or_default();
        assert!(typed.0[0].is_object(), "{typed:?}");
    }

    #[test]
    fn protocol_1_in_a_content_type_that_is_not_accepted() {
        let mut message = captured();
        message.properties.content_type = Some("application/x-python-serialize".into());
        message.headers.clear();
        assert_eq!(refused(&message).reason.disposition(), Disposition::Ack);
    }

    #[test]
    fn an_envelope_of_an_unknown_type_does_not_decode() {
        let body = json!([[], {}, {"callbacks": [{"__type__": "set", "__value__": []}]}]);
        let refused = refused(&with_body(&body));
        assert_eq!(refused.reason.disposition(), Disposition::Ack);
    }

    #[test]
    fn what_follows_keeps_its_envelopes() {
        let signature = json!({"task": "a", "args": [{"__type__": "decimal", "__value__": "1"}]});
        let body = json!([[], {}, {"callbacks": [signature]}]);
        let message = with_body(&body);
        let message = decode(&message, &Accept::json(1000)).unwrap_or_default();
        assert_eq!(message.embed.callbacks, [signature]);
        assert_eq!(message.typed, None);
    }

    /// Python decompresses first; an unknown task is told from a known one only afterwards.
    #[test]
    fn what_does_not_decompress_is_nobodys() {
        let mut message = captured();
        message.headers.insert("compression".into(), json!("gzip"));
        let refused = refused(&message);
        assert_eq!(refused.reason.disposition(), Disposition::Ack);
        assert_eq!((refused.task, refused.id), (None, None));
    }

    #[test]
    fn header_times_of_amqps_own_type() {
        let stamp = json!({"__type__": "datetime", "__value__": "2026-11-24T04:13:55"});
        let headers = json!({"task": "t", "id": "a", "eta": stamp});
        let message = decode(&raw(headers, &json!([[], {}, {}])), &Accept::json(1000));
        let eta = message.unwrap_or_default().eta.map(|eta| eta.timestamp());
        assert_eq!(eta, Some(1_795_493_635));
    }

    #[test]
    fn protocol_1_that_is_wrong_is_known_by_name() {
        for (body, reason) in [
            (
                json!({"task": "t", "id": "a", "kwargs": [1]}),
                Reason::KeywordArguments,
            ),
            (
                json!({"task": "t", "id": "a", "eta": 7}),
                Reason::Time {
                    header: "eta",
                    value: "7".into(),
                },
            ),
            (json!({"task": "t"}), Reason::NoId),
        ] {
            let id = body.get("id").and_then(Value::as_str).map(str::to_owned);
            let refused = refused(&raw(json!({}), &body));
            assert_eq!(
                (refused.reason.clone(), refused.reason.disposition()),
                (reason, Disposition::Reject)
            );
            assert_eq!((refused.task.as_deref(), refused.id), (Some("t"), id));
        }
    }

    #[test]
    fn headers_beside_protocol_1() {
        for (body, retries) in [
            (json!({"task": "t", "id": "a"}), 0),
            (json!({"task": "t", "id": "a", "args": []}), 7),
        ] {
            let message = decode(&raw(json!({"retries": 7}), &body), &Accept::json(1000));
            assert_eq!(message.unwrap_or_default().retries, retries);
        }
    }

    #[test]
    fn reprs_are_absent_or_empty_by_protocol() {
        let one = raw(json!({}), &json!({"task": "t", "id": "a"}));
        let two = raw(json!({"task": "t", "id": 7}), &json!([[], {}, {}]));
        for (raw, id, argsrepr) in [(one, "a", None), (two, "7", Some(String::new()))] {
            let message = decode(&raw, &Accept::json(1000)).unwrap_or_default();
            assert_eq!((message.id.as_str(), message.argsrepr), (id, argsrepr));
        }
    }

    #[rstest]
    #[case(json!("ab"), json!(["a", "b"]))]
    #[case(json!({"k": 1}), json!(["k"]))]
    #[case(json!(5), json!(5))]
    fn arguments_are_whatever_python_iterates(#[case] given: Value, #[case] args: Value) {
        let message = with_body(&json!([given, {}, {}]));
        let message = decode(&message, &Accept::json(1000)).unwrap_or_default();
        assert_eq!(message.args, args);
    }

    #[test]
    fn large_bodies_are_not_read() {
        let refused = decode(&captured(), &Accept::json(10))
            .err()
            .map(|r| r.reason);
        assert!(matches!(refused, Some(Reason::TooLarge { limit: 10, .. })));
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(
            body in proptest::collection::vec(any::<u8>(), 0..300),
            content_type in proptest::option::of("application/(json|x-msgpack|x-yaml|data)|.{0,20}"),
            header in proptest::sample::select(&["task", "id", "eta", "expires", "compression", "timelimit", "retries"][..]),
            value in proptest::sample::select(vec![
                Value::Null, json!(true), json!(-1), json!(1.5), json!(""), json!("gzip"), json!("xz"), json!([1, "a"]),
                json!({"__type__": "datetime", "__value__": "2026"}), json!({"__type__": [], "__value__": 1}),
            ]),
        ) {
            let accept = Accept::new(&["json", "msgpack", "yaml"].map(str::to_owned), 1000);
            let mut message = captured();
            message.body = body;
            message.properties.content_type = content_type;
            message.headers.insert(header.into(), value);
            let _ = decode(&message, &accept);
            message.headers.clear();
            let _ = decode(&message, &accept);
        }
    }
}
