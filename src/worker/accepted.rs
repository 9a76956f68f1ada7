//! The messages that a worker has accepted and not yet settled.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{Hash, Hasher};
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
struct Key(Arc<TaskMessage>);

impl Key {
    fn parts(&self) -> (&str, u32) {
        (&self.0.id, self.0.retries)
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

impl Received {
    fn key(&self) -> Key {
        Key(self.message.clone())
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

impl Phase {
    fn is_scheduled(self) -> bool {
        matches!(self, Self::Scheduled(_))
    }
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
pub(super) struct AcceptedTasks(Mutex<All>);

#[derive(Default)]
struct All {
    tasks: HashMap<Key, Accepted>,
    /// How many of them wait for their time. Kept, since each message with an `eta` asks for it, and
    /// there may be many thousands of them.
    scheduled: usize,
}

impl AcceptedTasks {
    /// Enters a delivery, to be stopped by `stop`; false if it joined one of the same task that is
    /// there already.
    pub(super) fn accept(&self, received: &Arc<Received>, delivery: Delivery, stop: &Stop) -> bool {
        match self.lock().tasks.entry(received.key()) {
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
        let mut all = self.lock();
        let Some(accepted) = all.find(received) else {
            return;
        };
        let before = std::mem::replace(&mut accepted.phase, phase);
        all.scheduled += usize::from(phase.is_scheduled());
        all.scheduled -= usize::from(before.is_scheduled());
    }

    /// Whether the broker still leaves a task's message to this worker. Otherwise it comes again, or
    /// has come to somebody else and is gone.
    pub(super) fn is_held(&self, received: &Arc<Received>) -> bool {
        self.lock().find(received).is_some_and(|accepted| {
            accepted
                .deliveries
                .iter()
                .any(|delivery| !delivery.is_void())
        })
    }

    /// Lets a task's deliveries count against the prefetch limit, or not while it waits.
    pub(super) fn park(&self, received: &Arc<Received>, parked: bool) {
        if let Some(accepted) = self.lock().find(received) {
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
        for accepted in self.lock().tasks.values() {
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
        self.lock().tasks.values().any(|accepted| {
            matches!(accepted.phase, Phase::Active(_)) && accepted.received.message.id == id
        })
    }

    /// The deliveries of a task that is acknowledged before its end. It stays in the list.
    pub(super) fn acknowledge(&self, received: &Arc<Received>) -> Vec<Delivery> {
        self.lock()
            .find(received)
            .map_or_else(Vec::new, |accepted| {
                accepted.acknowledged = true;
                std::mem::take(&mut accepted.deliveries)
            })
    }

    /// Takes out everything that has to be settled with a task. Nothing, if it was taken out
    /// before.
    pub(super) fn release(&self, received: &Arc<Received>) -> Vec<Delivery> {
        let mut all = self.lock();
        let accepted = match all.tasks.entry(received.key()) {
            Entry::Occupied(entry) if entry.get().is_of(received) => entry.remove(),
            Entry::Occupied(_) | Entry::Vacant(_) => return Vec::new(),
        };
        all.scheduled -= usize::from(accepted.phase.is_scheduled());
        accepted.deliveries
    }

    /// How many tasks run.
    pub(super) fn active(&self) -> usize {
        let is_active = |accepted: &&Accepted| matches!(accepted.phase, Phase::Active(_));
        self.lock().tasks.values().filter(is_active).count()
    }

    /// How many tasks wait for their time.
    pub(super) fn scheduled(&self) -> usize {
        self.lock().scheduled
    }

    /// The ids of the accepted tasks whose message `wanted` wants.
    pub(super) fn ids(&self, wanted: impl Fn(&TaskMessage) -> bool) -> Vec<String> {
        self.lock()
            .tasks
            .values()
            .filter(|accepted| wanted(&accepted.received.message))
            .map(|accepted| accepted.received.message.id.clone())
            .collect()
    }

    /// The tasks as `celery inspect` shows them, with how far each is; their arguments as Python
    /// would print them where `safe`.
    pub(super) fn requests(&self, hostname: &str, safe: bool) -> Vec<(Phase, Value)> {
        self.lock()
            .tasks
            .values()
            .map(|accepted| (accepted.phase, accepted.request(hostname, safe)))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        // No code panics while it holds the lock, and the map would still be whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl All {
    /// The entry of this very message, not of another one of the same task.
    fn find(&mut self, received: &Arc<Received>) -> Option<&mut Accepted> {
        self.tasks
            .get_mut(&received.key())
            .filter(|accepted| accepted.is_of(received))
    }
}

impl Accepted {
    fn is_of(&self, received: &Arc<Received>) -> bool {
        Arc::ptr_eq(&self.received, received)
    }

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

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::broker::{Settlement, Verdict};
    use crate::wire::content::Accept;
    use crate::wire::message::decode;

    struct Nothing;

    impl Settlement for Nothing {
        fn settle(self: Box<Self>, _: Verdict) -> oneshot::Receiver<()> {
            oneshot::channel().1
        }

        fn is_void(&self) -> bool {
            false
        }

        fn park(&self, _: bool) {}
    }

    fn received(id: &str) -> Option<Arc<Received>> {
        let headers = json!({"task": "t", "id": id, "lang": "py"});
        let mut raw = RawMessage {
            headers: serde_json::from_value(headers).ok()?,
            body: b"[[], {}, {}]".to_vec(),
            ..RawMessage::default()
        };
        raw.properties.content_type = Some("application/json".into());
        raw.properties.content_encoding = Some("utf-8".into());
        let message = decode(&raw, &Accept::json(1000)).ok()?;
        Some(Arc::new(Received {
            message: Arc::new(message),
            raw,
            exchange: String::new(),
            routing_key: "q".into(),
            queue: "q".into(),
            redelivered: false,
        }))
    }

    fn accept(accepted: &AcceptedTasks, received: &Arc<Received>) -> bool {
        let way = (String::new(), "q".to_owned());
        let raw = received.raw.clone();
        let delivery = Delivery::new(raw, "q".into(), way, false, Box::new(Nothing));
        accepted.accept(received, delivery, &Stop::new(&CancellationToken::new()))
    }

    #[tokio::test]
    async fn those_that_wait_are_counted_as_they_come_and_go() -> Result<(), &'static str> {
        let accepted = AcceptedTasks::default();
        let later = Phase::Scheduled(Utc::now());
        let [a, b, twin] = ["a", "b", "a"].map(received);
        let (a, b) = (a.ok_or("a message")?, b.ok_or("a message")?);
        let twin = twin.ok_or("a message")?;

        assert!(accept(&accepted, &a) && accept(&accepted, &b));
        assert_eq!(accepted.scheduled(), 0);
        accepted.enter(&a, later);
        accepted.enter(&a, later);
        accepted.enter(&b, later);
        assert_eq!(accepted.scheduled(), 2);
        // A second message of the task joins the first one, and is not one more.
        assert!(!accept(&accepted, &twin));
        accepted.enter(&twin, later);
        assert!(accepted.release(&twin).is_empty());
        assert_eq!(accepted.scheduled(), 2);

        accepted.enter(&b, Phase::Reserved);
        assert_eq!(accepted.scheduled(), 1);
        // It waits, and is given back to the broker.
        assert_eq!(accepted.release(&a).len(), 2);
        assert!(accepted.release(&a).is_empty());
        assert_eq!(accepted.scheduled(), 0);
        accepted.release(&b);
        assert_eq!(accepted.scheduled(), 0);
        Ok(())
    }
}
