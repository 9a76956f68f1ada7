//! `transfer_files_bbcp(data_transfer_id, session=None)`: moves the package of one data transfer.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use celery::error::TaskError;
use celery::task::{Request, Task, TaskOptions, TaskResult};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use super::base::{DataTransferTask, Settled};
use super::exceptions::{self, exception};
use crate::advice;
use crate::faults::fault_point;
use crate::transfer::id::TransferId;
use crate::transfer::lease;
use crate::transfer::repository::Withdrawal;
use crate::transfer::service::{self, Failed, Snapshot};
use celery_protocol::arguments::{Parameter, Signature};
use celery_protocol::message::TaskMessage;
use celery_worker::worker::{Attributes, Control, Discarded, Failure, Progress, WorkerTask};

/// Arguments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferFilesBbcpParams {
    /// Id of the row in `data_transfer`.
    pub data_transfer_id: TransferId,
    /// A database session in Python; never one on the wire. Taken and not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Value>,
}

/// The task. Returns nothing, like Python's; what it did stands in the row and in the attempt
/// history.
pub struct TransferFilesBbcp {
    request: Request<Self>,
    options: TaskOptions,
    prepared: Option<(DataTransferTask, Control)>,
    /// How the run failed, and what became of the row: from `run` over `on_failure` to `judge`.
    failed: Mutex<Option<(Failed, Settled)>>,
}

impl TransferFilesBbcp {
    /// Key in the setting `celery.task_names`.
    pub const KEY: &str = "transfer_files_bbcp";

    fn attempt(&self, control: &Control) -> service::Request {
        service::Request {
            id: self.request.params.data_transfer_id,
            task_id: self.request.id.clone(),
            cancelled: control.cancelled.clone(),
            no_new_attempt: control.shutting_down.clone(),
            redelivered: control.redelivered,
            by_hand: false,
            snapshots: watch::Sender::new(Snapshot::default()),
        }
    }

    fn take_failed(&self) -> Option<(Failed, Settled)> {
        self.failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    fn put_failed(&self, failed: Failed, settled: Settled) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some((failed, settled));
    }
}

#[async_trait]
impl Task for TransferFilesBbcp {
    const NAME: &'static str = "ccat_data_transfer.transfer_manager.transfer_files_bbcp";
    const ARGS: &'static [&'static str] = &["data_transfer_id", "session"];
    const DEFAULTS: TaskOptions = TaskOptions {
        time_limit: None,
        hard_time_limit: None,
        // A failed transfer goes back through the manager, not through Celery.
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
        Self {
            request,
            options,
            prepared: None,
            failed: Mutex::new(None),
        }
    }

    fn request(&self) -> &Request<Self> {
        &self.request
    }

    fn options(&self) -> &TaskOptions {
        &self.options
    }

    async fn run(&self, _params: Self::Params) -> TaskResult<()> {
        let Some((transfers, control)) = &self.prepared else {
            return Err(TaskError::UnexpectedError(NOT_PREPARED.into()));
        };
        let attempt = self.attempt(control);
        let snapshots = attempt.snapshots.subscribe();
        let ended = tokio::select! {
            ended = transfers.run(&attempt) => ended,
            never = pass_on(snapshots, &control.progress) => match never {},
        };
        match ended {
            Ok(_) => {
                fault_point!(TaskDone);
                Ok(())
            }
            Err(failed) => {
                let text = advice::explanation(&failed.error);
                self.put_failed(failed, Settled::Unwritten);
                Err(TaskError::UnexpectedError(text))
            }
        }
    }

    async fn on_failure(&self, _error: &TaskError) {
        let (Some((transfers, control)), Some((failed, _))) = (&self.prepared, self.take_failed())
        else {
            return;
        };
        // An interrupted attempt still has to give its row back.
        let mut request = self.attempt(control);
        if failed.error.is_interruption() {
            request.cancelled = Default::default();
        }
        let settled = transfers.on_failure(&request, &failed).await;
        let mut failed = failed;
        // The message is acknowledged nevertheless, so the row must not wait for it.
        if failed.lease.is_none() && control.terminated.is_cancelled() {
            let (id, task_id) = (request.id, &request.task_id);
            transfers
                .withdraw(id, task_id, &Withdrawal::Pending, "terminated")
                .await;
        }
        // The lease was lost before the attempt failed, or before its row was settled.
        let lost = failed.lost.as_ref().or(failed.lease.as_ref());
        if let (Settled::Untouched, Some(lost)) = (settled, lost) {
            failed.held_for_same_task = transfers
                .is_left_to_redelivery(&request, lost, || !control.message.goes_back())
                .await;
        }
        self.put_failed(failed, settled);
    }
}

/// Passes on how far an attempt is, for as long as it is polled.
async fn pass_on(mut snapshots: watch::Receiver<Snapshot>, progress: &Progress) -> Infallible {
    while snapshots.changed().await.is_ok() {
        let snapshot = *snapshots.borrow_and_update();
        progress.report(shown(&snapshot));
    }
    std::future::pending().await
}

/// The result of the state PROGRESS: bytes, bytes per second, and seconds.
fn shown(snapshot: &Snapshot) -> Map<String, Value> {
    let lease::Progress {
        bytes_done,
        bytes_total,
        rate_bytes_per_s,
    } = snapshot.progress;
    let left = bytes_total.map(|total| total.saturating_sub(bytes_done));
    Map::from_iter([
        ("phase".to_owned(), json!(snapshot.phase.as_str())),
        ("bytes".to_owned(), json!(bytes_done)),
        ("total".to_owned(), json!(bytes_total)),
        ("rate".to_owned(), json!(rate_bytes_per_s)),
        (
            "eta".to_owned(),
            json!(left.and_then(|left| left.checked_div(rate_bytes_per_s))),
        ),
    ])
}

/// Only a worker's registry gives a task its context.
const NOT_PREPARED: &str = "the task was started outside of celery_worker::worker";

impl WorkerTask for TransferFilesBbcp {
    const SIGNATURE: Signature = Signature {
        function: "transfer_files_bbcp",
        parameters: &[
            Parameter {
                name: "data_transfer_id",
                required: true,
            },
            Parameter {
                name: "session",
                required: false,
            },
        ],
        bound: true,
    };
    const ATTRIBUTES: Attributes = Attributes {
        acks_late: Some(true),
        // A copy has to be stopped, and its row put back.
        stops_itself: true,
        ..Attributes::NONE
    };
    type Context = DataTransferTask;

    fn prepare(mut self, context: DataTransferTask, control: Control) -> Self {
        self.prepared = Some((context, control));
        self
    }

    async fn discard(message: &TaskMessage, context: &DataTransferTask, reason: &Discarded) {
        context.discarded(message, reason).await;
    }

    fn judge(&self, error: &TaskError) -> Failure {
        let Some((failed, settled)) = self.take_failed() else {
            return Failure::Raised(exception("DataTransferError", error.to_string()));
        };
        match (&failed.error, settled) {
            _ if failed.held_for_same_task => Failure::Ignored,
            (error, _) if error.is_interruption() => Failure::Interrupted,
            // The row does not tell of the failure, so the message must not be gone.
            (_, Settled::Unwritten) => Failure::Interrupted,
            (error, _) => Failure::Raised(exceptions::of_transfer(error)),
        }
    }
}
