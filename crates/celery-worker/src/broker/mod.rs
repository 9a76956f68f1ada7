//! Message brokers behind one trait.
//!
//! A [`Broker`] transports [`RawMessage`]s and knows neither tasks nor transfers. [`amqp`] is RabbitMQ, and [`redis`] is
//! Redis in kombu's layout. [`topology`] describes queues, [`delayed`] the delay of messages, and [`consumer`]
//! the results of a subscription.
//!
//! Every broker guarantees two things: a publication is reported as done only after the server has taken responsibility
//! for it, and a delivery is settled exactly once.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use celery_protocol::RawMessage;

#[cfg(feature = "amqp")]
pub mod amqp;
pub mod consumer;
pub mod delayed;
#[cfg(any(feature = "amqp", feature = "redis"))]
mod failover;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
#[cfg(any(feature = "amqp", feature = "redis"))]
mod options;
mod propagation;
mod queue_settings;
mod reconnect;
#[cfg(feature = "redis")]
pub mod redis;
mod routes;
mod sending;
pub mod topology;

pub use consumer::{Consumer, Delivery, Disposition, Settlement, Subscriptions};
#[cfg(any(feature = "amqp", feature = "redis"))]
pub use failover::FailoverStrategy;
#[cfg(any(feature = "amqp", feature = "redis"))]
pub use options::BrokerOptions;
pub use propagation::{NoPropagation, TracePropagation};
pub use queue_settings::{DelayedDelivery, ExchangeKind, QueueSettings, QueueType, TaskQueue};
pub use reconnect::Reconnect;
pub use routes::TaskRoute;
pub(crate) use sending::{RABBITMQ, Sending, messaging_system};
pub use topology::{Binding, Declaration, Exchange, Queue, Route, TaskQueues};

/// Maximum length of the name of a queue or exchange and of a routing key, in bytes: a short string of AMQP 0-9-1.
pub const MAX_NAME_BYTES: usize = u8::MAX as usize;

/// A message to publish.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Publication {
    /// Exchange; empty for the default one, which routes by queue name.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
    /// The message.
    pub message: RawMessage,
    /// Declaration to make before publishing.
    pub declare: Option<Declaration>,
    /// True if it is an error when no queue accepts the message.
    pub mandatory: bool,
    /// Time after which a broker that keeps the queue of a client that has ended may delete it with its messages; `None`
    /// for never. Redis has such queues; RabbitMQ deletes them itself.
    pub queue_lifetime: Option<Duration>,
}

impl Publication {
    /// A message to an exchange, which may be dropped if no queue accepts it.
    pub fn new(
        exchange: impl Into<String>,
        routing_key: impl Into<String>,
        message: RawMessage,
    ) -> Self {
        Self {
            exchange: exchange.into(),
            routing_key: routing_key.into(),
            message,
            declare: None,
            mandatory: false,
            queue_lifetime: None,
        }
    }
}

/// Parameters of a subscription.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Subscription {
    /// Purpose in one or two words, for log lines.
    pub purpose: &'static str,
    /// Queues; declared if they are missing.
    pub queues: Vec<Queue>,
    /// Maximum number of unsettled deliveries of each queue, without exempt ones; 0 for no limit.
    pub prefetch: u16,
    /// Type of the queues for native delayed delivery, if these must be declared, too.
    pub delayed: Option<QueueType>,
    /// Maximum size of a body in bytes; a larger one is omitted without being read, see [`consumer::Damage`].
    pub max_body_bytes: Option<usize>,
    /// Maximum size in bytes of the body of a task whose eta has not been reached. A larger one is omitted; it is read
    /// when the message is redelivered.
    pub max_waiting_body_bytes: Option<usize>,
    /// Permits to hold a message, if their number is limited over all queues: each delivery then has one. Only Redis takes
    /// single messages; RabbitMQ sends them ahead.
    #[cfg_attr(
        not(feature = "redis"),
        expect(dead_code, reason = "only Redis takes single messages")
    )]
    pub(crate) permits: Option<Arc<Semaphore>>,
}

impl Subscription {
    /// A subscription of queues without limits.
    #[must_use]
    pub fn new(purpose: &'static str, queues: Vec<Queue>) -> Self {
        Self {
            purpose,
            queues,
            prefetch: 0,
            delayed: None,
            max_body_bytes: None,
            max_waiting_body_bytes: None,
            permits: None,
        }
    }
}

/// Number of messages and consumers of a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueDepth {
    /// Name of the queue.
    pub queue: String,
    /// Number of waiting messages, without those that a worker holds.
    pub messages: u32,
    /// Number of consumers; none if the broker does not know them.
    pub consumers: Option<u32>,
}

