//! Advice for operators that names commands of this program.
//!
//! The domain states the failure and general advice. A layer that prints a failure takes its texts from here.

use std::fmt::Write as _;

use crate::transfer::database::DatabaseError;
use crate::transfer::failures::{FailureKind, TransferError};
use crate::transfer::schema::Difference;

/// The chain of causes of a failure in one line, with the command that corrects it.
pub(crate) fn explanation(error: &TransferError) -> String {
    let mut text = error.chain();
    // Writing to a string cannot fail.
    let _ = match error {
        TransferError::NotDue { id, .. } => {
            write!(text, ", `ccat-transfer transfers run {id}` does it now")
        }
        TransferError::LinkPaused { .. } => write!(text, " (`ccat-transfer links resume`)"),
        TransferError::LinkFull { .. } => write!(text, " (`ccat-transfer links list`)"),
        _ => Ok(()),
    };
    text
}

/// Advice for an operator, in whole sentences.
pub(crate) fn remedy(kind: FailureKind) -> &'static str {
    match kind {
        FailureKind::OriginRootMissing => {
            "Mount it; `ccat-transfer doctor` shows which. `ccat-transfer transfers retry` tries the transfers \
             again at once."
        }
        FailureKind::LinkSettings => "`ccat-transfer config check` tells which.",
        FailureKind::AlreadyFailed => "To try it again: `ccat-transfer transfers retry ID`.",
        FailureKind::NotDue => {
            "Nothing: the manager sends a message in time. `ccat-transfer transfers run` does it at once, and so \
             does a reset of its `retry_count`."
        }
        FailureKind::LinkPaused => {
            "Nothing: when the link is resumed (`ccat-transfer links resume`), the manager sends the transfer \
             again."
        }
        FailureKind::LinkFull => {
            "Nothing: when the link has room, the manager sends the transfer again. `ccat-transfer transfers \
             run` does it at once."
        }
        FailureKind::Untracked => {
            "If no Python worker runs it either: `ccat-transfer transfers retry ID --untracked`."
        }
        kind => kind.row().remedy,
    }
}

/// [`remedy`] for a code of the attempt history; `None` if the code is unknown (for example from an older version).
pub(crate) fn remedy_of_code(code: &str) -> Option<&'static str> {
    FailureKind::from_code(code).map(remedy)
}

/// End of the text of a database error: the command that corrects it, or an empty string.
pub(crate) fn database_command(error: &DatabaseError) -> &'static str {
    match error {
        DatabaseError::Missing(_) => "; `ccat-transfer db migrate` creates one",
        _ => "",
    }
}

/// The end of the text of a schema that does not fit: the owner of the tables, and the command that helps.
pub(crate) fn schema_command(differences: &[Difference]) -> String {
    let mut text = String::new();
    let is_own = |difference: &Difference| entity::WORKER_TABLES.contains(&difference.table());
    if differences.iter().any(is_own) {
        text.push_str(
            "\nTables named transfer_worker_* are this program's own: run `ccat-transfer db migrate`.",
        );
    }
    let no_ops_db = entity::OPS_DB_TABLES.into_iter().all(|table| {
        differences.contains(&Difference::MissingTable {
            table: table.to_owned(),
        })
    });
    if no_ops_db {
        text.push_str(
            "\nThere is no ops-db. If this is the right database and this program should fill it (a test, a \
             development machine), run `ccat-transfer db migrate`.",
        );
    } else if !differences.iter().all(is_own) {
        text.push_str(
            "\nThe other tables belong to ccat_ops_db and its Alembic migrations, and this program never \
             alters them: update that schema, or run a version of ccat-transfer that matches it.",
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn explanations_name_the_command_that_helps() {
        let not_due = TransferError::NotDue {
            id: 7.into(),
            not_before: DateTime::UNIX_EPOCH,
        };
        assert_eq!(
            explanation(&not_due),
            "data transfer 7 failed before and waits until 1970-01-01 00:00:00 UTC to be tried again; the \
             manager sends it then, `ccat-transfer transfers run 7` does it now"
        );
        let paused = TransferError::LinkPaused {
            link: "a → b".into(),
            since: DateTime::UNIX_EPOCH,
            by: "me@here".into(),
            reason: "observing".into(),
        };
        assert_eq!(
            explanation(&paused),
            "the link a → b is paused since 1970-01-01 00:00:00 UTC by me@here: observing; the transfer waits \
             until it is resumed (`ccat-transfer links resume`)"
        );
        let full = TransferError::LinkFull {
            link: "a → b".into(),
            limit: 2,
            copies: 3,
        };
        assert_eq!(
            explanation(&full),
            "the link a → b has 3 copies and may have 2 at this time; the transfer waits until one ends \
             (`ccat-transfer links list`)"
        );
        let lost = TransferError::LeaseLost { id: 7.into() };
        assert_eq!(explanation(&lost), lost.chain());
    }

    #[test]
    fn tables_that_differ_have_an_owner() {
        let missing = |table: &str| Difference::MissingTable {
            table: table.to_owned(),
        };
        let own = missing("transfer_worker_lease");
        let migrate = "run `ccat-transfer db migrate`";
        assert_eq!(
            schema_command(std::slice::from_ref(&own)),
            format!("\nTables named transfer_worker_* are this program's own: {migrate}.")
        );
        let both = schema_command(&[missing("data_transfer"), own]);
        assert_eq!(both.lines().count(), 3);
        assert!(both.contains(migrate));
        assert!(both.contains("belong to ccat_ops_db and its Alembic migrations"));
        let none: Vec<Difference> = entity::OPS_DB_TABLES.into_iter().map(missing).collect();
        let none = schema_command(&none);
        assert!(none.starts_with("\nThere is no ops-db."), "{none}");
        assert!(none.ends_with(&format!("{migrate}.")), "{none}");
    }
}
