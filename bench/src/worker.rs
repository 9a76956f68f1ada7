//! Our worker with a task that does nothing worth a name: the one that [`crate::fill`] asks for.

use ccat_transfer::cli::Service;
use celery::error::CeleryError;
use celery_protocol::arguments::{Parameter, Signature};
use celery_worker::worker::{Attributes, Registry};

const ADD: Signature = Signature {
    function: "add",
    parameters: &[Parameter::required("x"), Parameter::required("y")],
    bound: false,
};

/// Acknowledged after the run, as transfers are.
const LATE: Attributes = Attributes {
    acks_late: Some(true),
    ..Attributes::NONE
};

/// # Errors
/// None, in truth: there is one task, and its name is good.
pub(crate) async fn tasks(_service: Service) -> Result<Registry, CeleryError> {
    let mut tasks = Registry::default();
    tasks.function("tasks.add", ADD, LATE, async |(x, y): (i64, i64), _| {
        Ok(x.wrapping_add(y))
    })?;
    Ok(tasks)
}
