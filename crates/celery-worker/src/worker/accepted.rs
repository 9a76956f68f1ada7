//! The messages that a worker has accepted and not yet settled.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::identity::Identity;
use super::stop::{Reason, Stop};
use crate::broker::Delivery;
use celery_protocol::RawMessage;
use celery_protocol::message::TaskMessage;
use celery_protocol::repr;

/// Bytes that a list of tasks may take in a reply.
const SHOWN_BYTES: usize = 4 << 20;

/// A message whose body is longer, in bytes, is shown with shortened arguments.
const LONG_BODY: usize = 16 << 10;

/// Approximate size of the description of a task without its arguments, in bytes.
const SHOWN_BESIDE: usize = 512;

/// A task message, and the way it came.
pub(super) struct Received {
    /// Identity of the task, which two deliveries of it share.
    pub(super) identity: Identity,
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

impl Received {
    /// A message that arrived by a delivery.
    pub(super) fn of(delivery: &Delivery, message: TaskMessage) -> Self {
        Self {
            identity: Identity::of(&delivery.message),
            message: Arc::new(message),
            raw: delivery.message.clone(),
            exchange: delivery.exchange.clone(),
            routing_key: delivery.routing_key.clone(),
            queue: delivery.queue.clone(),
            redelivered: delivery.redelivered,
        }
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
    deliveries: Vec<Held>,
    /// True if none of the deliveries counts against the prefetch limit.
    parked: bool,
    acknowledged: bool,
    stop: Stop,
}

/// An unsettled delivery.
struct Held {
    delivery: Delivery,
    /// True if the delivery does not count against the prefetch limit.
    parked: bool,
}

/// The accepted messages.
///
/// A task takes at most one place of the prefetch limit, and none while it waits for its time: all its other
/// deliveries are parked. Otherwise deliveries that join a task could fill the window for as long as that
/// task runs or waits, and no other message would be delivered.
pub(super) struct AcceptedTasks {
    all: Mutex<All>,
    /// Maximum number of parked deliveries: otherwise the broker would drain its queue into this process.
    parking_limit: usize,
}

#[derive(Default)]
struct All {
    tasks: HashMap<Identity, Accepted>,
    /// Deliveries that are parked.
    parked: usize,
}

impl AcceptedTasks {
    /// Creates an empty collection that parks at most `limit` deliveries.
    pub(super) fn new(parking_limit: usize) -> Self {
        Self {
            all: Mutex::default(),
            parking_limit,
        }
    }

    /// Enters a delivery, to be stopped by `stop`; false if it joined one of the same task that is
    /// there already.
    pub(super) fn accept(&self, received: &Arc<Received>, delivery: Delivery, stop: &Stop) -> bool {
        let held = Held {
            delivery,
            parked: false,
        };
        let mut all = self.lock();
        let All { tasks, parked, .. } = &mut *all;
        match tasks.entry(received.identity) {
            Entry::Vacant(entry) => {
                entry.insert(Accepted {
                    received: received.clone(),
                    phase: Phase::Reserved,
                    deliveries: vec![held],
                    parked: false,
                    acknowledged: false,
                    stop: stop.clone(),
                });
                true
            }
            Entry::Occupied(mut entry) => {
                let accepted = entry.get_mut();
                // Those of a lost connection need no settling any more.
                accepted.deliveries.retain(|earlier| {
                    let is_void = earlier.delivery.is_void();
                    *parked -= usize::from(is_void && earlier.parked);
                    !is_void
                });
                accepted.deliveries.push(held);
                accepted.arrange(parked, self.parking_limit);
                false
            }
        }
    }

    /// Notes how far a task is.
    pub(super) fn enter(&self, received: &Arc<Received>, phase: Phase) {
        if let Some(accepted) = self.lock().find(received) {
            accepted.phase = phase;
        }
    }

    /// Whether the broker still leaves a task's message to this worker. Otherwise it comes again, or
    /// has come to somebody else and is gone.
    pub(super) fn is_held(&self, received: &Arc<Received>) -> bool {
        self.lock().find(received).is_some_and(|accepted| {
            accepted
                .deliveries
                .iter()
                .any(|held| !held.delivery.is_void())
        })
    }

    /// Sets whether a task's deliveries count against the prefetch limit: not while it waits. Deliveries that join
    /// it later are treated alike.
    pub(super) fn park(&self, received: &Arc<Received>, parked: bool) {
        let mut all = self.lock();
        let All {
            tasks,
            parked: count,
            ..
        } = &mut *all;
        if let Some(accepted) = tasks.get_mut(&received.identity)
            && accepted.is_of(received)
        {
            accepted.parked = parked;
            accepted.arrange(count, self.parking_limit);
        }
    }

    /// Stops, for good, the running tasks whose message `wanted` selects; returns their ids.
    pub(super) fn terminate(&self, wanted: impl Fn(&TaskMessage) -> bool) -> Vec<String> {
        let mut stopped = Vec::new();
        for accepted in self.lock().tasks.values() {
            let message = &accepted.received.message;
            if accepted.runs() && wanted(message) {
                accepted.stop.stop(Reason::Terminated);
                stopped.push(message.id.clone());
            }
        }
        stopped
    }

