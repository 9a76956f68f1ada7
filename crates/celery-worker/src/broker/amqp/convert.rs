//! Conversion between AMQP's types and those of [`celery_protocol`].
//!
//! A header is sent with the type that it was received with, in particular in a retry. AMQP types that JSON does not
//! have are kept in kombu's envelopes, in the form that kombu writes for the corresponding Python values: `datetime`,
//! `decimal`, `bytes`, `base64`. The types `float` and `table` are this crate's own, for values that kombu has no
//! envelope for. As in Python, integers and floats keep their value, but not their width.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, DecimalValue, FieldArray, FieldTable, ShortString};
use serde_json::{Map, Number, Value};

use super::short;
use crate::broker::BrokerError;
use celery_protocol::{Properties, RawMessage, envelope};

/// A received message, without the handle to settle it.
pub(super) struct Incoming {
    pub(super) raw: RawMessage,
    pub(super) exchange: String,
    pub(super) routing_key: String,
    pub(super) redelivered: bool,
}

/// Splits a delivery into the received message and the handle to settle it.
pub(super) fn delivery(delivery: lapin::message::Delivery) -> (Incoming, lapin::Acker) {
    let text = |s: &Option<ShortString>| s.as_ref().map(ToString::to_string);
    let p = &delivery.properties;
    let properties = Properties {
        content_type: text(p.content_type()),
        content_encoding: text(p.content_encoding()),
        correlation_id: text(p.correlation_id()),
        reply_to: text(p.reply_to()),
        priority: *p.priority(),
        expiration: text(p.expiration()),
        persistent: *p.delivery_mode() == Some(2),
        app_id: text(p.app_id()),
        message_id: text(p.message_id()),
        message_type: text(p.kind()),
    };
    let headers = p.headers().as_ref().map(map).unwrap_or_default().into();
    let received = Incoming {
        raw: RawMessage {
            headers,
            properties,
            body: delivery.data,
        },
        exchange: delivery.exchange.to_string(),
        routing_key: delivery.routing_key.to_string(),
        redelivered: delivery.redelivered,
    };
    (received, delivery.acker)
}

/// Converts a message's properties, including the headers.
pub(super) fn properties(message: &RawMessage) -> Result<BasicProperties, BrokerError> {
    let p = &message.properties;
    let mut properties = BasicProperties::default()
        .with_headers(table(&message.headers))
        .with_delivery_mode(if p.persistent { 2 } else { 1 })
        .with_priority(p.priority.unwrap_or(0));
    if let Some(text) = &p.content_type {
        properties = properties.with_content_type(short(text)?);
    }
    if let Some(text) = &p.content_encoding {
        properties = properties.with_content_encoding(short(text)?);
    }
    if let Some(text) = &p.correlation_id {
        properties = properties.with_correlation_id(short(text)?);
    }
    if let Some(text) = &p.reply_to {
        properties = properties.with_reply_to(short(text)?);
    }
    if let Some(text) = &p.expiration {
        properties = properties.with_expiration(short(text)?);
    }
    if let Some(text) = &p.app_id {
        properties = properties.with_app_id(short(text)?);
    }
    if let Some(text) = &p.message_id {
        properties = properties.with_message_id(short(text)?);
    }
    if let Some(text) = &p.message_type {
        properties = properties.with_type(short(text)?);
    }
    Ok(properties)
}

/// Converts a JSON mapping to an AMQP table. A key that AMQP cannot represent (over 255 bytes) is omitted.
pub(super) fn table(map: &Map<String, Value>) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in map {
        if let Ok(key) = ShortString::try_new(key.as_str()) {
            table.insert(key, to_amqp(value));
        }
    }
    table
}

fn to_amqp(value: &Value) -> AMQPValue {
    match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(b) => AMQPValue::Boolean(*b),
        // The smaller of the two integer types that py-amqp writes.
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => i32::try_from(i).map_or(AMQPValue::LongLongInt(i), AMQPValue::LongInt),
            (None, Some(x)) if n.is_f64() => AMQPValue::Double(x),
            // An integer that no AMQP type can represent.
            _ => AMQPValue::LongString(n.to_string().into()),
        },
        Value::String(s) => AMQPValue::LongString(s.as_str().into()),
        Value::Array(values) => AMQPValue::FieldArray(FieldArray::from(
            values.iter().map(to_amqp).collect::<Vec<_>>(),
        )),
        Value::Object(map) => opened(map).unwrap_or_else(|| AMQPValue::FieldTable(table(map))),
    }
}

/// The AMQP value in an envelope; `None` if the mapping is not an envelope with a known type.
fn opened(map: &Map<String, Value>) -> Option<AMQPValue> {
    let (kind, value) = envelope::open(map)?;
    match (kind.as_str()?, value) {
        ("datetime", Value::String(text)) => {
            let seconds = envelope::timestamp(text)?;
            u64::try_from(seconds).ok().map(AMQPValue::Timestamp)
        }
        ("decimal", Value::String(text)) => decimal(text).map(AMQPValue::DecimalValue),
        ("bytes", Value::String(text)) => Some(bytes(text.as_bytes())),
        ("base64", Value::String(text)) => envelope::from_base64(text).map(|data| bytes(&data)),
        ("float", Value::String(text)) => text.parse().ok().map(AMQPValue::Double),
        ("table", Value::Object(inner)) => Some(AMQPValue::FieldTable(table(inner))),
        _ => None,
    }
}

fn bytes(data: &[u8]) -> AMQPValue {
    AMQPValue::ByteArray(data.into())
}

/// Parses a decimal: `-1.50` is 150 with 2 digits after the point, negated.
fn decimal(text: &str) -> Option<DecimalValue> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let value: i32 = format!("{whole}{fraction}").parse().ok()?;
    Some(DecimalValue {
        scale: fraction.len().try_into().ok()?,
        // The library's type is unsigned, but the protocol's value is signed.
        value: value.cast_unsigned(),
    })
}

