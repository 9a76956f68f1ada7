//! The wall clock; no other module reads it.

use chrono::{DateTime, Utc};

/// The current time.
#[allow(clippy::disallowed_methods, reason = "the module that reads the clock")]
pub(crate) fn now() -> DateTime<Utc> {
    Utc::now()
}
