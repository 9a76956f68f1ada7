//! Times in the notations of producers: those that `dateutil.parser.isoparse` accepts, which Celery uses for `eta` and
//! `expires`, and those that Python's `fromisoformat` accepts, which kombu uses for its envelopes. Both accept basic
//! and extended ISO 8601; a time without an offset is UTC.

use chrono::{DateTime, Datelike, Days, NaiveDate, NaiveDateTime, NaiveTime, TimeDelta, Utc};

/// A day from `isoparse`, and true if the text named a day rather than only a year or a month.
struct Day {
    date: NaiveDate,
    is_named: bool,
}

/// A time of day; midnight at the end of the day is 24:00.
struct Clock {
    time: NaiveTime,
    is_next_day: bool,
    offset: TimeDelta,
}

/// Parses like `isoparse`: years, months, days, ordinal and week dates, with or without a time of day. `None` for a
/// text that `isoparse` rejects.
pub(super) fn parse(text: &str) -> Option<DateTime<Utc>> {
    date_time(text).map(|(time, _)| time)
}

/// Returns true if `datetime.fromisoformat` accepts the text. Unlike `isoparse` it requires a complete date.
pub(super) fn is_date_time(text: &str) -> bool {
    date_time(text).is_some_and(|(_, is_named)| is_named)
}

/// Returns true if `time.fromisoformat` accepts the text.
pub(super) fn is_time(text: &str) -> bool {
    text.is_ascii() && clock(text.strip_prefix('T').unwrap_or(text).as_bytes()).is_some()
}

fn date_time(text: &str) -> Option<(DateTime<Utc>, bool)> {
    if !text.is_ascii() {
        return None;
    }
    let text = text.as_bytes();
    let (day, rest) = match calendar_date(text) {
        // The text has this form, so no other form is tried, even if the day does not exist.
        Some((day, rest)) => (day?, rest),
        None => other_date(text)?,
    };
    let midnight = day.date.and_time(NaiveTime::MIN);
    let time = match rest.split_first() {
        None => midnight,
        // Any single character may separate date and time.
        Some((_, rest)) => {
            let clock = clock(rest)?;
            let date = match clock.is_next_day {
                true => day.date.checked_add_days(Days::new(1))?,
                false => day.date,
            };
            if !is_in_calendar(&date) {
                return None;
            }
            let time = NaiveDateTime::new(date, clock.time).checked_sub_signed(clock.offset)?;
            // In UTC the time may be up to a day outside of the calendar, where it could not be written.
            let first = NaiveDate::from_ymd_opt(1, 1, 1)?.and_time(NaiveTime::MIN);
            let last =
                NaiveDate::from_ymd_opt(9999, 12, 31)?.and_hms_micro_opt(23, 59, 59, 999_999)?;
            time.clamp(first, last)
        }
    };
    is_in_calendar(&time).then_some((time.and_utc(), day.is_named))
}

/// Returns true for the years of Python's calendar, i.e. years with at most four digits.
pub(super) fn is_in_calendar(time: &impl Datelike) -> bool {
    (1..=9999).contains(&time.year())
}

/// Parses `YYYY`, `YYYY-MM`, `YYYY-MM-DD`, `YYYYMMDD`; returns the rest of the text, too.
fn calendar_date(text: &[u8]) -> Option<(Option<Day>, &[u8])> {
    let (year, rest) = year(text)?;
    let day = |month, day, is_named| {
        let date = NaiveDate::from_ymd_opt(year, month, day)?;
        Some(Day { date, is_named })
    };
    if rest.is_empty() {
        return Some((day(1, 1, false), rest));
    }
    let (separated, rest) = after(rest, b'-');
    let (month, rest) = number(rest, 2)?;
    if separated && rest.is_empty() {
        return Some((day(month, 1, false), rest));
    }
    let (again, rest) = after(rest, b'-');
    if again != separated {
        return None;
    }
    let (of_month, rest) = number(rest, 2)?;
    Some((day(month, of_month, true), rest))
}

