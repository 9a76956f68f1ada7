//! The wall clock; no other module reads it.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

/// The current time.
#[allow(clippy::disallowed_methods, reason = "the module that reads the clock")]
pub(crate) fn now() -> DateTime<Utc> {
    Utc::now()
}

/// The time `duration` after `time`; the last date of the calendar if it would be later.
pub(crate) fn after(time: DateTime<Utc>, duration: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(duration)
        .ok()
        .and_then(|duration| time.checked_add_signed(duration))
        .unwrap_or(DateTime::<Utc>::MAX_UTC)
}
