//! Tasks between acceptance and settlement, with their deliveries.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::cancellation::{CancelReason, Cancellation};
use super::identity::Identity;
use super::request::Request;
use crate::broker::{Delivery, Disposition};
use celery_protocol::message::TaskMessage;
use ended::Ended;

mod ended;
mod listing;

/// Progress of an accepted task.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Phase {
    /// Waits for its eta.
    Scheduled(DateTime<Utc>),
    /// Waits for its rate limit or for a slot.
    Reserved,
    /// Runs since this time.
    Active(DateTime<Utc>),
}

struct InFlightTask {
    request: Arc<Request>,
    phase: Phase,
    deliveries: Vec<HeldDelivery>,
    /// True if none of the deliveries counts against the prefetch limit.
    exempt: bool,
    acknowledged: bool,
    /// The progress that the task reported last.
    progress: Option<Arc<Value>>,
    /// True if the acknowledgement before its end could not be sent.
    unsettled: bool,
    /// True if its function has returned: its result may be known to others already.
    has_run: bool,
    stop: Cancellation,
}

/// Result of adding a delivery.
#[derive(Debug)]
pub(crate) enum Addition {
    /// The delivery is the first one of its task.
    First,
    /// The delivery joined a task that was accepted before.
    Joined,
    /// The delivery is that of a task that has ended, whose earlier delivery could not be settled.
    Ended(Box<Delivery>, Disposition),
}

/// An ended task that is to be settled.
#[derive(Default)]
pub(crate) struct EndedTask {
    /// Its deliveries.
    pub(crate) deliveries: Vec<Delivery>,
    /// True if an acknowledgement before its end could not be sent.
    pub(crate) unsettled: bool,
}

/// An unsettled delivery.
struct HeldDelivery {
    delivery: Delivery,
    /// True if the delivery does not count against the prefetch limit.
    exempt: bool,
}

/// Accepted messages by their identity.
///
/// A task counts at most once against the prefetch limit, and not at all while it waits for its eta: all of its other
/// deliveries are *exempt* from it. Otherwise deliveries that join a task could fill the window for as long as that task runs or
/// waits, and no other message would be delivered.
pub(crate) struct InFlight {
    all: Mutex<All>,
    /// Maximum number of exempt deliveries: otherwise the broker would send the whole queue to this process.
    exempt_limit: usize,
}

#[derive(Default)]
struct All {
    tasks: HashMap<Identity, InFlightTask>,
    /// Tasks that have run and are concluded while the same message, sent again, is in `tasks`.
    displaced: Vec<InFlightTask>,
    /// Number of exempt deliveries.
    exempt: usize,
    ended: Ended,
}

impl InFlight {
    /// Creates an empty collection with at most `exempt_limit` deliveries that are exempt.
    pub(crate) fn new(exempt_limit: usize) -> Self {
        Self {
            all: Mutex::default(),
            exempt_limit,
        }
    }

    /// Adds a delivery of a task that `stop` cancels.
    pub(crate) fn add(
        &self,
        request: &Arc<Request>,
        delivery: Delivery,
        stop: &Cancellation,
    ) -> Addition {
        let mut all = self.lock();
        let All {
            tasks,
            displaced,
            exempt,
            ended,
        } = &mut *all;
        if request.redelivered
            && !tasks.contains_key(&request.identity)
            && let Some(disposition) = ended.get(&request.identity)
        {
            return Addition::Ended(delivery.into(), disposition);
        }
        let held = HeldDelivery {
            delivery,
            exempt: false,
        };
        let task = |deliveries| InFlightTask {
            request: request.clone(),
            phase: Phase::Reserved,
            deliveries,
            exempt: false,
            acknowledged: false,
            progress: None,
            unsettled: false,
            has_run: false,
            stop: stop.clone(),
        };
        match tasks.entry(request.identity) {
            Entry::Vacant(entry) => {
                entry.insert(task(vec![held]));
                Addition::First
            }
            // Sent by someone who may know the result, and wants the task to run again.
            Entry::Occupied(mut entry) if entry.get().has_run && !request.redelivered => {
                displaced.push(entry.insert(task(vec![held])));
                Addition::First
            }
            Entry::Occupied(mut entry) => {
                let task = entry.get_mut();
                // Deliveries of a lost connection cannot be settled.
                task.deliveries.retain(|earlier| {
                    let is_void = earlier.delivery.is_void();
                    *exempt -= usize::from(is_void && earlier.exempt);
                    !is_void
                });
                task.deliveries.push(held);
                task.arrange(exempt, self.exempt_limit);
                Addition::Joined
            }
        }
    }