    /// Ids of the tasks that run here.
    pub(super) fn running(&self) -> HashSet<String> {
        self.lock()
            .tasks
            .values()
            .filter(|accepted| accepted.runs())
            .map(|accepted| accepted.received.message.id.clone())
            .collect()
    }

    /// The deliveries of a task that is acknowledged before its end. It stays in the list.
    pub(super) fn acknowledge(&self, received: &Arc<Received>) -> Vec<Delivery> {
        let mut all = self.lock();
        let Some(accepted) = all.find(received) else {
            return Vec::new();
        };
        accepted.acknowledged = true;
        let deliveries = std::mem::take(&mut accepted.deliveries);
        all.hand_out(deliveries)
    }

    /// Takes out everything that has to be settled with a task. Nothing, if it was taken out
    /// before.
    pub(super) fn release(&self, received: &Arc<Received>) -> Vec<Delivery> {
        let mut all = self.lock();
        let accepted = match all.tasks.entry(received.identity) {
            Entry::Occupied(entry) if entry.get().is_of(received) => entry.remove(),
            Entry::Occupied(_) | Entry::Vacant(_) => return Vec::new(),
        };
        all.hand_out(accepted.deliveries)
    }

    /// How many tasks run.
    pub(super) fn active(&self) -> usize {
        let all = self.lock();
        all.tasks
            .values()
            .filter(|accepted| accepted.runs())
            .count()
    }

    /// The tasks that `wanted` selects, in the form of `celery inspect`, with their stage. Arguments are shown as
    /// Python prints them if `safe`, or if they are long. The list is limited by [`SHOWN_BYTES`].
    pub(super) fn requests(
        &self,
        hostname: &str,
        safe: bool,
        wanted: impl Fn(Phase, &TaskMessage) -> bool,
    ) -> Vec<(Phase, Value)> {
        let mut room = SHOWN_BYTES;
        let mut shown = Vec::new();
        for accepted in self.lock().tasks.values() {
            if !wanted(accepted.phase, &accepted.received.message) {
                continue;
            }
            let message = &accepted.received.message;
            let body = accepted.received.raw.body.len();
            let long = body > LONG_BODY;
            let names = message.id.len() + message.task.len() + message.display_name().len();
            let Some(left) = room.checked_sub(body.min(LONG_BODY) + names + SHOWN_BESIDE) else {
                tracing::warn!(
                    "a reply of the remote control does not show all tasks: it would be too long"
                );
                break;
            };
            room = left;
            shown.push((accepted.phase, accepted.request(hostname, safe || long)));
        }
        shown
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        // No code panics while it holds the lock, and the map would still be whole.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl All {
    /// Deliveries that are about to be settled.
    fn hand_out(&mut self, deliveries: Vec<Held>) -> Vec<Delivery> {
        self.parked -= deliveries.iter().filter(|held| held.parked).count();
        deliveries.into_iter().map(|held| held.delivery).collect()
    }

    /// The entry of this very message, not of another one of the same task.
    fn find(&mut self, received: &Arc<Received>) -> Option<&mut Accepted> {
        self.tasks
            .get_mut(&received.identity)
            .filter(|accepted| accepted.is_of(received))
    }
}

impl Accepted {
    /// Parks every delivery except the first one, and also the first one while the task waits, as far as the limit
    /// allows. `parked` is the number of all parked deliveries.
    fn arrange(&mut self, parked: &mut usize, limit: usize) {
        let mut counted = usize::from(!self.parked);
        for held in &mut self.deliveries {
            if held.delivery.is_void() {
                continue;
            }
            let is_counted = counted > 0;
            counted -= usize::from(is_counted);
            match (held.parked, is_counted) {
                (true, true) => {
                    held.delivery.unpark();
                    *parked -= 1;
                }
                (false, false) if *parked < limit => {
                    held.delivery.park();
                    *parked += 1;
                }
                _ => continue,
            }
            held.parked = !held.parked;
        }
    }

    fn is_of(&self, received: &Arc<Received>) -> bool {
        Arc::ptr_eq(&self.received, received)
    }

