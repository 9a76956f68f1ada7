//! Makes text from outside safe for a terminal and a log.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Returns true for a control character, an invisible character, or a character that changes the order of others.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

fn escaped(text: &str, is_kept: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_escaped = |c: char| is_hidden(c) && !is_kept(c);
    if !text.contains(is_escaped) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_escaped(c) {
            // Escaped as in Rust and JSON: `\n`, `\u{1b}`.
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown.into()
}

/// Returns a text in one line, with invisible characters shown as escapes: control characters, and those that change
/// the direction of writing.
#[must_use]
pub fn visible(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// Escapes as [`visible`], but keeps line breaks and tabs.
#[must_use]
pub fn visible_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

/// Escapes as [`visible`], for text that is JSON: JSON's own escapes are used, so that its value stays the same. Line
/// breaks between its elements stay.
#[must_use]
pub fn visible_json(json: &str) -> Cow<'_, str> {
    let is_escaped = |c: char| is_hidden(c) && !matches!(c, '\n' | '\t' | '\r');
    if !json.contains(is_escaped) {
        return json.into();
    }
    let mut shown = String::with_capacity(json.len() + 16);
    let mut units = [0; 2];
    for c in json.chars() {
        if !is_escaped(c) {
            shown.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut units) {
            // Writing to a string does not fail.
            let _ = write!(shown, "\\u{unit:04x}");
        }
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("n\u{e4}cht-1.tar", "n\u{e4}cht-1.tar")]
    #[case("night\u{1b}[2J\n1.tar", "night\\u{1b}[2J\\n1.tar")]
    #[case("a\u{9b}2J\u{7f}\r\t\u{7}", "a\\u{9b}2J\\u{7f}\\r\\t\\u{7}")]
    #[case(
        "gpj.\u{202e}exe\u{2066}x\u{200b}",
        "gpj.\\u{202e}exe\\u{2066}x\\u{200b}"
    )]
    #[case("日本\u{e0041}", "日本\\u{e0041}")]
    fn invisible_characters_become_visible(#[case] text: &str, #[case] shown: &str) {
        assert_eq!(visible(text), shown);
    }

    #[test]
    fn line_breaks_are_kept() {
        assert_eq!(visible_lines("a\n\tb\u{1b}c\r\n"), "a\n\tb\\u{1b}c\\r\n");
    }

    proptest! {
        #[test]
        fn json_stays_the_same_value(text: String) {
            let json = serde_json::json!({ "text": text });
            let written = serde_json::to_string_pretty(&json).unwrap_or_default();
            let shown = visible_json(&written);
            prop_assert!(!shown.contains(|c| is_hidden(c) && c != '\n'));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).ok(), Some(json));
        }

        #[test]
        fn no_hidden_character_is_left(text: String) {
            prop_assert!(!visible(&text).contains(is_hidden));
        }
    }
}
