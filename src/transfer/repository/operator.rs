//! What an operator does about a transfer: have it tried again, stop it, give it up.
//!
//! By the rule of this module: lock the row, look, write, commit. Each change is noted with who made
//! it and why, in a table of ours, in the same transaction.
//!
//! A copy that runs is not stopped from here. Its lease is taken away, and its worker, which asks
//! for it at every renewal (`transfer.lease_renew_interval`), stops the copy, removes its temporary
//! file and writes nothing. Whatever it does before that goes to a name of its own, and it cannot
//! publish it.

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

use super::{Ending, Repository, delay, end_attempt, find_lease, lock, retry_count, storable};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::lease::LeaseInfo;

/// What an operator wants done with transfers.
#[derive(Debug, Clone)]
pub struct Instruction {
    /// What.
    pub action: Action,
    /// Who wants it, `login@host`.
    pub operator: String,
    /// Why.
    pub reason: Option<String>,
    /// Only while they have one of these statuses, if there are any: what was chosen by its status
    /// may have another one by the time of the change.
    pub only: Vec<Status>,
    /// Also rows that are IN_PROGRESS without a lease. Only the operator can know that no worker of
    /// another kind is at them.
    pub untracked: bool,
}

impl fmt::Display for Instruction {
    /// Who did what and why, for the row's message.
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

/// What an instruction means for one transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applicability {
    /// There is no such transfer.
    Unknown,
    /// It is as it should be.
    Unchanged,
    /// It must not be done.
    Refused(Refusal),
    /// It is done, or would be.
    Changed(Change),
}

/// What changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The status before.
    pub from: Label<Status>,
    /// The status after.
    pub to: Status,
    /// Whose copy is stopped.
    pub stopped: Option<Box<LeaseInfo>>,
}

/// Why an instruction is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The file is at its goal, and that is not undone.
    #[error("it is COMPLETED")]
    Completed,
    /// It is given up already.
    #[error("it is FAILED already{}", because(.message.as_deref()))]
    Failed {
        /// Why.
        message: Option<String>,
    },
    /// A worker is at it.
    #[error("{} is at it; `transfers cancel` stops the copy", .0.owner)]
    Running(Box<LeaseInfo>),
    /// A worker that knows nothing of leases may be at it, and would not notice the change.
    #[error("it is IN_PROGRESS without a lease: a Python worker may be at it; {}", untracked_remedy(*.action))]
    Untracked {
        /// What was asked for.
        action: Action,
    },
    /// Its status has changed since it was chosen.
    #[error("it is {0} by now")]
    Otherwise(Label<Status>),
    /// This program does not know what the status means.
    #[error("its status `{0}` is not known here")]
    UnknownStatus(String),
}

fn because(message: Option<&str>) -> String {
    message.map_or_else(String::new, |message| format!(": {message}"))
}

fn untracked_remedy(action: Action) -> &'static str {
    match action {
        Action::Cancel => "stop it there, then `transfers fail --untracked`",
        Action::Retry | Action::Fail => "if none is, add --untracked",
    }
}

/// What was found out about a transfer.
struct Findings {
    row: data_transfer::Model,
    held: Option<transfer_worker_lease::Model>,
    waits: bool,
    now: DateTime<Utc>,
}

impl Findings {
    async fn of(db: &impl ConnectionTrait, row: data_transfer::Model) -> Result<Self, DbErr> {
        let now = database::now(db).await?;
        Ok(Self {
            held: find_lease(db, row.id.into()).await?,
            waits: delay::standing(db, &row, now).await?.is_some(),
            row,
            now,
        })
    }

