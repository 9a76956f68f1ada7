//! Consumption of the lists in Redis: task queues, whose messages are recorded until they are settled, and queues of
//! replies.
//!
//! A script takes the messages and records them in one step, so that a message never exists only in a connection. While
//! all lists are empty, the connection waits for a change: Redis remembers the keys that a connection has read (`CLIENT
//! TRACKING`), and reports the first change of each.

use std::collections::HashMap;
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, cmd};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::connecting::Link;
use super::held::{Recorded, Unrecorded};
use super::options::QueueOrder;
use super::scripts::{self, ClaimFrom, FoundEntry, MAX_CLAIM};
use super::shared::{MessageLimits, SharedState, awaits_eta};
use super::supervisor::RedisSession;
use super::window::Window;
use crate::broker::consumer::{DesiredQueues, Feed, Settlement};
use crate::broker::{BrokerError, Delivery, Queue, Subscription};
use crate::liveness::Liveness;
use celery_protocol::virtual_message::{self, Malformed, VirtualMessage};

/// Maximum time between two claims while all lists are empty. It bounds the time until a dead connection is found, and
/// the delay if the server reports no change.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Interval at which bindings are written again. The bindings of a queue that expires may be removed an hour after they
/// were last written.
const BIND_EVERY: Duration = Duration::from_secs(1200);

/// Consumes from the lists of one subscription.
pub(super) struct ListConsumer {
    pub(super) shared: Arc<SharedState>,
    pub(super) feed: Arc<Feed>,
    pub(super) liveness: Liveness,
    pub(super) limits: MessageLimits,
    /// Permits to hold a message, if their number is limited.
    permits: Option<Arc<Semaphore>>,
    /// The consumed queues, the next one to be served first.
    queues: Vec<Consumed>,
    /// Fields of a claim whose messages have not arrived yet: messages may have been recorded under them.
    unanswered: Vec<String>,
    /// Notified when a prefetch window has more room.
    has_room: Arc<Notify>,
    bound_at: Option<Instant>,
}

/// A consumed queue.
struct Consumed {
    queue: Queue,
    window: Arc<Window>,
    /// Cancelled when the queue is no longer consumed.
    leaving: CancellationToken,
    is_bound: bool,
}

/// A message that was claimed and read.
struct Received {
    queue: String,
    /// Field of the entry in the record, if the message is recorded.
    field: Option<String>,
    message: Result<VirtualMessage, Malformed>,
}

/// State after a claim.
enum ClaimOutcome {
    /// There may be more messages.
    More,
    /// No message can be taken until this changes.
    Nothing(Lack),
}

/// Reason why no message can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    /// The lists of all queues are empty.
    Messages,
    /// The same, or the prefetch windows of queues are full.
    MessagesOrRoom,
    /// No permit to hold a message is left.
    Permit,
}

impl Lack {
    fn new(is_full: bool) -> Self {
        match is_full {
            true => Self::MessagesOrRoom,
            false => Self::Messages,
        }
    }
}

impl ListConsumer {
    pub(super) fn new(
        shared: Arc<SharedState>,
        feed: Arc<Feed>,
        liveness: Liveness,
        subscription: &Subscription,
    ) -> Self {
        Self {
            shared,
            feed,
            liveness,
            limits: MessageLimits::from(subscription),
            permits: subscription.permits.clone(),
            queues: Vec::new(),
            unanswered: Vec::new(),
            has_room: Arc::default(),
            bound_at: None,
        }
    }

    /// Starts and stops the consumption of queues, so that it matches `desired`, and writes the bindings.
    async fn reconcile(&mut self, desired: &DesiredQueues) -> Result<(), BrokerError> {
        let lists: Vec<Queue> = desired
            .queues
            .iter()
            .filter(|q| self.serves(q))
            .cloned()
            .collect();
        let is_wanted = |queue: &Queue| lists.iter().any(|desired| desired == queue);
        let (kept, ended): (Vec<_>, Vec<_>) = self
            .queues
            .drain(..)
            .partition(|known| is_wanted(&known.queue));
        self.queues = kept;
        for Consumed { queue, leaving, .. } in ended {
            leaving.cancel();
            if queue.is_transient() {
                self.shared.publisher.remove(&queue).await?;
            }
        }
        for queue in lists {
            if !self.queues.iter().any(|known| known.queue == queue) {
                self.queues.push(Consumed {
                    queue,
                    window: Window::new(self.has_room.clone()),
                    leaving: self.feed.cancelled.child_token(),
                    is_bound: false,
                });
            }
        }
        if self.shared.order == QueueOrder::Sorted {
            self.queues.sort_by(|a, b| a.queue.name.cmp(&b.queue.name));
        }
        if self.bound_at.is_none_or(|at| at.elapsed() >= BIND_EVERY) {
            self.bound_at = Some(Instant::now());
            self.queues
                .iter_mut()
                .for_each(|known| known.is_bound = false);
        }
        for known in self.queues.iter_mut().filter(|known| !known.is_bound) {
            self.shared.publisher.bind(&known.queue).await?;
            known.is_bound = true;
        }
        let names: Vec<_> = self
            .queues
            .iter()
            .map(|known| known.queue.name.clone())
            .collect();
        self.feed.reports.update(|served| {
            served.connected = true;
            served
                .queues
                .retain(|name| desired.queues.iter().any(|queue| queue.name == *name));
            served.queues.extend(names);
        });
        Ok(())
    }

