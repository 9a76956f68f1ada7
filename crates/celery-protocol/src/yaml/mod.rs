//! YAML as PyYAML's `safe_load` reads it, and in a form that it reads: YAML 1.1, in which `yes` is a boolean, `017` is octal and `2026-11-24` a
//! date. Values that JSON cannot represent are put into kombu's envelopes.
//!
//! Aliases are resolved, since PyYAML writes them for every object that occurs twice, but only while the copies stay
//! within the limit for the whole body, and the nesting within its own limit.

use std::collections::HashMap;
use std::sync::LazyLock;

use granit_parser::{Event, Parser, ScalarStyle, Tag};
use regex::{Captures, Regex};
use serde_json::{Map, Value};

use super::envelope::{self, sealed};
use super::json::{MAX_DEPTH, float, integer};

mod writer;

pub(super) use writer::write;

/// Size of one value in addition to its text, in bytes.
const VALUE_SIZE: usize = 32;

const BOOLEANS: [(&str, bool); 6] = [
    ("yes", true),
    ("no", false),
    ("true", true),
    ("false", false),
    ("on", true),
    ("off", false),
];

static FLOAT: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(concat!(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?",
        r"|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    ))
    .ok()
});
static INTEGER: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(concat!(
        r"^[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+",
        r"|[1-9][0-9_]*(?::[0-5]?[0-9])+)$",
    ))
    .ok()
});
static TIME: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(concat!(
        r"^(?<year>[0-9]{4})-(?<month>[0-9]{1,2})-(?<day>[0-9]{1,2})",
        r"(?:(?:[Tt]|[ \t]+)(?<hour>[0-9]{1,2})(?<minute>:[0-9]{2})(?<second>:[0-9]{2})",
        r"(?:\.(?<fraction>[0-9]*))?",
        r"(?:[ \t]*(?:Z|(?<sign>[-+])(?<zone>[0-9]{1,2})(?::(?<zone_minute>[0-9]{2}))?))?)?$",
    ))
    .ok()
});

/// Reason why a text is not YAML, or is a form of YAML that is not supported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct YamlError(String);

fn error<T>(what: impl Into<String>) -> Result<T, YamlError> {
    Err(YamlError(what.into()))
}

/// Parses one document; aliases may copy `limit` bytes in total.
pub(super) fn read(text: &str, limit: usize) -> Result<Value, YamlError> {
    let mut builder = Builder {
        left: limit,
        ..Builder::default()
    };
    for event in Parser::new_from_str(text) {
        let (event, _) = event.map_err(|e| YamlError(e.to_string()))?;
        builder.take(event)?;
    }
    // Null for an empty text, as None in Python.
    Ok(builder.document.unwrap_or_default())
}

/// A collection that is not complete yet.
struct Open {
    anchor: usize,
    content: Content,
}

enum Content {
    Sequence(Vec<Value>),
    Mapping {
        pairs: Map<String, Value>,
        /// Mappings from `<<`; keys of the mapping itself take precedence.
        merged: Vec<Value>,
        key: Option<Key>,
        is_set: bool,
    },
}

enum Key {
    Text(String),
    Merge,
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    anchored: HashMap<usize, Value>,
    document: Option<Value>,
    /// Remaining number of bytes that aliases may copy.
    left: usize,
}

