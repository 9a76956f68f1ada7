//! Python's `repr` of JSON values: monitors show arguments and results in this form.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// Maximum length of `argsrepr` and `kwargsrepr`, in characters, as in Celery.
pub const MAX_CHARS: usize = 1024;

/// Number of bytes that always contain at least [`MAX_CHARS`] characters.
const ENOUGH: usize = 4 * MAX_CHARS;

/// `repr(value)`.
#[must_use]
pub fn value(value: &Value) -> String {
    let mut out = String::new();
    write(&mut out, value);
    out
}

/// `repr(value)`, truncated as by [`shorten`]. Reads no more of a list or mapping than the text shows.
#[must_use]
pub fn shortened(value: &Value) -> String {
    let mut out = String::new();
    write_up_to(&mut out, value, ENOUGH);
    shorten(&out)
}

/// `repr(tuple(values))`.
#[must_use]
pub fn tuple(values: &[Value]) -> String {
    let mut out = String::from("(");
    items(&mut out, values);
    if values.len() == 1 {
        out.push(',');
    }
    out.push(')');
    out
}

/// `repr(dict(map))`.
#[must_use]
pub fn dict(map: &Map<String, Value>) -> String {
    let mut out = String::new();
    entries(&mut out, map);
    out
}

/// Truncates a text at [`MAX_CHARS`], and marks this with `...`.
#[must_use]
pub fn shorten(text: &str) -> String {
    if text.chars().count() <= MAX_CHARS {
        return text.to_owned();
    }
    text.chars()
        .take(MAX_CHARS - 3)
        .chain("...".chars())
        .collect()
}

fn write(out: &mut String, value: &Value) {
    write_up_to(out, value, usize::MAX);
}

/// Omits further items of lists and mappings once the text has more than `most` bytes.
fn write_up_to(out: &mut String, value: &Value, most: usize) {
    match value {
        Value::Null => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Number(n) => match n.as_f64() {
            Some(x) if n.is_f64() => out.push_str(&float(x)),
            _ => out.push_str(&n.to_string()),
        },
        Value::String(s) => string(out, s),
        Value::Array(values) => {
            out.push('[');
            items_up_to(out, values, most);
            out.push(']');
        }
        Value::Object(map) => entries_up_to(out, map, most),
    }
}

fn items(out: &mut String, values: &[Value]) {
    items_up_to(out, values, usize::MAX);
}

fn items_up_to(out: &mut String, values: &[Value], most: usize) {
    for (i, value) in values.iter().enumerate() {
        if out.len() > most {
            break;
        }
        if i > 0 {
            out.push_str(", ");
        }
        write_up_to(out, value, most);
    }
}

fn entries(out: &mut String, map: &Map<String, Value>) {
    entries_up_to(out, map, usize::MAX);
}

fn entries_up_to(out: &mut String, map: &Map<String, Value>, most: usize) {
    out.push('{');
    for (i, (key, value)) in map.iter().enumerate() {
        if out.len() > most {
            break;
        }
        if i > 0 {
            out.push_str(", ");
        }
        string(out, key);
        out.push_str(": ");
        write_up_to(out, value, most);
    }
    out.push('}');
}

/// The shortest digits that are read back as the same number, as in Rust; Python differs in the form of the exponent
/// (sign, two digits) and in the numbers that have one.
fn float(x: f64) -> String {
    let magnitude = x.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{x:e}");
        if let Some((digits, exponent)) = text.split_once('e') {
            let (sign, number) = match exponent.strip_prefix('-') {
                Some(number) => ('-', number),
                None => ('+', exponent),
            };
            return format!("{digits}e{sign}{number:0>2}");
        }
    }
    let text = x.to_string();
    if text.contains('.') {
        text
    } else {
        format!("{text}.0")
    }
}

fn string(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let code = u32::from(c);
                // Writing to a String cannot fail.
                let _ = write!(out, "\\x{code:02x}");
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::json;

    // Each right-hand side was printed by CPython 3.11.
    #[rstest]
    #[case(json!(null), "None")]
    #[case(json!(true), "True")]
    #[case(json!(-7), "-7")]
    #[case(json!(1.0), "1.0")]
    #[case(json!(0.1), "0.1")]
    #[case(json!(1e16), "1e+16")]
    #[case(json!(1.5e-7), "1.5e-07")]
    #[case(json!(123456789012345680.0), "1.2345678901234568e+17")]
    #[case(json!("it's"), "\"it's\"")]
    #[case(json!("a'b\"c"), "'a\\'b\"c'")]
    #[case(json!("l\n\u{1}é"), "'l\\n\\x01é'")]
    #[case(json!([1, "a", [null]]), "[1, 'a', [None]]")]
    #[case(json!({"a": 1, "b": {}}), "{'a': 1, 'b': {}}")]
    fn values(#[case] given: Value, #[case] expected: &str) {
        assert_eq!(value(&given), expected);
    }

    #[test]
    fn tuples() {
        assert_eq!(tuple(&[]), "()");
        assert_eq!(tuple(&[json!(42)]), "(42,)");
        assert_eq!(tuple(&[json!(1), json!("x")]), "(1, 'x')");
    }

    #[rstest]
    #[case(json!([[1, {"é": "é"}], null]))]
    #[case(json!(vec![json!({"a": vec!["é"; 10]}); 300]))]
    #[case(json!("x".repeat(5000)))]
    fn cut_part_of_a_value_does_not_change_its_repr(#[case] given: Value) {
        assert_eq!(shortened(&given), shorten(&value(&given)));
    }

    #[test]
    fn long_text_is_cut() {
        assert_eq!(shorten(&"x".repeat(1024)).len(), 1024);
        let cut = shorten(&"é".repeat(1025));
        assert_eq!(cut.chars().count(), 1024);
        assert!(cut.ends_with("é..."));
    }
}
