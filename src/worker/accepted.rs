//! The messages that a worker has accepted and not yet settled.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::stop::{Reason, Stop};
use crate::broker::Delivery;
use crate::wire::RawMessage;
use crate::wire::message::TaskMessage;
use crate::wire::repr;

/// A task message, and the way it came.
pub(super) struct Received {
    /// What it asks for.
    pub(super) message: Arc<TaskMessage>,
    /// As it was on the wire.
    pub(super) raw: RawMessage,
    /// Exchange it came through.
    pub(super) exchange: String,
    /// Its routing key.
    pub(super) routing_key: String,
    /// Queue it came from.
    pub(super) queue: String,
    /// Whether the broker thinks that it was delivered before.
    pub(super) redelivered: bool,
}

/// What tells accepted messages apart: a retry has the id of the run before it, and can come
/// before that one is settled.
type Key = (String, u32);

impl Received {
    fn key(&self) -> Key {
        (self.message.id.clone(), self.message.retries)
    }
}

/// How far an accepted task is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Phase {
    /// It waits for its time.
    Scheduled(DateTime<Utc>),
    /// It waits for its turn or for a place.
    Reserved,
    /// It runs since.
    Active(DateTime<Utc>),
}

struct Accepted {
    received: Arc<Received>,
    phase: Phase,
    deliveries: Vec<Delivery>,
    acknowledged: bool,
    stop: Stop,
}

/// The accepted messages.
#[derive(Default)]
pub(super) struct AcceptedTasks(Mutex<HashMap<Key, Accepted>>);

impl AcceptedTasks {
    /// Enters a delivery, to be stopped by `stop`; false if it joined one of the same task that is
    /// there already.
    pub(super) fn accept(&self, received: &Arc<Received>, delivery: Delivery, stop: &Stop) -> bool {
        match self.lock().entry(received.key()) {
            Entry::Vacant(entry) => {
                entry.insert(Accepted {
                    received: received.clone(),
                    phase: Phase::Reserved,
                    deliveries: vec![delivery],
                    acknowledged: false,
                    stop: stop.clone(),
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
    pub(super) fn enter(&self, received: &Arc<Received>, phase: Phase) {
        if let Some(accepted) = find(&mut self.lock(), received) {
            accepted.phase = phase;
        }
    }

    /// Whether the broker still leaves a task's message to this worker. Otherwise it comes again, or
    /// has come to somebody else and is gone.
    pub(super) fn is_held(&self, received: &Arc<Received>) -> bool {
        find(&mut self.lock(), received).is_some_and(|accepted| {
            accepted
                .deliveries
                .iter()
                .any(|delivery| !delivery.is_void())
        })
    }

    /// Lets a task's deliveries count against the prefetch limit, or not while it waits.
    pub(super) fn park(&self, received: &Arc<Received>, parked: bool) {
        if let Some(accepted) = find(&mut self.lock(), received) {
            for delivery in &accepted.deliveries {
                match parked {
                    true => delivery.park(),
                    false => delivery.unpark(),
                }
            }
        }
    }

    /// Stops the task of an id where it runs, for good; false if it does not run here.
    pub(super) fn terminate(&self, id: &str) -> bool {
        let mut found = false;
        for accepted in self.lock().values() {
            let runs = matches!(accepted.phase, Phase::Active(_));
            if runs && accepted.received.message.id == id {
                accepted.stop.stop(Reason::Terminated);
                found = true;
            }
        }
        found
    }

    /// Whether the task of an id runs here.
    pub(super) fn runs(&self, id: &str) -> bool {
        self.lock().values().any(|accepted| {
            matches!(accepted.phase, Phase::Active(_)) && accepted.received.message.id == id
        })
    }

    /// The deliveries of a task that is acknowledged before its end. It stays in the list.
    pub(super) fn acknowledge(&self, received: &Arc<Received>) -> Vec<Delivery> {
        find(&mut self.lock(), received).map_or_else(Vec::new, |accepted| {
            accepted.acknowledged = true;
            std::mem::take(&mut accepted.deliveries)
        })
    }

    /// Takes out everything that has to be settled with a task. Nothing, if it was taken out
    /// before.
    pub(super) fn release(&self, received: &Arc<Received>) -> Vec<Delivery> {
        let mut all = self.lock();
        let deliveries =
            find(&mut all, received).map(|accepted| std::mem::take(&mut accepted.deliveries));
        match deliveries {
            Some(deliveries) => {
                all.remove(&received.key());
                deliveries
            }
            None => Vec::new(),
        }
    }

    /// How many tasks run.
    pub(super) fn active(&self) -> usize {
        let is_active = |accepted: &&Accepted| matches!(accepted.phase, Phase::Active(_));
        self.lock().values().filter(is_active).count()
    }

    /// How many tasks wait for their time.
    pub(super) fn scheduled(&self) -> usize {
        let waits = |accepted: &&Accepted| matches!(accepted.phase, Phase::Scheduled(_));
        self.lock().values().filter(waits).count()
    }

    /// The ids of the accepted tasks whose message `wanted` wants.
    pub(super) fn ids(&self, wanted: impl Fn(&TaskMessage) -> bool) -> Vec<String> {
        self.lock()
            .values()
            .filter(|accepted| wanted(&accepted.received.message))
            .map(|accepted| accepted.received.message.id.clone())
            .collect()
    }

    /// The tasks as `celery inspect` shows them, with how far each is; their arguments as Python
    /// would print them where `safe`.
    pub(super) fn requests(&self, hostname: &str, safe: bool) -> Vec<(Phase, Value)> {
        self.lock()
            .values()
            .map(|accepted| (accepted.phase, accepted.request(hostname, safe)))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Accepted>> {
        // No code panics while it holds the lock, and the map would still be whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The entry of this very message, not of another one of the same task.
fn find<'a>(
    all: &'a mut HashMap<Key, Accepted>,
    received: &Arc<Received>,
) -> Option<&'a mut Accepted> {
    all.get_mut(&received.key())
        .filter(|accepted| Arc::ptr_eq(&accepted.received, received))
}

impl Accepted {
    fn request(&self, hostname: &str, safe: bool) -> Value {
        let started = match self.phase {
            Phase::Active(since) => Some(super::unix_seconds(since)),
            Phase::Scheduled(_) | Phase::Reserved => None,
        };
        let Received {
            message,
            raw,
            exchange,
            routing_key,
            redelivered,
            ..
        } = &*self.received;
        let shown = |value: &Value, repr: &Option<String>| match safe {
            true => json!(repr.clone().unwrap_or_else(|| repr::value(value))),
            false => value.clone(),
        };
        json!({
            "id": message.id,
            "name": message.display_name(),
            "args": shown(&message.args, &message.argsrepr),
            "kwargs": shown(&message.kwargs, &message.kwargsrepr),
            "type": message.task,
            "hostname": hostname,
            "time_start": started,
            "acknowledged": self.acknowledged,
            "delivery_info": {
                "exchange": exchange,
                "routing_key": routing_key,
                "priority": raw.properties.priority,
                "redelivered": redelivered,
            },
            "worker_pid": started.map(|_| std::process::id()),
        })
    }
}
