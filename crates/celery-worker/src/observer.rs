//! Observation of a worker, for metrics.

use celery_protocol::event::Event;

/// Receives the events of a worker. Every method has an empty default. The worker calls the methods while it processes
/// messages, so they must return at once.
pub trait Observer: Send + Sync {
    /// Announces a task of the registry that may arrive from `queue`; called for each pair before the worker starts.
    fn expect_task(&self, _task: &str, _queue: &str) {}

    /// Receives an event of a task from `queue`. `task` is `None` for a name that is not in the registry: senders can
    /// invent any number of names.
    fn task_event(&self, _task: Option<&str>, _queue: &str, _event: &Event<'_>) {}

    /// Receives the number of running tasks, once per heartbeat; `is_up` is false once the worker has ended.
    fn load(&self, _is_up: bool, _active: usize) {}

    /// Receives true if the broker currently does not accept messages from the worker, once per heartbeat.
    fn broker_blocked(&self, _is_blocked: bool) {}

    /// Receives true if all queues are consumed; `again` is true after the first time.
    fn broker_connected(&self, _is_connected: bool, _again: bool) {}
}

/// An observer that ignores everything.
impl Observer for () {}
