//! What a subscription gives: deliveries, and a handle to change what is subscribed to.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, OnceLock};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{BrokerError, Queue, Subscription};
use celery_protocol::RawMessage;

/// Capacity of the channel between the broker and the worker: with a single place each delivery would cost
/// both sides a wake-up.
const HANDED_OVER: usize = 32;

/// The way in which a delivery is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Done with: it leaves the queue.
    Ack,
    /// Refused for good: to the dead-letter exchange, if the queue has one.
    Reject,
    /// Given back, for this or another worker.
    Requeue,
}

/// Resolves once the disposition was sent, or the channel is gone.
pub type Settled = oneshot::Receiver<()>;

/// The broker's handle to settle one delivery.
pub trait Settlement: Send + Sync {
    /// Settles the delivery, even if the returned receiver is dropped. The broker logs a failure by
    /// [`not_settled`].
    fn settle(self: Box<Self>, disposition: Disposition) -> Settled;

    /// Returns true if the broker has taken the delivery back because its connection is gone.
    fn is_void(&self) -> bool;

    /// Sets whether the delivery is parked: a parked one does not count against the prefetch limit.
    fn park(&self, parked: bool);
}

/// Changes that a broker made to a message in order to read it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Damage {
    /// Bytes that are not UTF-8 became question marks: in names, in properties, in the exchange or the routing key.
    pub is_no_text: bool,
    /// Header values that were nested too deeply became bytes.
    pub is_too_deep: bool,
    /// Reason why its properties and its body were left out.
    pub unreadable: Option<&'static str>,
    /// Size of a body that was left out because of its size.
    pub body_bytes: Option<u64>,
    /// True if the body was left out because the task has to wait for its time.
    pub is_early: bool,
}

impl Damage {
    /// Merges these changes with earlier ones.
    #[must_use]
    pub fn and(self, before: Self) -> Self {
        Self {
            is_no_text: self.is_no_text || before.is_no_text,
            is_too_deep: self.is_too_deep || before.is_too_deep,
            unreadable: self.unreadable.or(before.unreadable),
            body_bytes: self.body_bytes.or(before.body_bytes),
            is_early: self.is_early || before.is_early,
        }
    }
}

/// A received message, which must be settled once.
///
/// One that is dropped unsettled is given back to the queue, so that no path through a worker
/// can leak it.
pub struct Delivery {
    /// The message.
    pub message: RawMessage,
    /// Queue it was consumed from.
    pub queue: String,
    /// Exchange it came through.
    pub exchange: String,
    /// Its routing key.
    pub routing_key: String,
    /// Whether it, or so the broker thinks, was delivered before.
    pub redelivered: bool,
    /// Changes that were made to the message in order to read it.
    pub damage: Option<Box<Damage>>,
    /// What settles it; taken when that is done.
    settlement: Option<Box<dyn Settlement>>,
}

impl Delivery {
    /// A delivery from `queue` that `settlement` settles.
    #[must_use]
    pub fn new(
        message: RawMessage,
        queue: String,
        (exchange, routing_key): (String, String),
        redelivered: bool,
        settlement: Box<dyn Settlement>,
    ) -> Self {
        Self {
            message,
            queue,
            exchange,
            routing_key,
            redelivered,
            damage: None,
            settlement: Some(settlement),
        }
    }

    /// Whether the broker has taken it back, because its connection is gone; it comes again.
    #[must_use]
    pub fn is_void(&self) -> bool {
        self.settlement
            .as_ref()
            .is_none_or(|settlement| settlement.is_void())
    }

    /// Keeps it unsettled without letting it count against the prefetch limit: it waits for
    /// something, and others are to be delivered meanwhile.
    pub fn park(&self) {
        if let Some(settlement) = &self.settlement {
            settlement.park(true);
        }
    }

    /// Lets it count again: its time has come.
    pub fn unpark(&self) {
        if let Some(settlement) = &self.settlement {
            settlement.park(false);
        }
    }

    /// Acknowledges it without waiting for that to be written.
    pub fn acknowledge(mut self) {
        if let Some(settlement) = self.settlement.take() {
            drop(settlement.settle(Disposition::Ack));
        }
    }

    /// Settles it. A failure means that the connection is gone, and the broker has the message
    /// back already or will when it notices; so it is logged, and that is all there is to do.
    pub async fn settle(mut self, disposition: Disposition) {
        if let Some(settlement) = self.settlement.take() {
            // An error means that the broker is gone altogether.
            let _ = settlement.settle(disposition).await;
        }
    }
}

/// Logs a disposition that could not be sent.
pub fn not_settled(error: &BrokerError, disposition: Disposition) {
    tracing::warn!(
        verdict = ?disposition,
        error = %service_connection::error_chain::chain(error),
        "delivery could not be settled; the broker will deliver it again"
    );
}

