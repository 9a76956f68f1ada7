//! `db+postgresql://` and `db+sqlite:///`: results in the tables of Celery's SQLAlchemy backend.
//!
//! The tables may be Python's or ours, made by any version of Celery: what columns there are is
//! looked up, and only those are written. None is ever altered. A result is written by an UPDATE
//! and, where there is no row, an INSERT; both leave a row alone that has to stay, so that it
//! needs no lock of its own whoever else writes.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use sea_orm::sea_query::{
    Expr, ExprTrait as _, IntoIden as _, IntoTableRef as _, OnConflict, Query, TableRef,
};
use sea_orm::sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sea_orm::sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sea_orm::sqlx::{self, ConnectOptions as _, Connection as _};
use sea_orm::{
    ConnectionTrait as _, DatabaseConnection, DbBackend, DbErr, QueryResult, Statement, TryGetable,
    Value as Cell,
};
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use self::address::Address;
use super::options::TableName;
use super::outage::Gate;
use super::{ChordSupport, Options, ResultBackend, ResultError};
use crate::aside::{aside, is_large};
use celery_protocol::isoformat;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{self, Extended, NotReadable, ResultMeta, State};
use service_connection::sql::{self, ErrorClass, pooler};

mod address;

/// Time for a connection or a lock.
const ACQUIRE: Duration = Duration::from_secs(5);

/// Time for one piece of work: neither sqlx nor TCP notices soon that the other end of a connection is
/// gone without a word.
const WITHIN: Duration = Duration::from_secs(15);

/// Connections to PostgreSQL at most. A result takes one for a millisecond.
const CONNECTIONS: u32 = 4;

/// Characters that Celery's columns for names hold.
const NAME: usize = 155;

/// SQLAlchemy's form of a time in SQLite.
const SQLITE_TIME: &str = "%Y-%m-%d %H:%M:%S%.6f";

/// Stores results in a database.
pub struct Database {
    connection: DatabaseConnection,
    server: Option<PgConnectOptions>,
    /// SQLite's.
    file: Option<PathBuf>,
    place: String,
    tasks: Table,
    groups: Table,
    create_tables: bool,
    expires_seconds: u64,
    /// What the table of the tasks looks like, once it was looked at.
    layout: Mutex<Option<Arc<Layout>>>,
    /// True if the tables were seen before.
    was_there: AtomicBool,
    gate: Gate,
}

/// A table, with its schema.
#[derive(Debug, Clone)]
struct Table {
    schema: Option<String>,
    name: String,
    /// Celery's name of it, which index and sequence are named after, whatever the table's name.
    original: &'static str,
    sequence: &'static str,
    key: &'static str,
}

/// What the table of the tasks looks like.
#[derive(Debug)]
struct Layout {
    columns: HashSet<String>,
    /// Whether a row's number comes from Celery's sequence; from a default of the column otherwise.
    has_sequence: bool,
}

/// Columns of results, beside the row's number.
const COLUMNS: [&str; 13] = [
    "task_id",
    "status",
    "result",
    "date_done",
    "traceback",
    "children",
    "name",
    "args",
    "kwargs",
    "worker",
    "retries",
    "queue",
    "stamps",
];

impl Database {
    /// A backend as `url` and `options` say; opens no connection yet. To be called in a tokio runtime.
    ///
    /// # Errors
    /// [`ResultError::Unsupported`], [`ResultError::Url`].
    pub(super) fn new(url: &str, options: &Options) -> Result<Self, ResultError> {
        let address = Address::parse(url)?;
        let place = address.place();
        let create_tables = options.database.create_tables;
        let (connection, server, file) = match address {
            Address::Postgres(server) => {
                let pool = PgPoolOptions::new()
                    .max_connections(CONNECTIONS)
                    .acquire_timeout(ACQUIRE)
                    .before_acquire(|_, connection| {
                        let is_current = sql::is_current(&connection);
                        Box::pin(async move { Ok(is_current) })
                    })
                    .connect_lazy_with((*server).clone());
                (pool.into(), Some(*server), None)
            }
            Address::Sqlite(path) => {
                let file = SqliteConnectOptions::new()
                    .filename(&path)
                    .create_if_missing(create_tables)
                    .busy_timeout(ACQUIRE)
                    .disable_statement_logging();
                // More would only wait for each other's lock.
                let pool = SqlitePoolOptions::new()
                    .max_connections(1)
                    .acquire_timeout(ACQUIRE)
                    .connect_lazy_with(file);
                (pool.into(), None, Some(path.into()))
            }
        };
        Ok(Self {
            connection,
            server,
            file,
            tasks: Table::new(
                &options.database.tasks,
                "celery_taskmeta",
                "task_id_sequence",
                "task_id",
            ),
            groups: Table::new(
                &options.database.groups,
                "celery_tasksetmeta",
                "taskset_id_sequence",
                "taskset_id",
            ),
            create_tables,
            expires_seconds: options.expires.results,
            layout: Mutex::new(None),
            was_there: AtomicBool::new(false),
            gate: Gate::new(place.clone()),
            place,
        })
    }

