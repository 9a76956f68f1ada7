//! AMQP 0-9-1 (RabbitMQ) on lapin.
//!
//! Consuming and publishing have a connection each: a broker that is short of memory stops
//! reading from connections that publish, and must not thereby hold up acknowledgements.
//!
//! lapin's own recovery is not used. A consumer's session (connection, channel, consumers) is
//! built as a whole and torn down as a whole whenever any part of it ends, whatever the reason:
//! closed connection or channel, missed heartbeat, a queue that was deleted. An ended consumer
//! stream is thus never mistaken for an idle queue.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt};
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions,
    BasicPublishOptions, BasicQosOptions, BasicRejectOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{Channel, Confirmation, Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{
    Binding, BrokerError, Consumer, Declaration, Delivery, Exchange, Publication, Queue,
    Settlement, Subscription, Transport, Verdict,
};
use crate::pauses::Pauses;
use crate::telemetry::chain;

mod convert;

/// Pause before the first new attempt to connect, and the longest one.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// Frame size where messages are small, in bytes. lapin's buffers are 64 frames for each connection, and
/// RabbitMQ's own frames 128 KiB. Bodies are cut to frames; only headers must fit into one.
const SMALL_FRAME: u32 = 16 << 10;

/// How long a polite goodbye may take.
const CLOSING: Duration = Duration::from_secs(5);

/// What is known about a broker before connecting.
#[derive(Debug, Clone)]
pub struct Options {
    /// `amqp://` or `amqps://` URL, with password.
    pub url: String,
    /// Heartbeat in seconds; 0 for none.
    pub heartbeat: u16,
    /// Time for one attempt to connect.
    pub connection_timeout: Duration,
    /// How the connection is called in the broker's management.
    pub name: String,
}

/// A [`Transport`] to one RabbitMQ virtual host.
pub struct Amqp {
    link: Arc<Link>,
    publisher: Mutex<Option<PublisherSession>>,
    sessions: TaskTracker,
    closing: CancellationToken,
}

/// Where to connect and how.
struct Link {
    uri: AMQPUri,
    masked: String,
    name: String,
    connection_timeout: Duration,
}

impl Amqp {
    /// A transport; connects when it is first used.
    ///
    /// # Errors
    /// [`BrokerError::Url`].
    pub fn new(options: &Options) -> Result<Self, BrokerError> {
        let mut uri: AMQPUri = options.url.parse().map_err(BrokerError::Url)?;
        // kombu takes `amqp://host/` for the default virtual host, AMQP for the one named "".
        if uri.vhost.is_empty() {
            uri.vhost = "/".into();
        }
        uri.query.heartbeat.get_or_insert(options.heartbeat);
        let masked = mask(&uri);
        Ok(Self {
            link: Arc::new(Link {
                uri,
                masked,
                name: options.name.clone(),
                connection_timeout: options.connection_timeout,
            }),
            publisher: Mutex::new(None),
            sessions: TaskTracker::new(),
            closing: CancellationToken::new(),
        })
    }

    /// Publishes once, on the open session or a new one.
    async fn publish_once(&self, publication: &Publication) -> Result<(), BrokerError> {
        let exchange = short(&publication.exchange)?;
        let routing_key = short(&publication.routing_key)?;
        let channel = self
            .publishing_channel(publication.declare.as_ref())
            .await?;
        let options = BasicPublishOptions {
            mandatory: publication.mandatory,
            ..Default::default()
        };
        let what = || format!("a message for `{}`", publication.routing_key);
        let confirmation = channel
            .basic_publish(
                exchange,
                routing_key,
                options,
                &publication.message.body,
                convert::properties(&publication.message)?,
            )
            .await
            .map_err(|e| self.link.error(e, &what()))?
            .await
            .map_err(|e| self.link.error(e, &what()))?;
        match confirmation {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)) => {
                Err(BrokerError::Unroutable {
                    exchange: publication.exchange.clone(),
                    routing_key: publication.routing_key.clone(),
                })
            }
            Confirmation::Nack(None) | Confirmation::NotRequested => Err(BrokerError::Refused {
                broker: self.link.masked.clone(),
                what: what(),
                source: "negative acknowledgement".into(),
            }),
        }
    }

    /// The channel to publish on, with everything declared. Only this is done under the lock:
    /// confirms are awaited by many publishers at once.
    async fn publishing_channel(
        &self,
        declaration: Option<&Declaration>,
    ) -> Result<Channel, BrokerError> {
        let mut session = self.publisher.lock().await;
        if session
            .as_ref()
            .is_some_and(|open| !open.channel.status().connected())
        {
            *session = None;
        }
        let open = match &mut *session {
            Some(open) => open,
            none => none.insert(PublisherSession::open(&self.link).await?),
        };
        if let Some(declaration) = declaration
            && !open.declared.contains(declaration.name())
        {
            self.link.declare(&open.connection, declaration).await?;
            open.declared.insert(declaration.name().to_owned());
        }
        Ok(open.channel.clone())
    }
}

