//! Columns of the live database.
//!
//! Not read with sea-schema, which reads every table of one named schema. This module finds a table by the search path
//! of the connection, like the statements that use the table.

use std::collections::HashMap;

use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, DbErr, QueryResult, Statement};

/// Kind of values that a column can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ColumnKind {
    Number,
    Text,
    Enum,
    Time,
    Flag,
    /// Any value: SQLite, with a declared type that says nothing about the values.
    Any,
    Other,
}

/// A column of the live database.
#[derive(Debug)]
pub(super) struct LiveColumn {
    pub(super) kind: ColumnKind,
    pub(super) type_name: String,
    pub(super) labels: Vec<String>,
    /// Maximum length in characters, if the type has one.
    pub(super) limit: Option<usize>,
    /// True if an insert without this column fails.
    pub(super) required: bool,
}

pub(super) type LiveColumns = HashMap<String, LiveColumn>;

/// Returns the columns of a table; empty if the table does not exist.
pub(super) async fn columns(db: &DatabaseConnection, table: &str) -> Result<LiveColumns, DbErr> {
    let backend = db.get_database_backend();
    let query = |sql| Statement::from_sql_and_values(backend, sql, [table.into()]);
    match backend {
        DbBackend::Postgres => {
            let rows = db.query_all_raw(query(POSTGRES_COLUMNS)).await?;
            rows.iter().map(postgres_column).collect()
        }
        _ => {
            let rows = db.query_all_raw(query(SQLITE_COLUMNS)).await?;
            rows.iter().map(sqlite_column).collect()
        }
    }
}

/// Query for the columns of a table. The labels of an enum are joined by line feeds, so that no array has to be
/// decoded. For a domain, the labels of its base type are returned.
const POSTGRES_COLUMNS: &str = "
    SELECT CAST(a.attname AS text) AS name,
           CAST(t.typcategory AS text) AS category,
           format_type(a.atttypid, NULL) AS type_name,
           a.attnotnull AND NOT (a.atthasdef OR a.attidentity <> '') AS required,
           CASE WHEN t.typname IN ('varchar', 'bpchar') AND a.atttypmod > 4
                THEN a.atttypmod - 4 END AS char_limit,
           (SELECT string_agg(e.enumlabel, chr(10) ORDER BY e.enumsortorder)
              FROM pg_catalog.pg_enum e
             WHERE e.enumtypid = COALESCE(NULLIF(t.typbasetype, 0), t.oid)) AS labels
      FROM pg_catalog.pg_attribute a
      JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
     WHERE a.attrelid = to_regclass(quote_ident($1)) AND a.attnum > 0 AND NOT a.attisdropped";

fn postgres_column(row: &QueryResult) -> Result<(String, LiveColumn), DbErr> {
    let type_name: String = row.try_get("", "type_name")?;
    let category: String = row.try_get("", "category")?;
    let labels: Option<String> = row.try_get("", "labels")?;
    let limit: Option<i32> = row.try_get("", "char_limit")?;
    let kind = match category.as_str() {
        "N" => ColumnKind::Number,
        "S" => ColumnKind::Text,
        "E" => ColumnKind::Enum,
        "D" if type_name.starts_with("timestamp") => ColumnKind::Time,
        "B" => ColumnKind::Flag,
        _ => ColumnKind::Other,
    };
    let found = LiveColumn {
        kind,
        type_name,
        labels: labels
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect(),
        limit: limit.and_then(|limit| usize::try_from(limit).ok()),
        required: row.try_get("", "required")?,
    };
    Ok((row.try_get("", "name")?, found))
}

const SQLITE_COLUMNS: &str = "
    SELECT name, type AS type_name, \"notnull\" AND dflt_value IS NULL AND pk = 0 AS required
      FROM pragma_table_info($1)";

fn sqlite_column(row: &QueryResult) -> Result<(String, LiveColumn), DbErr> {
    let type_name: String = row.try_get("", "type_name")?;
    let found = LiveColumn {
        kind: sqlite_kind(&type_name),
        type_name,
        labels: Vec::new(),
        // SQLite does not enforce the length of a text.
        limit: None,
        required: row.try_get("", "required")?,
    };
    Ok((row.try_get("", "name")?, found))
}

/// Kind of a declared type, by SQLite's rules for affinity and by further common type names.
fn sqlite_kind(declared: &str) -> ColumnKind {
    let declared = declared.to_ascii_uppercase();
    let mentions = |words: &[&str]| words.iter().any(|word| declared.contains(word));
    if mentions(&["DATE", "TIME"]) {
        ColumnKind::Time
    } else if mentions(&["BOOL"]) {
        ColumnKind::Flag
    } else if mentions(&["INT"]) {
        ColumnKind::Number
    } else if mentions(&["CHAR", "CLOB", "TEXT"]) {
        ColumnKind::Text
    } else {
        ColumnKind::Any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlites_declared_types_are_understood() {
        for (declared, kind) in [
            ("INTEGER", ColumnKind::Number),
            ("bigint", ColumnKind::Number),
            ("VARCHAR(250)", ColumnKind::Text),
            ("DATETIME", ColumnKind::Time),
            ("timestamp_with_timezone_text", ColumnKind::Time),
            ("BOOLEAN", ColumnKind::Flag),
            ("NUMERIC", ColumnKind::Any),
            ("", ColumnKind::Any),
        ] {
            assert_eq!(sqlite_kind(declared), kind, "{declared}");
        }
    }
}
