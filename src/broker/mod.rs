//! The message transport, behind one trait.
//!
//! A [`Transport`] carries [`RawMessage`]s and knows neither tasks nor transfers. [`amqp`] is the
//! one for RabbitMQ; a Redis transport in kombu's layout can stand beside it. [`app`] makes a
//! [`celery::Celery`] app that produces through any of them.
//!
//! Two promises hold for every transport: a publication is reported as done only when the broker
//! has taken responsibility for it, and a delivery is settled exactly once.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Map, Value};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::wire::RawMessage;

pub mod amqp;
pub mod app;

/// Kind of an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeKind {
    /// By equal routing key.
    Direct,
    /// To every bound queue.
    Fanout,
    /// By pattern.
    Topic,
}

impl ExchangeKind {
    /// Its name in AMQP.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Topic => "topic",
        }
    }
}

/// An exchange, as it is declared before it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: ExchangeKind,
    /// Whether it survives a restart of the broker.
    pub durable: bool,
}

/// A queue's binding to an exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The exchange; declared before the queue.
    pub exchange: Exchange,
    /// Binding key.
    pub key: String,
}

/// A queue, as it is declared before it is used.
#[derive(Debug, Clone, PartialEq)]
pub struct Queue {
    /// Its name; the default exchange routes to it by this name.
    pub name: String,
    /// Whether it survives a restart of the broker.
    pub durable: bool,
    /// Whether it belongs to one connection.
    pub exclusive: bool,
    /// Whether it vanishes with its last consumer.
    pub auto_delete: bool,
    /// Queue arguments, e.g. `x-expires`.
    pub arguments: Map<String, Value>,
    /// Its binding, if any.
    pub binding: Option<Binding>,
}

impl Queue {
    /// A task queue as Celery declares it: durable, with a direct exchange of the same name.
    pub fn tasks(name: impl Into<String>) -> Self {
        let name = name.into();
        let exchange = Exchange {
            name: name.clone(),
            kind: ExchangeKind::Direct,
            durable: true,
        };
        Self {
            durable: true,
            exclusive: false,
            auto_delete: false,
            arguments: Map::new(),
            binding: Some(Binding {
                exchange,
                key: name.clone(),
            }),
            name,
        }
    }

    /// A reply queue as an `rpc://` client declares it; it expires a day after its last use.
    pub fn replies(name: impl Into<String>) -> Self {
        let arguments = [("x-expires".to_owned(), Value::from(86_400_000_i32))];
        Self {
            name: name.into(),
            durable: true,
            exclusive: false,
            auto_delete: true,
            arguments: Map::from_iter(arguments),
            binding: None,
        }
    }

    /// A worker's queue for remote control. Celery names it after the node alone; two starts of
    /// one node in quick succession would then lock each other out, so `tag` makes it unique.
    #[must_use]
    pub fn control(hostname: &str, tag: &str) -> Self {
        let arguments = [
            ("x-expires".to_owned(), Value::from(10_000)),
            ("x-message-ttl".to_owned(), Value::from(300_000)),
        ];
        Self {
            name: format!("{hostname}.{tag}.celery.pidbox"),
            durable: false,
            exclusive: true,
            auto_delete: true,
            arguments: Map::from_iter(arguments),
            binding: Some(Binding {
                exchange: Exchange {
                    name: crate::wire::pidbox::EXCHANGE.into(),
                    kind: ExchangeKind::Fanout,
                    durable: false,
                },
                key: String::new(),
            }),
        }
    }
}

impl Exchange {
    /// The exchange of events.
    #[must_use]
    pub fn events() -> Self {
        Self {
            name: "celeryev".into(),
            kind: ExchangeKind::Topic,
            durable: true,
        }
    }
}

/// What is declared before a message is published, so that it cannot fall into nowhere.
#[derive(Debug, Clone, PartialEq)]
pub enum Declaration {
    /// The queue that it goes to.
    Queue(Queue),
    /// The exchange that it goes through.
    Exchange(Exchange),
}

impl Declaration {
    /// Name of what is declared.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Queue(queue) => &queue.name,
            Self::Exchange(exchange) => &exchange.name,
        }
    }
}

/// A message on its way out.
#[derive(Debug, Clone, PartialEq)]
pub struct Publication {
    /// Exchange; empty for the default one, which routes by queue name.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
    /// The message.
    pub message: RawMessage,
    /// What is declared first.
    pub declare: Option<Declaration>,
    /// Whether it is an error that no queue takes the message.
    pub mandatory: bool,
}

/// What a worker wants to receive.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// What for, in a word or two; for log lines.
    pub purpose: &'static str,
    /// Whether all messages have small headers. The connection then needs 1 MB instead of 8; one
    /// with larger headers breaks it.
    pub small: bool,
    /// Queues; declared where they are missing.
    pub queues: Vec<Queue>,
    /// Unsettled deliveries that each queue's consumer may hold; 0 is no limit.
    pub prefetch: u16,
}

