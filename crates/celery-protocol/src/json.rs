//! JSON as Python's `json` module reads it, because producers write this dialect.
//!
//! It differs from the standard, and from `serde_json`, in values that Celery messages may contain: `NaN`, `Infinity`
//! and `-Infinity`, integers of any size, halves of surrogate pairs, and deep nesting. Integers keep every digit.
//! Values that a [`Value`] cannot represent are converted, never dropped: a float that is not a number becomes the text
//! that Python prints for it, half a surrogate pair becomes U+FFFD.

use serde_json::{Map, Number, Value};

use super::envelope;

/// Maximum nesting depth of values. Python's own limit is near 1000 and varies; all code that shows, stores or drops an
/// accepted value is recursive, on stacks of 2 MiB.
pub(super) const MAX_DEPTH: usize = 250;

/// Maximum number of digits that CPython reads as an integer (`sys.int_info.default_max_str_digits`).
const MAX_INT_DIGITS: usize = 4300;

/// Reason why a text is not JSON.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at}")]
pub(super) struct JsonError {
    what: String,
    at: usize,
}

/// Parses one value. Kombu's envelopes are checked and left unchanged.
pub(super) fn read(text: &str) -> Result<Value, JsonError> {
    let mut reader = JsonReader { text, at: 0 };
    let value = reader.value(0)?;
    reader.skip_whitespace();
    match reader.rest().is_empty() {
        true => Ok(value),
        false => Err(reader.error("more than one value")),
    }
}

/// A float, or the text that Python prints for a float that is not a number.
pub(super) fn float(x: f64) -> Value {
    Number::from_f64(x).map_or_else(|| not_finite(x).into(), Value::Number)
}

fn not_finite(x: f64) -> &'static str {
    match (x.is_nan(), x > 0.0) {
        (true, _) => "NaN",
        (false, true) => "Infinity",
        (false, false) => "-Infinity",
    }
}

