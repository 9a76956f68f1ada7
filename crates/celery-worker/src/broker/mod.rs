//! Message brokers behind one trait.
//!
//! A [`Broker`] carries [`RawMessage`]s and knows neither tasks nor transfers. [`amqp`] is
//! RabbitMQ; Redis in kombu's layout can stand beside it. [`topology`] says what queues look like,
//! [`delayed`] how messages are delayed, [`consumer`] is what a subscription gives.
//!
//! Two promises hold for every broker: a publication is reported as done only when the server
//! has taken responsibility for it, and a delivery is settled exactly once.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use celery_protocol::RawMessage;

pub mod amqp;
pub mod consumer;
pub mod delayed;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
mod propagation;
mod queue_settings;
#[cfg(any(test, feature = "testing"))]
pub mod recorder;
mod sending;
pub mod topology;

pub use consumer::{Consumer, Delivery, Disposition, Settlement, Subscriptions};
pub use propagation::{NoPropagation, TracePropagation};
pub use queue_settings::{DelayedDelivery, ExchangeKind, QueueSettings, QueueType, TaskQueue};
pub(crate) use sending::Sending;
pub use topology::{Binding, Declaration, Exchange, Queue, Route, TaskQueues};

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
    /// Queues; declared where they are missing.
    pub queues: Vec<Queue>,
    /// Unsettled deliveries of each queue that are held at a time, parked ones aside; 0 is no limit.
    pub prefetch: u16,
    /// Type of the queues for native delayed delivery, if these are to be declared, too.
    pub delayed: Option<QueueType>,
    /// Largest body, in bytes; one above it is left out, unread, see [`consumer::Damage`].
    pub max_body_bytes: Option<usize>,
    /// Bodies of tasks whose time is yet to come are left out if they are larger, in bytes: such a
    /// message is read when it is delivered again.
    pub max_waiting_body_bytes: Option<usize>,
}

/// How full a queue is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueDepth {
    /// Its name.
    pub queue: String,
    /// Messages that wait; those that a worker holds are not counted.
    pub messages: u32,
    /// Consumers.
    pub consumers: u32,
}

/// Why the broker could not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BrokerError {
    /// The URL cannot be used.
    #[error("broker URL is not usable: {0}")]
    Url(String),
    /// No answer, or the connection broke. Worth a retry.
    #[error("broker at {broker} is not reachable")]
    Unreachable {
        /// Address of the broker, without password.
        broker: String,
        /// The client's error.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The broker said no.
    #[error("broker at {broker} refused {what}")]
    Refused {
        /// Address of the broker, without password.
        broker: String,
        /// What was asked.
        what: String,
        /// The broker's answer.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
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
        /// Address of the broker, without password.
        broker: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The broker is short of memory or disk space and takes no messages for now. Worth a retry.
    #[error("broker at {broker} blocks connections that publish: {reason}")]
    Blocked {
        /// Address of the broker, without password.
        broker: String,
        /// The broker's words.
        reason: Arc<str>,
    },
    /// A file for TLS cannot be used.
    #[error("{setting}: `{path}` cannot be used for TLS: {reason}")]
    Tls {
        /// Key of the setting.
        setting: &'static str,
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No further attempts to connect are wanted.
    #[error("the broker is given up after {attempts} failed attempts to connect; see {setting}")]
    GivenUp {
        /// Attempts in a row.
        attempts: u32,
        /// Key of the setting that says so.
        setting: &'static str,
        /// Why the last one failed.
        #[source]
        source: Arc<BrokerError>,
    },
    /// A subscription ended because the code that serves it panicked.
    #[error("the subscription for {purpose} panicked, which is a bug of this program: {panic}")]
    Panicked {
        /// Purpose of the subscription.
        purpose: &'static str,
        /// Text of the panic.
        panic: String,
    },
    /// A queue or exchange name, or a routing key, that the protocol cannot carry.
    #[error("name is longer than 255 bytes: `{0}…`")]
    Name(String),
}

/// A connection to a broker, with reconnection built in.
#[async_trait]
pub trait Broker: Send + Sync {
    /// The broker's URL without a password, for people.
    fn masked_url(&self) -> String;

    /// Addresses of all brokers if there are several; the one in use first.
    fn masked_urls(&self) -> Vec<String> {
        vec![self.masked_url()]
    }

    /// Publishes and waits for the broker's confirmation, for `within` at most. A lost connection is opened
    /// again and the publication repeated; so a message can arrive twice, but is not lost. A publication that
    /// is given up, by this limit or by dropping the future, is withdrawn unless it was sent already; in that
    /// case it may still arrive.
    ///
    /// # Errors
    /// The last [`BrokerError`] once `within` has passed, and at once those that no retry mends.
    async fn publish(&self, publication: &Publication, within: Duration)
    -> Result<(), BrokerError>;

    /// Publishes as [`Broker::publish`], but without a limit while there is a connection: a broker that blocks
    /// publishers, or confirms late, is waited for, since the publication is pending there and must not be
    /// made twice. `within` limits only the attempts to connect.
    ///
    /// # Errors
    /// As [`Broker::publish`]. The publication is no longer pending.
    async fn publish_until_confirmed(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError>;

    /// Reason why the broker takes no publications for now, if it has sent one.
    fn blocked(&self) -> Option<Arc<str>> {
        None
    }

    /// Connects for publishing, unless that is done; tried until `within` has passed.
    ///
    /// # Errors
    /// As [`Broker::publish`].
    async fn prepare(&self, within: Duration) -> Result<(), BrokerError>;

    /// Starts to consume, at once or as soon as there is a connection. Never fails: a broker that
    /// is down, goes away or refuses is tried again, with a log line that says why.
    fn consume(&self, subscription: Subscription) -> Consumer;

    /// How full queues are; those that are missing are left out. Asks the broker, so it also tells
    /// whether that is there: with no queues, nothing else. May be dropped while it waits.
    ///
    /// # Errors
    /// What the broker says, or that it cannot be reached.
    async fn survey(&self, queues: &[String]) -> Result<Vec<QueueDepth>, BrokerError>;

    /// Cancels every consumer and closes every connection; unsettled deliveries return to their
    /// queues.
    async fn close(&self);
}

/// The broker of a URL, with Celery's defaults: `amqp://`, `amqps://`, or `memory://` with the feature
/// `testing`. Connects when it is first used. `name` is shown in the broker's management.
///
/// # Errors
/// [`BrokerError::Url`].
pub fn open(url: &str, name: &str) -> Result<Arc<dyn Broker>, BrokerError> {
    #[cfg(any(test, feature = "testing"))]
    if url.starts_with("memory://") {
        return Ok(Arc::new(memory::MemoryBroker::named(url)?));
    }
    Ok(Arc::new(amqp::Amqp::new(&amqp::AmqpOptions::new(
        url, name,
    ))?))
}
