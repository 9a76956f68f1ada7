//! `transfer_transfer_packages(verbose=False, session=None)`: schedules the transfers that wait.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use celery::error::TaskError;
use celery::task::{Request, Task, TaskOptions, TaskResult};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::exceptions::{self, exception};
use crate::manager::Manager;
use celery_protocol::arguments::{Parameter, Signature};
use celery_protocol::exception::Exception;
use celery_worker::worker::{Attributes, Control, Failure, WorkerTask};
use service_connection::error_chain::chain;

/// Arguments.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferTransferPackagesParams {
    /// Log every row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verbose: Option<bool>,
    /// A database session in Python; never one on the wire. Taken and not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Value>,
}

/// The task: one pass of the manager.
pub struct TransferTransferPackages {
    request: Request<Self>,
    options: TaskOptions,
    manager: Option<Arc<Manager>>,
    raised: Mutex<Option<Exception>>,
}

impl TransferTransferPackages {
    /// Key in the setting `celery.task_names`.
    pub const KEY: &str = "transfer_transfer_packages";
}

#[async_trait]
impl Task for TransferTransferPackages {
    const NAME: &'static str = "ccat_data_transfer.transfer_manager.transfer_transfer_packages";
    const ARGS: &'static [&'static str] = &["verbose", "session"];
    type Params = TransferTransferPackagesParams;
    type Returns = ();

    fn from_request(request: Request<Self>, options: TaskOptions) -> Self {
        Self {
            request,
            options,
            manager: None,
            raised: Mutex::new(None),
        }
    }

    fn request(&self) -> &Request<Self> {
        &self.request
    }

    fn options(&self) -> &TaskOptions {
        &self.options
    }

    async fn run(&self, params: Self::Params) -> TaskResult<()> {
        let Some(manager) = &self.manager else {
            return Err(TaskError::UnexpectedError(
                "the task was not prepared by a worker".into(),
            ));
        };
        let verbose = params.verbose.unwrap_or(false);
        manager
            .transfer_transfer_packages(verbose)
            .await
            .map(drop)
            .map_err(|error| {
                let text = chain(&error).to_string();
                let raised = exceptions::of_manager(&error, text.clone());
                *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(raised);
                TaskError::UnexpectedError(text)
            })
    }
}

impl WorkerTask for TransferTransferPackages {
    const SIGNATURE: Signature = Signature {
        function: "transfer_transfer_packages",
        parameters: &[
            Parameter {
                name: "verbose",
                required: false,
            },
            Parameter {
                name: "session",
                required: false,
            },
        ],
        bound: false,
    };
    const ATTRIBUTES: Attributes = Attributes {
        acks_late: Some(true),
        // A pass is short, and must not be left in the middle.
        stops_itself: true,
        ..Attributes::NONE
    };
    type Context = Arc<Manager>;

    fn prepare(mut self, context: Arc<Manager>, _control: Control) -> Self {
        self.manager = Some(context);
        self
    }

    fn judge(&self, error: &TaskError) -> Failure {
        let raised = self
            .raised
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        Failure::Raised(raised.unwrap_or_else(|| exception("ScheduleError", error.to_string())))
    }
}