impl Builder {
    fn take(&mut self, event: Event<'_>) -> Result<(), YamlError> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let is_plain = style == ScalarStyle::Plain;
                let value = scalar(&text, is_plain, tag.as_deref())?;
                let is_special = is_plain && tag.is_none() && (text == "<<" || text == "=");
                if is_special && !self.expects_key() {
                    return error(format!("`{text}` in an invalid place"));
                }
                self.node(value, anchor, is_special && text == "<<")
            }
            Event::Alias(anchor) => {
                let Some(value) = self.anchored.get(&anchor) else {
                    return error("a value that contains itself");
                };
                let (size, depth) = measure(value);
                if size > self.left {
                    return error("aliases expand to too much data");
                }
                if depth + self.open.len() > MAX_DEPTH {
                    return error("nested too deep");
                }
                self.left -= size;
                let value = value.clone();
                self.node(value, 0, false)
            }
            Event::SequenceStart(_, anchor, tag) => {
                if !matches!(core(tag.as_deref()), Some(None | Some("seq"))) {
                    return error("a sequence with an unsafe or unknown tag");
                }
                self.begin(anchor, Content::Sequence(Vec::new()))
            }
            Event::MappingStart(_, anchor, tag) => {
                let is_set = match core(tag.as_deref()) {
                    Some(None | Some("map")) => false,
                    Some(Some("set")) => true,
                    _ => return error("a mapping with an unsafe or unknown tag"),
                };
                self.begin(
                    anchor,
                    Content::Mapping {
                        pairs: Map::new(),
                        merged: Vec::new(),
                        key: None,
                        is_set,
                    },
                )
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open { anchor, content }) => {
                    let value = content.close()?;
                    self.node(value, anchor, false)
                }
                None => error("an end without a beginning"),
            },
            Event::DocumentStart(..) if self.document.is_some() => error("more than one document"),
            _ => Ok(()),
        }
    }

    fn expects_key(&self) -> bool {
        let content = self.open.last().map(|open| &open.content);
        matches!(content, Some(Content::Mapping { key: None, .. }))
    }

    fn begin(&mut self, anchor: usize, content: Content) -> Result<(), YamlError> {
        if self.open.len() == MAX_DEPTH {
            return error("nested too deep");
        }
        self.open.push(Open { anchor, content });
        Ok(())
    }

    /// Adds a complete value to the collection that contains it.
    fn node(&mut self, value: Value, anchor: usize, is_merge: bool) -> Result<(), YamlError> {
        if anchor != 0 {
            let (size, _) = measure(&value);
            if size > self.left {
                return error("anchors name too much data");
            }
            self.left -= size;
            self.anchored.insert(anchor, value.clone());
        }
        match self.open.last_mut().map(|open| &mut open.content) {
            None => self.document = Some(value),
            Some(Content::Sequence(values)) => values.push(value),
            Some(Content::Mapping {
                pairs, merged, key, ..
            }) => match key.take() {
                None if is_merge => *key = Some(Key::Merge),
                None => *key = Some(Key::Text(text_of_key(value)?)),
                Some(Key::Merge) => merged.push(value),
                Some(Key::Text(name)) => {
                    pairs.insert(name, value);
                }
            },
        }
        Ok(())
    }
}

impl Content {
    fn close(self) -> Result<Value, YamlError> {
        let (pairs, merged, is_set) = match self {
            Self::Sequence(values) => return Ok(values.into()),
            Self::Mapping {
                pairs,
                merged,
                is_set,
                ..
            } => (pairs, merged, is_set),
        };
        let mut all = Map::new();
        for source in merged {
            // In a list, the first mapping takes precedence.
            let sources = match source {
                Value::Array(sources) => sources.into_iter().rev().collect(),
                one => vec![one],
            };
            for source in sources {
                let Ok(source) = envelope::mapping(source) else {
                    return error("`<<` needs a mapping, or a list of mappings");
                };
                all.extend(source);
            }
        }
        all.extend(pairs);
        Ok(match is_set {
            true => all.into_iter().map(|(key, _)| Value::from(key)).collect(),
            false => envelope::table(all),
        })
    }
}

/// A key as `json.dumps` writes it.
fn text_of_key(key: Value) -> Result<String, YamlError> {
    match key {
        Value::String(text) => Ok(text),
        Value::Object(map) => match envelope::open(&map) {
            Some((_, Value::String(text))) => Ok(text.clone()),
            _ => error("a mapping as a key"),
        },
        Value::Array(_) => error("a sequence as a key"),
        other => Ok(other.to_string()),
    }
}

