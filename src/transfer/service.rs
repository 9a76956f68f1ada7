//! The transfer service: everything that callers need to run attempts.
//!
//! The meaning of a failure for the row is not decided here: [`Failed`] hands the lease on to the
//! caller, which knows the policy.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::attempt::{AttemptFiles, AttemptRun};
use super::error::TransferError;
use super::lease::{Lease, Owner, Progress};
use super::plan::{LocalHost, Plan};
use super::repository::Repository;
use super::trace::{Explain, KeyValue, note, step};

pub use super::lease::{Phase, Snapshot};

use crate::metrics::TransferMetrics;
use crate::settings::Settings;
use crate::transfer::id::{AttemptNumber, TransferId};
use service_connection::error_chain::panic_text;

/// What a caller wants done.
#[derive(Debug, Clone)]
pub struct Request {
    /// The transfer.
    pub id: TransferId,
    /// Celery's id of the task, or any word that tells the caller.
    pub task_id: String,
    /// Cancelled when the attempt has to stop.
    pub cancelled: CancellationToken,
    /// Cancelled when no attempt may begin any more: an attempt that waits for its lease is interrupted.
    pub no_new_attempt: CancellationToken,
    /// The message came before, so a lease that is found may be that of a worker that died with
    /// it: worth waiting to see whether it is renewed.
    pub redelivered: bool,
    /// Somebody wants it now, even if its link has as many copies as it may.
    pub by_hand: bool,
    /// Gets what the attempt is doing.
    pub snapshots: watch::Sender<Snapshot>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq)]
pub enum Done {
    /// The transfer had been completed before.
    AlreadyCompleted,
    /// The file had been at its destination before, with the same content.
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
    /// Time from lease to commit.
    pub elapsed: Duration,
    /// What both ends agree on.
    pub digest: String,
}

/// An attempt that did not end well.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: TransferError,
    /// The lease it still holds; the row has to be settled with it.
    pub lease: Option<Lease>,
    /// The lost lease.
    pub lost: Option<Lease>,
    /// How far the copy came.
    pub progress: Progress,
    /// bbcp's output, if it came to that.
    pub log_path: Option<PathBuf>,
    /// What has arrived and is kept for the next attempt. If there will be none, it has to be
    /// [discarded](TransferService::discard).
    pub partial: Option<Box<Plan>>,
    /// The lease is or was held for the same task by another worker that has its message: that worker
    /// stores the result.
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

/// Runs attempts. Clones share everything.
#[derive(Debug, Clone)]
pub struct TransferService {
    repository: Repository,
    settings: Arc<Settings>,
    owner: Owner,
    local: LocalHost,
    metrics: Option<TransferMetrics>,
}

impl TransferService {
    /// A service that works as `owner`.
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

    /// Counts what is copied there.
    #[must_use]
    pub fn with_metrics(self, metrics: TransferMetrics) -> Self {
        Self {
            metrics: Some(metrics),
            ..self
        }
    }

    /// Where it is counted what becomes of transfers, if anywhere.
    #[must_use]
    pub fn metrics(&self) -> Option<&TransferMetrics> {
        self.metrics.as_ref()
    }

    /// The transfers.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Who holds the leases.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Names of this host.
    pub(super) fn local(&self) -> &LocalHost {
        &self.local
    }

    /// All settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Runs one attempt.
    ///
    /// # Errors
    /// [`Failed`]; its lease, if any, is not renewed any more, and the row has to be settled with it.
    pub async fn run(&self, request: &Request) -> Result<Done, Failed> {
        let acquired = match step("transfer/acquire", self.acquire(request)).await? {
            Some(acquired) => acquired,
            None => return Ok(Done::AlreadyCompleted),
        };
        let lease = acquired.lease.clone();
        note(|| {
            let attempt = i64::from(lease.attempt().get());
            vec![KeyValue::new("ccat.transfer.attempt", attempt)]
        });
        let run = AttemptRun::new(self, request, &lease);
        let renewal = run.renew_lease();
        let mut files = AttemptFiles::default();
        // A panic is a failed attempt like any other: its row must be settled, or it would come
        // back for ever.
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
