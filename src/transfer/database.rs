//! The connection to the ops-db: SQLite or PostgreSQL.
//!
//! Properties of the connection on which every statement relies:
//!
//! * **One clock.** [`Database::now`] is the clock of the database. The clocks of workers may differ, and a lease must
//!   not last longer because the clock of its reader is slow.
//! * **No upgrade of a lock.** On SQLite, a transaction that writes begins with `BEGIN IMMEDIATE`. A transaction that
//!   begins with a read can fail with `SQLITE_BUSY_SNAPSHOT` at its first write, and waiting does not help against this
//!   error. Worker, manager and command line write to the same file at the same time.
//! * **No endless wait.** Every wait for a connection, a row lock or an answer has a time limit; the error is then
//!   [`DatabaseError::Unreachable`].
//! * **No secrets in messages.** The password is never part of a URL, and statements are not logged.

use std::future::Future;
use std::path::PathBuf;
use std::str::FromStr as _;
use std::time::Duration;

use chrono::{DateTime, Utc};
use entity::Timestamp;
use sea_orm::sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use sea_orm::sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sea_orm::sqlx::{self, AssertSqlSafe, ConnectOptions as _, Connection as _, Executor as _};
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, IsolationLevel,
    SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait,
};
use secrecy::ExposeSecret;

use crate::settings::{DatabaseType, OpsDb, SslMode};
use service_connection::sql::{self, ErrorClass, pooler};
use service_connection::url;

/// Minimum of PostgreSQL's time limit for idle transactions of this program. The manager publishes messages inside a
/// transaction, and the broker may be slow.
const MIN_IDLE_IN_TRANSACTION: Duration = Duration::from_secs(60);

/// An error of the ops-db.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// No connection, no answer in time, or a lock that another session holds. The same call may succeed later.
    #[error("the database cannot be reached at the moment")]
    Unreachable(#[source] DbErr),
    /// The SQLite file does not exist.
    #[error("the database {} does not exist", .0.display())]
    Missing(PathBuf),
    /// The database refuses a session or a statement until an administrator acts; or, depending on the
    /// [class](Self::class), the values of one statement are not valid.
    #[error("the database refused a statement")]
    Refused(#[source] DbErr),
    /// One of the errors above, while connecting.
    #[error("cannot connect to {database}")]
    Connect {
        /// Address of the database, without the password.
        database: String,
        /// Cause.
        source: Box<DatabaseError>,
    },
}

impl DatabaseError {
    /// Returns true if the same call may succeed later without action by an operator.
    pub fn is_unreachable(&self) -> bool {
        self.class() == ErrorClass::Transient
    }

    /// Returns true if the values of the statement cause the error: this statement always fails, and others do not.
    pub fn is_of_one_row(&self) -> bool {
        self.class() == ErrorClass::Value
    }

    /// Returns true if a connection pooler assigns each transaction to another session.
    pub fn is_pooled(&self) -> bool {
        match self {
            Self::Refused(error) => pooler::is_shared(error),
            Self::Connect { source, .. } => source.is_pooled(),
            Self::Unreachable(_) | Self::Missing(_) => false,
        }
    }

    fn class(&self) -> ErrorClass {
        match self {
            Self::Unreachable(_) => ErrorClass::Transient,
            Self::Missing(_) => ErrorClass::Login,
            Self::Refused(error) => sql::classify(error),
            Self::Connect { source, .. } => source.class(),
        }
    }
}

impl From<DbErr> for DatabaseError {
    fn from(error: DbErr) -> Self {
        match sql::classify(&error) {
            ErrorClass::Transient => Self::Unreachable(error),
            ErrorClass::Login | ErrorClass::Refused | ErrorClass::Value => Self::Refused(error),
        }
    }
}

/// Use of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    ReadOnly,
    ReadWrite,
    /// As `ReadWrite`; creates a missing SQLite file.
    Create,
}

/// A pool of connections to the ops-db. Clones share the pool.
#[derive(Debug, Clone)]
pub struct Database {
    connection: DatabaseConnection,
    /// Time limit of one operation.
    limit: Duration,
}

