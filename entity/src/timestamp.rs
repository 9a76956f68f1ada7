//! Times in columns of the ops-db.

use std::fmt;

use chrono::{DateTime, NaiveDateTime, Utc};
use sea_orm::sea_query::{ArrayType, ColumnType, Nullable, ValueType, ValueTypeErr};
use sea_orm::{ColIdx, DbErr, QueryResult, TryGetError, TryGetable, Value};
use serde::{Serialize, Serializer};

/// A time in a column of the ops-db, in UTC.
///
/// SQLAlchemy's `DateTime` is `timestamp` on PostgreSQL, `DateTime(timezone=True)` is `timestamptz`, and both are text
/// on SQLite. Therefore a time is read as text, and written as a time without a zone: PostgreSQL assigns it to either
/// type (sqlx sets the time zone of the session to UTC), and on SQLite it becomes the text format that SQLAlchemy
/// reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub DateTime<Utc>);

/// A text that is not a time.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a time")]
pub struct TimestampError(String);

impl std::str::FromStr for Timestamp {
    type Err = TimestampError;

    /// Parses `2026-11-24 06:03:00`, optionally with `T` instead of the blank, a fraction and an offset. A time without
    /// an offset is in UTC.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = text.trim().replacen('T', " ", 1).replacen('Z', "+00:00", 1);
        DateTime::parse_from_str(&plain, "%Y-%m-%d %H:%M:%S%.f%#z")
            .map(|time| time.to_utc())
            .or_else(|_| {
                NaiveDateTime::parse_from_str(&plain, "%Y-%m-%d %H:%M:%S%.f")
                    .map(|time| time.and_utc())
            })
            .map(Self)
            .map_err(|_| TimestampError(text.to_owned()))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl TryGetable for Timestamp {
    fn try_get_by<I: ColIdx>(row: &QueryResult, index: I) -> Result<Self, TryGetError> {
        let text = String::try_get_by(row, index)?;
        text.parse()
            .map_err(|error: TimestampError| DbErr::Type(error.to_string()).into())
    }
}

impl From<Timestamp> for Value {
    fn from(time: Timestamp) -> Self {
        time.0.naive_utc().into()
    }
}

impl From<DateTime<Utc>> for Timestamp {
    fn from(time: DateTime<Utc>) -> Self {
        Self(time)
    }
}

impl Nullable for Timestamp {
    fn null() -> Value {
        NaiveDateTime::null()
    }
}

impl ValueType for Timestamp {
    fn try_from(value: Value) -> Result<Self, ValueTypeErr> {
        <NaiveDateTime as ValueType>::try_from(value).map(|time| Self(time.and_utc()))
    }

    fn type_name() -> String {
        "Timestamp".to_owned()
    }

    fn array_type() -> ArrayType {
        ArrayType::ChronoDateTime
    }

    fn column_type() -> ColumnType {
        ColumnType::DateTime
    }
}
