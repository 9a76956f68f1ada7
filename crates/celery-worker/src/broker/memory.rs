//! A broker in the memory of the process, for tests and examples.
//!
//! It routes as AMQP does (default, direct, fanout and topic exchanges), keeps the prefetch limit,
//! takes back what is not acknowledged, and marks it as redelivered. Nothing expires, nothing is
//! delayed, and everything is gone with the process.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use super::consumer::{Feed, Settled};
use super::topology::TopologyStep;
use super::{
    Broker, BrokerError, Consumer, Delivery, Disposition, Exchange, ExchangeKind, Publication,
    Queue, QueueDepth, Settlement, Subscription,
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
}

#[derive(Debug, Default)]
struct Topology {
    exchanges: HashMap<String, ExchangeKind>,
    bindings: HashSet<Bound>,
    queues: HashMap<String, Waiting>,
}

/// A queue that is bound to an exchange.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Bound {
    exchange: String,
    key: String,
    queue: String,
}

/// The messages of a queue.
#[derive(Debug, Default)]
struct Waiting {
    messages: VecDeque<Stored>,
    consumers: u32,
}

#[derive(Debug, Clone)]
struct Stored {
    message: RawMessage,
    exchange: String,
    routing_key: String,
    redelivered: bool,
}

impl MemoryBroker {
    /// Creates a broker without queues.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
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

impl Topology {
    fn declare_exchange(&mut self, exchange: &Exchange) {
        self.exchanges
            .entry(exchange.name.clone())
            .or_insert(exchange.kind);
    }

    fn declare(&mut self, queue: &Queue) {
        if let Some(binding) = &queue.binding {
            self.declare_exchange(&binding.exchange);
            self.bindings.insert(Bound {
                exchange: binding.exchange.name.clone(),
                key: binding.key.clone(),
                queue: queue.name.clone(),
            });
        }
        self.queues.entry(queue.name.clone()).or_default();
    }

    fn take_step(&mut self, step: TopologyStep) {
        match step {
            TopologyStep::Exchange(exchange) => self.declare_exchange(&exchange),
            TopologyStep::Queue(queue) => self.declare(&queue),
            TopologyStep::BindQueue {
                source,
                destination,
                key,
            } => {
                self.bindings.insert(Bound {
                    exchange: source,
                    key,
                    queue: destination,
                });
            }
            // Only native delayed delivery has such, which is not here.
            TopologyStep::BindExchange { .. } => {}
        }
    }

    /// Names of the queues that get a message.
    fn route(&self, exchange: &str, routing_key: &str) -> HashSet<String> {
        if exchange.is_empty() {
            let queue = self.queues.contains_key(routing_key);
            return queue.then(|| routing_key.to_owned()).into_iter().collect();
        }
        let Some(kind) = self.exchanges.get(exchange) else {
            return HashSet::new();
        };
        let takes = |bound: &&Bound| {
            bound.exchange == exchange
                && match kind {
                    ExchangeKind::Direct => bound.key == routing_key,
                    ExchangeKind::Topic => matches(&bound.key, routing_key),
                    _ => true,
                }
        };
        let bound = self.bindings.iter().filter(takes);
        bound.map(|bound| bound.queue.clone()).collect()
    }

    fn publish(&mut self, publication: &Publication) -> Result<(), BrokerError> {
        for step in publication
            .declare
            .iter()
            .flat_map(|declare| declare.steps())
        {
            self.take_step(step);
        }
        let (exchange, routing_key) = (&publication.exchange, &publication.routing_key);
        let queues = self.route(exchange, routing_key);
        if queues.is_empty() && publication.mandatory {
            return Err(BrokerError::Unroutable {
                exchange: exchange.clone(),
                routing_key: routing_key.clone(),
            });
        }
        for name in queues {
            if let Some(queue) = self.queues.get_mut(&name) {
                queue.messages.push_back(Stored {
                    message: publication.message.clone(),
                    exchange: exchange.clone(),
                    routing_key: routing_key.clone(),
                    redelivered: false,
                });
            }
        }
        Ok(())
    }

