//! Kombu's envelope for values that JSON cannot represent: a mapping of exactly `__type__` and `__value__`.
//!
//! Values stay in envelopes while a message is processed: a retry, or the signatures of follow-up tasks, contain them
//! as they were received. The other serializers, and headers with AMQP's own types, are converted to the same form. A
//! task gets [`plain`] values, with texts instead of envelopes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Datelike, Utc};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::time;

const TYPE: &str = "__type__";
const VALUE: &str = "__value__";

/// This crate's own type, see [`table`]. JSON in a message cannot contain it.
pub(super) const TABLE: &str = "table";

/// Puts a value into an envelope.
pub fn sealed(kind: &str, value: impl Into<Value>) -> Value {
    json!({TYPE: kind, VALUE: value.into()})
}

/// Envelope for bytes, as kombu writes them: as text if they are UTF-8, else in base64.
pub fn bytes(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => sealed("bytes", text),
        Err(_) => sealed("base64", STANDARD.encode(bytes)),
    }
}

/// Envelope for a time, as kombu writes a Python time in UTC.
pub(super) fn utc(time: DateTime<Utc>) -> Value {
    let format = match time.timestamp_subsec_micros() {
        0 => "%Y-%m-%dT%H:%M:%S+00:00",
        _ => "%Y-%m-%dT%H:%M:%S%.6f+00:00",
    };
    sealed("datetime", time.format(format).to_string())
}

/// Envelope for a time without an offset, as kombu writes it; from seconds since 1970. `None` outside of Python's
/// calendar.
pub fn datetime(seconds: u64) -> Option<Value> {
    let time = DateTime::from_timestamp(seconds.try_into().ok()?, 0)?;
    // Python's calendar ends with the year 9999.
    let is_known = time.year() <= 9999;
    is_known.then(|| sealed("datetime", time.format("%Y-%m-%dT%H:%M:%S").to_string()))
}

/// Seconds since 1970 of the time in an envelope.
pub fn timestamp(text: &str) -> Option<i64> {
    time::parse(text).map(|time| time.timestamp())
}

/// The text for bytes in an envelope.
pub(super) fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// The bytes in an envelope.
pub fn from_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// A mapping from another source than JSON, which has no envelopes. If the mapping looks like an envelope, it is put
/// into an envelope itself.
pub fn table(map: Map<String, Value>) -> Value {
    match open(&map) {
        Some(_) => sealed(TABLE, map),
        None => map.into(),
    }
}

/// Returns the mapping in a value.
///
/// # Errors
/// The value, if it is not a mapping, or an envelope with another content.
pub(super) fn mapping(value: Value) -> Result<Map<String, Value>, Value> {
    match value {
        Value::Object(mut map) => match open(&map) {
            None => Ok(map),
            Some((kind, _)) if kind == TABLE => match map.remove(VALUE) {
                Some(Value::Object(inner)) => Ok(inner),
                _ => Err(map.into()),
            },
            Some(_) => Err(map.into()),
        },
        other => Err(other),
    }
}

/// Type and content of an envelope; `None` for any other mapping.
pub fn open(map: &Map<String, Value>) -> Option<(&Value, &Value)> {
    match map.len() {
        2 => Some((map.get(TYPE)?, map.get(VALUE)?)),
        _ => None,
    }
}

/// Checks that kombu could open the mapping, if it is an envelope.
///
/// # Errors
/// The reason why kombu could not open it.
pub(super) fn check(map: &Map<String, Value>) -> Result<(), String> {
    let Some((kind, value)) = open(map) else {
        return Ok(());
    };
    let text = value.as_str();
    let is_valid = match kind.as_str() {
        Some("datetime" | "date") => text.is_some_and(time::is_date_time),
        Some("time") => text.is_some_and(time::is_time),
        Some("uuid") => uuid(value).is_some(),
        Some("decimal") => value.is_number() || text.is_some_and(is_decimal),
        Some("bytes") => text.is_some(),
        Some("base64") => text.is_some_and(is_base64),
        _ => return Err(format!("`{TYPE}` {kind} is unknown")),
    };
    match is_valid {
        true => Ok(()),
        false => Err(format!("`{VALUE}` is not a {kind}")),
    }
}

/// The value for a task: every envelope is replaced by the text in it.
#[must_use]
pub(super) fn plain(value: Value) -> Value {
    let held = match mapping(value) {
        Ok(map) => return map.into_iter().map(|(key, v)| (key, plain(v))).collect(),
        Err(Value::Array(values)) => return values.into_iter().map(plain).collect(),
        Err(Value::Object(mut map)) => map.remove(VALUE).unwrap_or_default(),
        Err(other) => return other,
    };
    match held {
        Value::Number(number) => number.to_string().into(),
        Value::Object(_) => uuid(&held).map_or(Value::Null, |id| id.to_string().into()),
        text => text,
    }
}

/// Returns true if the value contains an envelope at any depth.
pub(super) fn is_in(value: &Value) -> bool {
    match value {
        Value::Array(values) => values.iter().any(is_in),
        Value::Object(map) => open(map).is_some() || map.values().any(is_in),
        _ => false,
    }
}