/// Parses `YYYY-Www`, `YYYY-Www-D`, `YYYY-DDD` and the same without dashes; returns the rest of the text, too.
fn other_date(text: &[u8]) -> Option<(Day, &[u8])> {
    let (year, rest) = year(text)?;
    let (separated, rest) = after(rest, b'-');
    let (is_week, rest) = after(rest, b'W');
    if !is_week {
        let (ordinal, rest) = number(rest, 3)?;
        let date = NaiveDate::from_yo_opt(year, ordinal)?;
        let is_named = false;
        return Some((Day { date, is_named }, rest));
    }
    let (week, rest) = number(rest, 2)?;
    let (weekday, rest) = match rest.is_empty() {
        true => (1, rest),
        false => {
            let (again, rest) = after(rest, b'-');
            if again != separated {
                return None;
            }
            number(rest, 1)?
        }
    };
    if !(1..=53).contains(&week) || !(1..=7).contains(&weekday) {
        return None;
    }
    // The first week contains January 4th. Week 53 of a year without one is the first week of the next year.
    let january_4 = NaiveDate::from_ymd_opt(year, 1, 4)?;
    let monday = january_4 - Days::new(january_4.weekday().num_days_from_monday().into());
    let date = monday.checked_add_days(Days::new(
        (u64::from(week) - 1) * 7 + u64::from(weekday) - 1,
    ))?;
    let is_named = true;
    Some((Day { date, is_named }, rest))
}

/// Parses `HH`, `HH:MM`, `HH:MM:SS`, `HH:MM:SS.ffffff`, the same without colons, and an offset, which may follow each
/// of them. The last number may have one digit.
fn clock(text: &[u8]) -> Option<Clock> {
    if text.len() < 2 {
        return None;
    }
    let is_zone = |text: &[u8]| matches!(text.first(), Some(b'-' | b'+' | b'Z' | b'z'));
    let [mut hour, mut minute, mut second, mut micro] = [0; 4];
    let mut rest = text;
    let mut separated = false;
    for (place, field) in [&mut hour, &mut minute, &mut second]
        .into_iter()
        .enumerate()
    {
        if rest.is_empty() || is_zone(rest) {
            break;
        }
        let (colon, after_colon) = match place {
            0 => (false, rest),
            _ => after(rest, b':'),
        };
        match place {
            1 => separated = colon,
            2 if colon != separated => return None,
            _ => {}
        }
        let (digits, following) = after_colon.split_at(after_colon.len().min(2));
        *field = int(digits)?;
        rest = following;
        if place == 2
            && let Some((b'.' | b',', fraction)) = rest.split_first()
        {
            let digits = fraction.iter().take_while(|b| b.is_ascii_digit()).count();
            let kept = digits.min(6);
            micro = int(fraction.get(..kept)?)? * 10_u32.pow(6 - u32::try_from(kept).ok()?);
            rest = fraction.get(digits..)?;
        }
    }
    let offset = match rest {
        [] | b"Z" | b"z" => TimeDelta::zero(),
        zone => offset(zone)?,
    };
    let is_next_day = hour == 24;
    if is_next_day && (minute, second, micro) != (0, 0, 0) {
        return None;
    }
    let hour = if is_next_day { 0 } else { hour };
    let time = NaiveTime::from_hms_micro_opt(hour, minute, second, micro)?;
    Some(Clock {
        time,
        is_next_day,
        offset,
    })
}

/// Parses `±HH`, `±HHMM`, `±HH:MM`.
fn offset(zone: &[u8]) -> Option<TimeDelta> {
    let (sign, rest) = zone.split_first()?;
    let (hours, rest) = number(rest, 2)?;
    let minutes = match rest {
        [] => 0,
        rest if zone.len() == 5 || zone.len() == 6 => int(after(rest, b':').1)?,
        _ => return None,
    };
    if hours > 23 || minutes > 59 {
        return None;
    }
    let offset = TimeDelta::minutes(i64::from(hours * 60 + minutes));
    match sign {
        b'+' => Some(offset),
        b'-' => Some(-offset),
        _ => None,
    }
}

fn year(text: &[u8]) -> Option<(i32, &[u8])> {
    let (year, rest) = number(text, 4)?;
    let year = i32::try_from(year).ok()?;
    (year > 0).then_some((year, rest))
}

/// Parses a number of `width` characters; returns the rest of the text, too.
fn number(text: &[u8], width: usize) -> Option<(u32, &[u8])> {
    let (number, rest) = text.split_at_checked(width)?;
    Some((int(number)?, rest))
}