    fn backend(&self) -> DbBackend {
        self.connection.get_database_backend()
    }

    /// Does a piece of work, when it is its turn and not for longer than makes sense.
    async fn with<T>(
        &self,
        work: impl AsyncFnOnce(&Layout) -> Result<T, DbErr>,
    ) -> Result<T, ResultError> {
        self.gate
            .pass(async {
                let done = timeout(WITHIN, async { work(&*self.layout().await?).await }).await;
                match done {
                    Ok(Ok(done)) => Ok(done),
                    Ok(Err(error)) => Err(self.explained(error).await),
                    Err(_) => Err(ResultError::unreachable(&self.place, "no answer in time")),
                }
            })
            .await
    }

    async fn explained(&self, error: DbErr) -> ResultError {
        // A table may have been made anew, otherwise.
        *self.known_layout() = None;
        if !is_unreachable(&error) {
            return ResultError::refused(&self.place, error);
        }
        // A pool goes on trying for as long as it may wait, and then does not tell why it failed.
        if let Some(server) = &self.server
            && is_pool_timeout(&error)
            && let Ok(Err(reason)) =
                timeout(ACQUIRE, async { server.connect().await?.close().await }).await
        {
            return ResultError::unreachable(&self.place, reason);
        }
        ResultError::unreachable(&self.place, error)
    }

