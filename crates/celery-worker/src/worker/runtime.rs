//! State of a running worker, which all steps of a task and the remote control share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::activity::ActivityLog;
use super::effective_options::TimeLimits;
use super::events::Events;
use super::in_flight::InFlight;
use super::memory;
use super::rate_limit::RateLimits;
use super::request::Request;
use super::revocation::Revoked;
use super::slots::Slots;
use super::{Config, Shutdown};
use crate::broker::{Broker, Subscriptions};
use crate::client::Client;
use crate::observer::Observer;
use crate::remote_control::RequestOrder;
use crate::results::ResultBackend;
use crate::task::Registry;
use crate::workflow::Workflow;
use celery_protocol::event::{Event, Load};

/// State of a worker that the processing of messages and the remote control share.
pub(crate) struct Runtime {
    pub(crate) registry: Arc<Registry>,
    pub(super) activity_log: ActivityLog,
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) results: Arc<dyn ResultBackend>,
    pub(crate) workflow: Arc<Workflow>,
    /// Client from which the clients of running tasks are cloned.
    pub(crate) client: Client,
    pub(crate) config: Config,
    pub(crate) hostname: Arc<str>,
    pub(crate) shutdown: Shutdown,
    /// Cancelled when the running tasks must stop: at a cold shutdown, after its time limit for running tasks.
    pub(crate) stopping: CancellationToken,
    /// Cancelled when a worker that shuts down no longer waits for results to be stored and for follow-up tasks to be
    /// sent. Always after `stopping`: a task that is stopped has a result, too.
    pub(crate) settling_over: CancellationToken,
    pub(crate) slots: Slots,
    /// With `disable_prefetch`, the permits to hold a message, one for each slot. A slot becomes free when its task ends, a
    /// permit when the message is settled as well.
    pub(crate) permits: Option<Slots>,
    pub(crate) rate_limits: RateLimits,
    pub(crate) time_limits: TimeLimits,
    /// The subscription of the task queues, set when consuming starts.
    pub(crate) subscriptions: OnceLock<Subscriptions>,
    pub(crate) in_flight: Arc<InFlight>,
    pub(crate) memory: memory::MemoryBudget,
    pub(crate) revoked: Revoked,
    pub(crate) request_order: RequestOrder,
    pub(crate) events: Events,
    /// Number of started tasks, by name.
    pub(crate) totals: Mutex<BTreeMap<String, u64>>,
    pub(crate) started: Instant,
    pub(crate) observer: Arc<dyn Observer>,
}

impl Runtime {
    pub(crate) fn load(&self) -> Load {
        Load {
            freq: self.config.heartbeat_interval.as_secs_f64(),
            active: self.in_flight.active(),
            processed: self.totals().values().sum(),
            loadavg: load_average().unwrap_or_default(),
        }
    }

    pub(crate) fn totals(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        // No code panics while it holds the lock, and the map would still be consistent.
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of deliveries that each queue's consumer may hold.
    pub(crate) fn prefetch(&self) -> u16 {
        u16::try_from(self.slots.size())
            .unwrap_or(u16::MAX)
            .saturating_mul(self.config.prefetch_multiplier)
    }

    /// Counts an event of a task and sends it to monitors.
    pub(super) fn emit(&self, request: &Request, event: &Event<'_>) {
        self.count_event(&request.message.task, &request.queue, event);
        self.events.send(event);
    }

    pub(super) fn count_event(&self, task: &str, queue: &str, event: &Event<'_>) {
        let known = self.registry.get(task).map(|_| task);
        self.observer.task_event(known, queue, event);
    }

    /// Counts a task that starts.
    pub(crate) fn count(&self, task: &str) {
        let mut totals = self.totals();
        match totals.get_mut(task) {
            Some(count) => *count += 1,
            None => {
                totals.insert(task.to_owned(), 1);
            }
        }
    }
}

/// Load averages of the host over 1, 5 and 15 minutes.
fn load_average() -> Option<[f64; 3]> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let mut averages = text.split(' ').map_while(|word| word.parse().ok());
    Some([averages.next()?, averages.next()?, averages.next()?])
}