    /// The new status; none where there is nothing to change.
    fn judge(&self, instruction: &Instruction) -> Result<Option<Status>, Refusal> {
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
            Status::InProgress => self.judge_running(instruction)?,
            Status::Failed | Status::Pending | Status::Scheduled => {}
        }
        Ok(match instruction.action {
            Action::Cancel | Action::Fail => Some(Status::Failed),
            Action::Retry => {
                let is_due = known == Status::Pending
                    && !self.waits
                    && retry_count(&self.row) == 0
                    && self.held.is_none();
                (!is_due).then_some(Status::Pending)
            }
        })
    }

    /// Whether a row that is IN_PROGRESS may be changed.
    fn judge_running(&self, instruction: &Instruction) -> Result<(), Refusal> {
        let action = instruction.action;
        match (&self.held, action) {
            (None, Action::Retry | Action::Fail) if instruction.untracked => Ok(()),
            (None, _) => Err(Refusal::Untracked { action }),
            (Some(_), Action::Cancel) => Ok(()),
            // Its worker is gone, and whoever sweeps first would make it PENDING.
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
    /// What an instruction would do to a transfer.
    ///
    /// # Errors
    /// What the database says.
    pub async fn consider(
        &self,
        id: TransferId,
        instruction: &Instruction,
    ) -> Result<Applicability, DatabaseError> {
        let considering = async {
            let Some(row) = self.row(id).await? else {
                return Ok(Applicability::Unknown);
            };
            let findings = Findings::of(self.database.connection(), row).await?;
            Ok(match findings.judge(instruction) {
                Ok(Some(to)) => Applicability::Changed(findings.change(to)),
                Ok(None) => Applicability::Unchanged,
                Err(refusal) => Applicability::Refused(refusal),
            })
        };
        self.database.bounded(considering).await
    }

    /// Does to a transfer what an operator wants, and notes it.
    ///
    /// A transfer that is sent again is PENDING, without failures and without a wait. One that is
    /// stopped or given up is FAILED, with the operator's name and reason as its message: the ops-db
    /// has no other status for it.
    ///
    /// # Errors
    /// What the database says. Made again after an error, an instruction that was carried out is
    /// [unchanged](Applicability::Unchanged) or [refused](Refusal::Failed) with its own message.
    pub async fn instruct(
        &self,
        id: TransferId,
        instruction: &Instruction,
    ) -> Result<Applicability, DatabaseError> {
        let instructing =
            async |tx: &DatabaseTransaction| Ok(self.instruct_in(tx, id, instruction).await?);
        self.database
            .bounded(self.database.write(instructing))
            .await
    }

    async fn instruct_in(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        instruction: &Instruction,
    ) -> Result<Applicability, DbErr> {
        let Some(row) = lock(tx, id).await? else {
            return Ok(Applicability::Unknown);
        };
        let findings = Findings::of(tx, row).await?;
        let to = match findings.judge(instruction) {
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

    /// Writes the transfer's row.
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
            // Its last failure's message stays until the next attempt has ended.
            update
                .col_expr(Column::RetryCount, Expr::val(0))
                .col_expr(Column::EndTime, Expr::val(None::<Timestamp>))
        } else {
            let message = storable(&instruction.to_string());
            let message = self.schema.fit_failure_message(message);
            update
                .col_expr(Column::EndTime, Expr::val(Timestamp(findings.now)))
                .col_expr(Column::FailureErrorMessage, Expr::val(message))
        };
        update.exec(tx).await.map(drop)
    }
}

/// Takes a lease away and closes its attempt. False if it was dead when we looked and is alive now.
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
        // A renewal does not take the row lock, so it may come between our look and this.
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

/// Notes what was done.
async fn note(
    tx: &DatabaseTransaction,
    findings: &Findings,
    instruction: &Instruction,
) -> Result<(), DbErr> {
    let row = transfer_worker_action::ActiveModel {
        data_transfer_id: Set(findings.row.id),
        acted_at: Set(findings.now),
        action: Set(instruction.action),
        operator: Set(storable(&instruction.operator)),
        reason: Set(instruction.reason.as_deref().map(storable)),
        previous_status: Set(findings.row.status.to_string()),
        ..Default::default()
    };
    transfer_worker_action::Entity::insert(row)
        .exec_without_returning(tx)
        .await
        .map(drop)
}
