//! Results of a subscription: deliveries, and a handle to change the subscribed queues.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, OnceLock};

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{BrokerError, Queue, Subscription};
use celery_protocol::RawMessage;

/// Capacity of the channel between the broker and the worker: with a single slot, each delivery would wake both sides.
const HANDED_OVER: usize = 32;

/// The broker's handling of a delivery at its end: removed, dead-lettered or requeued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Acknowledged: the message is removed from the queue.
    Ack,
    /// Rejected: the message goes to the dead-letter exchange, if the queue has one.
    Reject,
    /// Requeued, for this or another worker.
    Requeue,
}

/// Resolves once the disposition was sent. An error means that it could not be sent: the broker delivers the message
/// again.
pub type Settled = oneshot::Receiver<()>;

/// The broker's handle to settle one delivery.
pub trait Settlement: Send + Sync {
    /// Settles the delivery, even if the returned receiver is dropped. The implementation logs a failure with
    /// [`not_settled`].
    fn settle(self: Box<Self>, disposition: Disposition) -> Settled;

    /// Returns true if the broker has requeued the delivery because its connection has ended.
    fn is_void(&self) -> bool;

    /// Sets whether the delivery is exempt from the prefetch limit, so that it does not count against it.
    fn set_exempt(&self, is_exempt: bool);
}

/// Changes that a broker made to a message in order to read it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// Bytes that are not UTF-8 became question marks: in names, in properties, in the exchange or the routing key.
    pub is_not_utf8: bool,
    /// Header values that were nested too deeply became bytes.
    pub is_too_deep: bool,
    /// Reason why the message's properties and body were omitted.
    pub unreadable: Option<&'static str>,
    /// Size of a body that was omitted because of its size.
    pub body_bytes: Option<u64>,
    /// True if the body was omitted because the task's eta has not been reached.
    pub awaits_eta: bool,
}

impl Damage {
    /// Merges these changes with earlier ones.
    #[must_use]
    pub fn and(self, before: Self) -> Self {
        Self {
            is_not_utf8: self.is_not_utf8 || before.is_not_utf8,
            is_too_deep: self.is_too_deep || before.is_too_deep,
            unreadable: self.unreadable.or(before.unreadable),
            body_bytes: self.body_bytes.or(before.body_bytes),
            awaits_eta: self.awaits_eta || before.awaits_eta,
        }
    }
}

/// A received message, which must be settled once.
///
/// A delivery that is dropped without being settled is requeued, so that no path through a worker can lose it.
pub struct Delivery {
    /// The message.
    pub message: RawMessage,
    /// Queue that delivered the message.
    pub queue: String,
    /// Exchange that the message was published to.
    pub exchange: String,
    /// Routing key of the message.
    pub routing_key: String,
    /// True if, according to the broker, the message was delivered before.
    pub redelivered: bool,
    /// Changes that were made to the message in order to read it.
    pub damage: Option<Box<Damage>>,
    /// Permit to hold the message, see [`Subscription`]; returned when the delivery is settled, unless it is taken out.
    pub(crate) permit: Option<OwnedSemaphorePermit>,
    /// Handle that settles the delivery; taken when it is used.
    settlement: Option<Box<dyn Settlement>>,
}

impl Delivery {
    /// Creates the first delivery of a message from `queue`, which `settlement` settles.
    #[must_use]
    pub fn new(
        message: RawMessage,
        queue: String,
        (exchange, routing_key): (String, String),
        settlement: Box<dyn Settlement>,
    ) -> Self {
        Self {
            message,
            queue,
            exchange,
            routing_key,
            redelivered: false,
            damage: None,
            permit: None,
            settlement: Some(settlement),
        }
    }

    /// Returns true if the broker has requeued the delivery because its connection has ended.
    #[must_use]
    pub fn is_void(&self) -> bool {
        self.settlement
            .as_ref()
            .is_none_or(|settlement| settlement.is_void())
    }

