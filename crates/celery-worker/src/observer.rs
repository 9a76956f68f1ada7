//! Observation of a worker, for metrics.

use celery_protocol::event::Event;

/// Receives what happens in a worker. Every method has an empty default. The worker calls them on its message
/// path, so they must return at once.
pub trait Observer: Send + Sync {
    /// A task of the registry that may come from `queue`; called for each pair before the worker starts.
    fn expect_task(&self, _task: &str, _queue: &str) {}

    /// An event of a task that came from `queue`. `task` is `None` for a name that the registry does not have:
    /// senders can make up any number of names.
    fn task_event(&self, _task: Option<&str>, _queue: &str, _event: &Event<'_>) {}

    /// The number of running tasks, once per heartbeat; `is_up` is false once the worker has ended.
    fn load(&self, _is_up: bool, _active: usize) {}

    /// True if the broker currently refuses messages from the worker, once per heartbeat.
    fn broker_blocked(&self, _is_blocked: bool) {}

    /// True if all queues are consumed; `again` is true after the first time.
    fn broker_connected(&self, _is_connected: bool, _again: bool) {}
}

/// An observer that ignores everything.
impl Observer for () {}
