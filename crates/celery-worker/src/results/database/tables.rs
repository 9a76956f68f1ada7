//! The tables of results: their names, columns and creation.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use sea_orm::sea_query::{IntoTableRef as _, TableRef};
use sea_orm::sqlx::{self, ConnectOptions as _, Connection as _};
use sea_orm::{ConnectionTrait as _, DbBackend, DbErr, Statement};

use super::{Database, NAME};
use crate::results::TableName;
use service_connection::sql::pooler;

/// A table, with its schema.
#[derive(Debug, Clone)]
pub(super) struct Table {
    pub(super) schema: Option<String>,
    pub(super) name: String,
    /// Celery's name of the table. The index and the sequence are named after it, even if the table has another name.
    pub(super) original: &'static str,
    pub(super) sequence: &'static str,
    pub(super) key: &'static str,
}

/// Structure of the table of tasks.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) columns: HashSet<String>,
    /// True if a row's `id` comes from Celery's sequence, false if it comes from a default of the column.
    pub(super) has_sequence: bool,
}

impl Database {
    pub(super) fn known_layout(&self) -> MutexGuard<'_, Option<Arc<Layout>>> {
        // A panic cannot leave a partial value behind.
        self.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the structure of the table. Creates missing tables if this is allowed.
    pub(super) async fn layout(&self) -> Result<Arc<Layout>, DbErr> {
        if let Some(known) = self.known_layout().clone() {
            return Ok(known);
        }
        self.require_own_sessions()
            .await
            .map_err(pooler::as_connection_error)?;
        let mut columns = self.columns(&self.tasks).await?;
        // Only before the tables were found once: a table that is missing later was renamed or dropped on purpose, and
        // must not be created again.
        let may_create = self.create_tables && !self.was_there.load(Ordering::Relaxed);
        if columns.is_empty() && may_create {
            self.create(&self.tasks, &result_columns(self.backend()))
                .await?;
            columns = self.columns(&self.tasks).await?;
            tracing::info!(backend = self.place, table = %self.tasks.quoted(), "result table created");
        }
        if may_create && self.columns(&self.groups).await?.is_empty() {
            self.create(&self.groups, &group_columns(self.backend()))
                .await?;
        }
        if columns.is_empty() {
            return Err(self.missing_table());
        }
        let layout = Arc::new(Layout {
            columns,
            has_sequence: self.has_sequence(&self.tasks).await?,
        });
        *self.known_layout() = Some(layout.clone());
        self.was_there.store(true, Ordering::Relaxed);
        Ok(layout)
    }

    async fn require_own_sessions(&self) -> Result<(), sqlx::Error> {
        let Some(server) = &self.server else {
            return Ok(());
        };
        let pool = self.connection.get_postgres_connection_pool();
        let (mut first, mut second) = (server.connect().await?, pool.acquire().await?);
        pooler::require_own_sessions(&mut first, &mut second).await?;
        first.close().await
    }

    pub(super) fn missing_table(&self) -> DbErr {
        DbErr::RecordNotFound(format!(
            "there is no table {}; Celery creates it, and so does a worker with the option `create_tables`",
            self.tasks.quoted()
        ))
    }

    /// The columns of a table; none if the table does not exist.
    pub(super) async fn columns(&self, table: &Table) -> Result<HashSet<String>, DbErr> {
        let statement = match self.backend() {
            // Finds the table by the search path, as other statements do.
            DbBackend::Postgres => Statement::from_sql_and_values(
                DbBackend::Postgres,
                "SELECT CAST(attname AS text) AS name FROM pg_attribute \
                 WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
                [table.quoted().into()],
            ),
            backend => Statement::from_sql_and_values(
                backend,
                "SELECT name FROM pragma_table_info(?, ?)",
                [
                    table.name.clone().into(),
                    table.schema.clone().unwrap_or("main".into()).into(),
                ],
            ),
        };
        let rows = self.connection.query_all_raw(statement).await?;
        rows.iter().map(|row| row.try_get("", "name")).collect()
    }

