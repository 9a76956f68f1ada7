//! Filters of the templates: values as text for people.
//!
//! A filter receives its value behind any number of references, so the values are traits.

use std::fmt::Display;

use askama::{Result, Values, filter_fn};
use celery_worker_cli::text::visible;
use chrono::{DateTime, SecondsFormat, Utc};
use humansize::{BINARY, format_size};
use xxhash_rust::xxh3::xxh3_64;

use super::super::model::{LinkState, ProblemGroup, ProgramCondition};

/// A point in time.
pub(super) trait Moment {
    /// The time.
    fn moment(&self) -> DateTime<Utc>;
}

impl Moment for DateTime<Utc> {
    fn moment(&self) -> DateTime<Utc> {
        *self
    }
}

impl<T: Moment + ?Sized> Moment for &T {
    fn moment(&self) -> DateTime<Utc> {
        (**self).moment()
    }
}

/// A whole number; a negative one counts as 0.
pub(super) trait Number {
    /// The number.
    fn number(&self) -> u64;
}

impl Number for u64 {
    fn number(&self) -> u64 {
        *self
    }
}

impl Number for usize {
    fn number(&self) -> u64 {
        u64::try_from(*self).unwrap_or(u64::MAX)
    }
}

impl Number for i64 {
    fn number(&self) -> u64 {
        u64::try_from(*self).unwrap_or(0)
    }
}

impl<T: Number + ?Sized> Number for &T {
    fn number(&self) -> u64 {
        (**self).number()
    }
}

/// A text from outside, in one line and with its invisible characters shown as escapes. The template escapes it for HTML.
#[filter_fn]
pub(super) fn clean(text: impl Display, _: &dyn Values) -> Result<String> {
    Ok(visible(&text.to_string()).into_owned())
}

/// A time for programs.
#[filter_fn]
pub(super) fn rfc3339(at: impl Moment, _: &dyn Values) -> Result<String> {
    Ok(at.moment().to_rfc3339_opts(SecondsFormat::Secs, true))
}

/// A time to the minute.
#[filter_fn]
pub(super) fn minute(at: impl Moment, _: &dyn Values) -> Result<String> {
    Ok(at.moment().format("%Y-%m-%d %H:%M UTC").to_string())
}

/// A time to the second.
#[filter_fn]
pub(super) fn second(at: impl Moment, _: &dyn Values) -> Result<String> {
    Ok(at.moment().format("%Y-%m-%d %H:%M:%S UTC").to_string())
}

/// A size in bytes, with a unit.
#[filter_fn]
pub(super) fn size(bytes: impl Number, _: &dyn Values) -> Result<String> {
    Ok(format_size(bytes.number(), BINARY))
}

/// A rate in bytes per second, with a unit.
#[filter_fn]
pub(super) fn rate(bytes_per_second: impl Number, _: &dyn Values) -> Result<String> {
    Ok(format!(
        "{}/s",
        format_size(bytes_per_second.number(), BINARY)
    ))
}

/// A span of time in seconds, in its two largest units.
#[filter_fn]
pub(super) fn span(seconds: impl Number, _: &dyn Values) -> Result<String> {
    Ok(span_text(seconds.number()))
}

fn span_text(seconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let first = UNITS
        .iter()
        .position(|(unit, _)| seconds >= *unit)
        .unwrap_or(UNITS.len() - 1);
    let mut rest = seconds;
    let mut words = Vec::new();
    for (unit, name) in UNITS.iter().skip(first).take(2) {
        let count = rest / unit;
        rest %= unit;
        if count > 0 || words.is_empty() {
            words.push(format!("{count} {name}"));
        }
    }
    words.join(" ")
}

fn counted(count: u64, one: &str, more: &str) -> String {
    match count {
        1 => format!("1 {one}"),
        _ => format!("{count} {more}"),
    }
}

/// A number of transfers.
#[filter_fn]
pub(super) fn transfers(count: impl Number, _: &dyn Values) -> Result<String> {
    Ok(counted(count.number(), "transfer", "transfers"))
}

/// A number of packages.
#[filter_fn]
pub(super) fn packages(count: impl Number, _: &dyn Values) -> Result<String> {
    Ok(counted(count.number(), "package", "packages"))
}

