//! State of the transfers in the database, and the rules for the change from one state to the next.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use sea_orm::{ConnectionTrait as _, Statement};

use crate::ops_db::Fixture;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub status: String,
    pub retry_count: i64,
    pub message: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRow {
    pub attempt: i32,
    pub destination: Option<String>,
}

#[derive(Debug, Clone, Default)]
pub struct Picture {
    pub rows: BTreeMap<i64, Row>,
    /// All leases, by transfer.
    pub leases: BTreeMap<i64, LeaseRow>,
    /// All attempts without an outcome.
    pub open_attempts: BTreeSet<(i64, i32)>,
    /// Transfers with a record of SCHEDULED.
    pub records: BTreeSet<i64>,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} retry_count={}", self.status, self.retry_count)?;
        self.message
            .as_ref()
            .map_or(Ok(()), |message| write!(f, " {message:?}"))
    }
}

impl Picture {
    pub async fn of(db: &Fixture, ids: impl Iterator<Item = i64>) -> Self {
        let ids: Vec<_> = ids.map(|id| id.to_string()).collect();
        let sql = format!(
            "SELECT 'row' AS kind, CAST(id AS bigint) AS id, CAST(status AS text) AS a, \
                    CAST(coalesce(retry_count, 0) AS bigint) AS n, failure_error_message AS b \
             FROM data_transfer WHERE id IN ({}) \
             UNION ALL SELECT 'lease', data_transfer_id, destination, CAST(attempt AS bigint), NULL \
             FROM transfer_worker_lease \
             UNION ALL SELECT 'attempt', data_transfer_id, NULL, CAST(attempt AS bigint), NULL \
             FROM transfer_worker_attempt WHERE outcome IS NULL \
             UNION ALL SELECT 'record', data_transfer_id, NULL, 0, NULL \
             FROM transfer_worker_schedule",
            ids.join(", ")
        );
        let connection = db.database.connection();
        let statement = Statement::from_string(connection.get_database_backend(), sql);
        let mut picture = Self::default();
        for row in connection.query_all_raw(statement).await.unwrap() {
            let kind: String = row.try_get("", "kind").unwrap();
            let id: i64 = row.try_get("", "id").unwrap();
            let number: i64 = row.try_get("", "n").unwrap();
            let text: Option<String> = row.try_get("", "a").unwrap();
            let attempt = i32::try_from(number).unwrap();
            match kind.as_str() {
                "row" => {
                    let row = Row {
                        status: text.unwrap(),
                        retry_count: number,
                        message: row.try_get("", "b").unwrap(),
                    };
                    picture.rows.insert(id, row);
                }
                "lease" => {
                    let destination = text;
                    let lease = LeaseRow {
                        attempt,
                        destination,
                    };
                    let twice = picture.leases.insert(id, lease);
                    assert!(twice.is_none(), "transfer {id} has two leases");
                }
                "attempt" => drop(picture.open_attempts.insert((id, attempt))),
                _ => drop(picture.records.insert(id)),
            }
        }
        picture
    }

    pub fn status(&self, id: i64) -> &str {
        self.rows.get(&id).map_or("", |row| &row.status)
    }

    /// Changes of a transfer since `before`, for its history.
    pub fn changes(&self, before: &Self, id: i64) -> Option<String> {
        let row = |picture: &Self| picture.rows.get(&id).map(Row::to_string);
        let lease = |picture: &Self| picture.leases.get(&id).cloned();
        let record = |picture: &Self| picture.records.contains(&id);
        let mut changes = Vec::new();
        if row(self) != row(before) {
            let show = |row: Option<String>| row.unwrap_or_else(|| "nothing".into());
            changes.push(format!("{} -> {}", show(row(before)), show(row(self))));
        }
        if lease(self) != lease(before) {
            changes.push(format!("lease {:?} -> {:?}", lease(before), lease(self)));
        }
        if record(self) != record(before) {
            changes.push(format!("record {} -> {}", record(before), record(self)));
        }
        (!changes.is_empty()).then(|| changes.join("; "))
    }
}