    /// Claims messages once, and forwards them.
    async fn claim(&mut self, link: &mut Link, prefetch: u16) -> Result<ClaimOutcome, BrokerError> {
        let from: Vec<ClaimFrom> = self
            .queues
            .iter()
            .map(|known| ClaimFrom {
                queue: known.queue.name.clone(),
                room: known.window.room(prefetch).min(MAX_CLAIM),
                is_recorded: !known.queue.is_transient(),
            })
            .filter(|from| from.room > 0)
            .collect();
        let is_full = from.len() < self.queues.len();
        if from.is_empty() {
            return Ok(ClaimOutcome::Nothing(Lack::new(is_full)));
        }
        let room: usize = from.iter().map(|from| from.room).sum();
        let most = room.min(MAX_CLAIM);
        let (most, permits) = match &self.permits {
            None => (most, None),
            Some(permits) => match take_permits(permits, most) {
                None => return Ok(ClaimOutcome::Nothing(Lack::Permit)),
                Some(free) => (free.num_permits(), Some(free)),
            },
        };
        let (claimed, is_drained) = self.claim_from(link, &from, most).await?;
        let mut rooms: HashMap<&str, usize> = from
            .iter()
            .map(|from| (from.queue.as_str(), from.room))
            .collect();
        for one in &claimed {
            if let Some(room) = rooms.get_mut(one.queue.as_str()) {
                *room -= 1;
            }
        }
        if self.shared.order == QueueOrder::RoundRobin
            && let Some(last) = claimed.last()
        {
            let is_last = |known: &Consumed| known.queue.name == last.queue;
            let next = self.queues.iter().position(is_last);
            self.queues.rotate_left(next.map_or(0, |served| served + 1));
        }
        self.forward_all(claimed, permits).await;
        if !is_drained {
            return Ok(ClaimOutcome::More);
        }
        rooms.retain(|_, room| *room > 0);
        let is_full = is_full || rooms.len() < from.len();
        let drained = rooms.into_keys();
        let watched = self.watch(&mut link.connection, drained).await;
        match watched.map_err(|e| self.shared.connector.error(e, "to wait for messages"))? {
            true => Ok(ClaimOutcome::More),
            false => Ok(ClaimOutcome::Nothing(Lack::new(is_full))),
        }
    }

    /// Claims up to `most` messages. Also returns true if the lists may be empty now.
    async fn claim_from(
        &mut self,
        link: &mut Link,
        from: &[ClaimFrom],
        most: usize,
    ) -> Result<(Vec<Received>, bool), BrokerError> {
        // The fields are chosen before the claim: if its reply is lost, the messages can be found by their fields.
        self.unanswered = (0..most).map(|_| Uuid::new_v4().to_string()).collect();
        let claimed = scripts::claim(
            &mut link.connection,
            &self.shared.names,
            from,
            self.shared.order == QueueOrder::RoundRobin,
            self.limits,
            &self.unanswered,
        )
        .await;
        let claimed = claimed.map_err(|e| self.shared.connector.error(e, "to take messages"))?;
        if claimed.parked > 0 {
            let queues: Vec<_> = from.iter().map(|from| from.queue.as_str()).collect();
            tracing::error!(
                queues = queues.join(", "),
                messages = claimed.parked,
                "elements of queues are not messages; they are moved to the queue's list of parked elements"
            );
        }
        let is_drained = claimed.messages.len() < most && claimed.parked == 0;
        let mut received = Vec::with_capacity(claimed.messages.len());
        for (one, field) in claimed.messages.into_iter().zip(&self.unanswered) {
            let Some(from) = from.get(one.queue) else {
                break;
            };
            let field = from.is_recorded.then_some(field.as_str());
            let message = self.read(link, &from.queue, field, one.text, one.omitted);
            received.push(Received {
                queue: from.queue.clone(),
                field: field.map(str::to_owned),
                message: message.await?,
            });
        }
        self.unanswered.clear();
        Ok((received, is_drained))
    }

