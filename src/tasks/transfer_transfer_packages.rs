//! `transfer_transfer_packages(verbose=False, session=None)`: schedules the PENDING transfers.

use std::sync::Arc;

use async_trait::async_trait;
use celery::error::TaskError as CrateError;
use celery::task::{Request, Task, TaskOptions, TaskResult as CrateResult};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::context_and_state;
use super::exceptions::{self, exception};
use crate::manager::Manager;
use celery_worker::celery_crate::CeleryTask;
use celery_worker::task::{
    FunctionSignature, Parameter, TaskContext, TaskOptions as WorkerOptions,
};
use service_connection::error_chain::chain;

/// Arguments of the task.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferTransferPackagesParams {
    /// Log every row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verbose: Option<bool>,
    /// A database session in Python, never part of a message. Accepted and ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Value>,
}

/// The task: one pass of the manager.
pub struct TransferTransferPackages {
    request: Request<Self>,
    options: TaskOptions,
}

impl TransferTransferPackages {
    /// Key in the setting `celery.task_names`.
    pub const KEY: &str = "transfer_transfer_packages";

    /// Returns the registration of this task, with its state.
    pub(super) fn registration(manager: Arc<Manager>) -> CeleryTask<Self> {
        CeleryTask::new()
            .signature(FunctionSignature {
                function: "transfer_transfer_packages".into(),
                parameters: vec![
                    Parameter::optional("verbose"),
                    Parameter::optional("session"),
                ]
                .into(),
                bound: false,
            })
            // A pass is short, and must not be interrupted.
            .options(WorkerOptions::DEFAULT.acks_late(true).cooperative(true))
            .state(manager)
    }
}

#[async_trait]
impl Task for TransferTransferPackages {
    const NAME: &'static str = "ccat_data_transfer.transfer_manager.transfer_transfer_packages";
    const ARGS: &'static [&'static str] = &["verbose", "session"];
    type Params = TransferTransferPackagesParams;
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

    async fn run(&self, params: Self::Params) -> CrateResult<()> {
        let (cx, manager) = context_and_state::<Manager>()?;
        let verbose = params.verbose.unwrap_or(false);
        let passed = manager.run_pass(verbose).await;
        passed.map(drop).map_err(|error| {
            let text = chain(&error).to_string();
            cx.raise(exceptions::of_manager(&error, text))
        })
    }

    /// Converts a panic to the exception class that callers of this task expect.
    async fn on_failure(&self, error: &CrateError) {
        if let Some(cx) = TaskContext::current() {
            cx.raise(exception("ScheduleError", error.to_string()));
        }
    }
}
