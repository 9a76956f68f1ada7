//! Kombu's virtual message: the JSON text that carries a message over transports without properties, such as Redis.
//!
//! The text has the body (in base64, unless its properties say otherwise), the headers, and AMQP's properties. The
//! publisher adds a delivery tag, and the exchange and routing key that it used. A message that is delivered again has
//! two flags, one in the headers and one in the properties.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{Headers, Properties, RawMessage, json};

/// Encoding of the body within the text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BodyEncoding {
    /// Base64, kombu's default.
    #[default]
    Base64,
    /// The body itself, which then has to be UTF-8; another body is written in base64.
    Text,
}

/// Reason why a text is not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The bytes are not JSON.
    #[error("it is not JSON")]
    NotJson,
    /// A part is missing, or has another type.
    #[error("`{0}` is missing, or has the wrong type")]
    Part(&'static str),
    /// The body is not valid in its encoding.
    #[error("its body is not base64")]
    Body,
}

/// A received message.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualMessage {
    /// Headers, properties and body.
    pub message: RawMessage,
    /// Exchange that the message was published to.
    pub exchange: String,
    /// Routing key of the message.
    pub routing_key: String,
    /// True if the message was delivered before.
    pub redelivered: bool,
    /// Size in bytes of a body that was omitted because of the limit.
    pub omitted_body: Option<usize>,
}

/// Writes a message for a transport, with a new delivery tag.
#[must_use]
pub fn encode(
    message: &RawMessage,
    (exchange, routing_key): (&str, &str),
    encoding: BodyEncoding,
) -> String {
    let p = &message.properties;
    let text = match encoding {
        BodyEncoding::Text => std::str::from_utf8(&message.body).ok(),
        BodyEncoding::Base64 => None,
    };
    let (body, body_encoding) = match text {
        Some(text) => (text.to_owned(), "utf-8"),
        None => (STANDARD.encode(&message.body), "base64"),
    };
    let mut properties = Map::new();
    for (key, value) in [
        ("correlation_id", &p.correlation_id),
        ("reply_to", &p.reply_to),
        ("expiration", &p.expiration),
        ("app_id", &p.app_id),
        ("message_id", &p.message_id),
        ("type", &p.message_type),
    ] {
        if let Some(value) = value {
            properties.insert(key.into(), value.as_str().into());
        }
    }
    properties.insert(
        "delivery_mode".into(),
        if p.persistent { 2 } else { 1 }.into(),
    );
    properties.insert(
        "delivery_info".into(),
        json!({"exchange": exchange, "routing_key": routing_key}),
    );
    properties.insert("priority".into(), p.priority.unwrap_or(0).into());
    properties.insert("body_encoding".into(), body_encoding.into());
    properties.insert("delivery_tag".into(), Uuid::new_v4().to_string().into());
    json!({
        "body": body,
        "content-encoding": p.content_encoding,
        "content-type": p.content_type,
        "headers": *message.headers,
        "properties": properties,
    })
    .to_string()
}

/// Reads a message. A body of more than `max_body` bytes is omitted.
///
/// # Errors
/// [`Malformed`], also for messages that kombu's workers cannot read.
pub fn decode(text: &[u8], max_body: usize) -> Result<VirtualMessage, Malformed> {
    let mut fields = parse(text)?;
    let Some(Value::Object(mut properties)) = fields.remove("properties") else {
        return Err(Malformed::Part("properties"));
    };
    let headers = match fields.remove("headers") {
        Some(Value::Object(headers)) => headers,
        // The sender of such a message uses no protocol of Celery; the worker refuses it by its rules.
        None | Some(Value::Null) => Map::new(),
        Some(_) => return Err(Malformed::Part("headers")),
    };
    if !properties.get("delivery_tag").is_some_and(Value::is_string) {
        return Err(Malformed::Part("properties.delivery_tag"));
    }
    let Some(Value::Object(mut info)) = properties.remove("delivery_info") else {
        return Err(Malformed::Part("properties.delivery_info"));
    };
    let exchange = text_of(&mut info, "exchange");
    let routing_key = text_of(&mut info, "routing_key");
    let (Some(exchange), Some(routing_key)) = (exchange, routing_key) else {
        return Err(Malformed::Part("properties.delivery_info"));
    };
    let is_set = |map: &Map<String, Value>| map.get("redelivered") == Some(&Value::Bool(true));
    let redelivered = is_set(&headers) || is_set(&info);
    let (body, omitted_body) = body(fields.remove("body"), &properties, max_body)?;
    let persistent = properties.get("delivery_mode").and_then(Value::as_u64) == Some(2);
    Ok(VirtualMessage {
        message: RawMessage {
            headers: Headers::from(headers),
            properties: Properties {
                content_type: text_of(&mut fields, "content-type"),
                content_encoding: text_of(&mut fields, "content-encoding"),
                correlation_id: text_of(&mut properties, "correlation_id"),
                reply_to: text_of(&mut properties, "reply_to"),
                priority: Some(priority(&properties)),
                expiration: text_of(&mut properties, "expiration"),
                persistent,
                app_id: text_of(&mut properties, "app_id"),
                message_id: text_of(&mut properties, "message_id"),
                message_type: text_of(&mut properties, "type"),
            },
            body,
        },
        exchange,
        routing_key,
        redelivered,
        omitted_body,
    })
}