/// Parses like Python's `int()` for a few characters, which accepts blanks, a plus sign and underscores.
fn int(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?.trim_ascii();
    let digits = text.strip_prefix('+').unwrap_or(text);
    if digits.starts_with('_') || digits.ends_with('_') || digits.contains("__") {
        return None;
    }
    let digits: String = digits.chars().filter(|c| *c != '_').collect();
    match digits.starts_with('+') {
        true => None,
        false => digits.parse().ok(),
    }
}

/// Returns true and the rest of the text if it begins with the character.
fn after(text: &[u8], character: u8) -> (bool, &[u8]) {
    match text.split_first() {
        Some((first, rest)) if *first == character => (true, rest),
        _ => (false, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isoformat;
    use proptest::prelude::*;

    /// Texts and the results of `isoparse` of `dateutil` 2.9.
    const TIMES: &[(&str, Option<&str>)] = &[
        (
            "2026-11-24T04:13:55.482591+00:00",
            Some("2026-11-24T04:13:55.482591+00:00"),
        ),
        (
            "2026-11-24T06:13:55+02:00",
            Some("2026-11-24T04:13:55.000000+00:00"),
        ),
        (
            "2026-11-24T04:13:55Z",
            Some("2026-11-24T04:13:55.000000+00:00"),
        ),
        (
            "2026-11-24T04:13:55z",
            Some("2026-11-24T04:13:55.000000+00:00"),
        ),
        (
            "2026-11-24T04:13:55",
            Some("2026-11-24T04:13:55.000000+00:00"),
        ),
        (
            "2026-11-24 04:13:55",
            Some("2026-11-24T04:13:55.000000+00:00"),
        ),
        (
            "2026-11-24x04:13:55",
            Some("2026-11-24T04:13:55.000000+00:00"),
        ),
        ("2026-11-24T04:13", Some("2026-11-24T04:13:00.000000+00:00")),
        ("2026-11-24T04", Some("2026-11-24T04:00:00.000000+00:00")),
        ("2026-11-24", Some("2026-11-24T00:00:00.000000+00:00")),
        ("20261124", Some("2026-11-24T00:00:00.000000+00:00")),
        ("20261124T041355", Some("2026-11-24T04:13:55.000000+00:00")),
        (
            "20261124T041355.5",
            Some("2026-11-24T04:13:55.500000+00:00"),
        ),
        (
            "20261124T041355,123456789Z",
            Some("2026-11-24T04:13:55.123456+00:00"),
        ),
        ("2026-11", Some("2026-11-01T00:00:00.000000+00:00")),
        ("2026", Some("2026-01-01T00:00:00.000000+00:00")),
        ("202611", None),
        ("200101000000", None),
        ("20010100", None),
        ("2026-W48", Some("2026-11-23T00:00:00.000000+00:00")),
        ("2026-W48-2", Some("2026-11-24T00:00:00.000000+00:00")),
        ("2026W482", Some("2026-11-24T00:00:00.000000+00:00")),
        ("2026W48", Some("2026-11-23T00:00:00.000000+00:00")),
        ("2026-W482", None),
        ("2026-328", Some("2026-11-24T00:00:00.000000+00:00")),
        ("2026328", Some("2026-11-24T00:00:00.000000+00:00")),
        ("2026-367", None),
        ("2024-366", Some("2024-12-31T00:00:00.000000+00:00")),
        ("2026-W54", None),
        ("2026-W53-7", Some("2027-01-03T00:00:00.000000+00:00")),
        ("2026-W48-2T04:13", Some("2026-11-24T04:13:00.000000+00:00")),
        ("2026-328T04:13Z", Some("2026-11-24T04:13:00.000000+00:00")),
        ("2026-11T04:13", None),
        ("2026-11-24T24:00", Some("2026-11-25T00:00:00.000000+00:00")),
        (
            "2026-11-24T24:00:00.000",
            Some("2026-11-25T00:00:00.000000+00:00"),
        ),
        ("2026-11-24T24:01", None),
        ("2026-11-24T23:59:60", None),
        ("2026-11-24T04:1355", None),
        ("2026-11-24T0413:55", None),
        (
            "2026-11-24T04:13:55+0530",
            Some("2026-11-23T22:43:55.000000+00:00"),
        ),
        (
            "2026-11-24T04:13:55+05",
            Some("2026-11-23T23:13:55.000000+00:00"),
        ),
        (
            "2026-11-24T04:13:55-05:30",
            Some("2026-11-24T09:43:55.000000+00:00"),
        ),
        ("2026-11-24T04:13:55+5:30", None),
        ("2026-11-24T04:13:55+24:00", None),
        ("2026-11-24T04:13:55+05:60", None),
        ("2026-11-24T04:13:55+05:30:00", None),
        ("2026-11-24T04:13:55 +05:30", None),
        ("2026-11-24T04+02", Some("2026-11-24T02:00:00.000000+00:00")),
        (
            "2026-11-24T04:13+02:00",
            Some("2026-11-24T02:13:00.000000+00:00"),
        ),
        ("2026-11-24T04:13:55.", None),
        ("2026-11-24T04:13:55.+01:00", None),
        ("2026-11-24T", None),
        ("2026-11-24T4", None),
        ("2026-11-24T04:", None),
        ("2026-11-24T04:1", Some("2026-11-24T04:01:00.000000+00:00")),
        (
            "2026-11-24T04:13:5",
            Some("2026-11-24T04:13:05.000000+00:00"),
        ),
        ("2026-11-24T04: 3", Some("2026-11-24T04:03:00.000000+00:00")),
        (
            "2026-11-24T-05:00",
            Some("2026-11-24T05:00:00.000000+00:00"),
        ),
        ("2026-11-24TZ", None),
        ("2026-13-01", None),
        ("2026-02-29", None),
        ("2024-02-29", Some("2024-02-29T00:00:00.000000+00:00")),
        ("0000-01-01", None),
        ("0001-01-01", Some("0001-01-01T00:00:00.000000+00:00")),
        (
            "9999-12-31T23:59:59.999999",
            Some("9999-12-31T23:59:59.999999+00:00"),
        ),
        (
            "9999-12-31T23:00-05:00",
            Some("9999-12-31T23:59:59.999999+00:00"),
        ),
        (
            "0001-01-01T01:00+05:00",
            Some("0001-01-01T00:00:00.000000+00:00"),
        ),
        ("9999-12-31T24:00", None),
        ("9999-W53-7", None),
        ("2026/11/24", None),
        ("24-11-2026", None),
        ("soon", None),
        ("2026-11-24T04:13:55 Z", None),
        ("2026-11-24T04:13:55ZZ", None),
        (" 2026-11-24", None),
        ("2_26-11-24", Some("0226-11-24T00:00:00.000000+00:00")),
        (
            "2026-11-24T04:13:55.4825911234+00:00",
            Some("2026-11-24T04:13:55.482591+00:00"),
        ),
        ("2026-11-24T04:13:55UTC", None),
        ("2026-11-24T04:13:55−05:00", None),
        (
            "2026-11-24T041355+0200",
            Some("2026-11-24T02:13:55.000000+00:00"),
        ),
    ];

    #[test]
    fn times_are_read_as_in_dateutil() {
        for (text, time) in TIMES {
            assert_eq!(parse(text).map(isoformat).as_deref(), *time, "{text}");
        }
    }

    #[test]
    fn envelopes_want_a_whole_date() {
        for text in [
            "2026-11-24",
            "2026-W48-2",
            "20261124T041355",
            "2026-11-24 04:13:55+02:00",
        ] {
            assert!(is_date_time(text), "{text}");
        }
        for text in ["2026", "2026-11", "2026-328", "", "soon"] {
            assert!(!is_date_time(text), "{text}");
        }
        for (text, valid) in [
            ("04:13:55.5", true),
            ("T04", true),
            ("04:13+02:00", true),
            ("25", false),
        ] {
            assert_eq!(is_time(text), valid, "{text}");
        }
    }

    proptest! {
        #[test]
        fn written_values_are_read_unchanged(seconds in -62_135_596_800_i64..253_402_300_800, micro in 0_u32..1_000_000) {
            let time = DateTime::from_timestamp(seconds, micro * 1000);
            prop_assert_eq!(time.map(isoformat).and_then(|text| parse(&text)), time);
        }

        #[test]
        fn any_text_is_read_as_a_time_without_panic(text in "[0-9TWZ:.,+_ -]{0,40}|.{0,40}") {
            let _ = (parse(&text), is_date_time(&text), is_time(&text));
        }
    }
}