/// Reason why a broker operation failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// The URL cannot be used.
    #[error("broker URL is not usable: {0}")]
    Url(String),
    /// The broker did not answer, or the connection ended. A retry may succeed.
    #[error("broker at {broker} is not reachable")]
    Unreachable {
        /// Address of the broker, without password.
        broker: String,
        /// The client's error.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The broker refused the request.
    #[error("broker at {broker} refused {what}")]
    Refused {
        /// Address of the broker, without password.
        broker: String,
        /// The refused request.
        what: String,
        /// The broker's answer.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// No queue accepted a mandatory message.
    #[error("no queue took the message: exchange `{exchange}`, routing key `{routing_key}`")]
    Unroutable {
        /// Exchange that the message was published to.
        exchange: String,
        /// Routing key of the message.
        routing_key: String,
    },
    /// The broker did not answer in time; it may or may not have accepted the message.
    #[error("broker at {broker} did not confirm within {}", humantime::format_duration(*.waited))]
    Timeout {
        /// Address of the broker, without password.
        broker: String,
        /// Time that was waited.
        waited: Duration,
    },
    /// The broker is short of memory or disk space and does not accept messages for now. A retry may succeed.
    #[error("broker at {broker} blocks connections that publish: {reason}")]
    Blocked {
        /// Address of the broker, without password.
        broker: String,
        /// The broker's reason.
        reason: Arc<str>,
    },
    /// A file for TLS cannot be used.
    #[error("`{path}` cannot be used for TLS (option `{option}`): {reason}")]
    Tls {
        /// Option of the connection that names the file, e.g. `tls.ca_file`.
        option: &'static str,
        /// Path of the file.
        path: String,
        /// Reason why the file cannot be used.
        reason: String,
    },
    /// The limit of attempts to connect was reached.
    #[error(
        "gave up after {attempts} failed attempts to connect to the broker (option `{option}`)"
    )]
    GivenUp {
        /// Number of consecutive attempts.
        attempts: u32,
        /// Option of the connection with the limit, e.g. `reconnect.max_retries`.
        option: &'static str,
        /// Error of the last attempt.
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
    /// The protocol cannot represent the name of a queue or exchange, or a routing key.
    #[error("name is longer than {MAX_NAME_BYTES} bytes: `{0}…`")]
    Name(String),
}

/// A connection to a broker, with reconnection built in.
#[async_trait]
pub trait Broker: Send + Sync {
    /// The broker's URL without a password, for messages.
    fn masked_url(&self) -> String;

    /// Name of the transport in kombu's terms.
    fn transport(&self) -> &'static str;

    /// URLs of all brokers, without passwords; the one in use first.
    fn masked_urls(&self) -> Vec<String> {
        vec![self.masked_url()]
    }

    /// Publishes and waits for the broker's confirmation, for `within` at most. A lost connection is opened again and
    /// the publication repeated; a message can therefore arrive twice, but is not lost. When a publication ends early,
    /// by this limit or because the future is dropped, it is withdrawn unless it was sent already; in that case it may
    /// still arrive.
    ///
    /// # Errors
    /// The last [`BrokerError`] once `within` has passed; an error that no retry can remedy is returned at once.
    async fn publish(&self, publication: &Publication, within: Duration)
    -> Result<(), BrokerError>;

    /// Publishes as [`Broker::publish`], but without a time limit while a connection exists: if the broker blocks
    /// publishers or confirms late, the call waits, since the publication is pending there and must not be sent twice.
    /// `within` limits only the attempts to connect.
    ///
    /// # Errors
    /// As [`Broker::publish`]. The publication is no longer pending.
    async fn publish_until_confirmed(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError>;

    /// Reason why the broker does not accept publications for now, if it has sent one.
    fn blocked(&self) -> Option<Arc<str>> {
        None
    }

    /// Connects for publishing, unless this was done before. Repeats failed attempts until `within` has passed.
    ///
    /// # Errors
    /// As [`Broker::publish`].
    async fn prepare(&self, within: Duration) -> Result<(), BrokerError>;

    /// Starts to consume, at once or as soon as a connection exists. Never fails: if the broker is down, ends the
    /// connection or refuses, the call is retried, and the reason is logged.
    fn consume(&self, subscription: Subscription) -> Consumer;

    /// Returns the numbers of messages and consumers of queues, without missing queues. The call always asks the
    /// broker, so that it also checks the connection, even without queues. Cancel-safe.
    ///
    /// # Errors
    /// The broker refused the request, or cannot be reached.
    async fn survey(&self, queues: &[String]) -> Result<Vec<QueueDepth>, BrokerError>;

    /// Cancels every consumer and closes every connection; unsettled deliveries are requeued.
    async fn close(&self);
}

/// The broker of a URL, with Celery's defaults: `amqp://` or `amqps://` with the feature `amqp`; `redis://`, `rediss://`
/// or `redis+socket://` with the feature `redis`; `memory://` with the feature `testing`. Connects when it is first used. `name` is shown in the broker's management.
///
/// # Errors
/// [`BrokerError::Url`], also for the URL of a broker whose feature is off.
pub fn open(url: &str, name: &str) -> Result<Arc<dyn Broker>, BrokerError> {
    #[cfg(any(test, feature = "testing"))]
    if url.starts_with("memory://") {
        return Ok(Arc::new(memory::MemoryBroker::named(url)?));
    }
    #[cfg(feature = "redis")]
    if redis::has_scheme(url) {
        let options = redis::RedisBrokerOptions::new(url, name);
        return Ok(Arc::new(redis::RedisBroker::new(&options)?));
    }
    open_amqp(url, name)
}

#[cfg(feature = "amqp")]
fn open_amqp(url: &str, name: &str) -> Result<Arc<dyn Broker>, BrokerError> {
    Ok(Arc::new(amqp::Amqp::new(&amqp::AmqpOptions::new(
        url, name,
    ))?))
}

#[cfg(not(feature = "amqp"))]
fn open_amqp(url: &str, _: &str) -> Result<Arc<dyn Broker>, BrokerError> {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    Err(BrokerError::Url(format!(
        "scheme `{scheme}` needs a feature of the crate `celery-worker` that is off, as `amqp` for RabbitMQ"
    )))
}
