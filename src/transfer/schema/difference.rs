//! Differences between the live database and what is needed, and their explanation.

use std::fmt;

use sea_orm::DbErr;

use crate::transfer::database::DatabaseError;

/// One way in which the live database differs from what is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// No such table.
    MissingTable {
        /// The table.
        table: String,
    },
    /// No such column.
    MissingColumn {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// The column's values cannot be used.
    WrongType {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// Its type.
        found: String,
        /// The required definition.
        needed: &'static str,
    },
    /// The enum type lacks members.
    MissingLabels {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// Names of the members.
        members: Vec<&'static str>,
        /// The existing labels.
        found: Vec<String>,
    },
    /// A column that needs a value when a row is inserted, and for which this program has none.
    Unwritten {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
}

impl Difference {
    /// The table that differs.
    pub fn table(&self) -> &str {
        match self {
            Self::MissingTable { table }
            | Self::MissingColumn { table, .. }
            | Self::WrongType { table, .. }
            | Self::MissingLabels { table, .. }
            | Self::Unwritten { table, .. } => table,
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingTable { table } => write!(f, "table {table} is missing"),
            Self::MissingColumn { table, column } => {
                write!(f, "column {table}.{column} is missing")
            }
            Self::WrongType {
                table,
                column,
                found,
                needed,
            } => {
                write!(
                    f,
                    "column {table}.{column} has the type `{found}`, and {needed} is needed"
                )
            }
            Self::MissingLabels {
                table,
                column,
                members,
                found,
            } => write!(
                f,
                "the type of column {table}.{column} has no label for {}, only {}",
                members.join(", "),
                found.join(", ")
            ),
            Self::Unwritten { table, column } => write!(
                f,
                "column {table}.{column} requires a value, and this program writes none"
            ),
        }
    }
}

/// Reason why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// It differs; the message has a line for each difference.
    #[error("{}", explain(.0))]
    Differs(Vec<Difference>),
    /// The schema could not be read.
    #[error("the database's schema could not be read")]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for SchemaError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

fn explain(differences: &[Difference]) -> String {
    let mut text = String::from("the schema of the database does not match this program:");
    for difference in differences {
        text.push_str("\n  - ");
        text.push_str(&difference.to_string());
    }
    text
}
