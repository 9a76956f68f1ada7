//! The Celery tasks of this program: one file for each, and one list that registers them.

use std::collections::HashMap;
use std::sync::Arc;

use celery::Celery;
use celery::error::TaskError;
use celery::task::Task;

use crate::manager::Manager;
use crate::settings;
use celery_worker::celery_crate::RegistrationError;
use celery_worker::task::{Registry, TaskContext};

mod base;
mod exceptions;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod failures_page;
mod messages;
mod notices;
mod producer;
mod settlement;
mod transfer_files_bbcp;
mod transfer_transfer_packages;
mod withdraw;

pub use base::DataTransferTask;
pub use exceptions::EXCEPTIONS;
pub use messages::Messages;
pub use producer::Producer;
pub use settlement::Settled;
pub use transfer_files_bbcp::{TransferFilesBbcp, TransferFilesBbcpParams};
pub use transfer_transfer_packages::{TransferTransferPackages, TransferTransferPackagesParams};

/// Services that the tasks need from the process that runs them.
#[derive(Clone)]
pub struct TaskServices {
    /// Runs transfers and settles their rows.
    pub transfers: DataTransferTask,
    /// Schedules transfers.
    pub manager: Arc<Manager>,
}

/// Registers every task under its configured names.
///
/// # Errors
/// [`RegistrationError`] if two tasks have the same name.
pub async fn register(
    app: &Arc<Celery>,
    settings: &settings::Celery,
    services: &TaskServices,
) -> Result<Registry, RegistrationError> {
    let mut registry = Registry::default();
    let names = |task: &str| settings.task_names.get(task).cloned().unwrap_or_default();
    let transfers = Arc::new(services.transfers.clone());
    let copying = TransferFilesBbcp::registration(transfers);
    registry
        .register_celery(app, copying.names(names(TransferFilesBbcp::KEY)))
        .await?;
    let scheduling = TransferTransferPackages::registration(services.manager.clone());
    registry
        .register_celery(app, scheduling.names(names(TransferTransferPackages::KEY)))
        .await?;
    Ok(registry)
}

/// Returns the context of the running task, and the state with which it was registered.
fn context_and_state<S: Send + Sync + 'static>() -> Result<(TaskContext, Arc<S>), TaskError> {
    let context = TaskContext::current();
    context
        .and_then(|cx| Some((cx.clone(), cx.state::<S>()?)))
        .ok_or_else(|| TaskError::UnexpectedError(NO_WORKER.into()))
}

/// Error text: only a worker's registry gives a task its context.
const NO_WORKER: &str = "the task was started outside of a worker of celery_worker";

/// Names of the tasks in messages that this process sends: the first configured name of each.
#[must_use]
pub fn wire_names(settings: &settings::Celery) -> HashMap<&'static str, String> {
    [
        (TransferFilesBbcp::KEY, TransferFilesBbcp::NAME),
        (
            TransferTransferPackages::KEY,
            TransferTransferPackages::NAME,
        ),
    ]
    .into_iter()
    .filter_map(|(key, name)| Some((name, settings.task_names.get(key)?.first()?.clone())))
    .collect()
}
