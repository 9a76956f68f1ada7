//! The connection to the ops-db: SQLite or PostgreSQL.
//!
//! What every statement relies on is set here, once:
//!
//! * **One clock.** [`Database::now`] is the database's clock. Workers' clocks may disagree, and a
//!   lease must not live longer because its reader's clock is slow.
//! * **No upgrade of a lock.** A transaction that writes begins with `BEGIN IMMEDIATE` on SQLite.
//!   One that began by reading could fail with `SQLITE_BUSY_SNAPSHOT` at its first write, and no
//!   waiting helps against that. Worker, manager and command line write to one file at once.
//! * **No endless wait.** Waiting for a connection, a row lock or an answer ends; the error is
//!   [`DatabaseError::Unreachable`] then.
//! * **No secret in sight.** The password is never part of a URL, and statements are not logged.

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

/// Shortest time that PostgreSQL lets a transaction of ours sit idle. A manager publishes a
/// message inside of one, and a broker may take its time.
const MIN_IDLE_IN_TRANSACTION: Duration = Duration::from_secs(60);

/// Why the database did not do something.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// No connection, no answer in time, or a lock that another session holds. Another try may succeed.
    #[error("the database cannot be reached at the moment")]
    Unreachable(#[source] DbErr),
    /// The SQLite file is missing.
    #[error("the database {} does not exist", .0.display())]
    Missing(PathBuf),
    /// The database refuses a session or a statement, until an administrator acts; or, by its
    /// [class](Self::class), the values of one statement do not fit.
    #[error("the database refused a statement")]
    Refused(#[source] DbErr),
    /// One of the above, while connecting.
    #[error("cannot connect to {database}")]
    Connect {
        /// Which database, without its password.
        database: String,
        /// Why.
        source: Box<DatabaseError>,
    },
}

impl DatabaseError {
    /// Returns true if the same call may succeed later without action by an operator.
    pub fn is_unreachable(&self) -> bool {
        self.class() == ErrorClass::Transient
    }

    /// Returns true if the values of the statement cause the error: it fails each time, and others do not.
    pub fn is_of_one_row(&self) -> bool {
        self.class() == ErrorClass::Value
    }

    /// Returns true if a connection pooler gives each transaction another session.
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

/// A pool of connections to the ops-db. Clones share it.
#[derive(Debug, Clone)]
pub struct Database {
    connection: DatabaseConnection,
    /// Longest time for one piece of work.
    limit: Duration,
}

impl Database {
    /// Connects to the database that the settings name.
    ///
    /// Where the settings are silent about PostgreSQL's TLS, it is chosen as by `psql`: `PGSSLMODE`,
    /// `PGSSLROOTCERT`, `PGSSLCERT`, `PGSSLKEY`; a password may also come from `PGPASSWORD` or
    /// `~/.pgpass`.
    ///
    /// # Errors
    /// [`DatabaseError::Missing`] if there is no such SQLite file; else [`DatabaseError::Connect`],
    /// with the cause.
    pub async fn connect(settings: &OpsDb) -> Result<Self, DatabaseError> {
        if settings.database_type == DatabaseType::Sqlite {
            let path = &settings.database_sqlite_database;
            if !path.exists() {
                return Err(DatabaseError::Missing(path.clone()));
            }
        }
        Self::open(settings, false).await
    }

    /// As [`Self::connect`], but creates a SQLite file (empty, not its directory) if it is missing.
    ///
    /// # Errors
    /// [`DatabaseError::Connect`], with the cause.
    pub async fn connect_or_create(settings: &OpsDb) -> Result<Self, DatabaseError> {
        Self::open(settings, true).await
    }

    async fn open(settings: &OpsDb, create: bool) -> Result<Self, DatabaseError> {
        // Twice the wait for a connection or a lock: what takes longer hangs on a dead connection.
        let limit = settings.acquire_timeout.saturating_mul(2);
        let connecting = async {
            let connected = match settings.database_type {
                DatabaseType::Sqlite => open_sqlite(settings, create).await,
                DatabaseType::Postgresql => open_postgres(settings).await,
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

    /// The connection itself, e.g. for migrations.
    pub fn connection(&self) -> &DatabaseConnection {
        &self.connection
    }

    /// The kind of database.
    pub fn backend(&self) -> DbBackend {
        self.connection.get_database_backend()
    }

    /// The time by the database's clock, in UTC.
    ///
    /// # Errors
    /// What the database says.
    pub async fn now(&self) -> Result<DateTime<Utc>, DatabaseError> {
        self.bounded(async { Ok(now(&self.connection).await?) })
            .await
    }

    /// Does `work` in a transaction that writes, and commits it. After an error it is rolled back, so
    /// that either way its locks are gone when this returns: one that is only dropped is rolled back by
    /// whoever uses its connection next, and whoever tries again at once meets its own locks.
    ///
    /// # Errors
    /// That of `work`, or what the database says.
    pub(crate) async fn write<T, E: From<DatabaseError>>(
        &self,
        work: impl AsyncFnOnce(&DatabaseTransaction) -> Result<T, E>,
    ) -> Result<T, E> {
        let tx = self.begin().await?;
        let done = work(&tx).await;
        match done {
            Ok(_) => tx.commit().await.map_err(DatabaseError::from)?,
            // If this fails, the connection is gone, and the locks with it.
            Err(_) => drop(tx.rollback().await),
        }
        done
    }

    /// Begins a transaction that writes. See [`Self::write`] for how to end it.
    pub(crate) async fn begin(&self) -> Result<DatabaseTransaction, DatabaseError> {
        let options = match self.backend() {
            // Whatever the server's default is: a row is locked first and read after, and what
            // was committed while we waited for the lock must be seen.
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

    /// Does the work, but not for longer than makes sense: neither sqlx nor TCP notices soon that
    /// the other end of a connection is gone without a word.
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

/// The database's clock, as a connection or a transaction sees it. Not the time at which a
/// transaction began: that lies before the locks it had to wait for.
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

async fn open_sqlite(settings: &OpsDb, create: bool) -> Result<DatabaseConnection, sqlx::Error> {
    let options = SqliteConnectOptions::new()
        .filename(&settings.database_sqlite_database)
        .create_if_missing(create)
        // Readers and one writer at a time, without blocking each other. The file remembers it, for
        // Python too. It needs shared memory: not for a file on a network file system.
        .journal_mode(SqliteJournalMode::Wal)
        // NORMAL could lose the last commits at a power cut. A COMPLETED whose message is already
        // acknowledged must not come back as IN_PROGRESS.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(settings.acquire_timeout)
        .disable_statement_logging();
    let pool = SqlitePoolOptions::new()
        .max_connections(settings.max_connections)
        .acquire_timeout(settings.acquire_timeout)
        // There is no server that could have gone away.
        .test_before_acquire(false)
        .connect_with(options)
        .await?;
    Ok(pool.into())
}

async fn open_postgres(settings: &OpsDb) -> Result<DatabaseConnection, sqlx::Error> {
    let options = postgres_options(settings)?;
    // A pool goes on trying for as long as it may wait, and then does not tell why it failed.
    let mut first = options.connect().await?;
    let session = postgres_session(settings.acquire_timeout);
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
    // All parts at once: the password of `~/.pgpass` belongs to this host, user and database.
    let mut options = PgConnectOptions::from_str(&url::libpq(given))?
        .application_name("ccat-transfer")
        // No number is received as text, and PgBouncer refuses unknown parameters.
        .extra_float_digits(None)
        .disable_statement_logging();
    options = match settings.database_postgresql_sslmode {
        SslMode::Environment => options,
        SslMode::Disable => options.ssl_mode(PgSslMode::Disable),
        SslMode::Prefer => options.ssl_mode(PgSslMode::Prefer),
        // As libpq does; sqlx would not look at the authorities.
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
    // A Unix socket has no TLS; libpq ignores sslmode there, too.
    Ok(match host.starts_with('/') {
        true => options.ssl_mode(PgSslMode::Disable),
        false => options,
    })
}

/// What is set in every session: a row lock is not waited for without end, and a transaction
/// whose client vanished in its middle (a host that lost power while it published) gives its locks
/// back before TCP finds out, hours later.
fn postgres_session(acquire_timeout: Duration) -> String {
    let lock = acquire_timeout.as_millis();
    let idle = acquire_timeout
        .saturating_mul(2)
        .max(MIN_IDLE_IN_TRANSACTION)
        .as_millis();
    format!("SET lock_timeout = {lock}; SET idle_in_transaction_session_timeout = {idle}")
}

/// The database's address, for messages.
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