struct JsonReader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> JsonReader<'a> {
    fn error(&self, what: impl Into<String>) -> JsonError {
        JsonError {
            what: what.into(),
            at: self.at,
        }
    }

    fn rest(&self) -> &'a str {
        // `at` is always at the beginning of a character.
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_whitespace(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// Consumes a word if it comes next.
    fn take(&mut self, word: &str) -> bool {
        let comes = self.rest().starts_with(word);
        if comes {
            self.at += word.len();
        }
        comes
    }

    fn value(&mut self, depth: usize) -> Result<Value, JsonError> {
        self.skip_whitespace();
        match self.peek() {
            Some(b'"') => self.string().map(Value::String),
            Some(b'[' | b'{') if depth == MAX_DEPTH => {
                Err(self.error(format!("nested deeper than {MAX_DEPTH}")))
            }
            Some(b'[') => self.array(depth + 1),
            Some(b'{') => self.object(depth + 1),
            Some(b'-' | b'0'..=b'9') if !self.rest().starts_with("-I") => self.number(),
            Some(_) => self.word(),
            None => Err(self.error("ends too early")),
        }
    }

    fn word(&mut self) -> Result<Value, JsonError> {
        let words = [
            ("null", Value::Null),
            ("true", true.into()),
            ("false", false.into()),
            ("NaN", float(f64::NAN)),
            ("Infinity", float(f64::INFINITY)),
            ("-Infinity", float(f64::NEG_INFINITY)),
        ];
        for (word, value) in words {
            if self.take(word) {
                return Ok(value);
            }
        }
        Err(self.error("no value"))
    }

    fn array(&mut self, depth: usize) -> Result<Value, JsonError> {
        self.at += 1;
        let mut values = Vec::new();
        self.skip_whitespace();
        if self.take("]") {
            return Ok(values.into());
        }
        loop {
            values.push(self.value(depth)?);
            self.skip_whitespace();
            if self.take("]") {
                return Ok(values.into());
            }
            if !self.take(",") {
                return Err(self.error("neither `,` nor `]`"));
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, JsonError> {
        self.at += 1;
        let mut map = Map::new();
        self.skip_whitespace();
        if self.take("}") {
            return Ok(map.into());
        }
        loop {
            self.skip_whitespace();
            if self.peek() != Some(b'"') {
                return Err(self.error("a key is not a string"));
            }
            let key = self.string()?;
            self.skip_whitespace();
            if !self.take(":") {
                return Err(self.error("no `:` after a key"));
            }
            let value = self.value(depth)?;
            map.insert(key, value);
            self.skip_whitespace();
            if self.take("}") {
                return match envelope::check(&map) {
                    Ok(()) => Ok(map.into()),
                    Err(what) => Err(self.error(what)),
                };
            }
            if !self.take(",") {
                return Err(self.error("neither `,` nor `}`"));
            }
        }
    }

    fn number(&mut self) -> Result<Value, JsonError> {
        let text = self.rest();
        let bytes = text.as_bytes();
        let digits = |from: usize| {
            bytes
                .iter()
                .skip(from)
                .take_while(|b| b.is_ascii_digit())
                .count()
        };
        let sign = usize::from(bytes.first() == Some(&b'-'));
        let whole = match bytes.get(sign) {
            Some(b'0') => 1,
            _ => digits(sign),
        };
        if whole == 0 {
            return Err(self.error("no number"));
        }
        let mut end = sign + whole;
        if bytes.get(end) == Some(&b'.') && digits(end + 1) > 0 {
            end += 1 + digits(end + 1);
        }
        if matches!(bytes.get(end), Some(b'e' | b'E')) {
            let from = end + 1 + usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
            if digits(from) > 0 {
                end = from + digits(from);
            }
        }
        let token = text.get(..end).unwrap_or_default();
        let value = if end > sign + whole {
            token.parse().ok().map(float)
        } else if whole > MAX_INT_DIGITS {
            return Err(self.error(format!("integer of more than {MAX_INT_DIGITS} digits")));
        } else {
            integer(token)
        };
        let value = value.ok_or_else(|| self.error("no number"))?;
        self.at += end;
        Ok(value)
    }

    fn string(&mut self) -> Result<String, JsonError> {
        self.at += 1;
        let mut string = String::new();
        loop {
            let rest = self.rest();
            let plain = rest
                .find(|c| c == '"' || c == '\\' || c < ' ')
                .unwrap_or(rest.len());
            string.push_str(rest.get(..plain).unwrap_or_default());
            self.at += plain;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(string);
                }
                Some(b'\\') => string.push(self.escape()?),
                Some(_) => return Err(self.error("control character in a string")),
                None => return Err(self.error("unterminated string")),
            }
        }
    }

    fn escape(&mut self) -> Result<char, JsonError> {
        let escaped = self.text.as_bytes().get(self.at + 1).copied();
        if escaped == Some(b'u') {
            return self.unicode_escape();
        }
        let c = match escaped {
            Some(c @ (b'"' | b'\\' | b'/')) => char::from(c),
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            _ => return Err(self.error("unknown escape")),
        };
        self.at += 2;
        Ok(c)
    }

    fn unicode_escape(&mut self) -> Result<char, JsonError> {
        let first = self
            .code_unit()
            .ok_or_else(|| self.error("no four digits after \\u"))?;
        self.at += 6;
        if (0xD800..0xDC00).contains(&first)
            && let Some(second @ 0xDC00..0xE000) = self.code_unit()
        {
            self.at += 6;
            let code = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
            return Ok(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
        }
        Ok(char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER))
    }

    /// The code unit of a `\u` with four hexadecimal digits, if it comes next.
    fn code_unit(&self) -> Option<u32> {
        let digits = self.rest().strip_prefix("\\u")?.get(..4)?;
        let is_hex = digits.bytes().all(|b| b.is_ascii_hexdigit());
        is_hex.then(|| u32::from_str_radix(digits, 16).ok())?
    }
}

/// An integer of any size, with all its digits.
pub(super) fn integer(digits: &str) -> Option<Value> {
    if let Ok(small) = digits.parse::<i64>() {
        return Some(small.into());
    }
    if let Ok(large) = digits.parse::<u64>() {
        return Some(large.into());
    }
    // Keeps the digits only because of serde_json's feature `arbitrary_precision`.
    serde_json::from_str::<Number>(digits)
        .ok()
        .map(Value::Number)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    #[rstest]
    #[case("[1, -0, 1.5e3, 1E5]", json!([1, 0, 1500.0, 100_000.0]))]
    #[case(" {\"a\" : [true,false , null]}\n", json!({"a": [true, false, null]}))]
    #[case("[NaN, Infinity, -Infinity, 1e999]", json!(["NaN", "Infinity", "-Infinity", "Infinity"]))]
    #[case(r#""\ud83d\ude00 \u00e9 \/ \"""#, json!("😀 é / \""))]
    #[case(r#"["\ud83d", "\ude00\ud83d", "\ud83dx"]"#, json!(["\u{fffd}", "\u{fffd}\u{fffd}", "\u{fffd}x"]))]
    #[case(r#"{"a": 1, "b": 2, "a": 3}"#, json!({"a": 3, "b": 2}))]
    fn json_is_read_as_in_python(#[case] text: &str, #[case] value: Value) {
        assert_eq!(read(text), Ok(value));
    }

    #[rstest]
    #[case("")]
    #[case("[1, 2")]
    #[case("[1,]")]
    #[case("01")]
    #[case("1.")]
    #[case("-")]
    #[case("+1")]
    #[case("'a'")]
    #[case("\"\u{1}\"")]
    #[case("\"\\x41\"")]
    #[case("\"\\u12g4\"")]
    #[case("{1: 2}")]
    #[case("{\"a\" 1}")]
    #[case("nul")]
    #[case("-NaN")]
    #[case("[] []")]
    #[case("\u{feff}[]")]
    fn invalid_json_is_refused_as_in_python(#[case] text: &str) {
        assert!(read(text).is_err(), "{text}");
    }

    #[test]
    fn integers_keep_their_digits() {
        let digits = "123456789012345678901234567890";
        assert_eq!(read(digits).unwrap().to_string(), digits);
        assert_eq!(read("18446744073709551615"), Ok(json!(u64::MAX)));
        assert!(read(&"9".repeat(MAX_INT_DIGITS)).is_ok());
        assert!(read(&"9".repeat(MAX_INT_DIGITS + 1)).is_err());
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth| "[".repeat(depth) + &"]".repeat(depth);
        assert!(read(&nested(MAX_DEPTH)).is_ok());
        assert!(read(&nested(MAX_DEPTH + 1)).is_err());
        assert!(read(&"{\"a\":".repeat(1_000_000)).is_err());
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(float),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::hash_map(any::<String>(), inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn written_values_are_read_unchanged(value in values()) {
            prop_assert_eq!(read(&value.to_string()).unwrap(), value);
        }

        #[test]
        fn any_input_is_read_without_panic(text in "[\\[\\]{}:,\"\\\\u0-9a-fNIE.+ \u{1}é-]{0,60}") {
            let ours = read(&text);
            // This reader accepts every text that the strict reader accepts.
            prop_assert!(ours.is_ok() || serde_json::from_str::<Value>(&text).is_err());
        }
    }
}
