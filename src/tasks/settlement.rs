//! The settlement of the row of a failed attempt: the decision about it by the table of failures, and the write.

use std::time::Duration;

use entity::{Action, Status};

use super::base::DataTransferTask;
use crate::advice;
use crate::faults::fault_point;
use crate::transfer::database::DatabaseError;
use crate::transfer::database_retry::{retry_until_reachable, write_with_lease};
use crate::transfer::failures::TransferError;
use crate::transfer::id::TransferId;
use crate::transfer::lease::Lease;
use crate::transfer::repository::{Applicability, Failure, Instruction};
use crate::transfer::request::{Failed, LeaseAtEnd, Request};
use crate::transfer::retry::{Decision, RetryPolicy, decide};
use crate::transfer::trace::{KeyValue, set_attributes};

/// Name of the operation in log lines, as in Python.
const OPERATION: &str = "data_transfer";

/// State of the row of a failed transfer after [`DataTransferTask::on_failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// PENDING again, counted as a failure: the manager will schedule the transfer again.
    Reset {
        /// Number of failures, including this one.
        retry_count: u32,
        /// Delay before the next attempt.
        delay: Duration,
    },
    /// FAILED, with no further attempt.
    Failed,
    /// PENDING again, not counted as a failure.
    Released,
    /// Not changed: the row belongs to another worker or an operator, or does not exist.
    Untouched,
    /// Not written before the process had to end. The lease will expire, and another worker takes the transfer over.
    Unwritten,
}

impl DataTransferTask {
    /// Decides about the row after a failure and writes it. Tries until the database can be reached or `request` is
    /// cancelled.
    pub async fn on_failure(&self, request: &Request, failed: &Failed) -> Settled {
        let settled = match &failed.lease {
            LeaseAtEnd::Held(lease) => self.decide_and_write(request, failed, lease).await,
            LeaseAtEnd::NotAcquired | LeaseAtEnd::HeldForSameTask | LeaseAtEnd::Lost(_) => {
                self.fail_without_lease(request, failed).await
            }
        };
        let outcome = outcome(failed, settled);
        if let Some(metrics) = self.service().metrics() {
            metrics.attempt(outcome, failed.error.code());
        }
        trace_failure(failed, outcome);
        tracing::warn!(
            data_transfer_id = request.id.get(),
            operation = OPERATION,
            task_id = request.task_id,
            error_code = failed.error.code(),
            error_scope = failed.error.scope().as_str(),
            error = advice::explanation(&failed.error),
            bytes = failed.progress.bytes_done,
            row = ?settled,
            "transfer did not complete"
        );
        if settled == Settled::Failed {
            self.notify_failure(request.id, &failed.error).await;
        }
        settled
    }

    /// Marks a transfer as FAILED for which no lease can be taken, because the database refuses one of its values.
    /// Otherwise its row would stay without a message.
    async fn fail_without_lease(&self, request: &Request, failed: &Failed) -> Settled {
        if !is_refusal_of_one_row(&failed.error) {
            return Settled::Untouched;
        }
        let instruction = Instruction {
            action: Action::Fail,
            operator: self.service().owner().node.clone(),
            reason: Some(failed.error.chain()),
            only: vec![Status::Scheduled],
            untracked: false,
        };
        let repository = self.service().repository();
        let failing = || repository.execute(request.id, &instruction);
        match retry_until_reachable(&request.cancelled, failing).await {
            Ok(Applicability::Changed(_)) => Settled::Failed,
            Ok(_) => Settled::Untouched,
            Err(error) => {
                tracing::error!(
                    data_transfer_id = request.id.get(),
                    error = error.chain(),
                    "the row could not be marked as failed"
                );
                match error.is_interruption() {
                    true => Settled::Unwritten,
                    false => Settled::Untouched,
                }
            }
        }
    }

    /// Decides about the row by the table of failures and the settings, and writes it with the lease.
    async fn decide_and_write(&self, request: &Request, failed: &Failed, lease: &Lease) -> Settled {
        let counting =
            || async { fault_point!(FailureCounted, self.get_retry_count(request.id).await) };
        let retry_count = match retry_until_reachable(&request.cancelled, counting).await {
            Ok(count) => count,
            Err(error) => return log_write_failure(request, &error),
        };
        let policy = RetryPolicy::from(&self.service().settings().transfer);
        let decision = decide(&failed.error, retry_count, &policy, fastrand::f64());
        let (written, settled) = match decision {
            Decision::Retry {
                counted: true,
                delay,
            } => (
                self.reset_state_on_failure(request, lease, failed, delay)
                    .await,
                Settled::Reset {
                    retry_count: retry_count.saturating_add(1),
                    delay,
                },
            ),
            Decision::Retry {
                counted: false,
                delay,
            } => (
                self.release_row(request, lease, failed, delay).await,
                Settled::Released,
            ),
            Decision::Permanent { reason } => {
                // No attempt will complete the copy. It is removed before the row is written: if the process dies in
                // between, the attempt still has to be settled.
                if let Some(partial) = &failed.partial {
                    self.service().discard(partial).await;
                }
                // Partial copies of earlier attempts, if this attempt did not reach that step.
                self.service().clear_partials(request.id).await;
                (
                    self.mark_permanent_failure(request, lease, failed, reason)
                        .await,
                    Settled::Failed,
                )
            }
            Decision::Leave => (Ok(()), Settled::Untouched),
        };
        match written {
            Ok(()) => settled,
            Err(TransferError::LeaseLost { .. }) => Settled::Untouched,
            Err(error) => log_write_failure(request, &error),
        }
    }