    async fn has_sequence(&self, table: &Table) -> Result<bool, DbErr> {
        if self.backend() != DbBackend::Postgres {
            return Ok(false);
        }
        let statement = Statement::from_sql_and_values(
            DbBackend::Postgres,
            "SELECT to_regclass($1) IS NOT NULL AS found",
            [table.quoted_sequence().into()],
        );
        match self.connection.query_one_raw(statement).await? {
            Some(row) => row.try_get("", "found"),
            None => Ok(false),
        }
    }

    /// Creates a table as SQLAlchemy does. If another process does the same at the same time, one of them gets an
    /// error; its next attempt finds the table.
    async fn create(&self, table: &Table, columns: &str) -> Result<(), DbErr> {
        let mut statements = Vec::new();
        if self.backend() == DbBackend::Postgres {
            let sequence = table.quoted_sequence();
            statements.push(format!("CREATE SEQUENCE IF NOT EXISTS {sequence}"));
        }
        let (name, key) = (table.quoted(), table.key);
        statements.push(format!(
            "CREATE TABLE IF NOT EXISTS {name} ({columns}, UNIQUE ({key}))"
        ));
        let index = format!("ix_{}_date_done", table.original);
        statements.push(match (self.backend(), &table.schema) {
            // SQLite expects the schema at the index, PostgreSQL at the table.
            (DbBackend::Sqlite, Some(schema)) => format!(
                "CREATE INDEX IF NOT EXISTS {}.{index} ON {} (date_done)",
                quoted(schema),
                quoted(&table.name)
            ),
            _ => format!("CREATE INDEX IF NOT EXISTS {index} ON {name} (date_done)"),
        });
        for statement in statements {
            self.connection.execute_unprepared(&statement).await?;
        }
        Ok(())
    }
}

impl Table {
    pub(super) fn new(
        named: &TableName,
        original: &'static str,
        sequence: &'static str,
        key: &'static str,
    ) -> Self {
        Self {
            schema: (!named.schema.is_empty()).then(|| named.schema.clone()),
            name: match named.name.as_str() {
                "" => original.to_owned(),
                name => name.to_owned(),
            },
            original,
            sequence,
            key,
        }
    }

    pub(super) fn reference(&self) -> TableRef {
        match &self.schema {
            Some(schema) => (schema.clone(), self.name.clone()).into_table_ref(),
            None => self.name.clone().into_table_ref(),
        }
    }

    pub(super) fn quoted(&self) -> String {
        self.in_schema(&self.name)
    }

    pub(super) fn quoted_sequence(&self) -> String {
        self.in_schema(self.sequence)
    }

    fn in_schema(&self, name: &str) -> String {
        match &self.schema {
            Some(schema) => format!("{}.{}", quoted(schema), quoted(name)),
            None => quoted(name),
        }
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Names of column types, and the definition of the row's `id`.
struct Types {
    id: &'static str,
    bytes: &'static str,
    time: &'static str,
}

impl Types {
    fn of(backend: DbBackend) -> Self {
        match backend {
            DbBackend::Postgres => Self {
                id: "id INTEGER NOT NULL PRIMARY KEY",
                bytes: "BYTEA",
                time: "TIMESTAMP WITHOUT TIME ZONE",
            },
            _ => Self {
                id: "id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT",
                bytes: "BLOB",
                time: "DATETIME",
            },
        }
    }
}

fn result_columns(backend: DbBackend) -> String {
    let Types { id, bytes, time } = Types::of(backend);
    format!(
        "{id}, task_id VARCHAR({NAME}), status VARCHAR(50), result {bytes}, date_done {time}, \
         traceback TEXT, children {bytes}, name VARCHAR({NAME}), args {bytes}, kwargs {bytes}, \
         worker VARCHAR({NAME}), retries INTEGER, queue VARCHAR({NAME}), stamps {bytes}"
    )
}

fn group_columns(backend: DbBackend) -> String {
    let Types { id, bytes, time } = Types::of(backend);
    format!("{id}, taskset_id VARCHAR({NAME}), result {bytes}, date_done {time}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        let named = TableName {
            schema: "a\"b".into(),
            name: "Outcomes".into(),
        };
        let table = Table::new(&named, "celery_taskmeta", "task_id_sequence", "task_id");
        assert_eq!(table.quoted(), "\"a\"\"b\".\"Outcomes\"");
        assert_eq!(table.quoted_sequence(), "\"a\"\"b\".\"task_id_sequence\"");
    }
}