    /// Sets the phase of a task.
    pub(crate) fn enter(&self, request: &Arc<Request>, phase: Phase) {
        if let Some(task) = self.lock().find(request) {
            task.phase = phase;
        }
    }

    /// Notes that the function of a task has returned. The same message joins the task from now on only if it is
    /// redelivered, and else is another task.
    pub(crate) fn note_run(&self, request: &Arc<Request>) {
        if let Some(task) = self.lock().find(request) {
            task.has_run = true;
        }
    }

    /// Returns true while the broker does not redeliver a task's message. Otherwise this or another worker receives it
    /// again.
    pub(crate) fn is_held(&self, request: &Arc<Request>) -> bool {
        self.lock()
            .find(request)
            .is_some_and(|task| task.deliveries.iter().any(|held| !held.delivery.is_void()))
    }

    /// Sets whether a task's deliveries are exempt, which is the case while the task waits. Deliveries that join it
    /// later are treated in the same way.
    pub(crate) fn set_exempt(&self, request: &Arc<Request>, exempt: bool) {
        let mut all = self.lock();
        let mut count = all.exempt;
        if let Some(task) = all.find(request) {
            task.exempt = exempt;
            task.arrange(&mut count, self.exempt_limit);
        }
        all.exempt = count;
    }

    /// Cancels the running tasks whose message `wanted` selects, without requeuing their messages. Returns their ids.
    pub(crate) fn terminate(&self, wanted: impl Fn(&TaskMessage) -> bool) -> Vec<String> {
        let mut stopped = Vec::new();
        for task in self.lock().each() {
            let message = &task.request.message;
            if task.runs() && wanted(message) {
                task.stop.stop(CancelReason::Terminated);
                stopped.push(message.id.clone());
            }
        }
        stopped
    }

    /// Ids of the tasks whose message `wanted` selects, running or waiting.
    pub(crate) fn ids(&self, wanted: impl Fn(&TaskMessage) -> bool) -> Vec<String> {
        let all = self.lock();
        let messages = all.each().map(|task| &task.request.message);
        let ids: BTreeSet<&str> = messages
            .filter(|message| wanted(message))
            .map(|message| message.id.as_str())
            .collect();
        ids.into_iter().map(str::to_owned).collect()
    }

    /// Ids of the running tasks.
    pub(crate) fn running(&self) -> HashSet<String> {
        self.lock()
            .each()
            .filter(|task| task.runs())
            .map(|task| task.request.message.id.clone())
            .collect()
    }

    /// Takes the deliveries of a task that is acknowledged before its end. The task stays in the collection.
    pub(crate) fn acknowledge(&self, request: &Arc<Request>) -> Vec<Delivery> {
        let mut all = self.lock();
        let Some(task) = all.find(request) else {
            return Vec::new();
        };
        task.acknowledged = true;
        let deliveries = std::mem::take(&mut task.deliveries);
        all.hand_out(deliveries)
    }

    /// Keeps the progress that a task has reported, for `celery inspect`.
    pub(crate) fn note_progress(&self, request: &Arc<Request>, progress: Arc<Value>) {
        if let Some(task) = self.lock().find(request) {
            task.progress = Some(progress);
        }
    }

    /// Notes that the acknowledgement of a task before its end could not be sent.
    pub(crate) fn note_unsettled(&self, request: &Arc<Request>) {
        if let Some(task) = self.lock().find(request) {
            task.unsettled = true;
        }
    }

    /// Removes an ended task and returns its deliveries, which must be settled with this disposition. The task is
    /// remembered until [`InFlight::forget`], if its deliveries may not be settled.
    pub(crate) fn end(&self, request: &Arc<Request>, disposition: Disposition) -> EndedTask {
        let mut all = self.lock();
        let Some(task) = all.remove(request) else {
            return EndedTask::default();
        };
        if task.unsettled || !task.deliveries.is_empty() {
            all.ended.add(request.identity, disposition);
        }
        EndedTask {
            unsettled: task.unsettled,
            deliveries: all.hand_out(task.deliveries),
        }
    }

    /// Forgets an ended task whose deliveries are settled.
    pub(crate) fn forget(&self, identity: &Identity) {
        self.lock().ended.remove(identity);
    }

    /// Removes a task and returns its unsettled deliveries; none if it was removed before.
    pub(crate) fn release(&self, request: &Arc<Request>) -> Vec<Delivery> {
        let mut all = self.lock();
        match all.remove(request) {
            Some(task) => all.hand_out(task.deliveries),
            None => Vec::new(),
        }
    }

