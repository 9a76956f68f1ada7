//! AMQP 0-9-1 (RabbitMQ) on lapin.
//!
//! Consuming and publishing use separate connections: a broker that is short of memory stops reading from connections
//! that publish, which must not delay acknowledgements.
//!
//! Every queue has its own channel on the consuming connection. If the broker closes a channel (a delivery was held for
//! longer than `consumer_timeout`, a queue must not be read), this affects only the deliveries of that queue, and one
//! new channel is enough to continue. The limit on unsettled deliveries applies to each queue, too.
//!
//! lapin's own recovery is not used. A channel with its consumer, or a connection with its channels, is created as a
//! whole and closed as a whole when any part of it ends, for any reason. An ended consumer stream is therefore never
//! mistaken for an idle queue.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use lapin::types::ShortString;
use lapin::{Channel, Confirmation};
use secrecy::SecretString;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::consumer::{Feed, Reports, Served};
use super::{
    Broker, BrokerError, Consumer, Declaration, FailoverStrategy, Publication, QueueDepth,
    Subscription,
};
use crate::liveness::LivenessRegistry;
use crate::product::Product;
use confirm_publisher::{ConfirmPublisher, Outgoing};
use connector::{Connector, goodbye};
use publisher_session::{Blocked, PublisherSession, confirming};
use screen::Bodies;
use service_connection::backoff::RetryLoop;
use service_connection::error_chain::{chain, panic_text};
use subscription::Subscriber;

mod ack_batcher;
mod address;
mod confirm_publisher;
mod connector;
mod convert;
mod diagnose;
mod prefetch;
mod publisher_session;
mod queue_consumer;
mod screen;
mod stream;
mod subscription;

pub use super::Reconnect;
pub use address::{SCHEMES, check as check_urls};
pub use diagnose::{Comparison, ConnectFailure, ConnectStage, Greeting, Permissions, Probe};

/// Pause before the first new attempt to connect, and the longest one: the time that a connection stays idle after
/// the broker is back. Celery's grows to 30 s; RabbitMQ's own clients for Java and .NET wait for 5 s always.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Configuration of the connection to a broker.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AmqpOptions {
    /// `amqp://` or `amqps://` URL, with password, or several separated by `;`: after a failure another one is used.
    pub url: SecretString,
    /// Order in which the brokers of a list are tried.
    pub failover: FailoverStrategy,
    /// Name of the connection in the broker's management.
    pub name: String,
    /// The program, for the broker's management.
    pub product: Product,
    /// Heartbeat in seconds; 0 for none.
    pub heartbeat: u16,
    /// Time limit of one attempt to connect.
    pub connection_timeout: Duration,
    /// Certificates for `amqps://`.
    pub tls: AmqpTls,
    /// True if queues and exchanges must exist and are not declared, except for those that belong to this process.
    pub no_declare: bool,
    /// Conditions under which a consumer stops reconnecting.
    pub reconnect: Reconnect,
}

impl AmqpOptions {
    /// Celery's defaults for a broker.
    pub fn new(url: impl Into<SecretString>, name: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            failover: FailoverStrategy::default(),
            name: name.into(),
            product: Product::default(),
            heartbeat: 120,
            connection_timeout: Duration::from_secs(4),
            tls: AmqpTls::default(),
            no_declare: false,
            reconnect: Reconnect::default(),
        }
    }
}

/// PEM files for TLS; empty paths for none.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct AmqpTls {
    /// Certificate authorities that are trusted in addition to the system's.
    pub ca_file: String,
    /// Client certificate.
    pub cert_file: String,
    /// Key of the client certificate.
    pub key_file: String,
}

/// A [`Broker`] to one RabbitMQ virtual host.
pub struct Amqp {
    connector: Arc<Connector>,
    reconnect: Reconnect,
    publisher: Mutex<Option<PublisherSession>>,
    blocked: Blocked,
    sessions: TaskTracker,
    closing: CancellationToken,
    liveness: LivenessRegistry,
}

impl Amqp {
    /// Creates a broker handle, which connects at its first use.
    ///
    /// # Errors
    /// [`BrokerError::Url`] and [`BrokerError::Tls`].
    pub fn new(options: &AmqpOptions) -> Result<Self, BrokerError> {
        Ok(Self {
            connector: Arc::new(Connector::new(options)?),
            reconnect: options.reconnect,
            publisher: Mutex::new(None),
            blocked: Blocked::default(),
            sessions: TaskTracker::new(),
            closing: CancellationToken::new(),
            liveness: LivenessRegistry::default(),
        })
    }

    /// Registers the loop of every later subscription there.
    #[must_use]
    pub fn with_liveness(self, liveness: LivenessRegistry) -> Self {
        Self { liveness, ..self }
    }