#[async_trait]
impl Transport for Amqp {
    fn masked_url(&self) -> String {
        self.link.masked.clone()
    }

    async fn publish(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        let deadline = Instant::now() + within;
        let mut pauses = pauses();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match timeout(left, self.publish_once(publication)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_) => {
                    let broker = self.link.masked.clone();
                    return Err(BrokerError::Timeout {
                        broker,
                        waited: within,
                    });
                }
            };
            let pause = pauses.next_pause();
            let hopeless = !matches!(error, BrokerError::Unreachable { .. });
            if hopeless || Instant::now() + pause >= deadline {
                return Err(error);
            }
            tracing::debug!(error = %chain(&error), "publishing is tried again");
            sleep(pause).await;
        }
    }

    fn consume(&self, subscription: Subscription) -> Consumer {
        // One place is enough: the broker's prefetch is the buffer.
        let (sender, deliveries) = mpsc::channel(1);
        let (connected, connection) = watch::channel(false);
        let cancelled = self.closing.child_token();
        let supervisor = Supervisor {
            link: self.link.clone(),
            subscription,
            sender,
            connected,
            cancelled: cancelled.clone(),
            closing: self.closing.clone(),
        };
        self.sessions.spawn(supervisor.run());
        Consumer::new(deliveries, cancelled, connection)
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

/// The connection that messages go out on.
struct PublisherSession {
    connection: Connection,
    channel: Channel,
    declared: HashSet<String>,
}

impl PublisherSession {
    async fn open(link: &Link) -> Result<Self, BrokerError> {
        let connection = link.connect("publisher", true).await?;
        let error = |e| link.error(e, "a channel for publishing");
        let channel = connection.create_channel().await.map_err(error)?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await
            .map_err(error)?;
        Ok(Self {
            connection,
            channel,
            declared: HashSet::new(),
        })
    }
}

/// Keeps a subscription served for as long as it is wanted.
struct Supervisor {
    link: Arc<Link>,
    subscription: Subscription,
    sender: mpsc::Sender<Delivery>,
    connected: watch::Sender<bool>,
    cancelled: CancellationToken,
    closing: CancellationToken,
}

impl Supervisor {
    async fn run(self) {
        let mut pauses = pauses();
        while !self.cancelled.is_cancelled() {
            let opened = tokio::select! {
                () = self.cancelled.cancelled() => return,
                opened = ConsumerSession::open(&self.link, &self.subscription) => opened,
            };
            let error = match opened {
                Ok(mut session) => {
                    self.connected.send_replace(true);
                    let ended = self.pump(&mut session).await;
                    self.connected.send_replace(false);
                    match ended {
                        None => return self.finish(session).await,
                        Some(error) => {
                            pauses = self::pauses();
                            goodbye(&session.connection).await;
                            error
                        }
                    }
                }
                Err(error) => error,
            };
            let pause = pauses.next_pause();
            tracing::warn!(
                broker = self.link.masked,
                purpose = self.subscription.purpose,
                error = %chain(&error),
                retry_in = %humantime::format_duration(pause),
                "no connection to the broker; it is tried again, and running tasks go on"
            );
            tokio::select! {
                () = self.cancelled.cancelled() => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// Hands deliveries on until the subscription is cancelled (`None`) or the session broke.
    async fn pump(&self, session: &mut ConsumerSession) -> Option<BrokerError> {
        loop {
            tokio::select! {
                biased;
                () = self.cancelled.cancelled() => return None,
                item = session.deliveries.next() => match item {
                    Some(Ok(delivery)) => self.hand_on(delivery).await,
                    Some(Err(error)) => return Some(error),
                    None => return Some(self.link.lost("every consumer ended")),
                },
            }
        }
    }

    async fn hand_on(&self, delivery: lapin::message::Delivery) {
        let (message, acker) = convert::delivery(delivery);
        let settlement = Box::new(Acker {
            acker,
            link: self.link.clone(),
        });
        let delivery = Delivery::new(
            message.raw,
            message.exchange,
            message.routing_key,
            message.redelivered,
            settlement,
        );
        // A receiver that is gone drops the delivery, which gives it back.
        let _ = self.sender.send(delivery).await;
    }

    /// Ends a healthy session: no new deliveries, what had already been sent is handed on, and
    /// the channel stays open for acknowledgements until the transport is closed.
    async fn finish(self, session: ConsumerSession) {
        let Self {
            link,
            sender,
            closing,
            ..
        } = self;
        for tag in &session.tags {
            let cancelled = session
                .channel
                .basic_cancel(tag.clone(), BasicCancelOptions::default())
                .await;
            if let Err(error) = cancelled {
                tracing::debug!(error = %link.error(error, "basic.cancel"), "no polite end");
            }
        }
        // Deliveries that were on their way are dropped with the consumers, unacknowledged;
        // the broker takes them back when the channel closes.
        drop(session.deliveries);
        drop(sender);
        closing.cancelled().await;
        if let Err(error) = timeout(CLOSING, session.channel.close(200, "bye".into())).await {
            tracing::debug!(%error, "channel did not close in time");
        }
        goodbye(&session.connection).await;
    }
}

type Deliveries =
    stream::SelectAll<stream::BoxStream<'static, Result<lapin::message::Delivery, BrokerError>>>;

/// A connection with one channel and a consumer for each queue.
struct ConsumerSession {
    connection: Connection,
    channel: Channel,
    tags: Vec<ShortString>,
    deliveries: Deliveries,
}

impl ConsumerSession {
    async fn open(link: &Arc<Link>, subscription: &Subscription) -> Result<Self, BrokerError> {
        let connection = link.connect("consumer", subscription.small).await?;
        for queue in &subscription.queues {
            let declaration = Declaration::Queue(queue.clone());
            link.declare(&connection, &declaration).await?;
        }
        let error = |e| link.error(e, "a channel for consuming");
        let channel = connection.create_channel().await.map_err(error)?;
        // Not global: a limit for each consumer is the only kind that quorum queues and
        // RabbitMQ 4 allow.
        let global = BasicQosOptions { global: false };
        channel
            .basic_qos(subscription.prefetch, global)
            .await
            .map_err(error)?;

        let mut tags = Vec::new();
        let mut deliveries = stream::SelectAll::new();
        for queue in &subscription.queues {
            let consumer = channel
                .basic_consume(
                    short(&queue.name)?,
                    ShortString::default(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await
                .map_err(|e| link.error(e, &format!("to consume from `{}`", queue.name)))?;
            tags.push(consumer.tag());
            let what = format!(
                "consumer of queue `{}` ended; was the queue deleted?",
                queue.name
            );
            let of = link.clone();
            let items = consumer.map(move |item| item.map_err(|e| of.error(e, "to deliver")));
            let of = link.clone();
            let end = stream::once(async move { Err(of.lost(&what)) });
            deliveries.push(items.chain(end).boxed());
        }
        Ok(Self {
            connection,
            channel,
            tags,
            deliveries,
        })
    }
}

/// Settles one delivery on the channel it came by.
struct Acker {
    acker: lapin::Acker,
    link: Arc<Link>,
}

#[async_trait]
impl Settlement for Acker {
    async fn settle(self: Box<Self>, verdict: Verdict) -> Result<(), BrokerError> {
        let settled = match verdict {
            Verdict::Ack => self.acker.ack(BasicAckOptions::default()).await,
            Verdict::Reject => {
                self.acker
                    .reject(BasicRejectOptions { requeue: false })
                    .await
            }
            // Not basic.reject: quorum queues count that against the message.
            Verdict::Requeue => {
                self.acker
                    .nack(BasicNackOptions {
                        multiple: false,
                        requeue: true,
                    })
                    .await
            }
        };
        match settled {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.link.lost("the channel of the delivery is closed")),
            Err(error) => Err(self.link.error(error, "to settle a delivery")),
        }
    }

    fn is_void(&self) -> bool {
        !self.acker.usable()
    }
}

impl Link {
    async fn connect(&self, role: &str, small: bool) -> Result<Connection, BrokerError> {
        let mut uri = self.uri.clone();
        if small {
            uri.query.frame_max.get_or_insert(SMALL_FRAME);
        }
        let properties = ConnectionProperties::default()
            .with_connection_name(format!("{} {role}", self.name).into())
            .with_client_property("product".into(), "ccat-transfer".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        match timeout(
            self.connection_timeout,
            Connection::connect_uri(uri, properties),
        )
        .await
        {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => {
                Err(self.error(error, "the connection (user, password, virtual host?)"))
            }
            Err(_) => Err(self.lost("no answer in time; see celery.broker_connection_timeout")),
        }
    }

    /// Declares something as Celery does. What exists with other arguments is used as it is: a
    /// throw-away channel takes the broker's refusal.
    async fn declare(
        &self,
        connection: &Connection,
        declaration: &Declaration,
    ) -> Result<(), BrokerError> {
        let what = format!("to declare `{}`", declaration.name());
        let error = |e| self.error(e, &what);
        short(declaration.name())?;
        let channel = connection.create_channel().await.map_err(error)?;
        let declared = match declaration {
            Declaration::Queue(queue) => declare_queue(&channel, queue).await,
            Declaration::Exchange(exchange) => declare_exchange(&channel, exchange).await,
        };
        match declared {
            Ok(()) => {
                // The channel goes either way; its closing tells nothing new.
                let _ = channel.close(200, "declared".into()).await;
                Ok(())
            }
            Err(error) if is_precondition_failed(&error) => {
                tracing::warn!(
                    name = declaration.name(),
                    difference = %error,
                    "the queue or its exchange exists with other arguments; it is used as it is"
                );
                Ok(())
            }
            Err(e) => Err(error(e)),
        }
    }

    fn error(&self, error: lapin::Error, what: &str) -> BrokerError {
        let broker = self.masked.clone();
        if error.is_amqp_error() && !is_shutdown(&error) {
            BrokerError::Refused {
                broker,
                what: what.into(),
                source: Box::new(error),
            }
        } else {
            BrokerError::Unreachable {
                broker,
                source: Box::new(error),
            }
        }
    }

    fn lost(&self, why: &str) -> BrokerError {
        BrokerError::Unreachable {
            broker: self.masked.clone(),
            source: why.into(),
        }
    }
}

/// Exchange, queue, binding, in the order in which Celery makes them. Names were checked.
async fn declare_queue(channel: &Channel, queue: &Queue) -> lapin::Result<()> {
    if let Some(binding) = &queue.binding {
        declare_exchange(channel, &binding.exchange).await?;
    }
    let name = queue.name.as_str();
    let options = QueueDeclareOptions {
        durable: queue.durable,
        exclusive: queue.exclusive,
        auto_delete: queue.auto_delete,
        ..Default::default()
    };
    let arguments = convert::table(&queue.arguments);
    channel
        .queue_declare(name.into(), options, arguments)
        .await?;
    if let Some(Binding { exchange, key }) = &queue.binding {
        let exchange = exchange.name.as_str().into();
        let (options, none) = (QueueBindOptions::default(), FieldTable::default());
        channel
            .queue_bind(name.into(), exchange, key.as_str().into(), options, none)
            .await?;
    }
    Ok(())
}

async fn declare_exchange(channel: &Channel, exchange: &Exchange) -> lapin::Result<()> {
    let kind = match exchange.kind {
        super::ExchangeKind::Direct => ExchangeKind::Direct,
        super::ExchangeKind::Fanout => ExchangeKind::Fanout,
        super::ExchangeKind::Topic => ExchangeKind::Topic,
    };
    let options = ExchangeDeclareOptions {
        durable: exchange.durable,
        ..Default::default()
    };
    let none = FieldTable::default();
    channel
        .exchange_declare(exchange.name.as_str().into(), kind, options, none)
        .await
}

fn is_precondition_failed(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(e)
        if *e.kind() == AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED))
}

/// Whether the broker closed the connection because it goes down, which is no refusal.
fn is_shutdown(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(e)
        if *e.kind() == AMQPErrorKind::Hard(lapin::protocol::AMQPHardError::CONNECTIONFORCED))
}

async fn goodbye(connection: &Connection) {
    if connection.status().connected() {
        // Whether it hears us makes no difference.
        let _ = timeout(CLOSING, connection.close(200, "bye".into())).await;
    }
}

fn pauses() -> Pauses {
    Pauses::new(RECONNECT.0, RECONNECT.1)
}

fn short(name: &str) -> Result<ShortString, BrokerError> {
    ShortString::try_new(name).map_err(|_| BrokerError::Name(name.chars().take(40).collect()))
}

/// The URL as kombu shows it: the password as `**`.
fn mask(uri: &AMQPUri) -> String {
    let mut masked = uri.clone();
    masked.authority.userinfo.password = "**".into();
    let lapin::uri::AMQPAuthority {
        userinfo,
        host,
        port,
    } = masked.authority;
    format!(
        "{}://{}:**@{host}:{port}/{}",
        masked.scheme, userinfo.username, masked.vhost
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amqp(url: &str) -> Result<Amqp, BrokerError> {
        Amqp::new(&Options {
            url: url.into(),
            heartbeat: 60,
            connection_timeout: Duration::from_secs(1),
            name: "test".into(),
        })
    }

    #[test]
    fn urls_are_read_as_kombu_reads_them() {
        for (url, vhost, masked) in [
            ("amqp://u:secret@h:1//", "/", "amqp://u:**@h:1//"),
            ("amqp://u:secret@h/", "/", "amqp://u:**@h:5672//"),
            ("amqp://u:secret@h", "/", "amqp://u:**@h:5672//"),
            (
                "amqps://u:secret@h/ccat",
                "ccat",
                "amqps://u:**@h:5671/ccat",
            ),
        ] {
            let amqp = amqp(url).ok();
            let link = amqp
                .as_ref()
                .map(|a| (a.link.uri.vhost.as_str(), a.link.masked.as_str()));
            assert_eq!(link, Some((vhost, masked)), "{url}");
        }
    }

    #[test]
    fn other_urls_are_refused() {
        assert!(matches!(amqp("redis://h"), Err(BrokerError::Url(_))));
        assert!(matches!(amqp("no url"), Err(BrokerError::Url(_))));
    }
}