    /// Number of running tasks.
    pub(crate) fn active(&self) -> usize {
        let all = self.lock();
        all.each().filter(|task| task.runs()).count()
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        // No code panics while it holds the lock, and the map would still be consistent.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl All {
    /// Returns deliveries that will be settled, and subtracts them from the exempt ones.
    fn hand_out(&mut self, deliveries: Vec<HeldDelivery>) -> Vec<Delivery> {
        self.exempt -= deliveries.iter().filter(|held| held.exempt).count();
        deliveries.into_iter().map(|held| held.delivery).collect()
    }

    /// All tasks.
    fn each(&self) -> impl Iterator<Item = &InFlightTask> {
        self.tasks.values().chain(&self.displaced)
    }

    /// Removes the entry of exactly this request.
    fn remove(&mut self, request: &Arc<Request>) -> Option<InFlightTask> {
        if let Some(index) = self.displaced.iter().position(|task| task.is_of(request)) {
            return Some(self.displaced.swap_remove(index));
        }
        self.find(request)?;
        self.tasks.remove(&request.identity)
    }

    /// The entry of exactly this request, not of another message of the same task.
    fn find(&mut self, request: &Arc<Request>) -> Option<&mut InFlightTask> {
        let current = self.tasks.get_mut(&request.identity);
        let mut entries = current.into_iter().chain(&mut self.displaced);
        entries.find(|task| task.is_of(request))
    }
}

impl InFlightTask {
    /// Exempts every delivery except the first one, and also the first one while the task waits, within the limit.
    /// `exempt` is the number of all exempt deliveries.
    fn arrange(&mut self, exempt: &mut usize, limit: usize) {
        let mut counted = usize::from(!self.exempt);
        for held in &mut self.deliveries {
            if held.delivery.is_void() {
                continue;
            }
            let is_counted = counted > 0;
            counted -= usize::from(is_counted);
            match (held.exempt, is_counted) {
                (true, true) => {
                    held.delivery.set_exempt(false);
                    *exempt -= 1;
                }
                (false, false) if *exempt < limit => {
                    held.delivery.set_exempt(true);
                    *exempt += 1;
                }
                _ => continue,
            }
            held.exempt = !held.exempt;
        }
    }

    fn is_of(&self, request: &Arc<Request>) -> bool {
        Arc::ptr_eq(&self.request, request)
    }

    fn runs(&self) -> bool {
        matches!(self.phase, Phase::Active(_))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::worker::test_support::ProbeSettlement;
    use celery_protocol::RawMessage;
    use celery_protocol::content::Accept;
    use celery_protocol::message::decode;

    fn request(id: &str, argument: &str) -> Option<Arc<Request>> {
        let headers = json!({"task": "t", "id": id, "lang": "py"});
        let mut raw = RawMessage {
            headers: serde_json::from_value(headers).ok()?,
            body: format!("[[{argument:?}], {{}}, {{}}]").into_bytes(),
            ..RawMessage::default()
        };
        raw.properties.content_type = Some("application/json".into());
        raw.properties.content_encoding = Some("utf-8".into());
        let message = decode(&raw, &Accept::json(1000)).ok()?;
        Some(Arc::new(Request {
            identity: Identity::of(&raw),
            message: Arc::new(message),
            raw,
            exchange: String::new(),
            routing_key: "q".into(),
            queue: "q".into(),
            redelivered: false,
        }))
    }

    /// Accepts a delivery. Returns true if it was the first of its task, and its settlement.
    fn added(in_flight: &InFlight, request: &Arc<Request>) -> (bool, ProbeSettlement) {
        let probe = ProbeSettlement::default();
        let delivery = probe.delivery(request.raw.clone());
        let stop = Cancellation::new(&CancellationToken::new());
        (
            matches!(in_flight.add(request, delivery, &stop), Addition::First),
            probe,
        )
    }

    fn exempt(probes: &[&ProbeSettlement]) -> Vec<bool> {
        probes.iter().map(|probe| probe.is_exempt()).collect()
    }

    const MISSING: &str = "no message";

    #[test]
    fn different_tasks_with_one_id_do_not_join() -> Result<(), &'static str> {
        let in_flight = InFlight::new(10);
        let one = request("a", "one").ok_or(MISSING)?;
        let other = request("a", "other").ok_or(MISSING)?;
        let again = request("a", "one").ok_or(MISSING)?;
        assert!(added(&in_flight, &one).0);
        assert!(added(&in_flight, &other).0);
        assert!(!added(&in_flight, &again).0);
        // These deliveries are settled separately.
        assert_eq!(in_flight.release(&one).len(), 2);
        assert!(in_flight.release(&one).is_empty());
        assert_eq!(in_flight.release(&other).len(), 1);
        Ok(())
    }

