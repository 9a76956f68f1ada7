//! Estimates of the memory that a message takes once it is decoded.
//!
//! One or two bytes of a body can be a value, and a value takes up to a hundred bytes of memory: 4 MB of `[1,1,1,…`
//! take 200 MB. The memory of a message is estimated from its bytes, without decoding them.

use serde_json::{Map, Value};

use super::RawMessage;
use super::content::{self, Accept};

/// Memory of one decoded value with its container, in bytes, rounded up: a number keeps its digits, a list
/// has room to grow, a mapping has an index.
const VALUE: usize = 100;

/// Estimated memory of a message with its decoded values, in bytes. The estimate is an upper bound rather than an
/// average.
#[must_use]
pub fn of(raw: &RawMessage, accept: &Accept) -> usize {
    let headers = of_map(&raw.headers);
    // A body that cannot be decompressed within the limit is rejected later.
    let body = content::decompress_body(raw, accept).map_or(0, |body| {
        let copies = body.len().saturating_mul(2);
        copies.saturating_add(values(raw, &body, accept).saturating_mul(VALUE))
    });
    raw.body.len().saturating_add(headers).saturating_add(body)
}

/// Approximate upper bound of the number of values in a body.
fn values(raw: &RawMessage, body: &[u8], accept: &Accept) -> usize {
    let content_type = raw.properties.content_type.as_deref().unwrap_or_default();
    let count = |marks: &[u8]| body.iter().filter(|byte| marks.contains(byte)).count() + 1;
    match content_type {
        content::JSON => count(b",:[{"),
        // Each line and each alias can add one value; copies by aliases have their own limit.
        "application/x-yaml" => {
            let copied = match body.contains(&b'*') {
                true => accept.max_body_bytes,
                false => 0,
            };
            count(b",:[{-\n").saturating_add(copied)
        }
        // In msgpack each byte can be a value.
        "application/x-msgpack" => body.len(),
        // Other bodies are not decoded.
        _ => 0,
    }
}

/// Memory of decoded values, in bytes.
pub(super) fn of_map(map: &Map<String, Value>) -> usize {
    map.iter()
        .map(|(name, value)| name.len() + VALUE + of_value(value))
        .sum()
}

/// Memory of a decoded value, in bytes.
#[must_use]
pub fn of_value(value: &Value) -> usize {
    VALUE
        + match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
            Value::String(text) => text.len(),
            Value::Array(values) => values.iter().map(of_value).sum(),
            Value::Object(map) => of_map(map),
        }
}

/// Returns true if decoded values take more than `bytes` bytes. Stops counting at this limit.
pub fn exceeds<'v>(values: impl IntoIterator<Item = &'v Value>, bytes: usize) -> bool {
    let mut left = bytes;
    !values.into_iter().all(|value| fits(value, &mut left))
}

fn fits(value: &Value, left: &mut usize) -> bool {
    let text = match value {
        Value::String(text) => text.len(),
        _ => 0,
    };
    take(VALUE + text, left)
        && match value {
            Value::Array(values) => values.iter().all(|value| fits(value, left)),
            Value::Object(map) => map
                .iter()
                .all(|(name, value)| take(name.len() + VALUE, left) && fits(value, left)),
            _ => true,
        }
}

fn take(bytes: usize, left: &mut usize) -> bool {
    let rest = left.checked_sub(bytes);
    *left = rest.unwrap_or(0);
    rest.is_some()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::Properties;

    fn raw(content_type: &str, body: Vec<u8>) -> RawMessage {
        RawMessage {
            body,
            properties: Properties {
                content_type: Some(content_type.into()),
                ..Properties::default()
            },
            ..RawMessage::default()
        }
    }

    fn accept() -> Accept {
        Accept::new(&["json", "msgpack", "yaml"].map(str::to_owned), 1 << 20)
    }

    /// The estimate is at least the memory of the decoded values.
    #[rstest]
    #[case("application/json", b"[".iter().chain(b"1,".repeat(1000).iter()).chain(b"1]").copied().collect())]
    #[case("application/json", br#"{"a": {"b": [[], {}, "", [{}]], "c": null}, "d": "some text"}"#.to_vec())]
    #[case("application/x-msgpack", [&[0xdc, 3, 0xe8][..], &[1; 1000]].concat())]
    #[case("application/x-yaml", b"a:\n- 1\n- [2, {b: c}]\n- d\n".to_vec())]
    #[case("application/x-yaml", b"a: &a [1, 1, 1, 1]\nb: [*a, *a, *a, *a]\nc: [*a, *a]\n".to_vec())]
    fn nothing_weighs_less_than_its_values(#[case] content_type: &str, #[case] body: Vec<u8>) {
        let raw = raw(content_type, body);
        let value = content::value(&raw, &raw.body, &accept()).unwrap_or_default();
        assert!(!value.is_null());
        assert!(of(&raw, &accept()) >= of_value(&value), "{content_type}");
    }

    #[test]
    fn headers_and_what_is_inflated_count() {
        let mut message = raw(content::JSON, b"[]".to_vec());
        let before = of(&message, &accept());
        message.headers.insert("x".into(), json!([null, null]));
        assert!(of(&message, &accept()) > before + 3 * VALUE);

        let plain = format!("[{}1]", "1,".repeat(10_000)).into_bytes();
        let method = crate::compression::Method::Gzip;
        let mut small = raw(content::JSON, method.compress(&plain).unwrap_or_default());
        small.headers.insert("compression".into(), "gzip".into());
        assert!(small.body.len() < 1000);
        assert!(of(&small, &accept()) > 1_000_000);
    }

    #[rstest]
    #[case(json!(null))]
    #[case(json!(["text", {"a": {"b": [1.5, true, {}]}}, []]))]
    fn exceeds_agrees_with_the_weight(#[case] value: Value) {
        let weight = of_value(&value);
        assert!(!exceeds([&value], weight));
        assert!(exceeds([&value], weight - 1));
        assert!(exceeds([&value, &json!(null)], weight));
    }

    #[test]
    fn text_weighs_little_more_than_itself() {
        let message = raw(
            content::JSON,
            format!("[[\"{}\"]]", "x".repeat(100_000)).into_bytes(),
        );
        assert!(of(&message, &accept()) < 310_000);
    }
}