/// Size of a value in bytes, and its nesting depth.
fn measure(value: &Value) -> (usize, usize) {
    let mut size = VALUE_SIZE;
    let mut depth = 0;
    let mut count = |text: &str, inner: Option<&Value>| {
        size += text.len();
        if let Some(inner) = inner {
            let (inner_size, inner_depth) = measure(inner);
            size += inner_size;
            depth = depth.max(inner_depth + 1);
        }
    };
    match value {
        Value::String(text) => count(text, None),
        Value::Array(values) => values.iter().for_each(|value| count("", Some(value))),
        Value::Object(map) => map.iter().for_each(|(key, value)| count(key, Some(value))),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    (size, depth)
}

/// The name of a tag of YAML's own: `Some(None)` without a tag, `None` for another tag.
fn core(tag: Option<&Tag>) -> Option<Option<&str>> {
    let Some(tag) = tag else {
        return Some(None);
    };
    match (tag.handle(), tag.suffix()) {
        ("tag:yaml.org,2002:", name) => Some(Some(name)),
        _ => None,
    }
}

fn scalar(text: &str, is_plain: bool, tag: Option<&Tag>) -> Result<Value, YamlError> {
    let value = match core(tag) {
        // `!` alone has no meaning.
        None if tag.is_some_and(|tag| tag.handle().is_empty() && tag.suffix() == "!") => {
            match is_plain {
                true => Some(resolved(text)?),
                false => Some(text.into()),
            }
        }
        None => return error("a scalar with an unsafe or unknown tag"),
        Some(None) if is_plain => Some(resolved(text)?),
        Some(None | Some("str")) => Some(text.into()),
        Some(Some("null")) => Some(Value::Null),
        Some(Some("bool")) => boolean(text),
        Some(Some("int")) => whole(text),
        Some(Some("float")) => real(text),
        Some(Some("timestamp")) => moment(text),
        Some(Some("binary")) => binary(text),
        Some(Some(other)) => return error(format!("a scalar with the tag !!{other}")),
    };
    value.ok_or_else(|| YamlError(format!("`{text:.40}` does not match its tag")))
}

/// The value of a scalar without quotes and tag.
fn resolved(text: &str) -> Result<Value, YamlError> {
    let matches =
        |regex: &LazyLock<Option<Regex>>| regex.as_ref().is_some_and(|r| r.is_match(text));
    let uniform =
        text == text.to_lowercase() || text == text.to_uppercase() || is_capitalised(text);
    let value = match text {
        "" | "~" | "null" | "Null" | "NULL" => Some(Value::Null),
        _ if uniform && boolean(text).is_some() => boolean(text),
        _ if matches(&FLOAT) => real(text),
        _ if matches(&INTEGER) => whole(text),
        _ if matches(&TIME) && is_implicit_time(text) => moment(text),
        _ => Some(text.into()),
    };
    value.ok_or_else(|| YamlError(format!("`{text:.40}` is out of range")))
}

fn is_capitalised(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(char::is_uppercase) && chars.all(char::is_lowercase)
}

/// Returns true for a date or time. A date without a time must have all its digits.
fn is_implicit_time(text: &str) -> bool {
    text.len() == 10 || text.contains(':')
}

fn boolean(text: &str) -> Option<Value> {
    let text = text.to_ascii_lowercase();
    let (_, value) = BOOLEANS.into_iter().find(|(word, _)| *word == text)?;
    Some(value.into())
}

fn whole(text: &str) -> Option<Value> {
    let text = text.replace('_', "");
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text.strip_prefix('+').unwrap_or(&text)),
    };
    let radix = |digits: &str, radix| {
        let value = i128::from_str_radix(digits, radix).ok()?;
        integer(&format!("{sign}{value}"))
    };
    match digits.as_bytes() {
        b"0" => Some(0.into()),
        [b'0', b'b', ..] => radix(digits.get(2..)?, 2),
        [b'0', b'x', ..] => radix(digits.get(2..)?, 16),
        [b'0', ..] => radix(digits, 8),
        _ if digits.contains(':') => {
            let value = digits.split(':').try_fold(0_i128, |value, part| {
                value.checked_mul(60)?.checked_add(part.parse().ok()?)
            })?;
            integer(&format!("{sign}{value}"))
        }
        [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit) => {
            integer(&format!("{sign}{digits}"))
        }
        _ => None,
    }
}

fn real(text: &str) -> Option<Value> {
    let text = text.replace('_', "").to_ascii_lowercase();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1.0, digits),
        None => (1.0, text.strip_prefix('+').unwrap_or(&text)),
    };
    let value = match digits {
        ".inf" => f64::INFINITY,
        ".nan" => f64::NAN,
        _ => digits.split(':').try_fold(0.0, |value, part| {
            Some(value * 60.0 + part.parse::<f64>().ok()?)
        })?,
    };
    Some(float(sign * value))
}

