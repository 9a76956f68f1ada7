//! Sizes, rates, times and texts of others, as this program shows them to people.

use std::borrow::Cow;

use chrono::{DateTime, TimeDelta, Utc};
use humansize::{BINARY, format_size};

use celery_worker_cli::text::visible;

/// Returns a text from another program or host in one line, with control characters shown as escapes.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    visible(text)
}

/// Formats a size in bytes with a unit.
pub(crate) fn size(bytes: i64) -> String {
    format_size(u64::try_from(bytes).unwrap_or(0), BINARY)
}

/// Formats a rate in bytes per second with a unit.
pub(crate) fn rate(bytes_per_s: i64) -> String {
    format!("{}/s", size(bytes_per_s))
}

/// Formats a share in whole per cent.
pub(crate) fn percent(done: i64, total: i64) -> String {
    if total > 0 {
        format!("{}%", done.saturating_mul(100) / total)
    } else {
        String::new()
    }
}

/// Formats a time in UTC, to the second.
pub(crate) fn second(time: DateTime<Utc>) -> impl std::fmt::Display {
    time.format("%Y-%m-%d %H:%M:%S UTC")
}

/// Formats a span of time in its two largest units, such as `2d 3h`; a negative span counts as zero.
pub(crate) fn age(span: TimeDelta) -> String {
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