    /// Returns the number of failures of a transfer so far.
    ///
    /// # Errors
    /// The error of the database.
    async fn get_retry_count(&self, data_transfer_id: TransferId) -> Result<u32, DatabaseError> {
        let count = self
            .service()
            .repository()
            .get_retry_count(data_transfer_id)
            .await?;
        Ok(count.unwrap_or(0))
    }

    /// Writes PENDING and `retry_count + 1`: the manager will schedule the transfer again after `delay`.
    ///
    /// # Errors
    /// [`TransferError::LeaseLost`], or the database could not be reached in time.
    async fn reset_state_on_failure(
        &self,
        request: &Request,
        lease: &Lease,
        failed: &Failed,
        delay: Duration,
    ) -> Result<(), TransferError> {
        let failure = failure(failed, advice::explanation(&failed.error), delay);
        let repository = self.service().repository();
        write_with_lease(lease, &request.cancelled, || {
            repository.reset_for_retry(lease, &failure)
        })
        .await
    }

    /// Writes FAILED, with the reason.
    ///
    /// # Errors
    /// As [`DataTransferTask::reset_state_on_failure`].
    async fn mark_permanent_failure(
        &self,
        request: &Request,
        lease: &Lease,
        failed: &Failed,
        reason: String,
    ) -> Result<(), TransferError> {
        let failure = failure(failed, reason, Duration::ZERO);
        let repository = self.service().repository();
        write_with_lease(lease, &request.cancelled, || {
            repository.mark_permanent_failure(lease, &failure)
        })
        .await
    }

    /// Writes PENDING with an unchanged `retry_count`: a stop is not a failure.
    async fn release_row(
        &self,
        request: &Request,
        lease: &Lease,
        failed: &Failed,
        delay: Duration,
    ) -> Result<(), TransferError> {
        let repository = self.service().repository();
        let reason = advice::explanation(&failed.error);
        if delay.is_zero() {
            let releasing = || repository.release(lease, &reason);
            return write_with_lease(lease, &request.cancelled, releasing).await;
        }
        let failure = failure(failed, reason, delay);
        let postponing = || repository.postpone(lease, &failure);
        write_with_lease(lease, &request.cancelled, postponing).await
    }
}

/// Returns true if the database refuses a value of this transfer's own rows, so that no lease can be taken.
fn is_refusal_of_one_row(error: &TransferError) -> bool {
    let TransferError::Database { source } = error else {
        return false;
    };
    let refusal = source.downcast_ref::<DatabaseError>();
    refusal.is_some_and(DatabaseError::is_of_one_row)
}

/// Outcome of an attempt, in the words of its history if it has one.
fn outcome(failed: &Failed, settled: Settled) -> &'static str {
    match settled {
        Settled::Reset { .. } => "retried",
        Settled::Failed => "failed",
        Settled::Released => "interrupted",
        Settled::Unwritten => "unsettled",
        Settled::Untouched if matches!(failed.lease, LeaseAtEnd::Lost(_)) => "interrupted",
        Settled::Untouched => "refused",
    }
}

/// Adds the outcome of a failed attempt to its trace.
fn trace_failure(failed: &Failed, outcome: &'static str) {
    set_attributes(|| {
        let bytes = i64::try_from(failed.progress.bytes_done).unwrap_or(i64::MAX);
        vec![
            KeyValue::new("ccat.transfer.outcome", outcome),
            KeyValue::new("ccat.transfer.bytes", bytes),
            KeyValue::new("ccat.transfer.error_code", failed.error.code()),
            KeyValue::new("ccat.transfer.error_scope", failed.error.scope().as_str()),
        ]
    });
}

fn log_write_failure(request: &Request, error: &TransferError) -> Settled {
    tracing::error!(
        data_transfer_id = request.id.get(),
        error = error.chain(),
        "row could not be updated; the transfer is recovered when its lease has expired"
    );
    Settled::Unwritten
}

/// The record of a failed attempt; the next one begins after `delay`.
fn failure(failed: &Failed, message: String, delay: Duration) -> Failure {
    Failure {
        error_code: failed.error.code().into(),
        message,
        bytes: failed.progress.bytes_done,
        rate_bytes_per_s: failed.progress.rate_bytes_per_s,
        log_path: failed.log_path.clone(),
        delay,
    }
}