/// The envelope for a date or a time, as `isoformat` writes it.
fn moment(text: &str) -> Option<Value> {
    let found = TIME.as_ref()?.captures(text)?;
    let part = |found: &Captures<'_>, name| found.name(name).map(|m| m.as_str().to_owned());
    let two = |name| part(&found, name).map(|digits| format!("{digits:0>2}"));
    let date = format!(
        "{}-{}-{}",
        part(&found, "year")?,
        two("month")?,
        two("day")?
    );
    let Some(hour) = two("hour") else {
        return super::time::is_date_time(&date).then(|| sealed("date", date));
    };
    let clock = format!(
        "{hour}{}{}",
        part(&found, "minute")?,
        part(&found, "second")?
    );
    let mut fraction = part(&found, "fraction").unwrap_or_default();
    fraction.truncate(6);
    let fraction = match fraction.trim_matches('0').is_empty() {
        true => String::new(),
        false => format!(".{fraction:0<6}"),
    };
    let zone = match (part(&found, "sign"), two("zone")) {
        (Some(sign), Some(hours)) => {
            let minutes = two("zone_minute").unwrap_or_else(|| "00".into());
            format!("{sign}{hours}:{minutes}")
        }
        _ if text.ends_with('Z') => "+00:00".into(),
        _ => String::new(),
    };
    let time = format!("{date}T{clock}{fraction}{zone}");
    super::time::is_date_time(&time).then(|| sealed("datetime", time))
}

