//! Actions of an operator on a transfer: retry, cancel, fail.
//!
//! Follows the rule of the parent module: lock the row, read, write, commit. Each action is recorded with the operator
//! and the reason in this project's own table, in the same transaction.
//!
//! This module does not stop a running copy directly. It removes the lease. The worker finds this at the next renewal
//! (`transfer.lease_renew_interval`), stops the copy, removes its temporary file and writes nothing. Until then it
//! writes only to its own temporary name, and it cannot publish the file.

use std::fmt;

use chrono::{DateTime, Utc};
use entity::{
    Action, Label, Outcome, Status, Timestamp, data_transfer, transfer_worker_action,
    transfer_worker_lease,
};
use sea_orm::sea_query::Expr;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, Set,
};
use serde::Serialize;

use super::{Ending, Repository, delay, end_attempt, find_lease, lock, replace_nul, retry_count};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::lease::LeaseInfo;

/// Request of an operator for an action on transfers.
#[derive(Debug, Clone)]
pub struct Instruction {
    /// The action.
    pub action: Action,
    /// The operator, as `login@host`.
    pub operator: String,
    /// Reason, if the operator gave one.
    pub reason: Option<String>,
    /// Statuses for which the action is made; an empty list allows all. A transfer that was selected by its status may
    /// have another one at the time of the change.
    pub only: Vec<Status>,
    /// True if rows are included that are IN_PROGRESS without a lease. Only the operator can know that no other
    /// program's worker is copying them.
    pub untracked: bool,
}

impl fmt::Display for Instruction {
    /// Action, operator and reason, for the row's message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = match self.action {
            Action::Retry => "sent again",
            Action::Cancel => "cancelled",
            Action::Fail => "given up",
        };
        write!(f, "{done} by {}", self.operator)?;
        match &self.reason {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

/// Result of an instruction for one transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applicability {
    /// The transfer does not exist.
    Unknown,
    /// The transfer is already in the requested state.
    Unchanged,
    /// The action is not allowed.
    Refused(Refusal),
    /// The change was made, or would be made.
    Changed(Change),
}

/// Change of one transfer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Status before the change.
    pub from: Label<Status>,
    /// Status after the change.
    pub to: Status,
    /// The removed lease, whose copy is stopped.
    pub stopped: Option<Box<LeaseInfo>>,
}

/// Reason why an instruction is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The file is at its destination; this is not undone.
    #[error("it is COMPLETED")]
    Completed,
    /// The transfer is already FAILED.
    #[error("it is FAILED already{}", error_suffix(.message.as_deref()))]
    Failed {
        /// Error message of the row.
        message: Option<String>,
    },
    /// A worker holds a lease that has not expired.
    #[error("{} runs it; `transfers cancel` stops the copy", .0.owner)]
    Running(Box<LeaseInfo>),
    /// A worker that does not use leases may be copying, and would not notice the change.
    #[error("it is IN_PROGRESS without a lease: a Python worker may run it; {}", untracked_remedy(*.action))]
    Untracked {
        /// The requested action.
        action: Action,
    },
    /// The status has changed since the transfer was selected.
    #[error("its status is {0} now")]
    Otherwise(Label<Status>),
    /// This program does not know the status.
    #[error("this program does not know its status `{0}`")]
    UnknownStatus(String),
}

fn error_suffix(message: Option<&str>) -> String {
    message.map_or_else(String::new, |message| format!(": {message}"))
}

fn untracked_remedy(action: Action) -> &'static str {
    match action {
        Action::Cancel => "stop it there, then `transfers fail --untracked`",
        Action::Retry | Action::Fail => "if none is, add --untracked",
    }
}

/// State of a transfer, as read for an instruction.
struct Findings {
    row: data_transfer::Model,
    held: Option<transfer_worker_lease::Model>,
    has_delay: bool,
    now: DateTime<Utc>,
}

impl Findings {
    async fn of(db: &impl ConnectionTrait, row: data_transfer::Model) -> Result<Self, DbErr> {
        let now = database::now(db).await?;
        Ok(Self {
            held: find_lease(db, row.id.into()).await?,
            has_delay: delay::current_delay(db, &row, now).await?.is_some(),
            row,
            now,
        })
    }

    /// Returns the new status; `None` if nothing has to change.
    fn new_status(&self, instruction: &Instruction) -> Result<Option<Status>, Refusal> {
        let status = &self.row.status;
        let Some(known) = status.known() else {
            return Err(Refusal::UnknownStatus(status.to_string()));
        };
        if !instruction.only.is_empty() && !instruction.only.contains(&known) {
            return Err(Refusal::Otherwise(status.clone()));
        }
        match known {
            Status::Completed => return Err(Refusal::Completed),
            Status::Failed if instruction.action != Action::Retry => {
                return Err(Refusal::Failed {
                    message: self.row.failure_error_message.clone(),
                });
            }
            Status::InProgress => self.check_running(instruction)?,
            Status::Failed | Status::Pending | Status::Scheduled => {}
        }
        Ok(match instruction.action {
            Action::Cancel | Action::Fail => Some(Status::Failed),
            Action::Retry => {
                let is_due = known == Status::Pending
                    && !self.has_delay
                    && retry_count(&self.row) == 0
                    && self.held.is_none();
                (!is_due).then_some(Status::Pending)
            }
        })
    }

    /// Checks if an IN_PROGRESS row may be changed.
    fn check_running(&self, instruction: &Instruction) -> Result<(), Refusal> {
        let action = instruction.action;
        match (&self.held, action) {
            (None, Action::Retry | Action::Fail) if instruction.untracked => Ok(()),
            (None, _) => Err(Refusal::Untracked { action }),
            (Some(_), Action::Cancel) => Ok(()),
            // The lease has expired, so the next sweep would make the row PENDING.
            (Some(held), _) if held.expires_at <= self.now => Ok(()),
            (Some(held), _) => Err(Refusal::Running(Box::new(held.into()))),
        }
    }

