//! AMQP's types to and from those of [`crate::wire`].

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, ShortString};
use serde_json::{Map, Value};

use super::short;
use crate::broker::BrokerError;
use crate::wire::{Properties, RawMessage};

/// A delivery without its settlement.
pub(super) struct Received {
    pub(super) raw: RawMessage,
    pub(super) exchange: String,
    pub(super) routing_key: String,
    pub(super) redelivered: bool,
}

/// Parts a delivery into what was received and what settles it.
pub(super) fn delivery(delivery: lapin::message::Delivery) -> (Received, lapin::Acker) {
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
    };
    let headers = p.headers().as_ref().map(map).unwrap_or_default();
    let received = Received {
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

/// A message's properties, headers included.
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
    Ok(properties)
}

/// A JSON mapping as an AMQP table. A key that AMQP cannot carry (over 255 bytes) is left out.
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
        // The smallest of the two integer types that py-amqp writes.
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => i32::try_from(i).map_or(AMQPValue::LongLongInt(i), AMQPValue::LongInt),
            (None, Some(x)) => AMQPValue::Double(x),
            (None, None) => AMQPValue::LongString(n.to_string().into()),
        },
        Value::String(s) => AMQPValue::LongString(s.as_str().into()),
        Value::Array(values) => AMQPValue::FieldArray(FieldArray::from(
            values.iter().map(to_amqp).collect::<Vec<_>>(),
        )),
        Value::Object(map) => AMQPValue::FieldTable(table(map)),
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
        AMQPValue::Float(x) => Value::from(*x),
        AMQPValue::Double(x) => Value::from(*x),
        AMQPValue::DecimalValue(d) => {
            Value::from(f64::from(d.value) / 10_f64.powi(i32::from(d.scale)))
        }
        AMQPValue::ShortString(s) => Value::from(s.as_str()),
        AMQPValue::LongString(s) => Value::from(String::from_utf8_lossy(s.as_bytes())),
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(to_json).collect(),
        AMQPValue::Timestamp(t) => Value::from(*t),
        AMQPValue::FieldTable(table) => Value::Object(map(table)),
        AMQPValue::ByteArray(bytes) => Value::from(String::from_utf8_lossy(bytes.as_slice())),
        AMQPValue::Void => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn headers_survive_the_way_there_and_back() {
        let headers = json!({
            "null": null, "yes": true, "small": 7, "large": 1_u64 << 40, "x": 1.5,
            "text": "é", "list": [1, [null]], "table": {"a": {"b": []}},
        });
        let Value::Object(headers) = headers else {
            return;
        };
        assert_eq!(map(&table(&headers)), headers);
    }

    #[test]
    fn keys_beyond_amqp_are_left_out() {
        let mut headers = Map::new();
        headers.insert("k".repeat(256), json!(1));
        headers.insert("k".repeat(255), json!(1));
        assert_eq!(map(&table(&headers)).len(), 1);
    }
}
