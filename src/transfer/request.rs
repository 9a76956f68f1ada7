//! The request for one attempt, and its results.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::failures::{Interruption, TransferError};
use super::id::{AttemptNumber, TransferId};
use super::lease::{Lease, Progress, Snapshot};
use super::plan::Plan;
use super::trace::Explain;

/// Request for one attempt.
#[derive(Debug, Clone)]
pub struct Request {
    /// Id of the transfer.
    pub id: TransferId,
    /// Id of the caller's task, or any other word that identifies the caller.
    pub task_id: String,
    /// Cancelled when the attempt has to stop.
    pub cancelled: CancellationToken,
    /// Cancelled before `cancelled` if the attempt has to stop for another reason than the end of the worker.
    pub terminated: CancellationToken,
    /// Cancelled when no attempt may begin any more: an attempt that waits for its lease is interrupted.
    pub no_new_attempt: CancellationToken,
    /// True if another worker may have had this request before. An existing lease may then belong to a worker that died
    /// with the request, so the attempt waits to see if the lease is renewed.
    pub redelivered: bool,
    /// True if a person requested the attempt; it then runs even if its link has reached its limit.
    pub by_hand: bool,
    /// Receives the phase and the progress of the attempt.
    pub snapshots: watch::Sender<Snapshot>,
}

impl Request {
    /// Returns the error of an attempt, with the reason if the attempt was stopped. A stopped step cannot report the
    /// reason, because a cancellation token has none.
    pub(super) fn with_reason(&self, error: TransferError) -> TransferError {
        match error {
            TransferError::Interrupted { .. } => TransferError::Interrupted {
                cause: match self.terminated.is_cancelled() {
                    true => Interruption::Cancelled,
                    false => Interruption::Shutdown,
                },
            },
            error => error,
        }
    }
}

/// Result of a successful attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum Success {
    /// The transfer was already completed.
    AlreadyCompleted,
    /// The file was already at its destination, with the same content.
    AlreadyThere(Summary),
    /// The file was copied.
    Copied(Summary),
}

/// Facts of a completed transfer.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Time from the acquisition of the lease to the commit.
    pub elapsed: Duration,
    /// Digest on which both ends agree.
    pub digest: String,
}

/// An attempt that was not successful.
#[derive(Debug)]
pub struct Failed {
    /// Cause.
    pub error: TransferError,
    /// The lease.
    pub lease: LeaseAtEnd,
    /// Progress of the copy at the end of the attempt.
    pub progress: Progress,
    /// Log file with bbcp's output, if bbcp was started.
    pub log_path: Option<PathBuf>,
    /// Plan of a partial copy that is kept for the next attempt. If no further attempt follows, the caller has to
    /// [discard](super::service::TransferService::discard) it.
    pub partial: Option<Box<Plan>>,
}

/// The lease of an attempt at the end of the attempt.
#[derive(Debug)]
pub enum LeaseAtEnd {
    /// The attempt had no lease.
    NotAcquired,
    /// The attempt had no lease: another worker holds one for the same task. That worker has the message, and stores
    /// the result.
    HeldForSameTask,
    /// The attempt holds its lease; the caller has to end the attempt with it.
    Held(Lease),
    /// The attempt has lost its lease to another worker or to an operator.
    Lost(Lease),
}

impl Failed {
    /// Creates the result of an attempt that has not acquired its lease.
    pub(super) fn before_the_lease(error: TransferError) -> Self {
        Self {
            error,
            lease: LeaseAtEnd::NotAcquired,
            progress: Progress::default(),
            log_path: None,
            partial: None,
        }
    }
}

impl Explain for Failed {
    fn kind(&self) -> String {
        self.error.code().to_owned()
    }

    fn message(&self) -> String {
        self.error.message()
    }
}
