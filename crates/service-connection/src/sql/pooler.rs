//! Connection poolers between this program and PostgreSQL.
//!
//! A pooler such as PgBouncer can give each transaction another session of the server
//! (`pool_mode = transaction`). State of a session (limits of lock waits, prepared statements) is then lost,
//! or belongs to another client. With `pool_mode = session` there is no difference.

use sea_orm::sqlx::{self, PgConnection, Row as _};
use sea_orm::{DbErr, RuntimeErr};

/// The sessions belong to a pooler and change with each transaction.
#[derive(Debug, thiserror::Error)]
#[error(
    "a connection pooler gives each transaction another session (PgBouncer's `pool_mode = transaction`), so that \
     settings and prepared statements of a session are lost; connect to PostgreSQL itself, or to a pool with \
     `pool_mode = session`"
)]
pub struct SharedSessions;

/// Checks that each of two open connections has and keeps its own session. The first connection must be idle.
///
/// # Errors
/// [`SharedSessions`] inside of [`sqlx::Error::Configuration`], or the error of the server.
pub async fn require_own_sessions(
    first: &mut PgConnection,
    second: &mut PgConnection,
) -> Result<(), sqlx::Error> {
    let before = session(first, "SELECT pg_backend_pid()").await?;
    // The transaction holds a session until it ends. With a pooler this may be the session of the first connection.
    let held = session(second, "BEGIN; SELECT pg_backend_pid()").await?;
    let after = session(first, "SELECT pg_backend_pid()").await;
    sqlx::raw_sql("ROLLBACK").execute(second).await?;
    match before == after? && before != held {
        true => Ok(()),
        false => Err(sqlx::Error::Configuration(SharedSessions.into())),
    }
}

/// Id of the server's process, by the last statement. The statement is not prepared.
async fn session(
    connection: &mut PgConnection,
    statements: &'static str,
) -> Result<i32, sqlx::Error> {
    sqlx::raw_sql(statements)
        .fetch_one(connection)
        .await?
        .try_get(0)
}

/// Returns true if an error says that the sessions are shared.
#[must_use]
pub fn is_shared(error: &DbErr) -> bool {
    let Some(sqlx::Error::Configuration(reason)) = super::sqlx_error(error) else {
        return false;
    };
    reason.is::<SharedSessions>()
}

/// Converts an error into one of the ORM.
#[must_use]
pub fn as_connection_error(error: sqlx::Error) -> DbErr {
    DbErr::Conn(RuntimeErr::SqlxError(error.into()))
}
