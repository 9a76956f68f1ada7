//! The processing of one task: the value that all steps share after the message was decoded.

use std::sync::Arc;

use super::cancellation::Cancellation;
use super::effective_options::EffectiveOptions;
use super::request::Request;
use super::runtime::Runtime;
use crate::task::RegisteredTask;

/// The processing of one task, from its decoded message to the disposition of this message.
pub(super) struct TaskProcessing<'a> {
    pub(super) runtime: &'a Runtime,
    pub(super) request: Arc<Request>,
    pub(super) registered: &'a RegisteredTask,
    pub(super) options: EffectiveOptions,
    /// Cancels the task.
    pub(super) stop: Cancellation,
}

impl<'a> TaskProcessing<'a> {
    /// Creates the processing of a request for the task of `registered`.
    pub(super) fn new(
        runtime: &'a Runtime,
        request: Request,
        registered: &'a RegisteredTask,
    ) -> Self {
        let message = &request.message;
        let limits = runtime.time_limits.get(&message.task);
        let options =
            EffectiveOptions::new(message, &registered.options, limits, &runtime.config.tasks);
        Self {
            runtime,
            request: Arc::new(request),
            registered,
            options,
            stop: Cancellation::new(&runtime.stopping),
        }
    }
}