    fn change(&self, to: Status) -> Change {
        Change {
            from: self.row.status.clone(),
            to,
            stopped: self.held.as_ref().map(|held| Box::new(held.into())),
        }
    }
}

impl Repository {
    /// Returns the result that an instruction would have, without a change.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn preview(
        &self,
        id: TransferId,
        instruction: &Instruction,
    ) -> Result<Applicability, DatabaseError> {
        let considering = async {
            let Some(row) = self.row(id).await? else {
                return Ok(Applicability::Unknown);
            };
            let findings = Findings::of(self.database.connection(), row).await?;
            Ok(match findings.new_status(instruction) {
                Ok(Some(to)) => Applicability::Changed(findings.change(to)),
                Ok(None) => Applicability::Unchanged,
                Err(refusal) => Applicability::Refused(refusal),
            })
        };
        self.database.bounded(considering).await
    }

    /// Carries out an instruction for a transfer, and records it.
    ///
    /// After a retry, the transfer is PENDING, with no failures and no delay. After a cancel or a fail, it is FAILED,
    /// with the operator's name and reason as its message: the ops-db has no other status for this.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement. If the call is repeated after an error, an
    /// instruction that was carried out is [unchanged](Applicability::Unchanged), or [refused](Refusal::Failed) with
    /// its own message.
    pub async fn execute(
        &self,
        id: TransferId,
        instruction: &Instruction,
    ) -> Result<Applicability, DatabaseError> {
        let executing =
            async |tx: &DatabaseTransaction| Ok(self.execute_in(tx, id, instruction).await?);
        self.database.bounded(self.database.write(executing)).await
    }

    async fn execute_in(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        instruction: &Instruction,
    ) -> Result<Applicability, DbErr> {
        let Some(row) = lock(tx, id).await? else {
            return Ok(Applicability::Unknown);
        };
        let findings = Findings::of(tx, row).await?;
        let to = match findings.new_status(instruction) {
            Ok(Some(to)) => to,
            Ok(None) => return Ok(Applicability::Unchanged),
            Err(refusal) => return Ok(Applicability::Refused(refusal)),
        };
        if let Some(held) = &findings.held
            && !revoke(tx, held, instruction, findings.now).await?
        {
            return Ok(Applicability::Refused(Refusal::Running(Box::new(
                held.into(),
            ))));
        }
        self.rewrite(tx, &findings, to, instruction).await?;
        delay::forget(tx, id).await?;
        self.forget_schedule(tx, id).await?;
        note(tx, &findings, instruction).await?;
        Ok(Applicability::Changed(findings.change(to)))
    }

    /// Writes the row of the transfer.
    async fn rewrite(
        &self,
        tx: &DatabaseTransaction,
        findings: &Findings,
        to: Status,
        instruction: &Instruction,
    ) -> Result<(), DbErr> {
        use data_transfer::Column;
        let update = self.set_status(findings.row.id.into(), to);
        let update = if instruction.action == Action::Retry {
            // The message of the last failure stays until the next attempt has ended.
            update
                .col_expr(Column::RetryCount, Expr::val(0))
                .col_expr(Column::EndTime, Expr::val(None::<Timestamp>))
        } else {
            let message = replace_nul(&instruction.to_string());
            let message = self.schema.fit_failure_message(message);
            update
                .col_expr(Column::EndTime, Expr::val(Timestamp(findings.now)))
                .col_expr(Column::FailureErrorMessage, Expr::val(message))
        };
        update.exec(tx).await.map(drop)
    }
}

/// Removes a lease and ends its attempt. Returns false if the lease had expired when it was read, and was renewed in
/// the meantime.
async fn revoke(
    tx: &DatabaseTransaction,
    held: &transfer_worker_lease::Model,
    instruction: &Instruction,
    now: DateTime<Utc>,
) -> Result<bool, DbErr> {
    use transfer_worker_lease::{Column, Entity};
    let mut delete = Entity::delete_many()
        .filter(Column::DataTransferId.eq(held.data_transfer_id))
        .filter(Column::Token.eq(held.token.as_str()));
    if instruction.action != Action::Cancel {
        // A renewal does not take the row lock, so the lease may have been renewed since it was read.
        delete = delete.filter(Column::RenewedAt.eq(held.renewed_at));
    }
    if delete.exec(tx).await?.rows_affected == 0 {
        return Ok(false);
    }
    let ending = Ending {
        outcome: Outcome::Interrupted,
        error_code: None,
        message: Some(instruction.to_string()),
        bytes: held.bytes_done,
        rate_bytes_per_s: held.rate_bytes_per_s,
        digest: None,
    };
    let (id, attempt) = (
        held.data_transfer_id.into(),
        AttemptNumber::new(held.attempt),
    );
    end_attempt(tx, id, attempt, now, &ending).await?;
    Ok(true)
}

/// Records the action.
async fn note(
    tx: &DatabaseTransaction,
    findings: &Findings,
    instruction: &Instruction,
) -> Result<(), DbErr> {
    let row = transfer_worker_action::ActiveModel {
        data_transfer_id: Set(findings.row.id),
        acted_at: Set(findings.now),
        action: Set(instruction.action),
        operator: Set(replace_nul(&instruction.operator)),
        reason: Set(instruction.reason.as_deref().map(replace_nul)),
        previous_status: Set(findings.row.status.to_string()),
        ..Default::default()
    };
    transfer_worker_action::Entity::insert(row)
        .exec_without_returning(tx)
        .await
        .map(drop)
}