    /// Sets whether the delivery is exempt from the prefetch limit: an exempt one stays unsettled, but does not count,
    /// so that others are delivered while it waits.
    pub fn set_exempt(&self, is_exempt: bool) {
        if let Some(settlement) = &self.settlement {
            settlement.set_exempt(is_exempt);
        }
    }

    /// Acknowledges the delivery without waiting until this is sent.
    pub fn acknowledge(mut self) {
        if let Some(settlement) = self.settlement.take() {
            drop(settlement.settle(Disposition::Ack));
        }
    }

    /// Settles the delivery and waits until this is sent. Returns false if it cannot be sent: the connection has ended,
    /// and the broker requeues the message. This is also logged.
    pub async fn settle(mut self, disposition: Disposition) -> bool {
        match self.settlement.take() {
            Some(settlement) => settlement.settle(disposition).await.is_ok(),
            None => false,
        }
    }
}

/// Logs a disposition that could not be sent.
pub fn not_settled(error: &BrokerError, disposition: Disposition) {
    tracing::warn!(
        ?disposition,
        error = %service_connection::error_chain::chain(error),
        "delivery could not be settled; the broker will deliver it again"
    );
}

impl Drop for Delivery {
    fn drop(&mut self) {
        // A delivery that the broker has requeued needs no disposition.
        if let Some(settlement) = self.settlement.take().filter(|held| !held.is_void()) {
            drop(settlement.settle(Disposition::Requeue));
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("queue", &self.queue)
            .field("exchange", &self.exchange)
            .field("routing_key", &self.routing_key)
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}

/// Desired state of a subscription.
#[derive(Debug, Clone)]
pub struct DesiredQueues {
    /// Subscribed queues, each once.
    pub queues: Vec<Queue>,
    /// Maximum number of unsettled deliveries of each queue, without exempt ones; 0 for no limit.
    pub prefetch: u16,
}

/// Actual state of a subscription.
#[derive(Debug, Clone, Default)]
pub struct Served {
    /// True while a connection exists.
    pub connected: bool,
    /// Queues that are consumed.
    pub queues: BTreeSet<String>,
    /// Queues that could not be consumed at the last attempt.
    pub failed: BTreeSet<String>,
}

/// A running subscription. It survives lost connections; it ends only when it is cancelled or dropped, or when the
/// broker ends reconnecting.
#[derive(Debug)]
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    cancelled: CancellationToken,
    ready: watch::Receiver<bool>,
    handle: Subscriptions,
    failure: Arc<OnceLock<BrokerError>>,
}

impl Consumer {
    /// Returns the next delivery. `None` after the subscription was cancelled and all deliveries were returned, or
    /// after reconnecting has ended, with the error in [`Consumer::failure`].
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// Stops receiving. Deliveries that the broker has sent already are returned by [`Consumer::next`] or requeued.
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }

    /// True while a connection exists over which all queues of the subscription were consumed, and its changes.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.ready.clone()
    }

    /// A handle to change this subscription from any task.
    #[must_use]
    pub fn handle(&self) -> Subscriptions {
        self.handle.clone()
    }

    /// The error that ended the subscription, if it was not cancelled.
    #[must_use]
    pub fn failure(&self) -> Option<&BrokerError> {
        self.failure.get()
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.cancelled.cancel();
    }
}

/// Changes the queues of a [`Consumer`]. Changes survive lost connections: a change that is not possible now is made
/// with the next connection.
#[derive(Debug, Clone)]
pub struct Subscriptions {
    desired: Arc<watch::Sender<DesiredQueues>>,
    served: watch::Receiver<Served>,
}

impl Subscriptions {
    /// Subscribes to a queue, or changes its declaration. Returns when consuming has begun or has failed once, or if no
    /// connection exists.
    pub async fn add(&self, queue: Queue) {
        let name = queue.name.clone();
        self.desired.send_modify(|desired| {
            match desired.queues.iter_mut().find(|known| known.name == name) {
                Some(known) => *known = queue,
                None => desired.queues.push(queue),
            }
        });
        self.until(|served| served.queues.contains(&name) || served.failed.contains(&name))
            .await;
    }