/// A number of copies.
#[filter_fn]
pub(super) fn copies(count: impl Number, _: &dyn Values) -> Result<String> {
    Ok(counted(count.number(), "copy", "copies"))
}

/// A number of failed attempts.
#[filter_fn]
pub(super) fn failed_attempts(count: impl Number, _: &dyn Values) -> Result<String> {
    Ok(counted(count.number(), "failed attempt", "failed attempts"))
}

/// The database's word for a status in normal writing: `In progress` for `IN_PROGRESS`.
#[filter_fn]
pub(super) fn status_word(status: impl Display, _: &dyn Values) -> Result<String> {
    let lower = visible(&status.to_string())
        .to_lowercase()
        .replace('_', " ");
    let mut letters = lower.chars();
    Ok(letters
        .next()
        .map(|first| first.to_uppercase().chain(letters).collect())
        .unwrap_or_default())
}

/// The class of a status in the style sheet.
#[filter_fn]
pub(super) fn status_class(status: impl Display, _: &dyn Values) -> Result<String> {
    let text = status.to_string();
    let is_plain = text.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    Ok(match is_plain {
        true => text.to_lowercase(),
        false => "other".to_owned(),
    })
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The text.
    pub(super) text: String,
    /// True for a command or a name, which was between backticks.
    pub(super) is_code: bool,
}

/// Splits a text of this program at its backticks.
#[filter_fn]
pub(super) fn parts(text: impl Display, _: &dyn Values) -> Result<Vec<Part>> {
    Ok(split(&text.to_string()))
}

fn split(text: &str) -> Vec<Part> {
    let part = |text: &str, is_code| Part {
        text: text.to_owned(),
        is_code,
    };
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('`')
        && let Some((code, after)) = after.split_once('`')
    {
        parts.push(part(before, false));
        parts.push(part(code, true));
        rest = after;
    }
    parts.push(part(rest, false));
    parts.retain(|part| !part.text.is_empty());
    parts
}

/// The words of a command, each as `clean` shows it.
#[filter_fn]
pub(super) fn words(text: impl Display, _: &dyn Values) -> Result<Vec<String>> {
    let text = visible(&text.to_string()).into_owned();
    Ok(text.split(' ').map(str::to_owned).collect())
}

/// The command that ends the pause of a link.
#[filter_fn]
pub(super) fn resume(link: &LinkState, _: &dyn Values) -> Result<String> {
    let names = [&*link.origin, &*link.destination].map(visible);
    Ok(format!(
        "ccat-transfer links resume {}",
        shell_words::join(names)
    ))
}

/// The id of the list of a problem's transfers. It stays the same while the problem exists.
#[filter_fn]
pub(super) fn details_id(group: &ProblemGroup, _: &dyn Values) -> Result<String> {
    let code = group.error_code.as_deref().unwrap_or_default();
    let name = format!("{:?} {code} {}", group.kind, group.title);
    Ok(format!("problem-{:016x}", xxh3_64(name.as_bytes())))
}

/// State of a program.
#[filter_fn]
pub(super) fn program_state(state: &ProgramCondition, _: &dyn Values) -> Result<&'static str> {
    Ok(match state {
        ProgramCondition::Running => "Runs",
        ProgramCondition::Lost => "Lost: no sign of life, and it has not ended in order",
        ProgramCondition::Ended => "Has ended",
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(0, "0 s")]
    #[case(61, "1 min 1 s")]
    #[case(7_200, "2 h")]
    #[case(86_400 + 3_599, "1 d")]
    #[case(u64::MAX, "213503982334601 d 7 h")]
    fn spans_have_two_units(#[case] seconds: u64, #[case] text: &str) {
        assert_eq!(span_text(seconds), text);
    }

    #[rstest]
    #[case("", &[])]
    #[case("a `b c` d", &[("a ", false), ("b c", true), (" d", false)])]
    #[case("`a``b`", &[("a", true), ("b", true)])]
    #[case("one ` alone", &[("one ` alone", false)])]
    fn commands_are_between_backticks(#[case] text: &str, #[case] expected: &[(&str, bool)]) {
        let parts = split(text);
        let parts: Vec<_> = parts
            .iter()
            .map(|part| (&*part.text, part.is_code))
            .collect();
        assert_eq!(parts, expected);
    }
}