    /// Asks the server to report the next change of the lists. Returns true if one of them is not empty.
    async fn watch(
        &self,
        connection: &mut MultiplexedConnection,
        queues: impl Iterator<Item = &str>,
    ) -> RedisResult<bool> {
        let mut exists = cmd("EXISTS");
        for queue in queues {
            exists.arg(self.shared.names.lists(queue).collect::<Vec<_>>());
        }
        let count: usize = exists.query_async(connection).await?;
        Ok(count > 0)
    }

    /// Reads a claimed message. Its body is fetched if it is not in the text, because the task had an eta, which has been
    /// reached.
    async fn read(
        &self,
        link: &mut Link,
        queue: &str,
        field: Option<&str>,
        text: Vec<u8>,
        omitted: Option<usize>,
    ) -> Result<Result<VirtualMessage, Malformed>, BrokerError> {
        let max_body = self.limits.max_body;
        let Some(size) = omitted else {
            return Ok(virtual_message::decode(&text, max_body));
        };
        let mut message = match virtual_message::decode(&text, max_body) {
            Ok(message) => message,
            Err(error) => return Ok(Err(error)),
        };
        if let Some(field) = field
            && size <= max_body
            && !awaits_eta(&message.message)
        {
            let names = &self.shared.names;
            let whole = scripts::text(&mut link.connection, names, field, queue).await;
            let whole = whole.map_err(|e| self.shared.connector.error(e, "to read a message"))?;
            if let Some(whole) = whole {
                return Ok(virtual_message::decode(&whole, max_body));
            }
        }
        message.message.body = Vec::new();
        message.omitted_body = Some(size);
        Ok(Ok(message))
    }

    /// Forwards claimed messages, each with a permit if there are any.
    async fn forward_all(
        &self,
        received: Vec<Received>,
        mut permits: Option<OwnedSemaphorePermit>,
    ) {
        for one in received {
            let permit = permits.as_mut().and_then(|permits| permits.split(1));
            self.forward(one, permit).await;
        }
    }

    /// Forwards a claimed message, or parks it.
    async fn forward(&self, received: Received, permit: Option<OwnedSemaphorePermit>) {
        let Received {
            queue,
            field,
            message,
        } = received;
        let Some(known) = self.queues.iter().find(|known| known.queue.name == queue) else {
            return;
        };
        let slot = known.window.take();
        let held = &self.shared.held;
        let entry = field.map(|field| held.add(field, queue.clone()));
        match (message, entry) {
            (Ok(message), entry) => {
                let settlement: Box<dyn Settlement> = match entry {
                    None => Box::new(Unrecorded { slot }),
                    Some(entry) => Box::new(Recorded {
                        held: held.clone(),
                        entry,
                        slot,
                        leaving: known.leaving.clone(),
                    }),
                };
                let mut delivery = self.limits.delivery(message, &queue, settlement);
                delivery.permit = permit;
                self.send(delivery).await;
            }
            (Err(error), entry) => {
                tracing::error!(
                    queue,
                    %error,
                    "an element of a queue is not a message; it is moved to the queue's list of parked elements"
                );
                if let Some(entry) = entry {
                    held.park(entry, slot);
                }
            }
        }
    }

    /// Sends a delivery to the consumer. Dropping it, if the subscription ends, returns it to its queue.
    async fn send(&self, delivery: Delivery) {
        tokio::select! {
            biased;
            () = self.feed.cancelled.cancelled() => {}
            _ = self.feed.deliveries.send(delivery) => {}
        }
    }

