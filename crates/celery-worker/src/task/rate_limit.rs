//! Rate of a task: the number of runs that may begin in a time.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Number of tasks per unit of time; Celery's `"10/m"`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateLimit {
    number: f64,
    /// Unit of time, one of [`UNITS`].
    unit: char,
}

/// Units of time, with their seconds.
const UNITS: [(char, f64); 3] = [('s', 1.0), ('m', 60.0), ('h', 3600.0)];

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.unit)
    }
}

impl RateLimit {
    /// A number of tasks per second.
    #[must_use]
    pub const fn per_second(number: f64) -> Self {
        Self { number, unit: 's' }
    }

    /// A number of tasks per minute.
    #[must_use]
    pub const fn per_minute(number: f64) -> Self {
        Self { number, unit: 'm' }
    }

    /// A number of tasks per hour.
    #[must_use]
    pub const fn per_hour(number: f64) -> Self {
        Self { number, unit: 'h' }
    }

    /// The pause between two tasks.
    pub(crate) fn interval(self) -> Duration {
        let seconds = UNITS
            .iter()
            .find(|(unit, _)| *unit == self.unit)
            .map_or(1.0, |(_, seconds)| *seconds);
        Duration::try_from_secs_f64(seconds / self.number).unwrap_or(Duration::MAX)
    }
}

impl FromStr for RateLimit {
    type Err = String;

    /// Parses a number followed by `/s` (the default), `/m` or `/h`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = text.split_once('/').unwrap_or((text, "s"));
        let unit = UNITS
            .iter()
            .map(|(unit, _)| *unit)
            .find(|known| unit.trim().chars().eq([*known]));
        let number = number.trim().parse::<f64>().ok();
        match (number.filter(|n| *n > 0.0 && n.is_finite()), unit) {
            (Some(number), Some(unit)) => Ok(Self { number, unit }),
            _ => Err(format!("`{text}` is not a rate such as 2/s, 10/m or 1/h")),
        }
    }
}
