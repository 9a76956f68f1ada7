//! Classes of database errors: one list for the ops-db and for the result backend.
//!
//! A class says what a caller that can wait should do. PostgreSQL's codes are those of its appendix A,
//! SQLite's its primary result codes.

pub mod pooler;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sea_orm::sqlx;
use sea_orm::sqlx::pool::PoolConnectionMetadata;
use sea_orm::{ConnAcquireErr, DbErr, RuntimeErr, SqlxPostgresError, SqlxSqliteError};

/// Class of the reason of a failed statement, by the effect of waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// No connection, no answer, a lack of resources, a lost race for a lock. It ends without action by an
    /// administrator, usually soon.
    Transient,
    /// The server gives no session: the login, the certificate or the name of the database is refused.
    Login,
    /// The server refuses the statement: a privilege, a table or a column is missing. An administrator
    /// has to act, and the same statement succeeds afterwards.
    Refused,
    /// The values of this statement do not fit. The statement fails each time, and others do not.
    Value,
}

/// Moment at which a connection reported that its prepared statements no longer fit the schema.
static OUTDATED: Mutex<Option<Instant>> = Mutex::new(None);

/// The class of an error.
#[must_use]
pub fn classify(error: &DbErr) -> ErrorClass {
    match error {
        DbErr::ConnectionAcquire(ConnAcquireErr::Timeout | ConnAcquireErr::ConnectionClosed) => {
            ErrorClass::Transient
        }
        DbErr::Conn(RuntimeErr::SqlxError(error))
        | DbErr::Exec(RuntimeErr::SqlxError(error))
        | DbErr::Query(RuntimeErr::SqlxError(error)) => classify_sqlx(error),
        // The error concerns a row that was read.
        DbErr::Type(_) | DbErr::Json(_) | DbErr::TryIntoErr { .. } => ErrorClass::Value,
        _ => ErrorClass::Refused,
    }
}

/// The SQL error inside an error of the ORM.
#[must_use]
pub fn sqlx_error(error: &DbErr) -> Option<&sqlx::Error> {
    match error {
        DbErr::Conn(RuntimeErr::SqlxError(error))
        | DbErr::Exec(RuntimeErr::SqlxError(error))
        | DbErr::Query(RuntimeErr::SqlxError(error)) => Some(error),
        _ => None,
    }
}

fn classify_sqlx(error: &sqlx::Error) -> ErrorClass {
    use sqlx::Error;
    match error {
        Error::Io(_)
        | Error::Protocol(_)
        | Error::PoolTimedOut
        | Error::PoolClosed
        | Error::WorkerCrashed => ErrorClass::Transient,
        Error::Tls(_) | Error::Configuration(_) => ErrorClass::Login,
        Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            if let Some(error) = error.try_downcast_ref::<SqlxPostgresError>() {
                of_sqlstate(&code, error.message())
            } else if error.try_downcast_ref::<SqlxSqliteError>().is_some() {
                of_sqlite(&code)
            } else {
                ErrorClass::Refused
            }
        }
        // A column of another type than the statement expects: the schema does not fit.
        Error::ColumnDecode { source, .. } | Error::Decode(source) => {
            match source.to_string().starts_with("mismatched types") {
                true => ErrorClass::Refused,
                false => ErrorClass::Value,
            }
        }
        Error::Encode(_) => ErrorClass::Value,
        _ => ErrorClass::Refused,
    }
}

fn of_sqlstate(code: &str, message: &str) -> ErrorClass {
    if is_outdated(code, message) {
        *outdated() = Some(Instant::now());
        return ErrorClass::Transient;
    }
    match (code.get(..2).unwrap_or_default(), code) {
        // Read-only: a standby in the middle of a fail-over. Idle for too long: the transaction, not the
        // statement.
        (_, "25006" | "25P03" | "25P04") => ErrorClass::Transient,
        // A pooler in between does not know a parameter of the session.
        (_, "08P01") => ErrorClass::Login,
        // Text that is not a value of its type, such as an unknown label of an enum: the schema does not fit.
        (_, "22P02" | "22P03") => ErrorClass::Refused,
        // A row that another writer has made meanwhile.
        (_, "23505") => ErrorClass::Refused,
        // Connection, rollback (deadlock, serialization), resources, object in use, operator, system.
        ("08" | "40" | "53" | "55" | "57" | "58", _) => ErrorClass::Transient,
        ("28" | "3D", _) => ErrorClass::Login,
        // Data, integrity, a value that is too large for an index, and what a trigger rejects.
        ("22" | "23", _) | (_, "54000" | "P0001") => ErrorClass::Value,
        _ => ErrorClass::Refused,
    }
}

/// Returns true if a connection's prepared statements no longer fit the server's state: a table or a type
/// was changed, or the statements are gone.
fn is_outdated(code: &str, message: &str) -> bool {
    match code {
        "0A000" => message.contains("cached plan must not change result type"),
        "XX000" => message.contains("cache lookup failed"),
        "26000" | "42P05" => true,
        _ => false,
    }
}

