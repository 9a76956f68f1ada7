//! The messages that a worker has accepted and not yet settled, by task id.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use crate::broker::Delivery;
use crate::wire::message::TaskMessage;

/// How far an accepted task is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Phase {
    /// It waits for its time.
    Scheduled(DateTime<Utc>),
    /// It waits for a slot.
    Reserved,
    /// It runs since.
    Active(DateTime<Utc>),
}

struct Accepted {
    message: Arc<TaskMessage>,
    phase: Phase,
    deliveries: Vec<Delivery>,
    delivery_info: Value,
}

/// The accepted messages.
#[derive(Default)]
pub(super) struct AcceptedTasks(Mutex<HashMap<String, Accepted>>);

impl AcceptedTasks {
    /// Enters a delivery under its task's id; false if it joined one that is there already.
    pub(super) fn accept(&self, message: &Arc<TaskMessage>, delivery: Delivery) -> bool {
        match self.lock().entry(message.id.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(Accepted {
                    message: message.clone(),
                    phase: message.eta.map_or(Phase::Reserved, Phase::Scheduled),
                    delivery_info: json!({
                        "exchange": delivery.exchange,
                        "routing_key": delivery.routing_key,
                        "priority": delivery.message.properties.priority,
                        "redelivered": delivery.redelivered,
                    }),
                    deliveries: vec![delivery],
                });
                true
            }
            Entry::Occupied(mut entry) => {
                let deliveries = &mut entry.get_mut().deliveries;
                // Those of a lost connection need no settling any more.
                deliveries.retain(|earlier| !earlier.is_void());
                deliveries.push(delivery);
                false
            }
        }
    }

    /// Notes how far a task is.
    pub(super) fn enter(&self, id: &str, phase: Phase) {
        if let Some(accepted) = self.lock().get_mut(id) {
            accepted.phase = phase;
        }
    }

    /// Takes out everything that has to be settled with a task.
    pub(super) fn release(&self, id: &str) -> Vec<Delivery> {
        self.lock()
            .remove(id)
            .map_or_else(Vec::new, |accepted| accepted.deliveries)
    }

    /// How many tasks run.
    pub(super) fn active(&self) -> usize {
        let is_active = |accepted: &&Accepted| matches!(accepted.phase, Phase::Active(_));
        self.lock().values().filter(is_active).count()
    }

    /// The tasks as `celery inspect` shows them, with how far each is.
    pub(super) fn requests(&self, hostname: &str) -> Vec<(Phase, Value)> {
        self.lock()
            .values()
            .map(|accepted| (accepted.phase, accepted.request(hostname)))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Accepted>> {
        // No code panics while it holds the lock, and the map would still be whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Accepted {
    fn request(&self, hostname: &str) -> Value {
        let started = match self.phase {
            Phase::Active(since) => Some(super::unix_seconds(since)),
            Phase::Scheduled(_) | Phase::Reserved => None,
        };
        json!({
            "id": self.message.id,
            "name": self.message.display_name(),
            "args": self.message.args,
            "kwargs": self.message.kwargs,
            "type": self.message.task,
            "hostname": hostname,
            "time_start": started,
            "acknowledged": false,
            "delivery_info": self.delivery_info,
            "worker_pid": started.map(|_| std::process::id()),
        })
    }
}