impl Database {
    /// Connects to the database of the settings.
    ///
    /// If the settings do not configure TLS for PostgreSQL, it is configured as in `psql`: by `PGSSLMODE`,
    /// `PGSSLROOTCERT`, `PGSSLCERT` and `PGSSLKEY`. The password may also come from `PGPASSWORD` or `~/.pgpass`.
    ///
    /// # Errors
    /// [`DatabaseError::Missing`] if the SQLite file does not exist; otherwise [`DatabaseError::Connect`] with the
    /// cause.
    pub async fn connect(settings: &OpsDb) -> Result<Self, DatabaseError> {
        Self::open_existing(settings, Access::ReadWrite).await
    }

    /// Connects as [`Self::connect`] does, for statements that only read: the database refuses all others. Privileges to
    /// read the tables suffice.
    ///
    /// # Errors
    /// The errors of [`Self::connect`].
    pub async fn connect_read_only(settings: &OpsDb) -> Result<Self, DatabaseError> {
        Self::open_existing(settings, Access::ReadOnly).await
    }

    async fn open_existing(settings: &OpsDb, access: Access) -> Result<Self, DatabaseError> {
        if settings.database_type == DatabaseType::Sqlite {
            let path = &settings.database_sqlite_database;
            if !path.exists() {
                return Err(DatabaseError::Missing(path.clone()));
            }
        }
        Self::open(settings, access).await
    }

    /// Connects as [`Self::connect`] does, but creates the SQLite file (empty; not its directory) if it does not exist.
    ///
    /// # Errors
    /// [`DatabaseError::Connect`] with the cause.
    pub async fn connect_or_create(settings: &OpsDb) -> Result<Self, DatabaseError> {
        Self::open(settings, Access::Create).await
    }

    async fn open(settings: &OpsDb, access: Access) -> Result<Self, DatabaseError> {
        // Twice the time limit for a connection or a lock: an operation that takes longer uses a dead connection.
        let limit = settings.acquire_timeout.saturating_mul(2);
        let connecting = async {
            let connected = match settings.database_type {
                DatabaseType::Sqlite => open_sqlite(settings, access).await,
                DatabaseType::Postgresql => open_postgres(settings, access).await,
            };
            connected.map_err(|error| pooler::as_connection_error(error).into())
        };
        let connection = bounded(limit, connecting)
            .await
            .map_err(|source: DatabaseError| DatabaseError::Connect {
                database: describe(settings),
                source: Box::new(source),
            })?;
        Ok(Self { connection, limit })
    }

    /// The underlying connection, e.g. for migrations.
    pub fn connection(&self) -> &DatabaseConnection {
        &self.connection
    }

    /// Kind of the database.
    pub fn backend(&self) -> DbBackend {
        self.connection.get_database_backend()
    }

    /// Returns the time by the database's clock, in UTC.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn now(&self) -> Result<DateTime<Utc>, DatabaseError> {
        self.bounded(async { Ok(now(&self.connection).await?) })
            .await
    }

    /// Runs `work` in a transaction that writes, and commits it. After an error it rolls the transaction back, so that
    /// the locks are always released when this function returns. (A transaction that is only dropped is rolled back
    /// when its connection is used next; a caller that tries again at once would wait for its own locks.)
    ///
    /// # Errors
    /// The error of `work`; or the database cannot be reached, or it refuses the statement.
    pub(crate) async fn write<T, E: From<DatabaseError>>(
        &self,
        work: impl AsyncFnOnce(&DatabaseTransaction) -> Result<T, E>,
    ) -> Result<T, E> {
        let tx = self.begin().await?;
        let done = work(&tx).await;
        match done {
            Ok(_) => tx.commit().await.map_err(DatabaseError::from)?,
            // If this fails, the connection is closed, which also releases the locks.
            Err(_) => drop(tx.rollback().await),
        }
        done
    }

    /// Begins a transaction that writes. See [`Self::write`] for how to end it.
    pub(crate) async fn begin(&self) -> Result<DatabaseTransaction, DatabaseError> {
        let options = match self.backend() {
            // Independent of the server's default: a row is locked first and read afterwards, so the read must see what
            // was committed during the wait for the lock.
            DbBackend::Postgres => TransactionOptions {
                isolation_level: Some(IsolationLevel::ReadCommitted),
                ..Default::default()
            },
            _ => TransactionOptions {
                sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
                ..Default::default()
            },
        };
        Ok(self.connection.begin_with_options(options).await?)
    }

    /// Runs `work` with a time limit: neither sqlx nor TCP notices soon that the other end of a connection has
    /// disappeared without closing it.
    pub(crate) async fn bounded<T, E: From<DatabaseError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        bounded(self.limit, work).await
    }
}

