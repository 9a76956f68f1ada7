//! A broker in the memory of the process, for tests and examples.
//!
//! It routes as AMQP does (default, direct, fanout and topic exchanges), keeps the prefetch limit,
//! takes back what is not acknowledged, and marks it as redelivered. Nothing expires, nothing is
//! delayed, and everything is gone with the process.

mod queues;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use self::queues::{Stored, Topology};
use super::consumer::{Feed, Settled};
use super::{
    Broker, BrokerError, Consumer, Delivery, Disposition, Publication, Queue, QueueDepth,
    Settlement, Subscription,
};
use celery_protocol::RawMessage;

/// Scheme of the URL.
const SCHEME: &str = "memory://";

/// Brokers that have a name, so that a worker and a client find each other by URL.
static NAMED: LazyLock<Mutex<HashMap<String, MemoryBroker>>> = LazyLock::new(Mutex::default);

/// A [`Broker`] within the process. Clones are the same broker.
///
/// ```
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// use celery_protocol::canvas::Signature;
/// use celery_worker::broker::memory::MemoryBroker;
/// use celery_worker::client::{Client, ClientOptions};
/// use celery_worker::results::memory::MemoryResults;
///
/// let broker = MemoryBroker::new();
/// let client = Client::new(broker.clone(), MemoryResults::new(), ClientOptions::default());
/// client.send(Signature::new("tasks.add").args((2, 3)).queue("fast")).await?;
/// assert_eq!(broker.messages("fast")[0].headers["task"], "tasks.add");
/// # Ok::<(), celery_worker::client::SendError>(())
/// # }).unwrap();
/// ```
#[derive(Debug, Clone, Default)]
pub struct MemoryBroker {
    shared: Arc<Shared>,
    closing: CancellationToken,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<Topology>,
    changed: Notify,
    /// All publications, where a test asked for them.
    recorded: Option<Mutex<Vec<Publication>>>,
}

impl MemoryBroker {
    /// Creates a broker without queues.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a broker that keeps each publication for [`MemoryBroker::take_recorded`], also one that no queue gets.
    #[must_use]
    pub fn recording() -> Self {
        Self {
            shared: Arc::new(Shared {
                recorded: Some(Mutex::default()),
                ..Shared::default()
            }),
            ..Self::default()
        }
    }

    /// Takes what was published since the last call, in order; nothing without [`MemoryBroker::recording`].
    #[must_use]
    pub fn take_recorded(&self) -> Vec<Publication> {
        let recorded = self.shared.recorded.as_ref();
        recorded
            .map(|recorded| {
                std::mem::take(&mut *recorded.lock().unwrap_or_else(PoisonError::into_inner))
            })
            .unwrap_or_default()
    }

    /// The broker of a `memory://` URL: the same one for each use of the same URL. Each returned value
    /// is closed by itself.
    ///
    /// # Errors
    /// [`BrokerError::Url`] for a URL with another scheme.
    pub fn named(url: &str) -> Result<Self, BrokerError> {
        if !url.starts_with(SCHEME) {
            return Err(BrokerError::Url(format!("it does not begin with {SCHEME}")));
        }
        let mut named = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
        let broker = named.entry(url.to_owned()).or_default();
        Ok(Self {
            shared: broker.shared.clone(),
            closing: CancellationToken::new(),
        })
    }

    /// The messages that wait in a queue, oldest first. Those that a consumer holds are not among
    /// them.
    #[must_use]
    pub fn messages(&self, queue: &str) -> Vec<RawMessage> {
        let state = self.shared.lock();
        let waiting = state.queues.get(queue).map(|queue| queue.messages.iter());
        waiting
            .into_iter()
            .flatten()
            .map(|stored| stored.message.clone())
            .collect()
    }

    /// Declares a queue with its exchange and binding.
    pub fn declare(&self, queue: &Queue) {
        self.shared.lock().declare(queue);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Topology> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a message back to the front of its queue.
    fn requeue(&self, queue: &str, mut stored: Stored) {
        stored.redelivered = true;
        if let Some(queue) = self.lock().queues.get_mut(queue) {
            queue.messages.push_front(stored);
        }
    }
}

/// Settles one delivery.
struct InMemory {
    shared: Arc<Shared>,
    queue: String,
    stored: Stored,
    /// Deliveries that count against the prefetch limit of the queue.
    held: Arc<AtomicUsize>,
    exempt: AtomicBool,
}

impl Settlement for InMemory {
    fn settle(self: Box<Self>, disposition: Disposition) -> Settled {
        if !self.exempt.load(Ordering::SeqCst) {
            self.held.fetch_sub(1, Ordering::SeqCst);
        }
        if disposition == Disposition::Requeue {
            self.shared.requeue(&self.queue, self.stored);
        }
        self.shared.changed.notify_waiters();
        let (settled, receiver) = oneshot::channel();
        // The receiver is right here.
        let _ = settled.send(());
        receiver
    }

    fn is_void(&self) -> bool {
        false
    }