    fn count_consumers(&mut self, queues: &[String], change: impl Fn(&mut u32)) {
        for name in queues {
            if let Some(queue) = self.queues.get_mut(name) {
                change(&mut queue.consumers);
            }
        }
    }
}

/// Matches a routing key against a topic pattern: `*` is one word, `#` any number of them.
fn matches(pattern: &str, routing_key: &str) -> bool {
    fn words(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), None) => words(rest, key),
            (Some((&"#", rest)), Some((_, after))) => words(rest, key) || words(pattern, after),
            (Some((word, rest)), Some((own, after))) => {
                (*word == "*" || word == own) && words(rest, after)
            }
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.split('.').collect();
    let key: Vec<&str> = routing_key.split('.').collect();
    words(&pattern, &key)
}

/// Settles one delivery.
struct InMemory {
    shared: Arc<Shared>,
    queue: String,
    stored: Stored,
    /// Deliveries that count against the prefetch limit of the queue.
    held: Arc<AtomicUsize>,
    parked: AtomicBool,
}

impl Settlement for InMemory {
    fn settle(self: Box<Self>, disposition: Disposition) -> Settled {
        if !self.parked.load(Ordering::SeqCst) {
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

    fn park(&self, parked: bool) {
        if self.parked.swap(parked, Ordering::SeqCst) != parked {
            match parked {
                true => self.held.fetch_sub(1, Ordering::SeqCst),
                false => self.held.fetch_add(1, Ordering::SeqCst),
            };
            self.shared.changed.notify_waiters();
        }
    }
}

/// One subscription.
struct Serving {
    shared: Arc<Shared>,
    feed: Feed,
    closing: CancellationToken,
    /// Deliveries of each queue that are held, parked ones aside.
    held: HashMap<String, Arc<AtomicUsize>>,
    /// The queue that was served last.
    turn: usize,
}

impl Serving {
    async fn run(mut self) {
        let mut wanted = self.feed.reports.wanted();
        let mut consumed: Vec<Queue> = Vec::new();
        let shared = self.shared.clone();
        let mut is_first = true;
        loop {
            let changed = shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let now = wanted.borrow_and_update().clone();
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
                Ok(()) = wanted.changed(), if is_idle => {}
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
                parked: AtomicBool::new(false),
            };
            return Some(Delivery::new(
                stored.message,
                name.clone(),
                way,
                stored.redelivered,
                Box::new(settlement),
            ));
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
    fn masked_url(&self) -> String {
        SCHEME.into()
    }

    async fn publish(&self, publication: &Publication, _: Duration) -> Result<(), BrokerError> {
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
        let serving = Serving {
            shared: self.shared.clone(),
            feed,
            closing: self.closing.clone(),
            held: HashMap::new(),
            turn: 0,
        };
        tokio::spawn(serving.run());
        consumer
    }

    async fn survey(&self, queues: &[String]) -> Result<Vec<QueueDepth>, BrokerError> {
        let state = self.shared.lock();
        let depth = |name: &String| {
            let queue = state.queues.get(name)?;
            Some(QueueDepth {
                queue: name.clone(),
                messages: u32::try_from(queue.messages.len()).unwrap_or(u32::MAX),
                consumers: queue.consumers,
            })
        };
        Ok(queues.iter().filter_map(depth).collect())
    }

    async fn close(&self) {
        self.closing.cancel();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::broker::{Binding, Declaration};

    const SHORTLY: Duration = Duration::from_millis(50);

    fn to(exchange: &str, routing_key: &str, body: &str) -> Publication {
        Publication {
            exchange: exchange.into(),
            routing_key: routing_key.into(),
            message: RawMessage {
                body: body.into(),
                ..RawMessage::default()
            },
            declare: None,
            mandatory: true,
        }
    }

    fn bound(name: &str, kind: ExchangeKind, exchange: &str, key: &str) -> Queue {
        Queue {
            binding: Some(Binding {
                exchange: Exchange::durable(exchange, kind),
                key: key.into(),
            }),
            ..Queue::tasks(name)
        }
    }

    fn subscription(queues: &[&str], prefetch: u16) -> Subscription {
        Subscription {
            purpose: "tests",
            queues: queues.iter().map(|name| Queue::tasks(*name)).collect(),
            prefetch,
            delayed: None,
            max_body_bytes: None,
            max_waiting_body_bytes: None,
        }
    }

    async fn publish(broker: &MemoryBroker, publication: Publication) -> Result<(), BrokerError> {
        broker.publish(&publication, SHORTLY).await
    }

    #[tokio::test]
    async fn exchanges_route_as_those_of_amqp() {
        let broker = MemoryBroker::new();
        broker.declare(&bound("direct", ExchangeKind::Direct, "d", "key"));
        broker.declare(&bound("all", ExchangeKind::Fanout, "f", ""));
        broker.declare(&bound("tasks", ExchangeKind::Topic, "t", "task.#"));
        broker.declare(&bound("one", ExchangeKind::Topic, "t", "*.*"));
        for (exchange, key) in [
            ("d", "key"),
            ("f", "any"),
            ("t", "task"),
            ("t", "task.sent"),
        ] {
            publish(&broker, to(exchange, key, key)).await.unwrap();
        }
        publish(&broker, to("", "direct", "by name")).await.unwrap();
        let bodies = |queue: &str| -> Vec<String> {
            let messages = broker.messages(queue).into_iter();
            messages
                .map(|message| String::from_utf8(message.body).unwrap())
                .collect()
        };
        assert_eq!(bodies("direct"), ["key", "by name"]);
        assert_eq!(bodies("all"), ["any"]);
        assert_eq!(bodies("tasks"), ["task", "task.sent"]);
        assert_eq!(bodies("one"), ["task.sent"]);
        for (exchange, key) in [("d", "other"), ("", "missing"), ("missing", "key")] {
            let refused = publish(&broker, to(exchange, key, "")).await;
            assert!(matches!(refused, Err(BrokerError::Unroutable { .. })));
        }
        let declared = Publication {
            declare: Some(Declaration::Queue(Queue::tasks("new"))),
            ..to("", "new", "x")
        };
        publish(&broker, declared).await.unwrap();
        assert_eq!(bodies("new"), ["x"]);
    }

    #[tokio::test]
    async fn prefetch_limits_what_is_held_and_parked_messages_do_not_count() {
        let broker = MemoryBroker::new();
        let mut consumer = broker.consume(subscription(&["q"], 1));
        broker.declare(&Queue::tasks("q"));
        for body in ["a", "b", "c"] {
            publish(&broker, to("", "q", body)).await.unwrap();
        }
        let first = consumer.next().await.unwrap();
        assert!(timeout(SHORTLY, consumer.next()).await.is_err());
        first.park();
        let second = consumer.next().await.unwrap();
        assert!(timeout(SHORTLY, consumer.next()).await.is_err());
        second.settle(Disposition::Ack).await;
        let third = consumer.next().await.unwrap();
        assert_eq!(third.message.body, b"c");
        // The parked one is given back when it is dropped, in front of the queue.
        third.settle(Disposition::Reject).await;
        drop(first);
        let again = consumer.next().await.unwrap();
        assert!(again.redelivered && again.message.body == b"a");
        again.settle(Disposition::Ack).await;
        assert!(broker.messages("q").is_empty());
    }

    #[tokio::test]
    async fn named_brokers_are_shared_and_closed_each() {
        let url = "memory://named_brokers_are_shared";
        let (worker, client) = (
            MemoryBroker::named(url).unwrap(),
            MemoryBroker::named(url).unwrap(),
        );
        let mut consumer = worker.consume(subscription(&["q"], 0));
        client.declare(&Queue::tasks("q"));
        publish(&client, to("", "q", "a")).await.unwrap();
        let held = consumer.next().await.unwrap();
        client.close().await;
        publish(&client, to("", "q", "b")).await.unwrap();
        let second = consumer.next().await.unwrap();
        assert_eq!(second.message.body, b"b");
        second.settle(Disposition::Ack).await;
        worker.close().await;
        drop(held);
        assert!(timeout(SHORTLY, consumer.next()).await.unwrap().is_none());
        // What was not acknowledged is there for the next consumer.
        assert_eq!(client.messages("q").len(), 1);
        assert!(MemoryBroker::named("redis://x").is_err());
    }

    #[tokio::test]
    async fn survey_counts_messages_and_consumers() {
        let broker = MemoryBroker::new();
        let consumer = broker.consume(subscription(&["q"], 0));
        let mut connected = consumer.connected();
        connected.wait_for(|served| *served).await.unwrap();
        consumer.handle().add(Queue::tasks("other")).await;
        broker.declare(&Queue::tasks("idle"));
        publish(&broker, to("", "idle", "x")).await.unwrap();
        let names = ["q", "other", "idle", "missing"].map(str::to_owned);
        let depths = broker.survey(&names).await.unwrap();
        let counts: Vec<_> = depths
            .iter()
            .map(|depth| (depth.queue.as_str(), depth.messages, depth.consumers))
            .collect();
        assert_eq!(counts, [("q", 0, 1), ("other", 0, 1), ("idle", 1, 0)]);
    }
}
