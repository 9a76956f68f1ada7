//! Connection poolers between this program and PostgreSQL.
//!
//! A pooler such as PgBouncer can give each transaction another session of the server
//! (`pool_mode = transaction`). What belongs to a session is then lost, or is another client's: the limits
//! of lock waits, and prepared statements. With `pool_mode = session` nothing is different.

use sea_orm::sqlx::{self, PgConnection, Row as _};
use sea_orm::{DbErr, RuntimeErr};

/// The sessions are a pooler's, and change with each transaction.
#[derive(Debug, thiserror::Error)]
#[error(
    "a connection pooler gives each transaction another session (PgBouncer's `pool_mode = transaction`), so that \
     settings and prepared statements of a session are lost; connect to PostgreSQL itself, or to a pool with \
     `pool_mode = session`"
)]
pub struct SharedSessions;

/// Makes sure that two open connections have a session each, and keep it. The first one must be idle.
///
/// # Errors
/// [`SharedSessions`] inside of [`sqlx::Error::Configuration`], or what the server says.
pub async fn require_own_sessions(
    first: &mut PgConnection,
    second: &mut PgConnection,
) -> Result<(), sqlx::Error> {
    let before = session(first, "SELECT pg_backend_pid()").await?;
    // Holds a session until it ends. That of the first connection, where it was only lent.
    let held = session(second, "BEGIN; SELECT pg_backend_pid()").await?;
    let after = session(first, "SELECT pg_backend_pid()").await;
    sqlx::raw_sql("ROLLBACK").execute(second).await?;
    match before == after? && before != held {
        true => Ok(()),
        false => Err(sqlx::Error::Configuration(SharedSessions.into())),
    }
}

/// The server's process, as the last statement says. Nothing is prepared for it.
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

/// An error as the ORM has it.
#[must_use]
pub fn as_connection_error(error: sqlx::Error) -> DbErr {
    DbErr::Conn(RuntimeErr::SqlxError(error.into()))
}
