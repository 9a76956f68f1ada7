//! Common part of all tasks about one transfer: runs it, and has its row settled when it fails. The counterpart of
//! Python's `DataTransferTask`.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::notices::BrokenLinks;
use super::settlement::Settled;
use crate::heartbeats::Heartbeats;
use crate::notify::Notifier;
use crate::transfer::request::{Failed, Request, Success};
use crate::transfer::service::TransferService;
use crate::transfer::trace::{KeyValue, set_attributes};

/// Runs transfers and settles the rows of those that fail. Clones share all state.
#[derive(Clone)]
pub struct DataTransferTask {
    service: TransferService,
    heartbeats: Heartbeats,
    pub(super) notifier: Option<Notifier>,
    pub(super) broken_links: Arc<BrokenLinks>,
}

/// A failed attempt, and the state of its row.
pub(super) struct SettledFailure {
    pub(super) failed: Failed,
    pub(super) settled: Settled,
    /// Cancels the waits for the database after the attempt.
    pub(super) cancelled: CancellationToken,
}

impl DataTransferTask {
    /// Creates the part on top of `service`.
    #[must_use]
    pub fn new(service: TransferService) -> Self {
        Self {
            service,
            notifier: None,
            heartbeats: Heartbeats::default(),
            broken_links: Arc::default(),
        }
    }

    /// Adds notices to administrators about transfers that are given up or recover.
    #[must_use]
    pub fn with_notifier(self, notifier: Notifier) -> Self {
        Self {
            notifier: Some(notifier),
            ..self
        }
    }

    /// Adds heartbeats while a task runs.
    #[must_use]
    pub fn with_heartbeats(self, heartbeats: Heartbeats) -> Self {
        Self { heartbeats, ..self }
    }

    /// Makes one attempt, and settles the row of a failed one.
    pub(super) async fn run_and_settle(
        &self,
        request: &Request,
    ) -> Result<Success, Box<SettledFailure>> {
        let failed = match self.run(request).await {
            Ok(done) => return Ok(done),
            Err(failed) => failed,
        };
        let mut settling = request.clone();
        // An interrupted attempt still has to release its row.
        if failed.error.is_interruption() {
            settling.cancelled = CancellationToken::new();
        }
        let settled = self.on_failure(&settling, &failed).await;
        Err(Box::new(SettledFailure {
            failed,
            settled,
            cancelled: settling.cancelled,
        }))
    }

    /// Makes one attempt. The caller must pass a failed one to [`DataTransferTask::on_failure`].
    ///
    /// # Errors
    /// [`Failed`], with the failure of the attempt.
    pub async fn run(&self, request: &Request) -> Result<Success, Failed> {
        let _alive = self.heartbeats.task(&request.task_id);
        set_attributes(|| vec![KeyValue::new("ccat.transfer.id", request.id.get())]);
        let done = self.service.run(request).await?;
        trace_success(&done);
        if !matches!(done, Success::AlreadyCompleted) {
            if let Some(metrics) = self.service.metrics() {
                metrics.attempt("completed", "");
            }
            self.notify_recovery(request.id).await;
        }
        Ok(done)
    }

    pub(super) fn service(&self) -> &TransferService {
        &self.service
    }
}

/// Adds the outcome of a completed attempt to its trace.
fn trace_success(done: &Success) {
    let (outcome, summary) = match done {
        Success::AlreadyCompleted => ("already_completed", None),
        Success::AlreadyThere(summary) => ("already_there", Some(summary)),
        Success::Copied(summary) => ("copied", Some(summary)),
    };
    set_attributes(|| {
        let bytes = summary.map(|summary| i64::try_from(summary.bytes).unwrap_or(i64::MAX));
        let bytes = bytes.map(|bytes| KeyValue::new("ccat.transfer.bytes", bytes));
        let outcome = KeyValue::new("ccat.transfer.outcome", outcome);
        bytes.into_iter().chain([outcome]).collect()
    });
}