/// Decodes base64, which PyYAML breaks into lines.
fn binary(text: &str) -> Option<Value> {
    let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    envelope::from_base64(&text).map(|bytes| envelope::bytes(&bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Documents and the results of PyYAML 6.0's `safe_load`, written by kombu's JSON encoder.
    const DOCUMENTS: &[(&str, Option<&str>)] = &[
        ("[1, a, 'b', \"c\\n\"]", Some(r#"[1, "a", "b", "c\n"]"#)),
        ("{a: 1, 'b': [x, y]}", Some(r#"{"a": 1, "b": ["x", "y"]}"#)),
        ("- 1\n- two\n- {k: v}\n", Some(r#"[1, "two", {"k": "v"}]"#)),
        (
            "- [1, 2]\n- {}\n- {callbacks: null, chain: null, chord: null, errbacks: null}\n",
            Some(
                r#"[[1, 2], {}, {"callbacks": null, "chain": null, "chord": null, "errbacks": null}]"#,
            ),
        ),
        (
            "[yes, No, TRUE, off, y, yEs, On]",
            Some(r#"[true, false, true, false, "y", "yEs", true]"#),
        ),
        (
            "[~, null, NULL, '', nuLL]",
            Some(r#"[null, null, null, "", "nuLL"]"#),
        ),
        (
            "[0, -0, +7, 017, 09, 0x1F, -0b101, 1_000, 190:20:30, 123456789012345678901234567890]",
            Some(r#"[0, 0, 7, 15, "09", 31, -5, 1000, 685230, 123456789012345678901234567890]"#),
        ),
        (
            "[1.5, -1.5e+3, 1e5, 1.e+5, .5, 6.8523015e+5, 685_230.15, 190:20:30.15, .inf, -.INF, .NaN]",
            Some(
                r#"[1.5, -1500.0, "1e5", 100000.0, 0.5, 685230.15, 685230.15, 685230.15, "Infinity", "-Infinity", "NaN"]"#,
            ),
        ),
        (
            "[2026-11-24, 2026-1-2, 2026-11-24T04:13:55Z, 2026-11-24 04:13:55.5 +05:30, 2026-1-2t4:13:55, 2026-11-24 04:13:55, 2026-11-24T04:13:55.123456789-05]",
            Some(
                r#"[{"__type__": "date", "__value__": "2026-11-24"}, "2026-1-2", {"__type__": "datetime", "__value__": "2026-11-24T04:13:55+00:00"}, {"__type__": "datetime", "__value__": "2026-11-24T04:13:55.500000+05:30"}, {"__type__": "datetime", "__value__": "2026-01-02T04:13:55"}, {"__type__": "datetime", "__value__": "2026-11-24T04:13:55"}, {"__type__": "datetime", "__value__": "2026-11-24T04:13:55.123456-05:00"}]"#,
            ),
        ),
        ("[&a [1, 2], *a, *a]", Some(r#"[[1, 2], [1, 2], [1, 2]]"#)),
        (
            "{base: &b {x: 1, y: 2}, more: {<<: *b, y: 3}}",
            Some(r#"{"base": {"x": 1, "y": 2}, "more": {"x": 1, "y": 3}}"#),
        ),
        (
            "[{<<: [{x: 1}, {x: 2, y: 2}], z: 3}]",
            Some(r#"[{"x": 1, "y": 2, "z": 3}]"#),
        ),
        (
            "!!binary /wA=",
            Some(r#"{"__type__": "base64", "__value__": "/wA="}"#),
        ),
        (
            "!!binary YWJj",
            Some(r#"{"__type__": "bytes", "__value__": "abc"}"#),
        ),
        (
            "[!!str 1, !!int '7', !!float '1.5', !!bool 'yes', !!null '']",
            Some(r#"["1", 7, 1.5, true, null]"#),
        ),
        ("!!set {a, b}", Some(r#"["a", "b"]"#)),
        (
            "{7: a, true: b, null: c, 1.5: d}",
            Some(r#"{"7": "a", "true": "b", "null": "c", "1.5": "d"}"#),
        ),
        ("--- [a]\n...\n", Some(r#"["a"]"#)),
        ("# nothing\n", Some(r#"null"#)),
        ("", Some(r#"null"#)),
        ("|\n  two\n  lines\n", Some(r#""two\nlines\n""#)),
        ("=", None),
        ("[a: 1]", Some(r#"[{"a": 1}]"#)),
        ("'it''s'", Some(r#""it's""#)),
        ("\"\\u00e9\\x41\"", Some(r#""\u00e9A""#)),
        ("{a: 1, a: 2}", Some(r#"{"a": 2}"#)),
        ("[1, 2", None),
        ("{a", None),
        ("!!python/tuple [1]", None),
        ("!!python/object/apply:os.system ['x']", None),
        ("!own x", None),
        ("*nope", None),
        ("--- a\n--- b\n", None),
        ("[!!int x]", None),
        ("2026-13-01", None),
        ("2026-02-30", None),
        ("[[1], {}, ]", Some(r#"[[1], {}]"#)),
        ("{[1]: 2}", None),
        ("@a", None),
        ("a: b: c", None),
        ("&a [*a]", None),
        ("! 7", Some(r#"7"#)),
        ("[<<]", None),
        ("{<<: 1}", None),
        ("0b", Some(r#""0b""#)),
        ("0x", Some(r#""0x""#)),
        ("1__0", Some(r#"10"#)),
        ("+.inf", Some(r#""Infinity""#)),
        ("12e03", Some(r#""12e03""#)),
        ("1.0e5", Some(r#""1.0e5""#)),
        ("-.5", Some(r#""-.5""#)),
        ("+1:30", Some(r#"90"#)),
    ];

    #[test]
    fn yaml_is_read_as_in_pyyaml() {
        for (text, expected) in DOCUMENTS {
            let value = read(text, 10_000);
            match expected {
                Some(json) => {
                    let expected: Value = serde_json::from_str(json).unwrap();
                    assert_eq!(value, Ok(expected), "{text}");
                }
                None => assert!(value.is_err(), "{text}: {value:?}"),
            }
        }
    }

    #[test]
    fn no_mapping_is_an_envelope() {
        let value = read("{__type__: datetime, __value__: soon}", 100).unwrap();
        let map = envelope::mapping(value).unwrap();
        assert_eq!(map["__value__"], "soon");
    }

    #[test]
    fn aliases_are_bounded() {
        let mut laughs = String::from("- &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for n in 1..10 {
            let one = format!("*a{}, ", n - 1);
            laughs += &format!("- &a{n} [{}]\n", one.repeat(10));
        }
        assert_eq!(
            read(&laughs, 1 << 20),
            error("aliases expand to too much data")
        );

        let mut deep = String::from("- &a0 [[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]\n");
        for n in 1..100 {
            deep += &format!(
                "- &a{n} [[[[[[[[[[[[[[[[[[[[[[*a{}]]]]]]]]]]]]]]]]]]]]]]\n",
                n - 1
            );
        }
        assert_eq!(read(&deep, 1 << 30), error("nested too deep"));
    }

    #[test]
    fn nesting_is_bounded() {
        for text in [
            "[".repeat(100_000),
            "{a: ".repeat(100_000),
            "- ".repeat(100_000),
        ] {
            assert!(read(&text, 1 << 20).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_input_is_read_without_panic(text in "[\\[\\]{}:,&*!<|>\"'a1. \n-]{0,60}|.{0,40}") {
            let _ = read(&text, 1000);
        }
    }
}