/// Sets the two flags of a message that is returned to its queue. Everything else stays as it is. Also returns the
/// priority of the message.
///
/// # Errors
/// [`Malformed`].
pub fn redelivered(text: &[u8]) -> Result<(String, u8), Malformed> {
    let mut message = Value::Object(parse(text)?);
    let priority = flag(&mut message)?;
    Ok((message.to_string(), priority))
}

/// A message that a transport holds until it is acknowledged, with the flags of one that is returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldMessage {
    /// The text of the message, with both flags.
    pub text: String,
    /// Exchange that routes the returned message; empty for the queue of the routing key.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
    /// Priority of the message.
    pub priority: u8,
}

/// Reads an entry of kombu's record of messages that are not acknowledged: `[message, exchange, routing_key]`.
///
/// # Errors
/// [`Malformed`].
pub fn held(text: &[u8]) -> Result<HeldMessage, Malformed> {
    let Ok(Value::Array(parts)) = read(text) else {
        return Err(Malformed::NotJson);
    };
    let Ok(
        [
            mut message,
            Value::String(exchange),
            Value::String(routing_key),
        ],
    ) = <[Value; 3]>::try_from(parts)
    else {
        return Err(Malformed::Part("entry"));
    };
    let priority = flag(&mut message)?;
    Ok(HeldMessage {
        text: message.to_string(),
        exchange,
        routing_key,
        priority,
    })
}

fn flag(message: &mut Value) -> Result<u8, Malformed> {
    let Some(properties) = message.get_mut("properties").and_then(Value::as_object_mut) else {
        return Err(Malformed::Part("properties"));
    };
    let priority = priority(properties);
    if let Some(Value::Object(info)) = properties.get_mut("delivery_info") {
        info.insert("redelivered".into(), true.into());
    }
    if let Some(Value::Object(headers)) = message.get_mut("headers") {
        headers.insert("redelivered".into(), true.into());
    }
    Ok(priority)
}

fn read(text: &[u8]) -> Result<Value, Malformed> {
    let text = std::str::from_utf8(text).map_err(|_| Malformed::NotJson)?;
    json::read(text).map_err(|_| Malformed::NotJson)
}

fn parse(text: &[u8]) -> Result<Map<String, Value>, Malformed> {
    match read(text)? {
        Value::Object(fields) => Ok(fields),
        _ => Err(Malformed::NotJson),
    }
}