    /// Maximum time between two ticks of a subscription's loop: it may wait for a connection, for its next attempt, or
    /// until missing heartbeats show that the broker is gone.
    fn liveness_limit(&self) -> Duration {
        self.connector.connecting_timeout() + RECONNECT.1 + self.connector.heartbeat() * 3
    }

    /// Publishes once, on the open session or a new one.
    async fn publish_once(&self, publication: &Publication) -> Result<(), BrokerError> {
        let outgoing = Outgoing {
            exchange: short(&publication.exchange)?,
            routing_key: short(&publication.routing_key)?,
            mandatory: publication.mandatory,
            properties: convert::properties(&publication.message)?,
            body: publication.message.body.clone(),
        };
        let what = || format!("a message for `{}`", publication.routing_key);
        let refused = |error: lapin::Error| {
            // The channel is shared, and one message to a missing exchange closes it for all callers.
            match connector::missing_exchange(&error) {
                Some(missing) if missing != publication.exchange => self
                    .connector
                    .lost("the channel was closed because of another message"),
                _ => self.connector.error(error, &what()),
            }
        };
        let answer = self.post(publication, outgoing).await?;
        let confirmation = answer.await.map_err(refused)?;
        match confirmation {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)) => {
                Err(BrokerError::Unroutable {
                    exchange: publication.exchange.clone(),
                    routing_key: publication.routing_key.clone(),
                })
            }
            Confirmation::Nack(None) | Confirmation::NotRequested => Err(BrokerError::Refused {
                broker: self.connector.masked(),
                what: what(),
                source: Arc::from(Box::from("negative acknowledgement")),
            }),
        }
    }

    /// The connected session for publishing.
    async fn connected<'s>(
        &self,
        session: &'s mut Option<PublisherSession>,
    ) -> Result<&'s mut PublisherSession, BrokerError> {
        if session
            .as_ref()
            .is_some_and(|open| !open.connection.status().connected())
        {
            *session = None;
        }
        match session {
            Some(open) => Ok(open),
            none => Ok(none.insert(PublisherSession::open(&self.connector, &self.blocked).await?)),
        }
    }

    /// Removes a record of a declaration, so that it is declared again before the next publication that needs it.
    async fn forget(&self, declaration: &Declaration) {
        let (kind, name) = declaration.key();
        if let Some(open) = self.publisher.lock().await.as_mut() {
            open.declared.remove(&(kind, name.to_owned()));
        }
    }

    /// A new channel for requests that may close it.
    async fn query_channel(&self) -> Result<Channel, BrokerError> {
        let mut session = self.publisher.lock().await;
        let open = self.connected(&mut session).await?;
        // The broker would not answer on a blocked connection.
        if open.is_blocked() {
            return Err(self.is_blocked());
        }
        let error = |e| self.connector.error(e, "a channel to look at queues");
        open.connection.create_channel().await.map_err(error)
    }

    async fn prepare_once(&self) -> Result<(), BrokerError> {
        let mut session = self.publisher.lock().await;
        self.connected(&mut session).await.map(drop)
    }

    /// Repeats an operation that needs a connection until `deadline`. The deadline does not end an attempt that
    /// runs.
    async fn retry_until_reachable<F>(
        &self,
        deadline: Instant,
        attempt: impl FnMut() -> F,
    ) -> Result<(), BrokerError>
    where
        F: Future<Output = Result<(), BrokerError>>,
    {
        let should_retry = |error: &BrokerError| matches!(error, BrokerError::Unreachable { .. });
        RetryLoop::new(RECONNECT)
            .until(deadline.into_std())
            .run(attempt, should_retry, |error, _| {
                tracing::debug!(error = %chain(error), "message not published; retrying");
            })
            .await
    }

    /// Ends an operation that takes longer than `within`.
    async fn bounded(
        &self,
        within: Duration,
        work: impl Future<Output = Result<(), BrokerError>>,
    ) -> Result<(), BrokerError> {
        match timeout(within, work).await {
            Ok(done) => done,
            Err(_) if self.blocked.reason().is_some() => Err(self.is_blocked()),
            Err(_) => Err(BrokerError::Timeout {
                broker: self.connector.masked(),
                waited: within,
            }),
        }
    }

    fn is_blocked(&self) -> BrokerError {
        BrokerError::Blocked {
            broker: self.connector.masked(),
            reason: self.blocked.reason().unwrap_or_default(),
        }
    }

    /// Declares missing objects, queues the message on the publisher of its channel and returns the future of its
    /// confirm. Only these steps run under the lock, so that many callers can wait for confirms at once.
    async fn post(
        &self,
        publication: &Publication,
        outgoing: Outgoing,
    ) -> Result<impl Future<Output = lapin::Result<Confirmation>> + use<>, BrokerError> {
        let mut session = loop {
            let changes = self.blocked.changes();
            let mut session = self.publisher.lock().await;
            if !self.connected(&mut session).await?.is_blocked() {
                break session;
            }
            drop(session);
            changes.next().await;
        };
        let open = self.connected(&mut session).await?;
        if let Some(declaration) = &publication.declare {
            let (kind, name) = declaration.key();
            let key = (kind, name.to_owned());
            if !open.declared.contains(&key) {
                self.connector
                    .declare(&open.connection, declaration)
                    .await?;
                open.declared.insert(key);
            }
        }
        // An exchange that comes from elsewhere may not exist, which closes the channel; such messages have a channel
        // of their own, so that other messages are not affected.
        let known = publication.exchange.is_empty()
            || publication
                .declare
                .as_ref()
                .is_some_and(|declaration| declaration.brings(&publication.exchange));
        let publisher = match known {
            true => &mut open.publisher,
            false => &mut open.foreign,
        };
        let publisher = match publisher {
            Some(publisher) if publisher.is_open() => publisher,
            gone => {
                let channel = confirming(&self.connector, &open.connection).await?;
                gone.insert(ConfirmPublisher::new(channel))
            }
        };
        Ok(publisher.publish(outgoing))
    }
}