    /// Forwards the messages of a claim whose reply was lost.
    async fn recover(&mut self, link: &mut Link) -> Result<(), BrokerError> {
        if self.unanswered.is_empty() {
            return Ok(());
        }
        let (names, fields) = (&self.shared.names, &self.unanswered);
        let found = scripts::find(&mut link.connection, names, self.limits, fields).await;
        let found = found.map_err(|e| self.shared.connector.error(e, "to find messages"))?;
        let mut received = Vec::new();
        for (field, FoundEntry { entry, omitted }) in self.unanswered.iter().zip(found) {
            if let Ok(held) = virtual_message::held(&entry) {
                let (queue, text) = (held.routing_key, held.text.into_bytes());
                let message = self.read(link, &queue, Some(field), text, omitted).await?;
                received.push(Received {
                    queue,
                    field: Some(field.clone()),
                    message,
                });
            }
        }
        self.unanswered.clear();
        let free = self
            .permits
            .as_ref()
            .map(|permits| take_permits(permits, received.len()));
        self.forward_all(received, free.flatten()).await;
        Ok(())
    }

    /// Waits until a list may have changed, or there may be more of what is lacking, or the desired state has changed, but
    /// at most until the time `until`.
    async fn wait(
        &self,
        link: &mut Link,
        desired: &mut watch::Receiver<DesiredQueues>,
        lack: Lack,
        until: Instant,
    ) -> Result<(), BrokerError> {
        let permit_is_left = async {
            if let (Lack::Permit, Some(permits)) = (lack, &self.permits) {
                // Only a closed semaphore returns an error, and this one is never closed.
                drop(permits.acquire().await);
                return;
            }
            pending().await
        };
        let mut permit_is_left = pin!(permit_is_left);
        loop {
            self.liveness.tick();
            let tick = (Instant::now() + crate::liveness::EVERY).min(until);
            tokio::select! {
                biased;
                () = self.feed.cancelled.cancelled() => return Ok(()),
                changed = desired.changed() => {
                    desired.mark_changed();
                    // An error means that the consumer is gone; it has cancelled the subscription.
                    if changed.is_err() {
                        self.feed.cancelled.cancelled().await;
                    }
                    return Ok(());
                }
                () = self.has_room.notified(), if lack == Lack::MessagesOrRoom => return Ok(()),
                () = &mut permit_is_left => return Ok(()),
                push = link.next() => return match push {
                    Some(_) => Ok(()),
                    None => Err(self.shared.connector.lost("the connection is closed")),
                },
                () = sleep_until(tick) => {
                    if tick == until {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// Takes up to `most` permits. None if there is none.
fn take_permits(permits: &Arc<Semaphore>, most: usize) -> Option<OwnedSemaphorePermit> {
    let free = u32::try_from(permits.available_permits().min(most)).unwrap_or(u32::MAX);
    let taken = permits.clone().try_acquire_many_owned(free).ok();
    taken.filter(|_| free > 0)
}

impl RedisSession for ListConsumer {
    fn serves(&self, queue: &Queue) -> bool {
        !self.shared.publisher.is_broadcast(queue)
    }

    async fn serve(&mut self, mut link: Link) -> Result<(), BrokerError> {
        let tracking: RedisResult<()> = cmd("CLIENT")
            .arg("TRACKING")
            .arg("ON")
            .arg("NOLOOP")
            .query_async(&mut link.connection)
            .await;
        let is_tracking = tracking.is_ok();
        if let Err(error) = tracking {
            tracing::debug!(%error, "server does not report changes; its lists are read every second");
        }
        self.queues
            .iter_mut()
            .for_each(|known| known.is_bound = false);
        let mut desired = self.feed.reports.desired();
        let mut current = desired.borrow_and_update().clone();
        self.reconcile(&current).await?;
        self.recover(&mut link).await?;
        loop {
            self.liveness.tick();
            panic_point!(QueueConsumer);
            if self.feed.cancelled.is_cancelled() {
                return Ok(());
            }
            let is_stale = self.bound_at.is_none_or(|at| at.elapsed() >= BIND_EVERY);
            if desired.has_changed().unwrap_or(false) || is_stale {
                current = desired.borrow_and_update().clone();
                self.reconcile(&current).await?;
            }
            if !link.drain() {
                return Err(self.shared.connector.lost("the connection is closed"));
            }
            if let ClaimOutcome::Nothing(lack) = self.claim(&mut link, current.prefetch).await? {
                let pause = match is_tracking {
                    true => LOOK_EVERY,
                    false => crate::liveness::EVERY,
                };
                let until = Instant::now() + pause;
                self.wait(&mut link, &mut desired, lack, until).await?;
            }
        }
    }

    async fn finish(&mut self) {
        for Consumed { queue, .. } in std::mem::take(&mut self.queues) {
            if queue.is_transient()
                && let Err(error) = self.shared.publisher.remove(&queue).await
            {
                tracing::debug!(queue = queue.name, %error, "a queue of this process was not removed; it expires");
            }
        }
    }
}