fn of_sqlite(code: &str) -> ErrorClass {
    let Ok(code) = code.parse::<u32>() else {
        return ErrorClass::Refused;
    };
    match (code & 0xff, code) {
        // Busy, locked, no memory, an I/O error, a full disk, a file that cannot be opened just now, a
        // schema that has just changed.
        (5 | 6 | 7 | 10 | 13 | 14 | 17, _) => ErrorClass::Transient,
        // A row that another writer has made meanwhile: by its primary key, by another unique one.
        (_, 1555 | 2067) => ErrorClass::Refused,
        // Too big, a constraint, a type, a range.
        (18 | 19 | 20 | 25, _) => ErrorClass::Value,
        _ => ErrorClass::Refused,
    }
}

/// Returns true if a pooled connection was opened after the last report of outdated prepared statements.
/// An older one must not be used: a connection keeps its plans, so a statement that is planned again needs a
/// new connection.
#[must_use]
pub fn is_current(connection: &PoolConnectionMetadata) -> bool {
    is_newer(connection.age, *outdated(), Instant::now())
}

fn is_newer(age: Duration, outdated: Option<Instant>, now: Instant) -> bool {
    outdated.is_none_or(|outdated| now.checked_sub(age).is_some_and(|opened| opened > outdated))
}

fn outdated() -> std::sync::MutexGuard<'static, Option<Instant>> {
    // The value is valid after a panic, too.
    OUTDATED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use ErrorClass::{Login, Refused, Transient, Value};

    #[rstest]
    #[case("08006", Transient)]
    #[case("40P01", Transient)]
    #[case("53300", Transient)]
    #[case("55P03", Transient)]
    #[case("57P01", Transient)]
    #[case("58030", Transient)]
    #[case("25006", Transient)]
    #[case("25P03", Transient)]
    #[case("08P01", Login)]
    #[case("28000", Login)]
    #[case("28P01", Login)]
    #[case("3D000", Login)]
    #[case("42P01", Refused)]
    #[case("42501", Refused)]
    #[case("42703", Refused)]
    #[case("22P02", Refused)]
    #[case("23505", Refused)]
    #[case("XX000", Refused)]
    #[case("22001", Value)]
    #[case("22021", Value)]
    #[case("23514", Value)]
    #[case("54000", Value)]
    #[case("P0001", Value)]
    #[case("", Refused)]
    fn classes_of_postgresql(#[case] code: &str, #[case] class: ErrorClass) {
        assert_eq!(of_sqlstate(code, "words"), class);
    }

    #[rstest]
    #[case("5", Transient)]
    #[case("261", Transient)]
    #[case("517", Transient)]
    #[case("14", Transient)]
    #[case("1", Refused)]
    #[case("8", Refused)]
    #[case("26", Refused)]
    #[case("1555", Refused)]
    #[case("2067", Refused)]
    #[case("275", Value)]
    #[case("18", Value)]
    #[case("words", Refused)]
    fn classes_of_sqlite(#[case] code: &str, #[case] class: ErrorClass) {
        assert_eq!(of_sqlite(code), class);
    }

    #[rstest]
    #[case("0A000", "cached plan must not change result type", true)]
    #[case("0A000", "cannot do that", false)]
    #[case("XX000", "cache lookup failed for type 16401", true)]
    #[case("26000", "prepared statement \"sqlx_s_1\" does not exist", true)]
    #[case("42P01", "relation does not exist", false)]
    fn outdated_statements(#[case] code: &str, #[case] message: &str, #[case] expected: bool) {
        assert_eq!(is_outdated(code, message), expected);
    }

    #[test]
    fn connections_from_before_a_change_are_not_used() {
        let second = Duration::from_secs(1);
        let now = Instant::now() + 10 * second;
        let changed = Some(now - 5 * second);
        assert!(is_newer(9 * second, None, now));
        assert!(is_newer(4 * second, changed, now));
        assert!(!is_newer(6 * second, changed, now));
    }

    #[test]
    fn errors_without_a_code() {
        let sqlx =
            |error: sqlx::Error| classify(&DbErr::Query(RuntimeErr::SqlxError(error.into())));
        assert_eq!(sqlx(sqlx::Error::PoolTimedOut), Transient);
        assert_eq!(sqlx(sqlx::Error::Tls("expired".into())), Login);
        assert_eq!(sqlx(sqlx::Error::ColumnNotFound("id".into())), Refused);
        let decode = |why: &str| sqlx(sqlx::Error::Decode(why.into()));
        assert_eq!(decode("mismatched types; Rust type `i64`"), Refused);
        assert_eq!(decode("out of range"), Value);
        assert_eq!(classify(&DbErr::RecordNotFound("a table".into())), Refused);
    }
}
