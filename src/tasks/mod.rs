//! The Celery tasks of this stage: one file for each, and one list that registers them.

use std::collections::HashMap;
use std::sync::Arc;

use celery::Celery;
use celery::error::CeleryError;
use celery::task::Task;

use crate::manager::Manager;
use crate::settings;
use celery_worker::worker::Registry;

mod base;
mod exceptions;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod failures_page;
mod messages;
mod notices;
mod producer;
mod transfer_files_bbcp;
mod transfer_transfer_packages;
mod withdraw;

pub use base::{DataTransferTask, OperationInfo, Settled};
pub use exceptions::EXCEPTIONS;
pub use messages::Messages;
pub use producer::Producer;
pub use transfer_files_bbcp::{TransferFilesBbcp, TransferFilesBbcpParams};
pub use transfer_transfer_packages::{TransferTransferPackages, TransferTransferPackagesParams};

/// What the tasks need from the process that runs them.
#[derive(Clone)]
pub struct Context {
    /// Does transfers and settles their rows.
    pub transfers: DataTransferTask,
    /// Schedules them.
    pub manager: Arc<Manager>,
}

/// Registers every task under its configured names.
///
/// # Errors
/// [`CeleryError::TaskRegistrationError`] if two tasks have one name.
pub async fn register(
    app: &Celery,
    settings: &settings::Celery,
    context: &Context,
) -> Result<Registry, CeleryError> {
    let mut registry = Registry::default();
    let names = |task: &str| settings.task_names.get(task).cloned().unwrap_or_default();
    registry
        .register::<TransferFilesBbcp>(
            app,
            &names(TransferFilesBbcp::KEY),
            context.transfers.clone(),
        )
        .await?;
    registry
        .register::<TransferTransferPackages>(
            app,
            &names(TransferTransferPackages::KEY),
            context.manager.clone(),
        )
        .await?;
    Ok(registry)
}

/// The names that producers of this process put on the wire: the first configured one of each.
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
