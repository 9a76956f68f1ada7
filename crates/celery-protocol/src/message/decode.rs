//! Reading a task message of either protocol.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::{Embed, Protocol, Reason, Refused, TaskMessage};
use crate::content::{self, Accept};
use crate::{Headers, RawMessage, envelope, time};

/// Reads a task message of either protocol.
///
/// # Errors
/// [`Refused`], for everything that is not a task; see [`Reason::disposition`].
pub fn decode(raw: &RawMessage, accept: &Accept) -> Result<TaskMessage, Refused> {
    let mut named = DeclaredName::of(&raw.headers);
    read(raw, accept, &mut named).map_err(|reason| {
        // Python decompresses a body before it looks at anything else.
        if matches!(reason, Reason::Compression(_)) {
            named = DeclaredName::default();
        }
        named.refused(raw, reason)
    })
}

/// Reads a task message from its headers, without its body.
///
/// # Errors
/// [`Refused`] for a message whose headers do not describe a task, for example with protocol 1.
pub fn head(raw: &RawMessage) -> Result<TaskMessage, Refused> {
    let named = DeclaredName::of(&raw.headers);
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
    DeclaredName::of(&raw.headers).refused(raw, reason)
}

/// Task name and id that a message declares.
#[derive(Default)]
struct DeclaredName {
    task: Option<String>,
    id: Option<String>,
}

impl DeclaredName {
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

fn read(
    raw: &RawMessage,
    accept: &Accept,
    named: &mut DeclaredName,
) -> Result<TaskMessage, Reason> {
    let body = content::decompress_body(raw, accept)?;
    // The header decides which protocol it is, even if its value is not a name.
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

fn protocol_2(
    raw: &RawMessage,
    named: &DeclaredName,
    parts: Vec<Value>,
) -> Result<TaskMessage, Reason> {
    let mut message = common(raw, named, raw.headers.clone())?;
    let [args, kwargs, embed] = <[Value; 3]>::try_from(parts)
        .map_err(|_| Reason::Malformed("body is not a list of args, kwargs and embed"))?;
    message.embed = match envelope::mapping(embed) {
        Ok(mut embed) => Embed::take(&mut embed),
        Err(other) if is_falsy(&other) => Embed::default(),
        _ => {
            return Err(Reason::Malformed(
                "the body's third element is not a mapping",
            ));
        }
    };
    let repr = |name: &str| message.headers.get(name).and_then(Value::as_str);
    message.argsrepr = Some(repr("argsrepr").unwrap_or_default().to_owned());
    message.kwargsrepr = Some(repr("kwargsrepr").unwrap_or_default().to_owned());
    Ok(with_arguments(message, args, kwargs))
}

fn protocol_1(
    raw: &RawMessage,
    named: &mut DeclaredName,
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
    *named = DeclaredName::of(&fields);
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

fn common(raw: &RawMessage, named: &DeclaredName, all: Headers) -> Result<TaskMessage, Reason> {
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

/// Values that are false in Python: absent, null or empty.
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
        Some(_) => Err(Reason::Malformed("`timelimit` is not a pair")),
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
