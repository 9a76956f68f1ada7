//! Our worker with one trivial task: the one in the messages of [`crate::fill`].

use celery_worker::prelude::*;
use celery_worker::task::DuplicateTask;
use celery_worker_cli::{Program, WorkerParts, WorkerProgram};

/// The worker program. Its environment variables are those of `ccat-transfer`.
pub(crate) fn program() -> WorkerProgram {
    let program = Program::new("ccat-bench", env!("CARGO_PKG_VERSION"));
    WorkerProgram::new(program).environment_prefix("CCAT_DATA_TRANSFER_")
}

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
