//! Output of results.

use std::borrow::Cow;
use std::io::{ErrorKind, Write as _};

use chrono::{DateTime, TimeDelta, Utc};
use comfy_table::{ContentArrangement, Table, presets};
use humansize::{BINARY, format_size};
use serde::Serialize;

use super::CliError;
use celery_worker_cli::text::{visible, visible_json, visible_lines};

/// Writes to standard output; control characters other than line breaks and tabs are shown as escapes.
///
/// # Errors
/// [`CliError::Unread`] if the reader has closed the output, as `head` does after its last line; `println!` would
/// panic.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    print_bytes(visible_lines(text).as_bytes())
}

/// Writes bytes to standard output without changes.
///
/// # Errors
/// As [`print`].
pub(super) fn print_bytes(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => CliError::Unread,
            _ => CliError::failed(format!("cannot write to standard output: {error}")),
        })
}

/// Prints a value as JSON.
pub(super) fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(no_json)?;
    print_bytes(format!("{}\n", visible_json(&text)).as_bytes())
}

/// Prints a value as JSON, in one line.
pub(super) fn json_line(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string(value).map_err(no_json)?;
    print_bytes(format!("{}\n", visible_json(&text)).as_bytes())
}

#[expect(clippy::needless_pass_by_value, reason = "as `map_err` passes it")]
fn no_json(error: serde_json::Error) -> CliError {
    CliError::failed(format!("cannot show the result as JSON: {error}"))
}

/// Creates a table without lines, for people and for `awk`.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table
}

/// Returns a text from another program or host in one line, with control characters shown as escapes.
pub(super) fn clean(text: &str) -> Cow<'_, str> {
    visible(text)
}

/// Formats a size in bytes with a unit.
pub(super) fn size(bytes: i64) -> String {
    format_size(u64::try_from(bytes).unwrap_or(0), BINARY)
}

/// Formats a rate in bytes per second with a unit.
pub(super) fn rate(bytes_per_s: i64) -> String {
    format!("{}/s", size(bytes_per_s))
}

/// Formats a share in whole per cent.
pub(super) fn percent(done: i64, total: i64) -> String {
    if total > 0 {
        format!("{}%", done.saturating_mul(100) / total)
    } else {
        String::new()
    }
}

/// Formats a time in UTC, to the second.
pub(super) fn second(time: DateTime<Utc>) -> impl std::fmt::Display {
    time.format("%Y-%m-%d %H:%M:%S UTC")
}

/// Formats a span of time in its two largest units, such as `2d 3h`; a negative span counts as zero.
pub(super) fn age(span: TimeDelta) -> String {
    const UNITS: [(i64, char); 4] = [(86_400, 'd'), (3_600, 'h'), (60, 'm'), (1, 's')];
    let seconds = span.num_seconds().max(0);
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
            words.push(format!("{count}{name}"));
        }
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(-5, "0s")]
    #[case(0, "0s")]
    #[case(59, "59s")]
    #[case(60, "1m")]
    #[case(3_725, "1h 2m")]
    #[case(86_400 * 3 + 59, "3d")]
    #[case(86_400 * 400 + 7_200, "400d 2h")]
    fn ages_have_two_units(#[case] seconds: i64, #[case] expected: &str) {
        assert_eq!(age(TimeDelta::seconds(seconds)), expected);
    }
}