    #[test]
    fn message_that_is_sent_again_after_the_run_is_another_task() -> Result<(), &'static str> {
        let in_flight = InFlight::new(10);
        let task = request("a", "").ok_or(MISSING)?;
        let again = request("a", "").ok_or(MISSING)?;
        let mut redelivered = request("a", "").ok_or(MISSING)?;
        Arc::get_mut(&mut redelivered).ok_or(MISSING)?.redelivered = true;
        assert!(added(&in_flight, &task).0);
        in_flight.note_run(&task);
        assert!(!added(&in_flight, &redelivered).0);
        assert!(added(&in_flight, &again).0);
        // Both are in flight, and end separately.
        assert_eq!(in_flight.activities().len(), 2);
        in_flight.enter(&task, Phase::Active(crate::clock::now()));
        assert_eq!(in_flight.active(), 1);
        assert_eq!(in_flight.release(&task).len(), 2);
        assert!(in_flight.release(&task).is_empty());
        assert_eq!(in_flight.release(&again).len(), 1);
        Ok(())
    }

    #[test]
    fn at_most_one_delivery_of_a_task_counts() -> Result<(), &'static str> {
        let in_flight = InFlight::new(10);
        let task = request("a", "").ok_or(MISSING)?;
        let twin = request("a", "").ok_or(MISSING)?;
        let (_, first) = added(&in_flight, &task);
        let (_, second) = added(&in_flight, &twin);
        assert_eq!(exempt(&[&first, &second]), [false, true]);
        in_flight.set_exempt(&task, true);
        let (_, third) = added(&in_flight, &twin);
        assert_eq!(exempt(&[&first, &second, &third]), [true, true, true]);
        // The delivery that joined stays exempt: only one delivery of a task counts.
        in_flight.set_exempt(&twin, false);
        assert_eq!(exempt(&[&first, &second, &third]), [true, true, true]);
        in_flight.set_exempt(&task, false);
        assert_eq!(exempt(&[&first, &second, &third]), [false, true, true]);
        Ok(())
    }

    /// After a lost connection the broker delivers the message again, and the new delivery is exempt like the old one.
    #[test]
    fn redelivery_is_exempt_with_its_task() -> Result<(), &'static str> {
        let in_flight = InFlight::new(1);
        let task = request("a", "").ok_or(MISSING)?;
        let (_, lost) = added(&in_flight, &task);
        in_flight.set_exempt(&task, true);
        lost.lose();
        let (_, again) = added(&in_flight, &task);
        assert_eq!(exempt(&[&again]), [true]);
        in_flight.set_exempt(&task, false);
        assert_eq!(exempt(&[&again]), [false]);
        Ok(())
    }

    #[test]
    fn long_progress_is_shortened() -> Result<(), &'static str> {
        let in_flight = InFlight::new(10);
        let task = request("a", "").ok_or(MISSING)?;
        added(&in_flight, &task);
        for (items, is_cut) in [(2, false), (10_000, true)] {
            let progress = json!({"files": vec!["name"; items]});
            in_flight.note_progress(&task, Arc::new(progress.clone()));
            let shown = in_flight.activities().remove(0).progress();
            let shown = shown.unwrap_or_default();
            assert_eq!(shown != progress, is_cut);
            assert_eq!(
                shown.as_str().is_some_and(|text| text.ends_with("...")),
                is_cut
            );
            assert!(shown.to_string().len() < 2000);
        }
        Ok(())
    }

    #[test]
    fn exemption_is_limited() -> Result<(), &'static str> {
        let in_flight = InFlight::new(2);
        let task = request("a", "").ok_or(MISSING)?;
        let other = request("b", "").ok_or(MISSING)?;
        let (_, first) = added(&in_flight, &task);
        let (_, second) = added(&in_flight, &other);
        for each in [&task, &other] {
            in_flight.set_exempt(each, true);
        }
        let (_, third) = added(&in_flight, &task);
        assert_eq!(exempt(&[&first, &second, &third]), [true, true, false]);
        // Settled deliveries free the limit for others.
        in_flight.release(&other);
        let (_, fourth) = added(&in_flight, &task);
        assert_eq!(exempt(&[&third, &fourth]), [true, false]);
        in_flight.release(&task);
        assert_eq!(in_flight.lock().exempt, 0);
        Ok(())
    }
}
