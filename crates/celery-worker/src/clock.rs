//! The wall clock; no other module reads it.

use chrono::{DateTime, Local, Offset as _, Utc};

/// The current time.
#[allow(clippy::disallowed_methods, reason = "the module that reads the clock")]
pub(crate) fn now() -> DateTime<Utc> {
    Utc::now()
}

/// Current distance of the local zone from UTC, in seconds to the east.
#[allow(clippy::disallowed_methods, reason = "the module that reads the clock")]
pub(crate) fn local_offset() -> i32 {
    Local::now().offset().fix().local_minus_utc()
}