/// The text of a field; none for any other value.
fn text_of(map: &mut Map<String, Value>, key: &str) -> Option<String> {
    match map.remove(key) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

/// The priority, which is a number or the text of one, and 0 otherwise; kombu's range is 0 to 9.
fn priority(properties: &Map<String, Value>) -> u8 {
    let number = match properties.get("priority") {
        Some(Value::Number(number)) => number.as_i64(),
        Some(Value::String(text)) => text.trim().parse().ok(),
        _ => None,
    };
    u8::try_from(number.unwrap_or(0).clamp(0, 9)).unwrap_or(0)
}

/// The body, or the size of one above the limit.
fn body(
    body: Option<Value>,
    properties: &Map<String, Value>,
    max_body: usize,
) -> Result<(Vec<u8>, Option<usize>), Malformed> {
    let Some(Value::String(text)) = body else {
        return Err(Malformed::Part("body"));
    };
    let encoding = properties.get("body_encoding").and_then(Value::as_str);
    let is_base64 = match encoding {
        None => false,
        Some(name) if name.eq_ignore_ascii_case("base64") => true,
        Some(name) if name.eq_ignore_ascii_case("utf-8") => false,
        Some(_) => return Err(Malformed::Part("properties.body_encoding")),
    };
    let size = match is_base64 {
        true => decoded_size(&text),
        false => text.len(),
    };
    if size > max_body {
        return Ok((Vec::new(), Some(size)));
    }
    match is_base64 {
        true => STANDARD.decode(text).map_err(|_| Malformed::Body),
        false => Ok(text.into_bytes()),
    }
    .map(|body| (body, None))
}

/// Size in bytes of what a base64 text stands for.
fn decoded_size(text: &str) -> usize {
    let padding = text.bytes().rev().take(2).filter(|b| *b == b'=').count();
    (text.len() / 4 * 3).saturating_sub(padding)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    /// A message of kombu 5.7.
    const FROM_PYTHON: &str = r#"{"body": "W1sxLCAyXSwge30sIHt9XQ==", "content-encoding": "utf-8",
        "content-type": "application/json", "headers": {"lang": "py", "task": "app1.add", "id": "ab8c", "eta": null},
        "properties": {"correlation_id": "ab8c", "reply_to": "cbe3", "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "celery"}, "priority": 0,
            "body_encoding": "base64", "delivery_tag": "824c9104-2468-4564-97f5-6a284453730a"}}"#;

    #[test]
    fn a_message_of_kombu_is_read() {
        let read = decode(FROM_PYTHON.as_bytes(), 100).unwrap();
        assert_eq!(read.message.body, b"[[1, 2], {}, {}]");
        assert_eq!(read.message.headers["task"], "app1.add");
        assert_eq!(read.message.properties.reply_to.as_deref(), Some("cbe3"));
        assert!(read.message.properties.persistent);
        assert_eq!(
            (&*read.exchange, &*read.routing_key, read.redelivered),
            ("", "celery", false)
        );
        let small = decode(FROM_PYTHON.as_bytes(), 3).unwrap();
        assert!(small.message.body.is_empty() && small.omitted_body.is_some());
    }

    #[test]
    fn a_returned_message_has_two_flags_and_no_other_change() {
        let (text, priority) = redelivered(FROM_PYTHON.as_bytes()).unwrap();
        assert_eq!(priority, 0);
        let mut expected: Value = serde_json::from_str(FROM_PYTHON).unwrap();
        expected["headers"]["redelivered"] = true.into();
        expected["properties"]["delivery_info"]["redelivered"] = true.into();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), expected);
        assert!(decode(text.as_bytes(), 100).unwrap().redelivered);
        let entry = format!(r#"[{FROM_PYTHON}, "e", "k"]"#);
        let held = held(entry.as_bytes()).unwrap();
        assert_eq!(
            (held.text, &*held.exchange, &*held.routing_key),
            (text, "e", "k")
        );
    }

    #[rstest]
    #[case("5", 5)]
    #[case("\"7\"", 7)]
    #[case("-1", 0)]
    #[case("300", 9)]
    #[case("null", 0)]
    #[case("[]", 0)]
    fn priorities(#[case] given: &str, #[case] expected: u8) {
        let text = FROM_PYTHON.replace(r#""priority": 0"#, &format!(r#""priority": {given}"#));
        assert_eq!(redelivered(text.as_bytes()).unwrap().1, expected);
    }

    #[rstest]
    #[case("utf-8", "x", Some("x"))]
    #[case("UTF-8", "é", Some("é"))]
    #[case("base64", "eA==", Some("x"))]
    #[case("Base64", "", Some(""))]
    #[case("base64", "x", None)]
    #[case("rot13", "x", None)]
    fn encodings_of_the_body(
        #[case] encoding: &str,
        #[case] body: &str,
        #[case] read: Option<&str>,
    ) {
        let text = json!({"body": body, "headers": {}, "properties": {"body_encoding": encoding,
            "delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "q"}}});
        let found = decode(text.to_string().as_bytes(), 100).ok();
        assert_eq!(
            found.map(|found| found.message.body),
            read.map(|text| text.as_bytes().to_vec())
        );
    }

    #[rstest]
    #[case("x")]
    #[case("[]")]
    #[case("{}")]
    #[case(r#"{"body": "", "properties": {}}"#)]
    #[case(r#"{"body": "", "properties": {"delivery_tag": "t"}}"#)]
    #[case(r#"{"body": "", "properties": {"delivery_tag": "t", "delivery_info": {}}}"#)]
    #[case(r#"{"body": 1, "properties": {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": ""}}}"#)]
    #[case(
        r#"{"body": "", "headers": [], "properties": {"delivery_tag": "t",
        "delivery_info": {"exchange": "", "routing_key": ""}}}"#
    )]
    fn malformed_messages_are_refused(#[case] text: &str) {
        assert!(decode(text.as_bytes(), 100).is_err());
    }

    proptest! {
        #[test]
        fn a_message_is_read_as_it_was_written(
            body in prop::collection::vec(any::<u8>(), 0..40),
            header in ".*", key in ".*", priority in 0_u8..=9, is_text: bool,
        ) {
            let message = RawMessage {
                headers: Headers::from_iter([("h".to_owned(), Value::from(header))]),
                properties: Properties {
                    content_type: Some("application/json".into()),
                    priority: Some(priority),
                    correlation_id: Some(key.clone()),
                    ..Properties::default()
                },
                body,
            };
            let encoding = if is_text { BodyEncoding::Text } else { BodyEncoding::Base64 };
            let text = encode(&message, ("e", &key), encoding);
            let read = decode(text.as_bytes(), 100).unwrap();
            prop_assert_eq!(read.message, message);
            prop_assert_eq!((read.exchange, read.routing_key), ("e".to_owned(), key));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(decode(&bytes, 10).is_err());
            prop_assert!(held(&bytes).is_err());
        }
    }
}