/// `uuid.UUID(hex=…, version=…)`.
fn uuid(value: &Value) -> Option<Uuid> {
    let fields = value.as_object()?;
    let is_known = |key: &String| key == "hex" || key == "version";
    if !fields.keys().all(is_known) {
        return None;
    }
    match fields.get("version") {
        None | Some(Value::Null) => {}
        Some(version) => {
            version.as_u64().filter(|n| (1..=5).contains(n))?;
        }
    }
    // Python removes hyphens, braces and `urn:uuid:` at any position.
    let hex = fields.get("hex")?.as_str()?;
    let hex = hex.replace("urn:", "").replace("uuid:", "");
    let hex = hex.trim_matches(['{', '}']).replace('-', "");
    Uuid::try_parse(&hex).ok().filter(|_| hex.len() == 32)
}

/// Returns true for a text that `decimal.Decimal` accepts.
fn is_decimal(text: &str) -> bool {
    let text = text.trim().replace('_', "").to_ascii_lowercase();
    let text = text.strip_prefix(['+', '-']).unwrap_or(&text);
    let all_digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if let Some(payload) = text.strip_prefix("snan").or(text.strip_prefix("nan")) {
        return all_digits(payload);
    }
    if text == "inf" || text == "infinity" {
        return true;
    }
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    let digits = mantissa.replacen('.', "", 1);
    !digits.is_empty() && all_digits(&digits) && !exponent.is_empty() && all_digits(exponent)
}

/// Returns true for a text that `base64.b64decode` accepts: it skips characters outside of the alphabet, and requires
/// the padding.
fn is_base64(text: &str) -> bool {
    let (mut characters, mut padding) = (0_usize, 0_usize);
    for b in text.bytes() {
        match b {
            b'=' => {
                padding += 1;
                if characters % 4 >= 2 && characters % 4 + padding >= 4 {
                    // The padding ends the data; the rest is ignored.
                    return true;
                }
            }
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'+' | b'/' => {
                characters += 1;
                padding = 0;
            }
            _ => {}
        }
    }
    characters % 4 == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn checked(kind: &str, value: Value) -> bool {
        match sealed(kind, value) {
            Value::Object(map) => check(&map).is_ok(),
            _ => false,
        }
    }

    #[rstest]
    #[case("datetime", json!("2026-11-24T04:13:55.482591+00:00"), true)]
    #[case("datetime", json!("2026"), false)]
    #[case("datetime", json!(7), false)]
    #[case("date", json!("2026-11-24"), true)]
    #[case("time", json!("04:13:55"), true)]
    #[case("time", json!("4"), false)]
    #[case("uuid", json!({"hex": "8f8de06861384418a4f05107449d652d"}), true)]
    #[case("uuid", json!({"hex": "8f8de068-6138-4418-a4f0-5107449d652d", "version": 4}), true)]
    #[case("uuid", json!({"hex": "8f8de068", "version": 4}), false)]
    #[case("uuid", json!({"hex": "8f8de06861384418a4f05107449d652d", "version": 9}), false)]
    #[case("uuid", json!("8f8de06861384418a4f05107449d652d"), false)]
    #[case("decimal", json!("1.50"), true)]
    #[case("decimal", json!(" -1_0.E+3 "), true)]
    #[case("decimal", json!("sNaN12"), true)]
    #[case("decimal", json!("1.5.0"), false)]
    #[case("decimal", json!("."), false)]
    #[case("bytes", json!("é"), true)]
    #[case("bytes", json!(null), false)]
    #[case("base64", json!("//4="), true)]
    #[case("base64", json!("/!/4 ="), true)]
    #[case("base64", json!("//4"), false)]
    #[case("base64", json!("/"), false)]
    #[case("set", json!([]), false)]
    fn envelopes_are_opened_as_in_kombu(
        #[case] kind: &str,
        #[case] value: Value,
        #[case] valid: bool,
    ) {
        assert_eq!(checked(kind, value), valid);
    }

    #[test]
    fn other_mappings_are_not_envelopes() {
        for value in [
            json!({"__type__": "nope"}),
            json!({"__type__": "nope", "__value__": 1, "a": 2}),
        ] {
            let map = value.as_object().cloned().unwrap_or_default();
            assert_eq!(check(&map), Ok(()));
            assert!(!is_in(&value));
        }
    }

    #[test]
    fn a_mapping_that_looks_like_an_envelope() {
        let map = Map::from_iter([
            (TYPE.to_owned(), json!("date")),
            (VALUE.to_owned(), json!(7)),
        ]);
        let value = table(map.clone());
        assert_eq!(mapping(value.clone()), Ok(map.clone()));
        assert_eq!(plain(json!([value])), json!([map]));
        assert_eq!(
            mapping(sealed("date", "2026-11-24")),
            Err(sealed("date", "2026-11-24"))
        );
        let forged = value.as_object().map(check);
        assert!(forged.is_some_and(|checked| checked.is_err()));
    }

    #[test]
    fn tasks_get_text() {
        let uuid = sealed("uuid", json!({"hex": "8f8de06861384418a4f05107449d652d"}));
        let value = json!([{"at": sealed("date", "2026-11-24"), "n": sealed("decimal", 1.5)}, uuid, bytes(b"\xff"), 7]);
        assert!(is_in(&value));
        assert_eq!(
            plain(value),
            json!([{"at": "2026-11-24", "n": "1.5"}, "8f8de068-6138-4418-a4f0-5107449d652d", "/w==", 7])
        );
    }
}
