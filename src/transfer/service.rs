//! The transfer service: runs attempts for its callers.
//!
//! The service does not decide what a failure means for the row: [`Failed`] passes the lease on to the caller, which
//! knows the retry policy.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::attempt::{AttemptFiles, AttemptRun};
use super::failures::TransferError;
use super::lease::{Lease, Owner, Progress};
use super::plan::{LocalHost, Plan};
use super::repository::Repository;
use super::trace::{Explain, KeyValue, set_attributes, step};

pub use super::lease::{Phase, Snapshot};

use crate::metrics::TransferMetrics;
use crate::settings::Settings;
use crate::transfer::id::{AttemptNumber, TransferId};
use service_connection::error_chain::panic_text;

/// Request for one attempt.
#[derive(Debug, Clone)]
pub struct Request {
    /// Id of the transfer.
    pub id: TransferId,
    /// Celery's id of the task, or any other word that identifies the caller.
    pub task_id: String,
    /// Cancelled when the attempt has to stop.
    pub cancelled: CancellationToken,
    /// Cancelled when no attempt may begin any more: an attempt that waits for its lease is interrupted.
    pub no_new_attempt: CancellationToken,
    /// True if the message was delivered before. An existing lease may then belong to a worker that died while it had
    /// the message, so the attempt waits to see if the lease is renewed.
    pub redelivered: bool,
    /// True if a person requested the attempt; it then runs even if its link has reached its limit.
    pub by_hand: bool,
    /// Receives the phase and the progress of the attempt.
    pub snapshots: watch::Sender<Snapshot>,
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
    /// The lease, if still held; the caller has to end the attempt with it.
    pub lease: Option<Lease>,
    /// The lease, if lost.
    pub lost: Option<Lease>,
    /// Progress of the copy at the end of the attempt.
    pub progress: Progress,
    /// Log file with bbcp's output, if bbcp was started.
    pub log_path: Option<PathBuf>,
    /// Plan of a partial copy that is kept for the next attempt. If no further attempt follows, the caller has to
    /// [discard](TransferService::discard) it.
    pub partial: Option<Box<Plan>>,
    /// True if the lease is or was held for the same task by another worker that has its message: that worker stores
    /// the result.
    pub held_for_same_task: bool,
}

impl Failed {
    pub(super) fn before_the_lease(error: TransferError) -> Self {
        let progress = Progress::default();
        Self {
            error,
            lease: None,
            lost: None,
            progress,
            log_path: None,
            partial: None,
            held_for_same_task: false,
        }
    }
}

/// Runs attempts. Clones share all fields.
#[derive(Debug, Clone)]
pub struct TransferService {
    repository: Repository,
    settings: Arc<Settings>,
    owner: Owner,
    local: LocalHost,
    metrics: Option<TransferMetrics>,
}

impl TransferService {
    /// Creates a service that acquires leases as `owner`.
    #[must_use]
    pub fn new(repository: Repository, settings: Arc<Settings>, owner: Owner) -> Self {
        let further = settings.transfer.local_hosts.iter().map(String::as_str);
        let local = LocalHost::new(&owner.host, further);
        Self {
            repository,
            settings,
            owner,
            local,
            metrics: None,
        }
    }

    /// Sets the metrics that count attempts and copied bytes.
    #[must_use]
    pub fn with_metrics(self, metrics: TransferMetrics) -> Self {
        Self {
            metrics: Some(metrics),
            ..self
        }
    }

    /// Metrics of transfers, if they are collected.
    #[must_use]
    pub fn metrics(&self) -> Option<&TransferMetrics> {
        self.metrics.as_ref()
    }

    /// Repository of transfers.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Process that holds the leases.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Names of this host.
    pub(super) fn local(&self) -> &LocalHost {
        &self.local
    }

    /// Settings of the program.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Runs one attempt.
    ///
    /// # Errors
    /// [`Failed`]; its lease, if any, is no longer renewed, and the caller has to end the attempt with it.
    pub async fn run(&self, request: &Request) -> Result<Success, Failed> {
        let acquired = match step("transfer/acquire", self.acquire(request)).await? {
            Some(acquired) => acquired,
            None => return Ok(Success::AlreadyCompleted),
        };
        let lease = acquired.lease.clone();
        set_attributes(|| {
            let attempt = i64::from(lease.attempt().get());
            vec![KeyValue::new("ccat.transfer.attempt", attempt)]
        });
        let run = AttemptRun::new(self, request, &lease);
        let renewal = run.renew_lease();
        let mut files = AttemptFiles::default();
        // A panic is handled like any other failure: if the row were not written, the transfer would be attempted again
        // and again.
        let running = AssertUnwindSafe(run.run(&acquired, &mut files));
        let outcome = running.catch_unwind().await.unwrap_or_else(|panic| {
            Err(TransferError::Internal {
                what: panic_text(&*panic).to_owned(),
            })
        });
        drop(renewal);
        let error = match outcome {
            Ok(done) => return Ok(done),
            Err(error) => run.cause(error),
        };
        let (lease, lost) = match error {
            TransferError::LeaseLost { .. } => (None, Some(lease)),
            _ => (Some(lease), None),
        };
        Err(Failed {
            lease,
            lost,
            error,
            progress: request.snapshots.borrow().progress,
            log_path: files.log_path,
            partial: files.partial,
            held_for_same_task: false,
        })
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