/// Actions of a step that allow changes of the rows.
#[derive(Debug, Default)]
pub struct Step {
    pub text: String,
    /// Transfers of the step.
    pub about: BTreeSet<i64>,
    /// Transfers that an operator has changed.
    pub operator: BTreeSet<i64>,
    /// Transfers whose failure counts.
    pub counted: BTreeSet<i64>,
    /// Transfers and attempts with a requested completion.
    pub completing: BTreeSet<(i64, i32)>,
    /// Transfers that a manager may miss until its next full scan: another program wrote their rows, or their record is
    /// gone.
    pub unseen: BTreeSet<i64>,
    /// Transfers that a manager has sent.
    pub scheduled: BTreeSet<i64>,
    /// Number of rows that a manager has made PENDING because their message was lost.
    pub resent: usize,
    /// Number of leases that a sweep has removed.
    pub swept: usize,
    /// Number of leases that were taken from others.
    pub displaced: usize,
    /// True if a manager has made a full scan.
    pub is_full_look: bool,
}

impl Step {
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }

    pub fn about(id: i64, text: impl Into<String>) -> Self {
        Self {
            about: BTreeSet::from([id]),
            ..Self::new(text)
        }
    }

    pub fn add(&mut self, text: &str) {
        self.text.push_str("; ");
        self.text.push_str(text);
    }
}

/// The transfer and the rule that is violated after a step.
pub type Violation = (i64, String);

/// Checks the changes of the rows by one step.
pub fn check_step(before: &Picture, after: &Picture, step: &Step) -> Result<(), Violation> {
    for (id, new) in &after.rows {
        let Some(old) = before.rows.get(id) else {
            continue;
        };
        let by_operator = step.operator.contains(id);
        if new.status != old.status && !by_operator {
            if old.status == "COMPLETED" || old.status == "FAILED" {
                return Err((*id, format!("{} became {}", old.status, new.status)));
            }
            if new.status == "COMPLETED" {
                let held = before.leases.get(id).map(|lease| (*id, lease.attempt));
                let is_holder = held.is_some_and(|held| step.completing.contains(&held));
                if old.status != "IN_PROGRESS" || !is_holder {
                    return Err((*id, format!("COMPLETED by one that does not hold {held:?}")));
                }
            }
        }
        let grown = new.retry_count - old.retry_count;
        let is_counted = grown == 1 && step.counted.contains(id);
        let is_reset = new.retry_count == 0 && by_operator;
        if grown != 0 && !is_counted && !is_reset {
            let (old, new) = (old.retry_count, new.retry_count);
            return Err((*id, format!("retry_count went from {old} to {new}")));
        }
    }
    Ok(())
}

/// Checks the rules that hold at any time. `has_message` returns true if a message of the transfer exists; `unseen` are
/// rows that only the next full scan finds.
pub fn check_state(
    after: &Picture,
    has_message: impl Fn(i64) -> bool,
    unseen: &BTreeSet<i64>,
) -> Result<(), Violation> {
    for (id, row) in &after.rows {
        let lease = after.leases.get(id);
        match row.status.as_str() {
            "PENDING" | "COMPLETED" => {}
            "IN_PROGRESS" if lease.is_some() => {}
            "IN_PROGRESS" => return Err((*id, "IN_PROGRESS without a lease".into())),
            "SCHEDULED" => {
                let moves = lease.is_some()
                    || after.records.contains(id)
                    || unseen.contains(id)
                    || has_message(*id);
                if !moves {
                    return Err((*id, "SCHEDULED, and nothing will move it".into()));
                }
            }
            "FAILED" if row.message.as_ref().is_some_and(|m| !m.is_empty()) => {}
            "FAILED" => return Err((*id, "FAILED without a reason".into())),
            other => return Err((*id, format!("unknown status {other}"))),
        }
    }
    let mut destinations = BTreeMap::new();
    for (id, lease) in &after.leases {
        let Some(destination) = &lease.destination else {
            continue;
        };
        if let Some(other) = destinations.insert(destination, id) {
            return Err((*id, format!("has the destination of {other}")));
        }
    }
    let leased = after.leases.iter().map(|(id, lease)| (*id, lease.attempt));
    let leased: BTreeSet<_> = leased.collect();
    let odd = after.open_attempts.symmetric_difference(&leased).next();
    match odd {
        Some((id, attempt)) => Err((
            *id,
            format!("attempt {attempt} is open without its lease, or closed with it"),
        )),
        None => Ok(()),
    }
}