    fn set_exempt(&self, exempt: bool) {
        if self.exempt.swap(exempt, Ordering::SeqCst) != exempt {
            match exempt {
                true => self.held.fetch_sub(1, Ordering::SeqCst),
                false => self.held.fetch_add(1, Ordering::SeqCst),
            };
            self.shared.changed.notify_waiters();
        }
    }
}

/// One subscription.
struct MemorySubscription {
    shared: Arc<Shared>,
    feed: Feed,
    closing: CancellationToken,
    /// Deliveries of each queue that are held, without exempt ones.
    held: HashMap<String, Arc<AtomicUsize>>,
    /// The queue that was served last.
    turn: usize,
}

impl MemorySubscription {
    async fn run(mut self) {
        let mut desired = self.feed.reports.desired();
        let mut consumed: Vec<Queue> = Vec::new();
        let shared = self.shared.clone();
        let mut is_first = true;
        loop {
            let changed = shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let now = desired.borrow_and_update().clone();
            if now.queues != consumed || std::mem::take(&mut is_first) {
                self.consume(&consumed, &now.queues);
                consumed = now.queues;
            }
            let delivery = self.next(&consumed, now.prefetch);
            let is_idle = delivery.is_none();
            tokio::select! {
                biased;
                () = self.feed.cancelled.cancelled() => break,
                () = self.closing.cancelled() => break,
                true = hand_over(&self.feed, delivery) => {}
                () = &mut changed, if is_idle => {}
                Ok(()) = desired.changed(), if is_idle => {}
                else => break,
            }
        }
        let names: Vec<String> = consumed.iter().map(|queue| queue.name.clone()).collect();
        let mut state = self.shared.lock();
        state.count_consumers(&names, |count| *count = count.saturating_sub(1));
        for queue in consumed.iter().filter(|queue| queue.is_transient()) {
            state.queues.remove(&queue.name);
            state.bindings.retain(|bound| bound.queue != queue.name);
        }
    }

    /// Declares and reports what is consumed from now on.
    fn consume(&self, before: &[Queue], now: &[Queue]) {
        let names = |queues: &[Queue]| -> Vec<String> {
            queues.iter().map(|queue| queue.name.clone()).collect()
        };
        let mut state = self.shared.lock();
        state.count_consumers(&names(before), |count| *count = count.saturating_sub(1));
        now.iter().for_each(|queue| state.declare(queue));
        state.count_consumers(&names(now), |count| *count += 1);
        drop(state);
        self.feed.reports.update(|served| {
            served.connected = true;
            served.queues = names(now).into_iter().collect();
        });
    }

    /// The next message of a queue below its limit; the queues take turns.
    fn next(&mut self, queues: &[Queue], prefetch: u16) -> Option<Delivery> {
        let mut state = self.shared.lock();
        for offset in 0..queues.len() {
            let turn = (self.turn + offset) % queues.len();
            let name = &queues[turn].name;
            let held = self.held.entry(name.clone()).or_default();
            if prefetch > 0 && held.load(Ordering::SeqCst) >= usize::from(prefetch) {
                continue;
            }
            let waiting = state.queues.get_mut(name);
            let Some(stored) = waiting.and_then(|queue| queue.messages.pop_front()) else {
                continue;
            };
            held.fetch_add(1, Ordering::SeqCst);
            self.turn = turn + 1;
            let way = (stored.exchange.clone(), stored.routing_key.clone());
            let settlement = InMemory {
                shared: self.shared.clone(),
                queue: name.clone(),
                stored: stored.clone(),
                held: held.clone(),
                exempt: AtomicBool::new(false),
            };
            let settlement = Box::new(settlement);
            let mut delivery = Delivery::new(stored.message, name.clone(), way, settlement);
            delivery.redelivered = stored.redelivered;
            return Some(delivery);
        }
        None
    }
}

/// Waits for ever without a delivery. False if the consumer is gone.
async fn hand_over(feed: &Feed, delivery: Option<Delivery>) -> bool {
    match delivery {
        Some(delivery) => feed.deliveries.send(delivery).await.is_ok(),
        None => std::future::pending().await,
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    fn transport(&self) -> &'static str {
        "memory"
    }

    fn masked_url(&self) -> String {
        SCHEME.into()
    }

    async fn publish(&self, publication: &Publication, _: Duration) -> Result<(), BrokerError> {
        if let Some(recorded) = &self.shared.recorded {
            let mut recorded = recorded.lock().unwrap_or_else(PoisonError::into_inner);
            recorded.push(publication.clone());
        }
        self.shared.lock().publish(publication)?;
        self.shared.changed.notify_waiters();
        Ok(())
    }

    async fn publish_until_confirmed(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        self.publish(publication, within).await
    }

    async fn prepare(&self, _: Duration) -> Result<(), BrokerError> {
        Ok(())
    }

    fn consume(&self, subscription: Subscription) -> Consumer {
        let (feed, consumer) = Feed::new(&subscription, CancellationToken::new());
        let subscription = MemorySubscription {
            shared: self.shared.clone(),
            feed,
            closing: self.closing.clone(),
            held: HashMap::new(),
            turn: 0,
        };
        tokio::spawn(subscription.run());
        consumer
    }

    async fn survey(&self, queues: &[String]) -> Result<Vec<QueueDepth>, BrokerError> {
        let state = self.shared.lock();
        let depth = |name: &String| {
            let queue = state.queues.get(name)?;
            Some(QueueDepth {
                queue: name.clone(),
                messages: u32::try_from(queue.messages.len()).unwrap_or(u32::MAX),
                consumers: Some(queue.consumers),
            })
        };
        Ok(queues.iter().filter_map(depth).collect())
    }

    async fn close(&self) {
        self.closing.cancel();
    }
}