/// Why the transport could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The URL cannot be used.
    #[error("broker URL is not usable: {0}")]
    Url(String),
    /// No answer, or the connection broke. Worth a retry.
    #[error("broker at {broker} is not reachable")]
    Unreachable {
        /// Where, without password.
        broker: String,
        /// The transport's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The broker said no.
    #[error("broker at {broker} refused {what}")]
    Refused {
        /// Where, without password.
        broker: String,
        /// What was asked.
        what: String,
        /// The broker's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A mandatory message that no queue took.
    #[error("no queue took the message: exchange `{exchange}`, routing key `{routing_key}`")]
    Unroutable {
        /// Exchange it was published to.
        exchange: String,
        /// Its routing key.
        routing_key: String,
    },
    /// The broker did not answer in time; it may have the message or not.
    #[error("broker at {broker} did not confirm within {}", humantime::format_duration(*.waited))]
    Timeout {
        /// Where, without password.
        broker: String,
        /// How long was waited.
        waited: Duration,
    },
    /// A queue or exchange name, or a routing key, that the protocol cannot carry.
    #[error("name is longer than 255 bytes: `{0}…`")]
    Name(String),
}

/// What is done with a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Done with: it leaves the queue.
    Ack,
    /// Refused for good: to the dead-letter exchange, if the queue has one.
    Reject,
    /// Given back, for this or another worker.
    Requeue,
}

/// The transport's handle to settle one delivery.
#[async_trait]
pub trait Settlement: Send + Sync {
    /// Settles it.
    async fn settle(self: Box<Self>, verdict: Verdict) -> Result<(), BrokerError>;

    /// Whether the broker has taken the delivery back, because its connection is gone.
    fn is_void(&self) -> bool;
}

/// A received message, which must be settled once.
///
/// One that is dropped unsettled is given back to the queue, so that no path through a worker
/// can leak it.
pub struct Delivery {
    /// The message.
    pub message: RawMessage,
    /// Exchange it came through.
    pub exchange: String,
    /// Its routing key.
    pub routing_key: String,
    /// Queue it was consumed from.
    pub queue: String,
    /// Whether it, or so the broker thinks, was delivered before.
    pub redelivered: bool,
    settlement: Option<Box<dyn Settlement>>,
}

impl Delivery {
    /// A delivery that `settlement` settles.
    #[must_use]
    pub fn new(
        message: RawMessage,
        exchange: String,
        routing_key: String,
        redelivered: bool,
        settlement: Box<dyn Settlement>,
    ) -> Self {
        Self {
            message,
            exchange,
            queue: routing_key.clone(),
            routing_key,
            redelivered,
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

    /// Settles it. A failure means that the connection is gone, and the broker has the message
    /// back already or will when it notices; so it is logged, and that is all there is to do.
    pub async fn settle(mut self, verdict: Verdict) {
        if let Some(settlement) = self.settlement.take() {
            report(settlement.settle(verdict).await, verdict);
        }
    }
}

fn report(outcome: Result<(), BrokerError>, verdict: Verdict) {
    if let Err(error) = outcome {
        tracing::warn!(
            ?verdict,
            error = %crate::telemetry::chain(&error),
            "delivery could not be settled; the broker will deliver it again"
        );
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        let Some(settlement) = self.settlement.take() else {
            return;
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            report(settlement.settle(Verdict::Requeue).await, Verdict::Requeue);
        });
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("exchange", &self.exchange)
            .field("routing_key", &self.routing_key)
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}

/// A running subscription. Connections come and go beneath it; it ends only when it is
/// cancelled or dropped.
#[derive(Debug)]
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    cancelled: CancellationToken,
    connected: watch::Receiver<bool>,
}

impl Consumer {
    /// A consumer fed through `deliveries` until `cancelled`; `connected` says whether the
    /// broker is serving it.
    #[must_use]
    pub fn new(
        deliveries: mpsc::Receiver<Delivery>,
        cancelled: CancellationToken,
        connected: watch::Receiver<bool>,
    ) -> Self {
        Self {
            deliveries,
            cancelled,
            connected,
        }
    }

    /// The next delivery; `None` once cancelled and drained.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// Stops receiving. What the broker had already sent still comes out of [`Consumer::next`].
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }

    /// Whether the broker is serving this subscription right now, and its changes.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }
}

/// SHIM
#[derive(Debug, Clone)]
pub struct Subscriptions;
#[allow(missing_docs, clippy::unused_async)]
impl Subscriptions {
    pub async fn renew(&self, _q: &str) {}
    pub async fn add(&self, _q: Queue) {}
    pub async fn cancel_queue(&self, _q: &str) {}
    pub async fn set_prefetch(&self, _n: u16) {}
    pub fn queues(&self) -> Vec<Queue> {
        Vec::new()
    }
}
impl Consumer {
    /// SHIM
    #[must_use]
    pub fn handle(&self) -> Subscriptions {
        Subscriptions
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.cancelled.cancel();
    }
}

/// A connection to a broker, with reconnection built in.
#[async_trait]
pub trait Transport: Send + Sync {
    /// The broker's URL without a password, for people.
    fn masked_url(&self) -> String;

    /// Publishes and waits until the broker has taken responsibility. A lost connection is
    /// made anew and the publication repeated until `within` has passed; so a message can arrive
    /// twice, but is not lost.
    ///
    /// # Errors
    /// The last [`BrokerError`] once `within` has passed, and at once those that no retry mends.
    async fn publish(&self, publication: &Publication, within: Duration)
    -> Result<(), BrokerError>;

    /// Starts to consume, at once or as soon as there is a connection. Never fails: a broker that
    /// is down, goes away or refuses is tried again, with a log line that says why.
    fn consume(&self, subscription: Subscription) -> Consumer;

    /// Cancels every consumer and closes every connection; unsettled deliveries return to their
    /// queues.
    async fn close(&self);
}