    /// Unsubscribes from a queue. Its deliveries can still be settled. Returns when this is done, or if no connection
    /// exists.
    pub async fn cancel_queue(&self, name: &str) {
        self.desired
            .send_modify(|desired| desired.queues.retain(|queue| queue.name != name));
        self.until(|served| !served.queues.contains(name)).await;
    }

    /// Sets the maximum number of unsettled deliveries of each queue, without exempt ones; 0 for no limit.
    pub fn set_prefetch(&self, prefetch: u16) {
        self.desired.send_if_modified(|desired| {
            let changed = desired.prefetch != prefetch;
            desired.prefetch = prefetch;
            changed
        });
    }

    /// The subscribed queues.
    #[must_use]
    pub fn queues(&self) -> Vec<Queue> {
        self.desired.borrow().queues.clone()
    }

    async fn until(&self, reached: impl Fn(&Served) -> bool) {
        let mut served = self.served.clone();
        // An error means that the subscription has ended.
        let _ = served
            .wait_for(|served| !served.connected || reached(served))
            .await;
    }
}

/// The broker's side of a [`Consumer`].
#[derive(Debug)]
pub struct Feed {
    /// Channel for deliveries. The consumer ends when every sender is dropped.
    pub deliveries: mpsc::Sender<Delivery>,
    /// Reports to the consumer.
    pub reports: Arc<Reports>,
    /// Cancelled when the subscription must end.
    pub cancelled: CancellationToken,
}

/// Reports of a broker about a subscription.
#[derive(Debug)]
pub struct Reports {
    desired: watch::Receiver<DesiredQueues>,
    served: watch::Sender<Served>,
    ready: watch::Sender<bool>,
    failure: Arc<OnceLock<BrokerError>>,
}

impl Feed {
    /// Creates both sides of a subscription, which ends with `cancelled`.
    #[must_use]
    pub fn new(subscription: &Subscription, cancelled: CancellationToken) -> (Self, Consumer) {
        let mut queues: Vec<Queue> = Vec::new();
        for queue in &subscription.queues {
            if !queues.iter().any(|known| known.name == queue.name) {
                queues.push(queue.clone());
            }
        }
        let prefetch = subscription.prefetch;
        let (desiring, desired) = watch::channel(DesiredQueues { queues, prefetch });
        let (served, serving) = watch::channel(Served::default());
        let (ready, readiness) = watch::channel(false);
        // The actual buffer is the broker's prefetch.
        let (sender, deliveries) = mpsc::channel(HANDED_OVER);
        let failure = Arc::new(OnceLock::new());
        let feed = Self {
            deliveries: sender,
            reports: Arc::new(Reports {
                desired,
                served,
                ready,
                failure: failure.clone(),
            }),
            cancelled: cancelled.clone(),
        };
        let consumer = Consumer {
            deliveries,
            cancelled,
            ready: readiness,
            handle: Subscriptions {
                desired: Arc::new(desiring),
                served: serving,
            },
            failure,
        };
        (feed, consumer)
    }
}

impl Reports {
    /// The desired state, and its changes.
    #[must_use]
    pub fn desired(&self) -> watch::Receiver<DesiredQueues> {
        self.desired.clone()
    }

    /// Reports the actual state.
    pub fn update(&self, change: impl FnOnce(&mut Served)) {
        self.served.send_modify(change);
        let served = self.served.borrow();
        let desired = self.desired.borrow();
        // A queue that fails later does not count as a lost connection.
        let all = served.connected
            && (*self.ready.borrow()
                || desired
                    .queues
                    .iter()
                    .all(|q| served.queues.contains(&q.name)));
        drop((served, desired));
        self.ready.send_if_modified(|ready| {
            let changed = *ready != all;
            *ready = all;
            changed
        });
    }

    /// Reports an error that ends the subscription.
    pub fn fail(&self, error: BrokerError) {
        // Only the first reason is kept.
        let _ = self.failure.set(error);
    }
}
