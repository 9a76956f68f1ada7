//! `transfer_files_bbcp(data_transfer_id, session=None)`: copies the package of one data transfer.

use std::convert::Infallible;
use std::sync::Arc;

use async_trait::async_trait;
use celery::error::TaskError as CrateError;
use celery::task::{Request, Task, TaskOptions, TaskResult as CrateResult};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::base::{DataTransferTask, SettledFailure};
use super::context_and_state;
use super::exceptions::{self, exception};
use super::settlement::Settled;
use crate::faults::fault_point;
use crate::transfer::id::TransferId;
use crate::transfer::lease::{self, Snapshot};
use crate::transfer::repository::Withdrawal;
use crate::transfer::request::{self, LeaseAtEnd};
use celery_worker::celery_crate::CeleryTask;
use celery_worker::task::{
    FunctionSignature, Parameter, TaskContext, TaskError, TaskOptions as WorkerOptions,
};

/// Arguments of the task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferFilesBbcpParams {
    /// Id of the row in `data_transfer`.
    pub data_transfer_id: TransferId,
    /// A database session in Python, never part of a message. Accepted and ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Value>,
}

/// The task. It returns nothing, like Python's: its effects are the row and the attempt history.
pub struct TransferFilesBbcp {
    request: Request<Self>,
    options: TaskOptions,
}

impl TransferFilesBbcp {
    /// Key in the setting `celery.task_names`.
    pub const KEY: &str = "transfer_files_bbcp";

    /// Returns the registration of this task, with its state.
    pub(super) fn registration(transfers: Arc<DataTransferTask>) -> CeleryTask<Self> {
        let state = transfers.clone();
        CeleryTask::new()
            .signature(FunctionSignature {
                function: "transfer_files_bbcp".into(),
                parameters: vec![
                    Parameter::required("data_transfer_id"),
                    Parameter::optional("session"),
                ]
                .into(),
                bound: true,
            })
            // The task stops the copy and releases the row before it ends.
            .options(WorkerOptions::DEFAULT.cooperative(true))
            .state(state)
            .on_discard(move |message, reason| {
                let transfers = transfers.clone();
                async move { transfers.discarded(&message, &reason).await }
            })
    }

    fn attempt_request(&self, cx: &TaskContext) -> request::Request {
        request::Request {
            id: self.request.params.data_transfer_id,
            task_id: self.request.id.clone(),
            cancelled: cx.cancelled().clone(),
            terminated: cx.terminated().clone(),
            no_new_attempt: cx.shutting_down().clone(),
            redelivered: cx.redelivered(),
            by_hand: false,
            snapshots: watch::Sender::new(Snapshot::default()),
        }
    }

    /// Returns the end of the task after a failed attempt.
    async fn end(
        &self,
        transfers: &DataTransferTask,
        cx: &TaskContext,
        failure: SettledFailure,
    ) -> TaskError {
        let SettledFailure {
            failed,
            settled,
            cancelled,
        } = failure;
        let (id, task_id) = (self.request.params.data_transfer_id, &self.request.id);
        // The message is acknowledged nevertheless, so the row must not wait for it.
        if !matches!(failed.lease, LeaseAtEnd::Held(_)) && cx.terminated().is_cancelled() {
            transfers
                .withdraw(id, task_id, &Withdrawal::Pending, "terminated")
                .await;
        }
        let is_left_to_another_worker = match (&failed.lease, settled) {
            (LeaseAtEnd::HeldForSameTask, _) => true,
            // The lease was lost before the attempt failed, or before its row was settled.
            (LeaseAtEnd::Lost(lost) | LeaseAtEnd::Held(lost), Settled::Untouched) => {
                let is_gone = || !cx.will_requeue();
                let service = transfers.service();
                service
                    .is_left_to_another_worker(task_id, lost, &cancelled, is_gone)
                    .await
            }
            _ => false,
        };
        match (&failed.error, settled) {
            _ if is_left_to_another_worker => TaskError::Ignore,
            (error, _) if error.is_interruption() => TaskError::Stopped,
            // The row does not have the failure, so the message must stay.
            (_, Settled::Unwritten) => TaskError::Stopped,
            (error, _) => TaskError::Raised(exceptions::of_transfer(error)),
        }
    }
}

#[async_trait]
impl Task for TransferFilesBbcp {
    const NAME: &'static str = "ccat_data_transfer.transfer_manager.transfer_files_bbcp";
    const ARGS: &'static [&'static str] = &["data_transfer_id", "session"];
    const DEFAULTS: TaskOptions = TaskOptions {
        time_limit: None,
        hard_time_limit: None,
        // The manager repeats a failed transfer, not Celery.
        max_retries: Some(0),
        min_retry_delay: None,
        max_retry_delay: None,
        retry_for_unexpected: Some(false),
        acks_late: Some(true),
        content_type: None,
    };
    type Params = TransferFilesBbcpParams;
    type Returns = ();

    fn from_request(request: Request<Self>, options: TaskOptions) -> Self {
        Self { request, options }
    }

    fn request(&self) -> &Request<Self> {
        &self.request
    }

    fn options(&self) -> &TaskOptions {
        &self.options
    }

    async fn run(&self, _params: Self::Params) -> CrateResult<()> {
        let (cx, transfers) = context_and_state::<DataTransferTask>()?;
        let request = self.attempt_request(&cx);
        let snapshots = request.snapshots.subscribe();
        let ended = tokio::select! {
            ended = transfers.run_and_settle(&request) => ended,
            never = forward_progress(snapshots, &cx) => match never {},
        };
        match ended {
            Ok(_) => {
                fault_point!(TaskDone);
                Ok(())
            }
            Err(failure) => Err(cx.raise(self.end(&transfers, &cx, *failure).await)),
        }
    }

    /// Converts a panic to the exception class that callers of this task expect. An error that [`Self::run`] has raised
    /// is kept: only the first error of a context counts.
    async fn on_failure(&self, error: &CrateError) {
        if let Some(cx) = TaskContext::current() {
            cx.raise(exception("DataTransferError", error.to_string()));
        }
    }
}

/// Publishes the progress of an attempt while this future is polled.
async fn forward_progress(
    mut snapshots: watch::Receiver<Snapshot>,
    cx: &TaskContext,
) -> Infallible {
    while snapshots.changed().await.is_ok() {
        let snapshot = *snapshots.borrow_and_update();
        cx.progress(progress_values(&snapshot));
    }
    std::future::pending().await
}

/// The result of the state PROGRESS: bytes, bytes per second, and seconds.
fn progress_values(snapshot: &Snapshot) -> Map<String, Value> {
    let lease::Progress {
        bytes_done,
        bytes_total,
        rate_bytes_per_s,
        bytes_verified,
    } = snapshot.progress;
    let remaining_bytes = bytes_total.map(|total| total.saturating_sub(bytes_done));
    Map::from_iter([
        ("phase".to_owned(), json!(snapshot.phase.as_str())),
        ("bytes".to_owned(), json!(bytes_done)),
        ("total".to_owned(), json!(bytes_total)),
        ("rate".to_owned(), json!(rate_bytes_per_s)),
        ("verified".to_owned(), json!(bytes_verified)),
        (
            "eta".to_owned(),
            json!(remaining_bytes.and_then(|bytes| bytes.checked_div(rate_bytes_per_s))),
        ),
    ])
}
