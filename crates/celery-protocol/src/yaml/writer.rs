//! Writing of YAML in a form that PyYAML reads.

use serde_json::{Map, Value};

use super::moment;
use crate::envelope;

/// Length of a key in bytes, above which it is marked: PyYAML searches for the colon in 1024 characters.
const LONG_KEY: usize = 500;

/// Writes a value in the flow style, which is JSON except for what PyYAML would read in another way: a float needs a point
/// and a sign in its exponent, a long key a mark, and characters that are not printable an escape. Bytes and times in
/// envelopes have tags.
pub(crate) fn write(value: &Value) -> String {
    let mut out = String::new();
    put(&mut out, value);
    out
}

fn put(out: &mut String, value: &Value) {
    match value {
        Value::Array(values) => {
            out.push('[');
            for (at, value) in values.iter().enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                put(out, value);
            }
            out.push(']');
        }
        Value::Object(map) => match envelope::open(map) {
            None => put_map(out, map),
            Some((kind, Value::Object(inner))) if kind == envelope::TABLE => put_map(out, inner),
            Some((kind, held)) => put_held(out, kind, held, value),
        },
        single => put_single(out, single),
    }
}

fn put_map(out: &mut String, map: &Map<String, Value>) {
    out.push('{');
    for (at, (key, value)) in map.iter().enumerate() {
        out.push_str(if at > 0 { ", " } else { "" });
        out.push_str(if key.len() > LONG_KEY { "? " } else { "" });
        put_text(out, key);
        out.push_str(": ");
        put(out, value);
    }
    out.push('}');
}

/// Writes what an envelope holds.
fn put_held(out: &mut String, kind: &Value, held: &Value, whole: &Value) {
    let text = held.as_str().unwrap_or_default();
    match kind.as_str() {
        Some("bytes") => {
            out.push_str("!!binary ");
            put_text(out, &envelope::to_base64(text.as_bytes()));
        }
        Some("base64") => {
            out.push_str("!!binary ");
            put_text(out, text);
        }
        Some("datetime" | "date") if moment(text).is_some() => {
            out.push_str("!!timestamp ");
            put_text(out, text);
        }
        _ => put_single(out, &envelope::plain(whole.clone())),
    }
}

/// Writes a value that has no parts.
fn put_single(out: &mut String, value: &Value) {
    match value {
        Value::String(text) => put_text(out, text),
        Value::Number(number) if number.is_f64() => {
            let text = number.to_string().to_ascii_lowercase();
            let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, ""));
            out.push_str(mantissa);
            out.push_str(if mantissa.contains('.') { "" } else { ".0" });
            if !exponent.is_empty() {
                out.push('e');
                out.push_str(if exponent.starts_with(['+', '-']) {
                    ""
                } else {
                    "+"
                });
                out.push_str(exponent);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => out.push_str(&value.to_string()),
        Value::Array(_) | Value::Object(_) => {}
    }
}

fn put_text(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\0'..='\x1f'
            | '\x7f'..='\u{9f}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{feff}'
            | '\u{fffe}'
            | '\u{ffff}' => {
                out.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
