//! Types for the ids of transfers and the numbers of attempts.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use sea_orm::DeriveValueType;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Id of a row in `data_transfer`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    DeriveValueType,
    ToSchema,
)]
#[serde(transparent)]
pub struct TransferId(i64);

impl TransferId {
    /// Creates the id of the transfer in this row.
    #[must_use]
    pub const fn new(id: i64) -> Self {
        Self(id)
    }

    /// The id as an integer, for columns and logs.
    #[must_use]
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl From<i64> for TransferId {
    fn from(id: i64) -> Self {
        Self(id)
    }
}

impl From<TransferId> for i64 {
    fn from(id: TransferId) -> Self {
        id.0
    }
}

impl FromStr for TransferId {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of an attempt of one transfer: 1, 2, … Interrupted attempts count.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    DeriveValueType,
    ToSchema,
)]
#[serde(transparent)]
pub struct AttemptNumber(i32);

impl AttemptNumber {
    /// The number before the first attempt.
    pub const ZERO: Self = Self(0);

    /// Creates the number of an attempt.
    #[must_use]
    pub const fn new(number: i32) -> Self {
        Self(number)
    }

    /// The number as an integer, for columns and logs.
    #[must_use]
    pub const fn get(self) -> i32 {
        self.0
    }

    /// The number of the attempt after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl FromStr for AttemptNumber {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl fmt::Display for AttemptNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
