//! `db+postgresql://` and `db+sqlite:///`: results in the tables of Celery's SQLAlchemy backend.
//!
//! Any version of Celery, or this crate, may have created the tables: the existing columns are read from the database,
//! and only those are written. The module never alters a table. A result is written by an UPDATE and, if no row was
//! changed, by an INSERT. Both statements leave a row unchanged whose state must be kept, so that no lock is needed,
//! even with concurrent writers.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use chrono::TimeDelta;
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoIden as _, OnConflict, Query};
use sea_orm::sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sea_orm::sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sea_orm::sqlx::{self, ConnectOptions as _, Connection as _};
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, DbErr, QueryResult};
use serde_json::Value;
use tokio::time::timeout;

use self::address::DatabaseUrl;
use self::rows::RowError;
use self::tables::{Layout, Table};
use super::breaker::CircuitBreaker;
use super::{ChordSupport, ResultBackend, ResultError, ResultOptions};
use crate::clock;
use celery_protocol::content::Serializer;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::ResultMeta;
use service_connection::sql::{self, ErrorClass};

mod address;
mod rows;
mod tables;

/// Time limit for a connection or a lock.
const ACQUIRE: Duration = Duration::from_secs(5);

/// Time limit of one operation: neither sqlx nor TCP detects soon that the other end of a connection has disappeared
/// without closing it.
const WITHIN: Duration = Duration::from_secs(15);

/// Maximum number of connections to PostgreSQL. Storing a result takes about a millisecond.
const CONNECTIONS: u32 = 4;

/// Maximum length of Celery's columns for names, in characters.
const NAME: usize = 155;

/// Stores results in a database.
pub struct Database {
    connection: DatabaseConnection,
    server: Option<PgConnectOptions>,
    /// Path of the file, for SQLite.
    file: Option<PathBuf>,
    place: String,
    tasks: Table,
    groups: Table,
    create_tables: bool,
    expires_seconds: u64,
    serializer: Serializer,
    /// Columns of the table of tasks, once they were read.
    layout: Mutex<Option<Arc<Layout>>>,
    /// True if the tables were found before.
    was_there: AtomicBool,
    breaker: CircuitBreaker,
}

/// Columns of results, without `id`, the number of the row.
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
    /// Creates the backend for `url` and `options`, without a connection. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`ResultError::Unsupported`], [`ResultError::Url`].
    pub(super) fn new(url: &str, options: &ResultOptions) -> Result<Self, ResultError> {
        let address = DatabaseUrl::parse(url)?;
        let place = address.place();
        let create_tables = options.database.create_tables;
        let (connection, server, file) = match address {
            DatabaseUrl::Postgres(server) => {
                let server = match server.get_application_name() {
                    Some(_) => *server,
                    None => server.application_name(&options.database.application_name),
                };
                let pool = PgPoolOptions::new()
                    .max_connections(CONNECTIONS)
                    .acquire_timeout(ACQUIRE)
                    .before_acquire(|_, connection| {
                        let is_current = sql::is_current(&connection);
                        Box::pin(async move { Ok(is_current) })
                    })
                    .connect_lazy_with(server.clone());
                (pool.into(), Some(server), None)
            }
            DatabaseUrl::Sqlite(path) => {
                let file = SqliteConnectOptions::new()
                    .filename(&path)
                    .create_if_missing(create_tables)
                    .busy_timeout(ACQUIRE)
                    .disable_statement_logging();
                // More connections would only wait for each other's lock.
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
            serializer: options.serializer,
            layout: Mutex::new(None),
            was_there: AtomicBool::new(false),
            breaker: CircuitBreaker::new(place.clone()),
            place,
        })
    }

    fn backend(&self) -> DbBackend {
        self.connection.get_database_backend()
    }

    /// Runs one operation through the circuit breaker, with the time limit [`WITHIN`].
    async fn with<T>(
        &self,
        work: impl AsyncFnOnce(&Layout) -> Result<T, DbErr>,
    ) -> Result<T, ResultError> {
        self.breaker
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
        // Another process may have created the table again, with other columns.
        *self.known_layout() = None;
        if !is_unreachable(&error) {
            return ResultError::refused(&self.place, error);
        }
        // The pool retries until its time limit and then does not report the reason, which one direct connection finds.
        if let Some(server) = &self.server
            && is_pool_timeout(&error)
            && let Ok(Err(reason)) =
                timeout(ACQUIRE, async { server.connect().await?.close().await }).await
        {
            return ResultError::unreachable(&self.place, reason);
        }
        ResultError::unreachable(&self.place, error)
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
        // Either no row exists, or its state must be kept, or another process inserted it in the meantime.
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
                    // SQLite stores times as text.
                    "date_done" if self.backend() == DbBackend::Sqlite => {
                        select.expr_as(Expr::col(column).cast_as("text"), column)
                    }
                    _ => select.column(column),
                };
            }
        }
        self.connection.query_one(&select).await
    }
}

#[async_trait]
impl ResultBackend for Database {
    async fn probe(&self) -> Result<String, ResultError> {
        let place = &self.place;
        let to_come = format!("{place}: the first result will create the tables");
        // A connection would create the file.
        if self.create_tables && self.file.as_ref().is_some_and(|file| !file.exists()) {
            return Ok(to_come);
        }
        let reading = timeout(WITHIN, self.columns(&self.tasks));
        let columns = match reading.await {
            Ok(Ok(columns)) => columns,
            Ok(Err(error)) => return Err(self.explained(error).await),
            Err(_) => return Err(ResultError::unreachable(place, "no answer in time")),
        };
        match (columns.is_empty(), self.create_tables) {
            (false, _) => Ok(format!("{place}: the table {} exists", self.tasks.quoted())),
            (true, true) => Ok(to_come),
            (true, false) => Err(ResultError::refused(place, self.missing_table())),
        }
    }

    fn chords(&self) -> ChordSupport {
        ChordSupport::Polled
    }

    async fn store(&self, meta: &ResultMeta, _message: &TaskMessage) -> Result<(), ResultError> {
        // Only a message that was made by hand has such an id; it can never be stored.
        if !is_id(&meta.task_id) {
            tracing::warn!(
                task_id = meta.task_id,
                limit_chars = NAME,
                "task id is too long or contains NUL; its result does not fit into the result table and is dropped"
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
            .and_then(|age| clock::now().checked_sub_signed(age))
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

fn is_id(task_id: &str) -> bool {
    !task_id.contains('\0') && task_id.chars().count() <= NAME
}

/// Returns true if no statement can succeed at the moment, so that waiting tasks try one at a time.
fn is_unreachable(error: &DbErr) -> bool {
    matches!(
        sql::classify(error),
        ErrorClass::Transient | ErrorClass::Login
    )
}

/// Checks a URL for use as a result backend.
pub(super) fn check(url: &str) -> Result<(), ResultError> {
    DatabaseUrl::parse(url).map(drop)
}

fn is_pool_timeout(error: &DbErr) -> bool {
    matches!(error, DbErr::ConnectionAcquire(_))
        || matches!(sql::sqlx_error(error), Some(sqlx::Error::PoolTimedOut))
}