    fn known_layout(&self) -> std::sync::MutexGuard<'_, Option<Arc<Layout>>> {
        // It holds no half-made state.
        self.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the table looks like; makes the tables that are missing, if it may.
    async fn layout(&self) -> Result<Arc<Layout>, DbErr> {
        if let Some(known) = self.known_layout().clone() {
            return Ok(known);
        }
        self.require_own_sessions()
            .await
            .map_err(pooler::as_connection_error)?;
        let mut columns = self.columns(&self.tasks).await?;
        // Only once: a table that is missing later was renamed or dropped on purpose, and must not be created
        // again.
        let may_create = self.create_tables && !self.was_there.load(Ordering::Relaxed);
        if columns.is_empty() && may_create {
            self.create(&self.tasks, &result_columns(self.backend()))
                .await?;
            columns = self.columns(&self.tasks).await?;
            tracing::info!(backend = self.place, table = %self.tasks.quoted(), "table of results made");
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

    fn missing_table(&self) -> DbErr {
        DbErr::RecordNotFound(format!(
            "there is no table {}; Celery makes it, and so does \
             celery.database_create_tables_at_setup = true",
            self.tasks.quoted()
        ))
    }

    /// The columns of a table; none if there is no such table.
    async fn columns(&self, table: &Table) -> Result<HashSet<String>, DbErr> {
        let statement = match self.backend() {
            // Found as a statement would find it, by the search path.
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

    /// Makes a table as SQLAlchemy does. Another process may do the same at the same time: whoever
    /// is told so tries once more and finds it.
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
            // SQLite has the schema at the index, PostgreSQL at the table.
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

    /// A time as the column holds it: without zone, in UTC.
    fn time(&self, time: Option<DateTime<Utc>>) -> Cell {
        let naive = time.map(|time| time.naive_utc());
        match self.backend() {
            DbBackend::Postgres => naive.into(),
            _ => naive
                .map(|naive| naive.format(SQLITE_TIME).to_string())
                .into(),
        }
    }

    /// The row of a result, without the columns that the table has not.
    fn cells(&self, meta: &ResultMeta, layout: &Layout) -> Vec<(&'static str, Cell)> {
        let mapping = aside(is_large(meta.values()), || meta.to_json());
        let bytes = |value: &Value| {
            let text = aside(is_large([value]), || value.to_string());
            Cell::from(text.into_bytes())
        };
        let date_done = match meta.state {
            // As SQLAlchemy's `onupdate` does for a row that was STARTED. `cleanup` goes by it.
            State::Retry { .. } | State::Progress(_) => Some(Utc::now()),
            _ => meta.date_done,
        };
        let mut cells = vec![
            ("task_id", meta.task_id.clone().into()),
            ("status", meta.state.name().into()),
            ("result", bytes(&mapping["result"])),
            ("date_done", self.time(date_done)),
            (
                "traceback",
                mapping["traceback"].as_str().map(storable).into(),
            ),
            (
                "children",
                match meta.children.is_empty() {
                    true => Cell::Bytes(None),
                    false => bytes(&json!(meta.children)),
                },
            ),
        ];
        let extended = meta.extended.as_ref();
        let text = |of: fn(&Extended) -> Option<&str>| -> Cell {
            let text = extended.and_then(of);
            text.map(|text| storable(text).chars().take(NAME).collect::<String>())
                .into()
        };
        let json = |of: fn(&Extended) -> &Value| match extended {
            Some(extended) => bytes(of(extended)),
            None => Cell::Bytes(None),
        };
        cells.extend([
            ("name", text(|extended| Some(&extended.name))),
            ("args", json(|extended| &extended.args)),
            ("kwargs", json(|extended| &extended.kwargs)),
            ("worker", text(|extended| Some(&extended.worker))),
            (
                "retries",
                extended
                    .map(|extended| i32::try_from(extended.retries).unwrap_or(i32::MAX))
                    .into(),
            ),
            ("queue", text(|extended| extended.queue.as_deref())),
        ]);
        // A state that knows of no stamps leaves those that an earlier one has noted.
        if let Some(stamps) = extended.and_then(stamps) {
            cells.push(("stamps", bytes(&stamps)));
        }
        cells.retain(|(column, _)| layout.columns.contains(*column));
        cells
    }

    async fn write(&self, meta: &ResultMeta, layout: &Layout) -> Result<(), DbErr> {
        let cells = self.cells(meta, layout);
        let status = || Expr::col((self.tasks.name.clone().into_iden(), "status"));
        let may_go = || {
            status()
                .is_null()
                .or(status().is_not_in(meta.state.unyielding().iter().copied()))
        };
        let update = Query::update()
            .table(self.tasks.reference())
            .values(
                cells
                    .iter()
                    .filter(|(column, _)| *column != "task_id")
                    .map(|(column, cell)| (*column, Expr::val(cell.clone()))),
            )
            .and_where(Expr::col("task_id").eq(meta.task_id.as_str()))
            .and_where(may_go())
            .to_owned();
        if self.connection.execute(&update).await?.rows_affected() > 0 {
            return Ok(());
        }
        // No row, or one that has to stay; or one that somebody else has made just now.
        let mut columns: Vec<&str> = cells.iter().map(|(column, _)| *column).collect();
        let mut values: Vec<Expr> = cells.into_iter().map(|(_, cell)| Expr::val(cell)).collect();
        let updated: Vec<&str> = columns[1..].to_vec();
        if layout.has_sequence {
            columns.push("id");
            let sequence = self.tasks.quoted_sequence();
            values.push(Expr::cust_with_values(
                "nextval(CAST($1 AS regclass))",
                [sequence],
            ));
        }
        let insert = Query::insert()
            .into_table(self.tasks.reference())
            .columns(columns)
            .values(values)
            .map_err(|e| DbErr::Custom(e.to_string()))?
            .on_conflict(
                OnConflict::column("task_id")
                    .update_columns(updated)
                    .action_and_where(may_go())
                    .to_owned(),
            )
            .to_owned();
        self.connection.execute(&insert).await.map(drop)
    }

    async fn find(&self, task_id: &str, layout: &Layout) -> Result<Option<QueryResult>, DbErr> {
        let mut select = Query::select();
        select
            .from(self.tasks.reference())
            .and_where(Expr::col("task_id").eq(task_id));
        for column in COLUMNS {
            if layout.columns.contains(column) {
                match column {
                    // SQLite's columns of times hold text.
                    "date_done" if self.backend() == DbBackend::Sqlite => {
                        select.expr_as(Expr::col(column).cast_as("text"), column)
                    }
                    _ => select.column(column),
                };
            }
        }
        self.connection.query_one(&select).await
    }

    /// The mapping that a row stands for.
    fn mapping(&self, row: &QueryResult, layout: &Layout) -> Result<Value, RowError> {
        let row = Row { row, layout };
        let date_done = match self.backend() {
            DbBackend::Postgres => row.get::<NaiveDateTime>("date_done")?,
            _ => row
                .get::<String>("date_done")?
                .and_then(|text| NaiveDateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S%.f").ok()),
        };
        let mut mapping = Map::new();
        let mut put = |key: &str, value: Value| mapping.insert(key.to_owned(), value);
        put("status", json!(row.get::<String>("status")?));
        put("result", row.json("result")?);
        put("traceback", json!(row.get::<String>("traceback")?));
        put(
            "children",
            match row.json("children")? {
                Value::Null => json!([]),
                children => children,
            },
        );
        put(
            "date_done",
            json!(date_done.map(|naive| isoformat(naive.and_utc()))),
        );
        if let Some(name) = row.get::<String>("name")? {
            put("name", json!(name));
            put("args", row.json("args")?);
            put("kwargs", row.json("kwargs")?);
            put("worker", json!(row.get::<String>("worker")?));
            put("retries", json!(row.get::<i32>("retries")?));
            put("queue", json!(row.get::<String>("queue")?));
            if let Value::Object(mut noted) = row.json("stamps")? {
                put(
                    "stamped_headers",
                    noted.remove("stamped_headers").unwrap_or_default(),
                );
                if let Some(Value::Object(stamps)) = noted.remove("stamps") {
                    for (header, stamp) in stamps {
                        put(&header, stamp);
                    }
                }
            }
        }
        put("task_id", json!(row.get::<String>("task_id")?));
        Ok(Value::Object(mapping))
    }
}

#[async_trait]
impl ResultBackend for Database {
    async fn probe(&self) -> Result<String, ResultError> {
        let place = &self.place;
        let to_come = format!("{place}: the tables will be made with the first result");
        // To connect would make it.
        if self.create_tables && self.file.as_ref().is_some_and(|file| !file.exists()) {
            return Ok(to_come);
        }
        let looking = timeout(WITHIN, self.columns(&self.tasks));
        let columns = match looking.await {
            Ok(Ok(columns)) => columns,
            Ok(Err(error)) => return Err(self.explained(error).await),
            Err(_) => return Err(ResultError::unreachable(place, "no answer in time")),
        };
        match (columns.is_empty(), self.create_tables) {
            (false, _) => Ok(format!(
                "{place}: the table {} is there",
                self.tasks.quoted()
            )),
            (true, true) => Ok(to_come),
            (true, false) => Err(ResultError::refused(place, self.missing_table())),
        }
    }

    fn chords(&self) -> ChordSupport {
        ChordSupport::Polled
    }

    async fn store(&self, meta: &ResultMeta, _message: &TaskMessage) -> Result<(), ResultError> {
        // Only a message that was made by hand has such an id. Nobody could store it, ever.
        if !is_id(&meta.task_id) {
            tracing::warn!(
                task_id = meta.task_id,
                limit_chars = NAME,
                "a task id that is too long, or has a NUL, does not fit into the table of results; the result is dropped"
            );
            return Ok(());
        }
        self.with(async |layout| self.write(meta, layout).await)
            .await
    }

    async fn get(&self, task_id: &str) -> Result<Option<Value>, ResultError> {
        if !is_id(task_id) {
            return Ok(None);
        }
        let read = self
            .with(async |layout| {
                let Some(row) = self.find(task_id, layout).await? else {
                    return Ok(Ok(None));
                };
                match self.mapping(&row, layout) {
                    Ok(mapping) => Ok(Ok(Some(mapping))),
                    Err(RowError::Database(error)) => Err(error),
                    Err(RowError::NotReadable(error)) => Ok(Err(error)),
                }
            })
            .await?;
        read.map_err(|source| ResultError::Unreadable {
            task_id: task_id.to_owned(),
            source,
        })
    }

    async fn forget(&self, task_id: &str) -> Result<(), ResultError> {
        if !is_id(task_id) {
            return Ok(());
        }
        let delete = Query::delete()
            .from_table(self.tasks.reference())
            .and_where(Expr::col("task_id").eq(task_id))
            .to_owned();
        self.with(async |_| self.connection.execute(&delete).await.map(drop))
            .await
    }

    async fn cleanup(&self) -> Result<u64, ResultError> {
        let age = i64::try_from(self.expires_seconds).ok();
        let Some(before) = age
            .filter(|seconds| *seconds > 0)
            .and_then(TimeDelta::try_seconds)
            .and_then(|age| Utc::now().checked_sub_signed(age))
        else {
            return Ok(0);
        };
        self.with(async |_| {
            let mut deleted = 0;
            for table in [&self.tasks, &self.groups] {
                if self.columns(table).await?.is_empty() {
                    continue;
                }
                let delete = Query::delete()
                    .from_table(table.reference())
                    .and_where(Expr::col("date_done").lt(self.time(Some(before))))
                    .to_owned();
                deleted += self.connection.execute(&delete).await?.rows_affected();
            }
            Ok(deleted)
        })
        .await
    }
}

/// A row of the table of tasks.
struct Row<'a> {
    row: &'a QueryResult,
    layout: &'a Layout,
}

enum RowError {
    Database(DbErr),
    NotReadable(NotReadable),
}

impl From<DbErr> for RowError {
    fn from(error: DbErr) -> Self {
        Self::Database(error)
    }
}

impl Row<'_> {
    /// A cell; none where the table has no such column.
    fn get<T: TryGetable>(&self, column: &str) -> Result<Option<T>, DbErr> {
        match self.layout.columns.contains(column) {
            true => self.row.try_get("", column),
            false => Ok(None),
        }
    }

    /// What a cell's bytes say; null for none.
    fn json(&self, column: &str) -> Result<Value, RowError> {
        match self.get::<Vec<u8>>(column)? {
            Some(bytes) => result::decode(&bytes).map_err(RowError::NotReadable),
            None => Ok(Value::Null),
        }
    }
}

/// `{"stamped_headers": …, "stamps": {…}}` of a task with stamps.
fn stamps(extended: &Extended) -> Option<Value> {
    let headers = extended.stamps.get("stamped_headers")?;
    let mut stamps = extended.stamps.clone();
    stamps.remove("stamped_headers");
    Some(json!({"stamped_headers": headers, "stamps": stamps}))
}

fn is_id(task_id: &str) -> bool {
    !task_id.contains('\0') && task_id.chars().count() <= NAME
}

/// Text as PostgreSQL can hold it: without NUL.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

impl Table {
    fn new(
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

    fn reference(&self) -> TableRef {
        match &self.schema {
            Some(schema) => (schema.clone(), self.name.clone()).into_table_ref(),
            None => self.name.clone().into_table_ref(),
        }
    }

    fn quoted(&self) -> String {
        self.in_schema(&self.name)
    }

    fn quoted_sequence(&self) -> String {
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

/// Names of types, and the row's number.
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

/// Returns true if no statement succeeds at the moment, so that waiting tasks try it one at a time.
fn is_unreachable(error: &DbErr) -> bool {
    matches!(
        sql::classify(error),
        ErrorClass::Transient | ErrorClass::Login
    )
}

/// Checks a URL for use as a result backend.
pub(super) fn check(url: &str) -> Result<(), ResultError> {
    Address::parse(url).map(drop)
}

fn is_pool_timeout(error: &DbErr) -> bool {
    matches!(error, DbErr::ConnectionAcquire(_))
        || matches!(sql::sqlx_error(error), Some(sqlx::Error::PoolTimedOut))
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
