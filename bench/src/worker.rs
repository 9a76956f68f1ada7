//! Our worker with one trivial task: the one in the messages of [`crate::fill`].

use celery_worker::prelude::*;
use celery_worker::task::DuplicateTask;
use celery_worker_cli::{Program, WorkerParts, WorkerProgram};

/// The worker, with the environment variables of `ccat-transfer`.
pub(crate) const PROGRAM: WorkerProgram = WorkerProgram::new(
    Program::new("ccat-bench", env!("CARGO_PKG_VERSION")),
    "CCAT_DATA_TRANSFER_",
    "CCAT_DATA_TRANSFER_CONFIG",
);

/// The message is acknowledged after the run, as for transfers.
#[task(name = "tasks.add", acks_late)]
async fn add(x: i64, y: i64) -> TaskResult<i64> {
    Ok(x.wrapping_add(y))
}

/// # Errors
/// None, since only one task exists.
pub(crate) async fn tasks(_: WorkerParts) -> Result<Registry, DuplicateTask> {
    let mut tasks = Registry::default();
    tasks.register(add)?;
    Ok(tasks)
}