fn decimal_text(decimal: DecimalValue) -> String {
    let value = decimal.value.cast_signed();
    let scale = usize::from(decimal.scale);
    let sign = if value < 0 { "-" } else { "" };
    // At least one digit before the point.
    let digits = format!("{:0>width$}", value.unsigned_abs(), width = scale + 1);
    match digits.split_at_checked(digits.len() - scale) {
        Some((whole, fraction)) if scale > 0 => format!("{sign}{whole}.{fraction}"),
        _ => format!("{sign}{digits}"),
    }
}

fn map(table: &FieldTable) -> Map<String, Value> {
    table
        .inner()
        .iter()
        .map(|(key, value)| (key.to_string(), to_json(value)))
        .collect()
}

fn to_json(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(b) => Value::from(*b),
        AMQPValue::ShortShortInt(n) => Value::from(*n),
        AMQPValue::ShortShortUInt(n) => Value::from(*n),
        AMQPValue::ShortInt(n) => Value::from(*n),
        AMQPValue::ShortUInt(n) => Value::from(*n),
        AMQPValue::LongInt(n) => Value::from(*n),
        AMQPValue::LongUInt(n) => Value::from(*n),
        AMQPValue::LongLongInt(n) => Value::from(*n),
        AMQPValue::Float(x) => float((*x).into()),
        AMQPValue::Double(x) => float(*x),
        AMQPValue::DecimalValue(d) => envelope::sealed("decimal", decimal_text(*d)),
        AMQPValue::ShortString(s) => Value::from(s.as_str()),
        // As in Python: bytes if it is not valid UTF-8.
        AMQPValue::LongString(s) => match std::str::from_utf8(s.as_bytes()) {
            Ok(text) => text.into(),
            Err(_) => envelope::bytes(s.as_bytes()),
        },
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(to_json).collect(),
        AMQPValue::Timestamp(seconds) => envelope::datetime(*seconds)
            // A time outside of the calendar stays a number.
            .unwrap_or_else(|| Value::from(*seconds)),
        // A table that looks like an envelope must not be converted as one when it is sent.
        AMQPValue::FieldTable(table) => envelope::table(map(table)),
        AMQPValue::ByteArray(bytes) => envelope::bytes(bytes.as_slice()),
        AMQPValue::Void => Value::Null,
    }
}

fn float(x: f64) -> Value {
    Number::from_f64(x).map_or_else(|| envelope::sealed("float", x.to_string()), Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn headers_survive_a_round_trip() {
        let headers = json!({
            "null": null, "yes": true, "small": 7, "large": 1_u64 << 40, "x": 1.5,
            "text": "é", "list": [1, [null]], "table": {"a": {"b": []}},
        });
        let Value::Object(headers) = headers else {
            return;
        };
        assert_eq!(map(&table(&headers)), headers);
    }

    /// Converts values from AMQP and back: they stay the same, except for the width of numbers and the choice between
    /// the two text types.
    #[test]
    fn types_survive_a_round_trip() {
        let mut inner = FieldTable::default();
        inner.insert("__type__".into(), AMQPValue::LongString("datetime".into()));
        inner.insert("__value__".into(), AMQPValue::Boolean(true));
        let decimal = |value: i32, scale| {
            let value = value.cast_unsigned();
            AMQPValue::DecimalValue(DecimalValue { scale, value })
        };
        let mut headers = FieldTable::default();
        for (name, value) in [
            ("timestamp", AMQPValue::Timestamp(1_795_493_635)),
            ("far", AMQPValue::Timestamp(253_402_300_799)),
            ("decimal", decimal(-150, 2)),
            ("small", decimal(5, 3)),
            ("whole", decimal(7, 0)),
            ("bytes", bytes(b"abc")),
            ("binary", bytes(b"\xff\0")),
            ("infinite", AMQPValue::Double(f64::NEG_INFINITY)),
            ("float", AMQPValue::Double(0.1)),
            ("long", AMQPValue::LongLongInt(i64::MIN)),
            ("int", AMQPValue::LongInt(-7)),
            ("void", AMQPValue::Void),
            ("like an envelope", AMQPValue::FieldTable(inner)),
            (
                "list",
                AMQPValue::FieldArray(vec![AMQPValue::Timestamp(0)].into()),
            ),
        ] {
            headers.insert(name.into(), value);
        }
        assert_eq!(table(&map(&headers)), headers);
        assert_eq!(
            map(&headers)["timestamp"],
            json!({"__type__": "datetime", "__value__": "2026-11-24T04:13:55"})
        );
        assert_eq!(map(&headers)["decimal"]["__value__"], "-1.50");
        assert_eq!(map(&headers)["small"]["__value__"], "0.005");
    }

    #[test]
    fn mapping_without_envelope_becomes_field_table() {
        for value in [
            json!({"__type__": "datetime", "__value__": "soon"}),
            json!({"__type__": "decimal", "__value__": "1e5"}),
            json!({"__type__": [], "__value__": 1}),
        ] {
            assert!(
                matches!(to_amqp(&value), AMQPValue::FieldTable(_)),
                "{value}"
            );
        }
        let large = json!(u64::MAX);
        assert_eq!(
            to_amqp(&large),
            AMQPValue::LongString("18446744073709551615".into())
        );
    }

    #[test]
    fn keys_beyond_amqp_are_left_out() {
        let mut headers = Map::new();
        headers.insert("k".repeat(256), json!(1));
        headers.insert("k".repeat(255), json!(1));
        assert_eq!(map(&table(&headers)).len(), 1);
    }
}