    fn runs(&self) -> bool {
        matches!(self.phase, Phase::Active(_))
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
            true => {
                let shown = repr.as_deref().map(repr::shorten);
                json!(shown.unwrap_or_else(|| repr::shortened(value)))
            }
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
    use std::sync::atomic::AtomicBool;
    use std::sync::atomic::Ordering::Relaxed;

    use tokio::sync::oneshot;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::broker::{Settlement, Verdict};
    use celery_protocol::content::Accept;
    use celery_protocol::message::decode;

    /// A delivery that records whether it is parked.
    #[derive(Clone, Default)]
    struct Probe {
        parked: Arc<AtomicBool>,
        void: Arc<AtomicBool>,
    }

    impl Settlement for Probe {
        fn settle(self: Box<Self>, _: Verdict) -> oneshot::Receiver<()> {
            oneshot::channel().1
        }

        fn is_void(&self) -> bool {
            self.void.load(Relaxed)
        }

        fn park(&self, parked: bool) {
            self.parked.store(parked, Relaxed);
        }
    }

    fn received(id: &str, argument: &str) -> Option<Arc<Received>> {
        let headers = json!({"task": "t", "id": id, "lang": "py"});
        let mut raw = RawMessage {
            headers: serde_json::from_value(headers).ok()?,
            body: format!("[[{argument:?}], {{}}, {{}}]").into_bytes(),
            ..RawMessage::default()
        };
        raw.properties.content_type = Some("application/json".into());
        raw.properties.content_encoding = Some("utf-8".into());
        let message = decode(&raw, &Accept::json(1000)).ok()?;
        Some(Arc::new(Received {
            identity: Identity::of(&raw),
            message: Arc::new(message),
            raw,
            exchange: String::new(),
            routing_key: "q".into(),
            queue: "q".into(),
            redelivered: false,
        }))
    }

    /// Accepts a delivery; returns true with it if it was the first of its task.
    fn accept(accepted: &AcceptedTasks, received: &Arc<Received>) -> (bool, Probe) {
        let way = (String::new(), "q".to_owned());
        let probe = Probe::default();
        let raw = received.raw.clone();
        let delivery = Delivery::new(raw, "q".into(), way, false, Box::new(probe.clone()));
        let stop = Stop::new(&CancellationToken::new());
        (accepted.accept(received, delivery, &stop), probe)
    }

    fn parked(probes: &[&Probe]) -> Vec<bool> {
        let is_parked = |probe: &&Probe| probe.parked.load(Relaxed);
        probes.iter().map(is_parked).collect()
    }

    const MISSING: &str = "no message";

    #[test]
    fn different_tasks_with_one_id_do_not_join() -> Result<(), &'static str> {
        let accepted = AcceptedTasks::new(10);
        let one = received("a", "one").ok_or(MISSING)?;
        let other = received("a", "other").ok_or(MISSING)?;
        let again = received("a", "one").ok_or(MISSING)?;
        assert!(accept(&accepted, &one).0);
        assert!(accept(&accepted, &other).0);
        assert!(!accept(&accepted, &again).0);
        // These deliveries are settled separately.
        assert_eq!(accepted.release(&one).len(), 2);
        assert!(accepted.release(&one).is_empty());
        assert_eq!(accepted.release(&other).len(), 1);
        Ok(())
    }

    #[test]
    fn at_most_one_delivery_of_a_task_counts() -> Result<(), &'static str> {
        let accepted = AcceptedTasks::new(10);
        let task = received("a", "").ok_or(MISSING)?;
        let twin = received("a", "").ok_or(MISSING)?;
        let (_, first) = accept(&accepted, &task);
        let (_, second) = accept(&accepted, &twin);
        assert_eq!(parked(&[&first, &second]), [false, true]);
        accepted.park(&task, true);
        let (_, third) = accept(&accepted, &twin);
        assert_eq!(parked(&[&first, &second, &third]), [true, true, true]);
        // The message that joined does not count: it waits for nothing.
        accepted.park(&twin, false);
        assert_eq!(parked(&[&first, &second, &third]), [true, true, true]);
        accepted.park(&task, false);
        assert_eq!(parked(&[&first, &second, &third]), [false, true, true]);
        Ok(())
    }

    /// A broker that closes the connection delivers again, and that delivery is treated like the one
    /// before it.
    #[test]
    fn what_is_delivered_again_is_parked_with_its_task() -> Result<(), &'static str> {
        let accepted = AcceptedTasks::new(1);
        let task = received("a", "").ok_or(MISSING)?;
        let (_, lost) = accept(&accepted, &task);
        accepted.park(&task, true);
        lost.void.store(true, Relaxed);
        let (_, again) = accept(&accepted, &task);
        assert_eq!(parked(&[&again]), [true]);
        accepted.park(&task, false);
        assert_eq!(parked(&[&again]), [false]);
        Ok(())
    }

    #[test]
    fn no_more_than_the_limit_is_parked() -> Result<(), &'static str> {
        let accepted = AcceptedTasks::new(2);
        let task = received("a", "").ok_or(MISSING)?;
        let other = received("b", "").ok_or(MISSING)?;
        let (_, first) = accept(&accepted, &task);
        let (_, second) = accept(&accepted, &other);
        for each in [&task, &other] {
            accepted.park(each, true);
        }
        let (_, third) = accept(&accepted, &task);
        assert_eq!(parked(&[&first, &second, &third]), [true, true, false]);
        // Settled deliveries make room.
        accepted.release(&other);
        let (_, fourth) = accept(&accepted, &task);
        assert_eq!(parked(&[&third, &fourth]), [true, false]);
        accepted.release(&task);
        assert_eq!(accepted.lock().parked, 0);
        Ok(())
    }
}
