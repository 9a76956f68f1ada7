//! Observation of a worker, for metrics.

use celery_protocol::event::Event;

/// State of a worker's connection to its broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BrokerConnection {
    /// All queues are consumed, for the first time.
    Connected,
    /// All queues are consumed again.
    Reconnected,
    /// A queue is not consumed.
    Lost,
}

/// Receives the events of a worker. Every method has an empty default. The worker calls the methods while it processes
/// messages, so they must return at once.
pub trait Observer: Send + Sync {
    /// Announces a task of the registry that may arrive from `queue`; called for each pair before the worker starts.
    fn expect_task(&self, _task: &str, _queue: &str) {}

    /// Receives an event of a task from `queue`. `task` is `None` for a name that is not in the registry: senders can
    /// invent any number of names.
    fn task_event(&self, _task: Option<&str>, _queue: &str, _event: &Event<'_>) {}

    /// Receives the number of running tasks, once per heartbeat.
    fn load(&self, _active: usize) {}

    /// Receives the end of the worker; no task runs any more.
    fn worker_stopped(&self) {}

    /// Receives true if the broker currently does not accept messages from the worker, once per heartbeat.
    fn broker_blocked(&self, _is_blocked: bool) {}

    /// Receives the state of the connection to the broker when it changes.
    fn broker_connection(&self, _connection: BrokerConnection) {}
}

/// An observer that ignores everything.
impl Observer for () {}