#[async_trait]
impl Broker for Amqp {
    fn transport(&self) -> &'static str {
        "amqp"
    }

    fn masked_url(&self) -> String {
        self.connector.masked()
    }

    fn masked_urls(&self) -> Vec<String> {
        self.connector
            .brokers
            .starting_with_current()
            .map(|a| a.masked.clone())
            .collect()
    }

    async fn publish(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        self.bounded(within, self.publish_until_confirmed(publication, within))
            .await
    }

    async fn publish_until_confirmed(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        let deadline = Instant::now() + within;
        let publish = || self.retry_until_reachable(deadline, || self.publish_once(publication));
        match (publish().await, &publication.declare) {
            // The queue or its exchange was deleted after this connection had declared it.
            (Err(error), Some(declaration)) if connector::leads_nowhere(&error, publication) => {
                self.forget(declaration).await;
                publish().await
            }
            (published, _) => published,
        }
    }

    async fn prepare(&self, within: Duration) -> Result<(), BrokerError> {
        let preparing = self.retry_until_reachable(Instant::now() + within, || self.prepare_once());
        self.bounded(within, preparing).await
    }

    fn blocked(&self) -> Option<Arc<str>> {
        self.blocked.reason()
    }

    async fn survey(&self, queues: &[String]) -> Result<Vec<QueueDepth>, BrokerError> {
        let mut channel = self.query_channel().await?;
        let mut depths = Vec::with_capacity(queues.len());
        for queue in queues {
            match connector::depth(&channel, queue).await {
                Ok(depth) => depths.push(depth),
                // The broker has closed the channel with its refusal.
                Err(error) if connector::is_not_found(&error) => {
                    channel = self.query_channel().await?
                }
                Err(error) => {
                    let what = format!("to look at queue `{queue}`");
                    return Err(self.connector.error(error, &what));
                }
            }
        }
        // The channel is not used again; an error of its closing has no consequence.
        let _ = channel.close(200, "seen".into()).await;
        Ok(depths)
    }

    fn consume(&self, subscription: Subscription) -> Consumer {
        let (feed, consumer) = Feed::new(&subscription, self.closing.child_token());
        let subscriber = Subscriber {
            connector: self.connector.clone(),
            reconnect: self.reconnect,
            purpose: subscription.purpose,
            delayed: subscription.delayed,
            bodies: Bodies {
                max: subscription
                    .max_body_bytes
                    .map_or(u64::MAX, |max| max as u64),
                max_waiting: subscription
                    .max_waiting_body_bytes
                    .map_or(u64::MAX, |max| max as u64),
            },
            closing: self.closing.clone(),
        };
        let name = format!("connection for {}", subscription.purpose);
        let loop_liveness = self.liveness.start(name, self.liveness_limit());
        let reports = feed.reports.clone();
        self.sessions.spawn(async move {
            let running = AssertUnwindSafe(subscriber.run(feed, &loop_liveness));
            match running.catch_unwind().await {
                Ok(()) => loop_liveness.retire(),
                // The loop of the subscription does not tick from now on.
                Err(panic) => report_panic(&reports, subscription.purpose, panic_text(&*panic)),
            }
        });
        consumer
    }

    async fn close(&self) {
        self.closing.cancel();
        self.sessions.close();
        self.sessions.wait().await;
        if let Some(session) = self.publisher.lock().await.take() {
            goodbye(&session.connection).await;
        }
    }
}

/// Reports that a subscription has ended, with the reason.
fn report_panic(reports: &Reports, purpose: &'static str, panic: &str) {
    tracing::error!(
        purpose,
        panic,
        "subscription panicked, which is a bug; it receives no more messages"
    );
    reports.fail(BrokerError::Panicked {
        purpose,
        panic: panic.to_owned(),
    });
    reports.update(|served| *served = Served::default());
}

fn short(name: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(name).map_err(|_| BrokerError::Name(name.chars().take(40).collect()))
}