impl Drop for Delivery {
    fn drop(&mut self) {
        // One that the broker has taken back needs nothing more.
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

/// What is to be consumed.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The queues, each once.
    pub queues: Vec<Queue>,
    /// Deliveries of each queue that are held at a time, parked ones aside; 0 is no limit.
    pub prefetch: u16,
}

/// What is consumed.
#[derive(Debug, Clone, Default)]
pub struct Served {
    /// Whether there is a connection.
    pub connected: bool,
    /// Queues that are consumed from.
    pub queues: BTreeSet<String>,
    /// Queues that could not be, at the last try.
    pub failed: BTreeSet<String>,
}

/// A running subscription. Connections come and go beneath it; it ends only when it is
/// cancelled or dropped, or when the broker is given up.
#[derive(Debug)]
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    cancelled: CancellationToken,
    ready: watch::Receiver<bool>,
    handle: Subscriptions,
    failure: Arc<OnceLock<BrokerError>>,
}

impl Consumer {
    /// The next delivery; `None` once cancelled and drained, and when the broker was given up, of
    /// which [`Consumer::failure`] tells.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// Stops receiving. What the broker had already sent comes out of [`Consumer::next`] or goes
    /// back.
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }

    /// Whether the broker is serving the whole of this subscription right now, and its changes.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.ready.clone()
    }

    /// What changes this subscription, from any task.
    #[must_use]
    pub fn handle(&self) -> Subscriptions {
        self.handle.clone()
    }

    /// Why it ended of itself, if it did.
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

/// Changes what a [`Consumer`] consumes. Changes outlive connections: what cannot be done now is
/// done when there is one again.
#[derive(Debug, Clone)]
pub struct Subscriptions {
    wanted: Arc<watch::Sender<Wanted>>,
    served: watch::Receiver<Served>,
}

impl Subscriptions {
    /// Consumes from a queue, too, or otherwise. Returns when that has begun or has failed once,
    /// or when there is no connection.
    pub async fn add(&self, queue: Queue) {
        let name = queue.name.clone();
        self.wanted.send_modify(|wanted| {
            match wanted.queues.iter_mut().find(|known| known.name == name) {
                Some(known) => *known = queue,
                None => wanted.queues.push(queue),
            }
        });
        self.until(|served| served.queues.contains(&name) || served.failed.contains(&name))
            .await;
    }

    /// Consumes no longer from a queue. What was delivered can still be settled. Returns when that
    /// is so, or when there is no connection.
    pub async fn cancel_queue(&self, name: &str) {
        self.wanted
            .send_modify(|wanted| wanted.queues.retain(|queue| queue.name != name));
        self.until(|served| !served.queues.contains(name)).await;
    }

    /// Deliveries of each queue that may be held at a time, parked ones aside; 0 is no limit.
    pub fn set_prefetch(&self, prefetch: u16) {
        self.wanted.send_if_modified(|wanted| {
            let changed = wanted.prefetch != prefetch;
            wanted.prefetch = prefetch;
            changed
        });
    }

    /// The queues.
    #[must_use]
    pub fn queues(&self) -> Vec<Queue> {
        self.wanted.borrow().queues.clone()
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
    /// Where deliveries go. The consumer ends when every sender is gone.
    pub deliveries: mpsc::Sender<Delivery>,
    /// What is reported.
    pub reports: Arc<Reports>,
    /// Cancelled when nothing more is wanted.
    pub cancelled: CancellationToken,
}

/// What a broker reports of a subscription.
#[derive(Debug)]
pub struct Reports {
    wanted: watch::Receiver<Wanted>,
    served: watch::Sender<Served>,
    ready: watch::Sender<bool>,
    failure: Arc<OnceLock<BrokerError>>,
}

impl Feed {
    /// Both sides of a new subscription, which ends with `cancelled`.
    #[must_use]
    pub fn new(subscription: &Subscription, cancelled: CancellationToken) -> (Self, Consumer) {
        let mut queues: Vec<Queue> = Vec::new();
        for queue in &subscription.queues {
            if !queues.iter().any(|known| known.name == queue.name) {
                queues.push(queue.clone());
            }
        }
        let prefetch = subscription.prefetch;
        let (wanting, wanted) = watch::channel(Wanted { queues, prefetch });
        let (served, serving) = watch::channel(Served::default());
        let (ready, readiness) = watch::channel(false);
        // The buffer proper is the broker's prefetch.
        let (sender, deliveries) = mpsc::channel(HANDED_OVER);
        let failure = Arc::new(OnceLock::new());
        let feed = Self {
            deliveries: sender,
            reports: Arc::new(Reports {
                wanted,
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
                wanted: Arc::new(wanting),
                served: serving,
            },
            failure,
        };
        (feed, consumer)
    }
}

impl Reports {
    /// What is wanted, and its changes.
    #[must_use]
    pub fn wanted(&self) -> watch::Receiver<Wanted> {
        self.wanted.clone()
    }

    /// Reports what is consumed.
    pub fn update(&self, change: impl FnOnce(&mut Served)) {
        self.served.send_modify(change);
        let served = self.served.borrow();
        let wanted = self.wanted.borrow();
        // A queue that fails later is not taken for a lost connection.
        let all = served.connected
            && (*self.ready.borrow()
                || wanted
                    .queues
                    .iter()
                    .all(|q| served.queues.contains(&q.name)));
        drop((served, wanted));
        self.ready.send_if_modified(|ready| {
            let changed = *ready != all;
            *ready = all;
            changed
        });
    }

    /// Reports why the subscription ends of itself.
    pub fn fail(&self, error: BrokerError) {
        // The first reason is the reason.
        let _ = self.failure.set(error);
    }
}