async fn bounded<T, E: From<DatabaseError>>(
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let reason = DbErr::Custom(format!(
            "no answer within {}",
            humantime::Duration::from(limit)
        ));
        Err(DatabaseError::Unreachable(reason).into())
    })
}

/// Time by the database's clock. Not the start time of the transaction, which is earlier than the locks that it waited
/// for.
pub(crate) async fn now(db: &impl ConnectionTrait) -> Result<DateTime<Utc>, DbErr> {
    let backend = db.get_database_backend();
    let sql = match backend {
        DbBackend::Postgres => "SELECT CAST(clock_timestamp() AS text)",
        _ => "SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')",
    };
    let row = db
        .query_one_raw(Statement::from_string(backend, sql))
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("the database's clock".to_owned()))?;
    row.try_get_by_index::<Timestamp>(0)
        .map(|Timestamp(now)| now)
}

async fn open_sqlite(settings: &OpsDb, access: Access) -> Result<DatabaseConnection, sqlx::Error> {
    let options = SqliteConnectOptions::new()
        .filename(&settings.database_sqlite_database)
        .busy_timeout(settings.acquire_timeout)
        .disable_statement_logging();
    let options = match access {
        Access::ReadOnly => options.read_only(true),
        Access::ReadWrite | Access::Create => writing(options, access),
    };
    let pool = SqlitePoolOptions::new()
        .max_connections(settings.max_connections)
        .acquire_timeout(settings.acquire_timeout)
        // SQLite has no server that could close the connection.
        .test_before_acquire(false)
        .connect_with(options)
        .await?;
    Ok(pool.into())
}

fn writing(options: SqliteConnectOptions, access: Access) -> SqliteConnectOptions {
    options
        .create_if_missing(access == Access::Create)
        // WAL allows readers and one writer at a time without blocking each other. The mode is stored in the file, so
        // it is also valid for Python. It needs shared memory, so the file must not be on a network file system.
        .journal_mode(SqliteJournalMode::Wal)
        // NORMAL could lose the last commits at a power failure. A COMPLETED row whose message is already acknowledged
        // must not become IN_PROGRESS again.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
}

async fn open_postgres(
    settings: &OpsDb,
    access: Access,
) -> Result<DatabaseConnection, sqlx::Error> {
    let options = postgres_options(settings)?;
    // Connects once outside the pool, because a pool retries until its time limit and then does not report the cause.
    let mut first = options.connect().await?;
    let session = postgres_session(settings.acquire_timeout, access);
    let pool = PgPoolOptions::new()
        .max_connections(settings.max_connections)
        .acquire_timeout(settings.acquire_timeout)
        .after_connect(move |connection, _| {
            let session = AssertSqlSafe(session.clone());
            Box::pin(async move { connection.execute(session).await.map(drop) })
        })
        .before_acquire(|_, connection| {
            let is_current = sql::is_current(&connection);
            Box::pin(async move { Ok(is_current) })
        })
        .connect_with(options)
        .await?;
    pooler::require_own_sessions(&mut first, &mut *pool.acquire().await?).await?;
    first.close().await?;
    Ok(pool.into())
}

