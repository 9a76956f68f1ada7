//! Our worker with a task that does nothing worth a name: the one that [`crate::fill`] asks for.

use ccat_transfer::cli::Service;
use celery_worker::prelude::*;
use celery_worker::task::DuplicateTask;

/// Acknowledged after the run, as transfers are.
#[task(name = "tasks.add", acks_late)]
async fn add(x: i64, y: i64) -> TaskResult<i64> {
    Ok(x.wrapping_add(y))
}

/// # Errors
/// None: there is one task.
pub(crate) async fn tasks(_service: Service) -> Result<Registry, DuplicateTask> {
    let mut tasks = Registry::default();
    tasks.register(add)?;
    Ok(tasks)
}