fn postgres_options(settings: &OpsDb) -> Result<PgConnectOptions, sqlx::Error> {
    let host = settings.database_postgresql_host.as_str();
    let port = settings.database_postgresql_port.to_string();
    let given = [
        ("host", host),
        ("port", &port),
        ("user", &settings.database_postgresql_user),
        ("dbname", &settings.database_postgresql_database),
        (
            "password",
            settings.database_postgresql_password.expose_secret(),
        ),
    ];
    let given = given.into_iter().filter(|(_, value)| !value.is_empty());
    // All parts at once: the password in `~/.pgpass` is valid for this host, user and database.
    let mut options = PgConnectOptions::from_str(&url::libpq(given))?
        .application_name("ccat-transfer")
        // No number is received as text, and PgBouncer refuses unknown parameters.
        .extra_float_digits(None)
        .disable_statement_logging();
    options = match settings.database_postgresql_sslmode {
        SslMode::Environment => options,
        SslMode::Disable => options.ssl_mode(PgSslMode::Disable),
        SslMode::Prefer => options.ssl_mode(PgSslMode::Prefer),
        // As in libpq; with `Require`, sqlx would ignore the root certificate.
        SslMode::Require if !settings.database_postgresql_sslrootcert.is_empty() => {
            options.ssl_mode(PgSslMode::VerifyCa)
        }
        SslMode::Require => options.ssl_mode(PgSslMode::Require),
        SslMode::VerifyCa => options.ssl_mode(PgSslMode::VerifyCa),
        SslMode::VerifyFull => options.ssl_mode(PgSslMode::VerifyFull),
    };
    for (file, put) in [
        (
            &settings.database_postgresql_sslrootcert,
            PgConnectOptions::ssl_root_cert as fn(_, _) -> _,
        ),
        (
            &settings.database_postgresql_sslcert,
            PgConnectOptions::ssl_client_cert,
        ),
        (
            &settings.database_postgresql_sslkey,
            PgConnectOptions::ssl_client_key,
        ),
    ] {
        if !file.is_empty() {
            options = put(options, file.as_str());
        }
    }
    // A Unix socket has no TLS; libpq ignores sslmode for it, too.
    Ok(match host.starts_with('/') {
        true => options.ssl_mode(PgSslMode::Disable),
        false => options,
    })
}

/// SQL for the settings of every session: time limits for row locks and for idle transactions. The second one releases
/// the locks of a client that disappeared during a transaction (for example a host that lost power while it published);
/// TCP would detect this only hours later.
///
/// A session that only reads has a time limit for statements, too: a query must not run on after the wait for its answer is over.
fn postgres_session(acquire_timeout: Duration, access: Access) -> String {
    let lock = acquire_timeout.as_millis();
    let idle = acquire_timeout
        .saturating_mul(2)
        .max(MIN_IDLE_IN_TRANSACTION)
        .as_millis();
    let mut session =
        format!("SET lock_timeout = {lock}; SET idle_in_transaction_session_timeout = {idle}");
    if access == Access::ReadOnly {
        let limit = acquire_timeout.saturating_mul(2).as_millis();
        session.push_str(&format!(
            "; SET default_transaction_read_only = on; SET statement_timeout = {limit}"
        ));
    }
    session
}

/// Address of the database, for messages.
fn describe(settings: &OpsDb) -> String {
    match settings.database_type {
        DatabaseType::Sqlite => {
            format!(
                "the SQLite file {}",
                settings.database_sqlite_database.display()
            )
        }
        DatabaseType::Postgresql => format!(
            "postgresql://{}@{}/{}",
            settings.database_postgresql_user,
            url::host_and_port(
                &settings.database_postgresql_host,
                settings.database_postgresql_port
            ),
            settings.database_postgresql_database
        ),
    }
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for DatabaseError {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        Self::Unreachable(DbErr::Custom(lost.to_string()))
    }
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for DbErr {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        let cause = sqlx::Error::Io(std::io::Error::other(lost));
        service_connection::sql::pooler::as_connection_error(cause)
    }
}
